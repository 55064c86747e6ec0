"""What tools/inspect_artifact.py says of a file: figures that add up, and one line where there are none."""

import hashlib
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT
from tooling import call

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import inspect_artifact  # noqa: E402


@pytest.fixture
def artifact(tiny, tmp_path):
    """A file of both kinds of tensors, with values that differ in spread; its path and its tensors."""
    torch.manual_seed(0)
    cfg, stored = tiny(), {}
    for name, p in t.GPT(cfg).named_parameters():
        w = p.detach() + 3 * torch.randn_like(p)
        if t.is_quantised(name, w.shape, cfg.quant_min_numel):
            (stored[name],) = t.rowmax(w[None], 6, False)
        else:
            stored[name] = t.Stored("fp16", 16, w.half().numpy())
    path = tmp_path / "a.ptz"
    path.write_bytes(t.pack(cfg, stored))
    return path, stored


def test_the_parts_of_a_file_add_up_to_it(artifact):
    path, stored = artifact
    found, size = inspect_artifact.contents(str(path)), path.stat().st_size
    assert set(found.bytes) == set(stored)
    assert sum(found.bytes.values()) + found.tables + found.header == pytest.approx(size, abs=1e-6)
    assert found.header == 44 + int.from_bytes(path.read_bytes()[8:12], "little")
    order0 = sum(inspect_artifact.entropy(s.values) * s.values.size / 8 for s in stored.values() if s.coded)
    assert 0.8 * order0 < found.payload < 1.2 * order0, "tables by spread gain what lanes and rounding cost"
    large = {name: found.bytes[name] / s.values.size for name, s in stored.items() if s.values.size > 5000}
    assert all(0.4 < each < 1 for each in large.values()), "a value of 6 bits takes less than a byte"


def test_entropy_by_hand():
    values = np.array([[1, 1, 1, 1], [2, 2, -3, 0]], np.int8)
    assert inspect_artifact.entropy(values) == pytest.approx(0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3)
    assert math.copysign(1, inspect_artifact.entropy(np.zeros((2, 2), np.int8))) == 1, "no -0"
    assert inspect_artifact.entropy(np.arange(-128, 128).astype(np.int8)) == 8


def test_every_tensor_has_a_row(artifact, capsys):
    path, stored = artifact
    code = inspect_artifact.main([str(path)])
    out = capsys.readouterr().out
    lines, size = out.splitlines(), path.stat().st_size
    rows = {line.split()[0]: line.split() for line in lines if line.endswith("%")}
    assert code == 0 and set(rows) == set(stored) and "MODEL_DIM=32" in lines[0]
    order0 = inspect_artifact.entropy(stored["tok_emb.weight"].values)
    assert rows["tok_emb.weight"][1:4] == ["400x32", "rows", "6.00"] and rows["tok_emb.weight"][5] == f"{order0:.3f}"
    assert rows["smear"][1:4] == ["32", "fp16", "16.00"] and len(rows["smear"]) == 6, "no coded bits, no entropy"
    coded = {name: float(row[4]) for name, row in rows.items() if len(row) == 8}
    bits = sum(coded[name] * stored[name].values.size for name in coded)
    values = sum(stored[name].values.size for name in coded)
    payload = int(re.search(r"^values: ([\d,]+) bytes, ", out, re.M)[1].replace(",", ""))
    assert bits / 8 == pytest.approx(payload, rel=0.01) and all(1 < each < 6 for each in coded.values())
    assert f", {8 * payload / values:.3f} coded bits each; " in out
    assert t.coded_bits(path.read_bytes()) == pytest.approx(8 * payload / values)
    said = [int(re.search(rf"{word} ([\d,]+)", out)[1].replace(",", "")) for word in ("tables", "checksum")]
    shown = sum(int(row[-2].replace(",", "")) for row in rows.values()) + sum(said)
    assert shown == pytest.approx(size, abs=len(rows)), "each is rounded"
    whole = size + len(t.pack_script(SCRIPT.read_bytes()))
    assert lines[-1].endswith(f"= {whole:,} bytes, {16_000_000 - whole:,} left of 16,000,000")


def test_a_run_has_its_own_limit_and_code(artifact, capsys):
    """Of summary.json beside the file, where that is of this file and whole."""
    path, _ = artifact
    size, own = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    for told, end in (({"sha256": own, "limit": 90_000, "bytes_code": 1000}, f"{89_000 - size:,} left of 90,000"),
                      ({"sha256": "0", "limit": 90_000, "bytes_code": 1000}, "left of 16,000,000"),
                      ({"sha256": own, "limit": "x"}, "left of 16,000,000"), (None, "left of 16,000,000")):
        path.with_name("summary.json").write_text(json.dumps({"artifact": told}))
        assert inspect_artifact.main([str(path)]) == 0
        assert capsys.readouterr().out.rstrip().endswith(end), told


def test_a_run_is_named_by_its_folder_or_its_name(artifact, tmp_path):
    path, _ = artifact
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / t.ARTIFACT_NAME).write_bytes(path.read_bytes())
    said = [call(inspect_artifact.main, [word], {}, tmp_path).out for word in (path, "logs/run", "run")]
    assert said[0] == said[1] == said[2] != ""
    call(inspect_artifact.main, ["other"], {}, tmp_path).refused("other")


def test_several_files(artifact, tiny, capsys):
    path, stored = artifact
    fine = {name: t.Stored("fp16", 16, s.tensor().half().numpy()) for name, s in stored.items()}
    other = path.with_name("b.ptz")
    other.write_bytes(t.pack(tiny(), fine))
    found = inspect_artifact.contents(str(other))
    assert sum(found.bytes.values()) + found.header == pytest.approx(other.stat().st_size) and found.payload == 0
    assert inspect_artifact.main([str(path), str(other)]) == 0
    assert capsys.readouterr().out.count("order-0 entropies") == 2


def test_what_is_no_artifact_is_one_line(artifact, tmp_path, monkeypatch):
    path, _ = artifact
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("not\none\n" * 20)
    with open("huge", "wb") as file:
        file.truncate(1 << 40)
    for bad in ("none.ptz", "pipe", "huge", ".", "/dev/zero", "cut", "text"):
        call(inspect_artifact.main, [bad], {}, tmp_path).refused(bad)
