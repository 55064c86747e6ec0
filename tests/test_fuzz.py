"""Hostile shards, variables and tokenizers: each is read or refused in one line. FUZZ=20000 tries more."""

import json
import math
import os
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import TINY

import train_gpt as t

CASES = int(os.environ.get("FUZZ", 700))
INTS = (0, 1, -1, 2, 255, 399, 400, 65535, 2**31 - 1, -(2**31), 20240520, 2**30, 30649, 30648, 30650)


def refused_or(action, *args) -> bool:
    """Whether `action` succeeds; False for a UserError of one line; anything else fails the test."""
    try:
        t.Process("fp32").together(lambda: action(*args))
        return True
    except t.UserError as error:
        assert 10 < len(str(error)) and len(t.one_line(error).splitlines()) == 1
        return False


def mutated_shard(rng: random.Random, data: bytes) -> bytes:
    """A shard with its header or its body spoilt, a few ways at a time, or a whole one."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        if kind == 0 and len(data) >= 1024:
            struct.pack_into("<i", data, 4 * rng.choice((0, 1, 2, 2, 2, rng.randrange(256))), rng.choice(INTS))
        elif kind == 1:
            del data[rng.randrange(len(data) + 1) :]
        elif kind == 2:
            data += rng.randbytes(rng.randrange(1, 3000))
        elif kind == 3 and len(data) > 1026:
            at = 1024 + 2 * rng.randrange((len(data) - 1024) // 2)
            struct.pack_into("<H", data, at, rng.choice((399, 400, 65535, 1, 0)))
        elif kind == 4 and data:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 5:
            data = bytearray(rng.randbytes(rng.randrange(rng.choice((5, 1500, 5000)))))
        elif kind == 6 and len(data) >= 1024:  # short, and true to its header
            tokens = rng.randrange(6)
            data = data[:8] + struct.pack("<i", tokens) + data[12:1024] + data[1024 : 1024 + 2 * tokens]
        elif kind == 7:
            at = rng.randrange(len(data) + 1)
            data[at:at] = data[:1024]
    return bytes(data)


def use_shards(cfg, folder, tokenizer, limit: int, first: int):
    """What a run does with a split."""
    process = t.Process("fp32")
    tokens = t.Tokens(folder, "val", 400)
    stream = t.open_stream(tokens, tokenizer, limit, process.device)
    assert int(stream.tokens.max()) < 400 and stream.targets >= 1 and stream.bytes > 0
    loader = t.Loader(cfg, tokens, process, first)
    assert loader.next().shape == (8, 33)
    loader._pool.shutdown()


def test_hostile_shards(corpus, tiny, tmp_path):
    rng, tokenizer, read, cfg = random.Random(1), t.Tokenizer(corpus / "tokenizer.model", 400), 0, tiny()
    whole = (corpus / "fineweb_val_000000.bin").read_bytes()[: 1024 + 2 * 4000]
    whole = whole[:8] + struct.pack("<i", 4000) + whole[12:]
    names = ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    for _ in range(CASES):
        shards = [mutated_shard(rng, whole) for _ in range(rng.choice((1, 1, 2)))]
        for name, data in zip(names, shards, strict=False):
            (tmp_path / name).write_bytes(data)
        read += refused_or(use_shards, cfg, tmp_path, tokenizer, rng.choice((0, 5, 10**6)), rng.randrange(1000))
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
    assert 0.1 * CASES < read < 0.9 * CASES, f"{read} of {CASES} were read"


HOSTILE = (
    "", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1", "2", "3", "1e15", "1e16", "9" * 400, "0x10", "1_000",
    "\u0661\u0662", "\u00bd", "\u202e12", "\u00e9" * 300, "\udcff\udcfe", "a\nb", "a\0b", "../..", "/dev/null", "/",
    ".", "..", "~", "-", "--help", "{}", "%s%n", "$(true)", "None", "True", "1.5", "0.0", "-0.0", "1e-400",
    "16000000", "32", "33", "4096", "2147483648", "18446744073709551616", "1,2", "\t1", "1 ", "+1", "x" * 5000,
    "auto", "full", "lora", "sgd", "skip")


def hostile_environment(rng: random.Random) -> dict[str, str]:
    names = [f.name.upper() for f in t.VARIABLES] + list(t.NOT_IMPLEMENTED)
    numbers = ("0", "1", "2", "3", "7", "8", "16", "32", "33", "0.5", "-1", "4096", "16000000", "1e14")
    env = {rng.choice(names): rng.choice(HOSTILE if rng.random() < 0.4 else numbers)
           for _ in range(rng.choice((1, 1, 1, 2, 3)))}
    if rng.random() < 0.1:
        name = list(rng.choice(names))
        name[rng.randrange(len(name))] = rng.choice("ÄX_\n =é0")
        env["".join(name)] = rng.choice(HOSTILE)
    return env


def begin(cfg):
    """What a run does before it starts."""
    process = t.Process("fp32")
    past = t.find_past(cfg)
    if cfg.resume:
        cfg = t.continued(cfg, past, 1)
    script = t.Script(b"", b"")
    cfg, inputs = t.open_inputs(cfg, process, past, {}, script)
    t.check_machine(cfg, process, past, script)
    t.check(cfg, process, inputs, 1)


def test_hostile_variables(corpus, tmp_path, monkeypatch):
    rng, accepted, opened = random.Random(2), 0, 0
    monkeypatch.chdir(tmp_path)
    base = TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs")}
    for _ in range(CASES):
        env = base | hostile_environment(rng)
        cfg, problems, warnings = t.load_config(env, rng.choice((1, 1, 2, 3, 8)))
        for line in problems + warnings:
            assert line and len(t.one_line(line).splitlines()) == 1
        if not problems:
            accepted += 1
            json.loads(json.dumps(cfg.settings()))
            if cfg.num_layers <= 8 and accepted % 4 == 0:
                opened += refused_or(begin, cfg)
    assert accepted > 0.12 * CASES and opened > 0.02 * CASES, (accepted, opened)


def use_tokenizer(path):
    assert (t.Tokenizer(path, 400).target_bytes(np.arange(400, dtype=np.uint16)) >= 0).all()


def test_hostile_tokenizers(corpus, tmp_path):
    rng, read, whole, path = random.Random(3), 0, (corpus / "tokenizer.model").read_bytes(), tmp_path / "x.model"
    for _ in range(CASES):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            kind = rng.randrange(5)
            if kind == 0:
                del data[rng.randrange(len(data)) :]
            elif kind == 1:
                for _ in range(rng.randrange(1, 9)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind == 2:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            elif kind == 3:
                at = rng.randrange(len(data))
                del data[at : at + rng.randrange(1, 200)]
            else:
                data[:] = rng.randbytes(rng.randrange(1, 3000))
            data = data or bytearray(b"x")
        path.write_bytes(data)

        read += refused_or(use_tokenizer, path)
    assert read < 0.9 * CASES


ODD = (None, -1, "x", "../..", "..", "", "a\0b", 1e300, [], {}, [{}], ["resume", "nosuch"], "a\nb", True, math.nan,
       -math.inf, 10**30, 0.5, False)


def test_settings_of_a_file_are_held_to_what_the_variables_accept():
    taken = 0
    for field in t.VARIABLES:
        for value in ODD:
            try:
                kept = t.check_value(field, value)
            except (ValueError, TypeError):
                continue
            assert type(kept) in ((int, float) if field.type is float else (field.type,)) and kept == value
            taken += 1
    assert 50 < taken < 4 * len(t.VARIABLES)


def take_up(cfg, folder):
    """What a run does with the checkpoint in its folder. It may also start afresh, since the only one is damaged."""
    process = t.Process("fp32")
    past = t.find_past(cfg)
    new = t.continued(cfg, past, 1)
    assert not new.nll_dump and new.log_dir == cfg.log_dir
    json.dumps(t.new_summary(new, process, "run"))
    if past.facts is None:
        raise t.UserError(past.notes[0])
    assert 0 <= past.facts["step"] <= 1e15
    new, inputs = t.open_inputs(new, process, past, {}, t.Script(b"", b""))
    model = t.GPT(new)
    trainer = t.Trainer(new, process, model)
    trainer.restore(past.facts, past.tensors)
    assert trainer.flat.weights.dtype == torch.float32 and t.rate_factor(new, past.facts["step"], 1.0) >= 0


def test_hostile_checkpoints(tiny, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "lock", lambda folder: None)  # of which this process would keep each
    rng, read, path = random.Random(4), 0, tmp_path / "run" / "checkpoints" / "step_0000001.npz"
    cfg = tiny(RESUME=1, RUN_ID="run", LOG_DIR=tmp_path, DATA_PATH=corpus)
    trainer = t.Trainer(cfg, t.Process("fp32"), t.GPT(cfg))
    trainer.step(torch.randint(2, 400, (8, 33), dtype=torch.int32), 0, 1.0)
    tensors = {name: x.numpy() for name, x in trainer.tensors().items()}
    honest = {"settings": cfg.settings(), "explicit": [], "step": 1, "seconds": 1.0,
              "train_tokens": len(t.Tokens(corpus, "train", 400))}
    path.parent.mkdir(parents=True)
    for _ in range(CASES // 3):
        arrays, facts = dict(tensors), json.loads(json.dumps(honest))
        kind = rng.randrange(7)
        if kind == 0:
            facts[rng.choice(sorted(facts))] = rng.choice(ODD)
        elif kind == 1:
            facts["settings"][rng.choice(sorted(facts["settings"]))] = rng.choice(ODD)
        elif kind == 2:
            del arrays[rng.choice(sorted(arrays))]
        elif kind == 3:
            arrays[rng.choice(sorted(arrays))] = rng.choice((np.zeros(3), np.float32(1), np.zeros(40000, np.uint8),
                                                              np.zeros(36001, np.complex64)))
        elif kind == 4:
            del facts[rng.choice(sorted(facts))]
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        np.savez(path, **arrays)
        if kind == 5:
            data = bytearray(path.read_bytes())
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        read += refused_or(take_up, cfg, tmp_path)
    assert 0.1 * CASES < 3 * read < 0.8 * CASES, read


@pytest.mark.parametrize("case", range(12))
def test_hostile_launches_end_with_a_result_or_one_line(launch, corpus, tmp_path, case):
    """The same through the command line; what --check lets pass then runs, or is refused in one line too."""
    rng = random.Random(100 + case)
    shutil.copytree(corpus, tmp_path / "data")
    for name in ("fineweb_val_000000.bin", "fineweb_train_000000.bin"):
        if rng.random() < 0.4:
            (tmp_path / "data" / name).write_bytes(mutated_shard(rng, (corpus / name).read_bytes()))
    hostile = {n: v for n, v in hostile_environment(rng).items() if "\0" not in n + v and "=" not in n}
    endless = ("ITERATIONS", "NUM_LAYERS", "WARMUP_STEPS")  # legal, and longer than a test
    hostile = {n: v for n, v in hostile.items() if n not in endless or not v.strip().isdigit()}
    fits = {"ITERATIONS": "2", "VAL_TOKEN_LIMIT": "200", "DATA_PATH": tmp_path / "data", "LOG_DIR": "logs"}
    done = launch(**fits | hostile)
    lines = [x for x in done.err.splitlines() if not x.startswith("warning: ")]
    assert (done.code in (0, 1) and not lines) or (done.code == 2 and lines), (hostile, done.err)
    assert all(x.startswith("error: ") for x in lines) and "Traceback" not in done.err, (hostile, done.err)
