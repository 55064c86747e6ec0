"""prepare.py verify: tiny shards in, what is wrong with them out. Mostly through the command line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))
import overlap  # noqa: E402
import prepare  # noqa: E402
import verify  # noqa: E402

sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402

BOS, WINDOW = 1, 64
PUBLISHED = {"kind": "fineweb", "origin": {"repository": "willdepueoai/parameter-golf", "revision": "0123abcd"}}


def program(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, to which no DATA_PATH is passed on."""
    inherited = {name: value for name, value in os.environ.items() if name != "DATA_PATH"}
    return subprocess.run([*map(str, command)], env=inherited | variables, cwd=cwd, capture_output=True, text=True,
                          timeout=60)


def ends(code: int, *args: object, **variables: str) -> tuple[str, list[str]]:
    """Standard output and the lines of standard error of a `verify` that must end with `code`; in this process."""
    out, err = io.StringIO(), io.StringIO()
    environment = {name: value for name, value in os.environ.items() if name != "DATA_PATH"} | variables
    with (mock.patch.dict(os.environ, environment, clear=True), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), mock.patch("sys.argv", ["prepare.py", "verify", *map(str, args)])):
        ended = prepare.main()
    lines = err.getvalue().splitlines()
    assert ended == code, (ended, out.getvalue(), lines)
    assert all(re.fullmatch("error: .+; .+|warning: .+", line) for line in lines), lines
    return out.getvalue(), lines


def ids(rng: random.Random, count: int, low: int = 2, high: int = 1000) -> list[int]:
    return [rng.randrange(low, high) for _ in range(count)]


def document(rng: random.Random, count: int) -> list[int]:
    """BOS and what makes it `count` tokens."""
    return [BOS, *ids(rng, count - 1)]


def split_of(rng: random.Random, documents: int, longest: int = 300) -> list[int]:
    return [token for _ in range(documents) for token in document(rng, rng.randint(70, longest))]


def place(part: list[int], tokens: list[int]) -> int:
    """Where the part first stands."""
    return next(i for i in range(len(tokens)) if tokens[i : i + len(part)] == part)


def write_shard(path: Path, tokens: list[int]) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def write_folder(folder: Path, train: list[int], val: list[int], cuts: tuple[int, ...] = (), val_cuts=()) -> Path:
    """Shards of the splits, cut at the positions given; an empty split has none."""
    folder.mkdir(parents=True)
    for name, tokens, where in (("train", train, cuts), ("val", val, val_cuts)):
        edges = [0, *where, len(tokens)] if tokens else [0]
        for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
            write_shard(folder / f"fineweb_{name}_{number:06d}.bin", tokens[begin:end])
    return folder


def result_of(folder: Path) -> dict:
    assert t.read_verified(folder)[0], "not stale"
    return json.loads((folder / "verified.json").read_text())


def known(folder: Path) -> dict | None:
    """What a run knows of its data."""
    return t.read_verified(folder)[0]


def survey(folder: Path, jobs: int = 2) -> overlap.Survey:
    return overlap.survey({split: verify.shard_paths(folder, split) for split in ("train", "val")}, jobs)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(5)


@pytest.fixture
def clean(rng: random.Random, tmp_path: Path) -> Path:
    """Two splits that share nothing."""
    return write_folder(tmp_path / "mine_sp1024", split_of(rng, 30), split_of(rng, 12), (1000, 1900), (700,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that prepare.py made, with tokenizer and manifest, of 60 documents of made-up words."""
    rng, folder = random.Random(1), tmp_path_factory.mktemp("made")
    words = ["".join(rng.choices("aeioubdgklmnrst", k=rng.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 90))) + "." for _ in range(60)]
    (folder / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    done = program(sys.executable, SCRIPT, "docs", folder / "own.jsonl", "--vocab-size", 400, "--val-fraction", 0.3,
                   "--out", folder / "own_sp400", "--shard-tokens", 2000)
    assert done.returncode == 0, done.stderr
    return folder / "own_sp400"


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


# ---- a folder in which nothing is wrong ----


def test_a_clean_corpus_passes_and_is_described(corpus: Path) -> None:
    printed, errors = ends(0, corpus)
    assert errors == [] and "nothing is wrong" in printed
    said, manifest = result_of(corpus), json.loads((corpus / "manifest.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", said["date"])
    assert said["faults"] == said["notes"] == said["named"] == [] and said["published"] is False
    assert [said[name] for name in ("equal_documents", "equal_short", "shared_tokens", "shared_documents")] == [0] * 4
    listed = [file for split in ("train", "val") for file in manifest["splits"][split]["files"]]
    assert len(listed) > 2
    assert [{name: file[name] for name in ("name", "tokens", "sha256")} for file in said["files"]] == listed
    for file in said["files"]:
        state = (corpus / file["name"]).stat()
        assert (file["bytes"], file["mtime"]) == (state.st_size, int(state.st_mtime))
    for split in ("train", "val"):
        figures = {name: manifest["splits"][split][name] for name in ("tokens", "documents")}
        assert said["splits"][split] == figures | ({"targets": figures["tokens"] - 1} if split == "val" else {})
        assert f"{figures['tokens']:,} tokens" in printed
    model = hashlib.sha256((corpus / "tokenizer.model").read_bytes()).hexdigest()
    assert said["tokenizer"] == {"name": "tokenizer.model", "sha256": model}


def test_the_result_does_not_hinder_making_the_corpus_again(corpus: Path, made: Path) -> None:
    ends(0, corpus)
    done = program(sys.executable, SCRIPT, "docs", made.parent / "own.jsonl", "--vocab-size", 300, "--out", corpus,
                   "--force")
    assert done.returncode == 0, done.stderr
    assert not (corpus / "verified.json").exists()


def test_the_result_is_stale_where_a_shard_changed(clean: Path) -> None:
    assert known(clean) is None
    ends(0, clean)
    shard, said = clean / "fineweb_train_000001.bin", known(clean)
    names = sorted(path.name for path in clean.glob("fineweb_*.bin"))
    lines = "".join(f"{hashlib.sha256((clean / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    assert said["sha256"] == hashlib.sha256(lines.encode()).hexdigest() and said["faults"] == 0
    state, data = shard.stat(), shard.read_bytes()
    os.utime(shard, (0, int(state.st_mtime) + 0.75))
    assert known(clean) == said, "parts of a second do not count"
    os.utime(shard, (0, int(state.st_mtime) - 1))
    assert known(clean) is None, "another time"
    shard.write_bytes(data[:-2])
    os.utime(shard, (0, state.st_mtime))
    assert known(clean) is None, "another size"
    shard.rename(clean / "fineweb_train_000009.bin")
    assert known(clean) is None, "another name"
    (clean / "fineweb_train_000009.bin").unlink()
    assert known(clean) is None, "one less"
    shard.write_bytes(data)
    os.utime(shard, (0, state.st_mtime))
    assert known(clean) == said
    write_shard(clean / "fineweb_val_000002.bin", [1, 2])
    assert known(clean) is None, "one more"
    (clean / "fineweb_val_000002.bin").unlink()
    for broken in ("", "[]", '{"files": []}', '{"files": 3}', "[" * 100_000):
        (clean / "verified.json").write_text(broken, encoding="utf-8")
        assert known(clean) is None, broken[:20]


# ---- what is wrong with shards ----


def test_the_published_figures_are_those_of_the_script() -> None:
    assert verify.PUBLISHED["targets"] == t.PUBLISHED_TARGETS


def test_a_cut_validation_split_of_published_data_is_found(rng: random.Random, tmp_path: Path) -> None:
    """Its header fits its size; only the published figures tell."""
    folder = write_folder(tmp_path / "fineweb10B_sp1024", split_of(rng, 10), split_of(rng, 40))
    _, errors = ends(1, folder)
    val = result_of(folder)["splits"]["val"]
    assert errors == [
        f"error: {folder}: the validation split has {val['targets'] // 2048 * 2048:,} targets, the published one "
        "62,021,632: both cut down to a multiple of 2,048; remove fineweb_val_*.bin there and fetch again with "
        "./run.sh data",
        f"error: {folder}: the validation split has 40 documents, the published one 50,000; remove fineweb_val_*.bin "
        "there and fetch again with ./run.sh data"]
    assert [f"error: {folder}: {fault}" for fault in result_of(folder)["faults"]] == errors
    for size, count in ((8192, 2), (4096, 1)):
        other = folder.rename(tmp_path / f"fineweb10B_sp{size}")
        _, errors = ends(1, other)
        assert len(errors) == count and all(f"./run.sh data --variant sp{size}" in line for line in errors)
        folder = other


@pytest.mark.parametrize(("targets", "documents", "faults"), [
    (62_021_632, 50_000, 0), (62_021_632 + 2047, 50_000, 0), (62_021_632 - 1, 50_000, 1),
    (62_021_632 + 2048, 50_000, 1), (62_021_632, 49_999, 1), (40_540_160, 50_000, 1), (1, 1, 2)])
def test_published_figures(targets: int, documents: int, faults: int, tmp_path: Path) -> None:
    val = {"tokens": targets + 1, "targets": targets, "documents": documents}
    assert len(verify.published_faults(tmp_path / "fineweb10B_sp1024", val)) == faults
    assert verify.published_faults(tmp_path / "mine_sp1024", val) == []


def test_what_the_manifest_says_is_compared(corpus: Path) -> None:
    shard = corpus / "fineweb_train_000001.bin"
    data = bytearray(shard.read_bytes())
    data[1024 + 200] ^= 1
    shard.write_bytes(data)
    _, errors = ends(1, corpus)
    assert [line.split(": ", 2)[2].split(";")[0] for line in errors] == [
        "the sha256 of fineweb_train_000001.bin is not the one in manifest.json"]

    manifest = json.loads((corpus / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    manifest["splits"]["val"]["documents"] += 1
    manifest["splits"]["val"]["files"].append({"name": "fineweb_val_000009.bin", "sha256": ""})
    manifest["tokenizer"]["sha256"] = "0" * 64
    (corpus / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_shard(corpus / "fineweb_train_000005.bin", [BOS, 5])
    _, errors = ends(1, corpus)
    for said in ("not the tokenizer that cut the shards", "fineweb_val_000009.bin is named in manifest.json and not",
                 "fineweb_train_000005.bin is not named", "the val split has",
                 f"train split has {train['tokens'] + 2:,} tokens",
                 f"train split has {train['documents'] + 1:,} documents"):
        assert sum(said in line for line in errors) == 1, (said, errors)


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {"val": 3}}', '{"splits": 3}', '{"splits": {"val": {}}}',
                                  '{"origin": {}}', "\x00", '{"splits": {"val": {"files": [{}]}}}'])
def test_a_manifest_that_says_nothing_is_a_fault(text: str, clean: Path) -> None:
    (clean / "manifest.json").write_text(text, encoding="utf-8")
    (fault,) = verify.check(clean, 1)["faults"]
    assert ("cut short" if "origin" in text else "manifest.json") in fault


def test_broken_shards_are_named_and_the_others_checked(clean: Path) -> None:
    os.truncate(clean / "fineweb_train_000001.bin", 1500)
    (clean / "fineweb_val_000001.bin").write_bytes(b"<html>")
    (clean / "fineweb_train_7.bin").write_bytes((clean / "fineweb_train_000000.bin").read_bytes())
    write_shard(clean / "fineweb_val_000004.bin", [BOS, *[7] * 80])
    _, errors = ends(1, clean)
    for said in ("fineweb_train_000001.bin: header promises", "fineweb_val_000001.bin: only 6 bytes",
                 "fineweb_train_7.bin is no name", "fineweb_val_000002.bin and 1 more are missing before"):
        assert sum(said in line for line in errors) == 1, (said, errors)
    assert len(errors) == 4
    said = {file["name"]: file for file in result_of(clean)["files"]}
    assert said["fineweb_val_000001.bin"]["tokens"] is None
    assert said["fineweb_val_000001.bin"]["sha256"] == hashlib.sha256(b"<html>").hexdigest()
    assert said["fineweb_train_000000.bin"]["tokens"] == 1000


def test_a_missing_shard_number_is_a_fault(clean: Path) -> None:
    (clean / "fineweb_train_000000.bin").unlink()
    _, (error,) = ends(1, clean)
    assert "fineweb_train_000000.bin is missing before fineweb_train_000002.bin; fetch" in error


def test_token_ids_are_held_against_the_vocabulary(rng: random.Random, clean: Path, corpus: Path) -> None:
    write_shard(clean / "fineweb_train_000003.bin", [*document(rng, 80), 1024])
    _, (error,) = ends(1, clean)
    assert "fineweb_train_000003.bin holds token id 1,024, the vocabulary has 1,024;" in error, "by the folder's name"
    shutil.copy(corpus / "tokenizer.model", clean)
    assert len(ends(1, clean)[1]) == 6, "by the tokenizer beside the shards"
    (clean / "tokenizer.model").unlink()
    (clean.parent / "data").mkdir()
    other = clean.rename(clean.parent / "data" / "mine_sp400")
    (clean.parent / "tokenizers").mkdir()
    shutil.copy(corpus / "tokenizer.model", clean.parent / "tokenizers" / "fineweb_400_bpe.model")
    ends(1, other)
    assert result_of(other)["tokenizer"]["name"] == "fineweb_400_bpe.model"
    (other / "tokenizer.model").write_bytes(b"no model")
    assert "not a SentencePiece model" in ends(1, other)[1][0]


def test_a_split_that_begins_within_a_document(rng: random.Random, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", [9, 8, 7, *split_of(rng, 9)], split_of(rng, 3))
    printed, _ = ends(0, folder)
    assert "note: the train split does not begin with BOS" in printed
    assert result_of(folder)["splits"]["train"]["documents"] == 9
    folder = write_folder(tmp_path / "b", split_of(rng, 9), [9, 8, 7, *split_of(rng, 3)])
    assert "the val split does not begin with BOS" in ends(1, folder)[1][0]


@pytest.mark.parametrize("missing", ["train", "val"])
def test_one_split_alone_is_checked_as_far_as_it_goes(missing: str, rng: random.Random, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", *[[] if name == missing else split_of(rng, 5) for name in ("train", "val")])
    printed, said = ends(1, folder)
    assert any(f"no whole shard of the {missing} split, so what the other shares" in line for line in said)
    said = result_of(folder)
    assert said["splits"][missing] is None and sum(map(bool, said["splits"].values())) == 1
    assert said["named"] == [] and said["shared_tokens"] == 0


# ---- what validation and training share ----


def test_equal_documents_are_faults_and_named(corpus: Path, rng: random.Random) -> None:
    """Also an empty one, one over three shards, and one that ends with the split."""
    train, val = split_of(rng, 20), split_of(rng, 6)
    long, short, last = document(rng, 200), [BOS, 17, 18], document(rng, 150)
    train += [*long, *split_of(rng, 2), *short, BOS, *split_of(rng, 2), *last]
    val = [*val, *short, *document(rng, 90), *long, BOS, *last]
    begin = place(long, train)
    folder = write_folder(corpus.parent / "x", train, val, (begin + 50, begin + 120), (len(val) - 30,))
    shutil.copy(corpus / "tokenizer.model", folder)
    printed, errors = ends(1, folder)
    assert "4 validation documents are in the training split too, 2 of them under 64 tokens;" in errors[-1]
    said = result_of(folder)
    assert (said["equal_documents"], said["equal_short"], said["published"]) == (4, 2, False)
    named = {entry["document"]: entry for entry in said["named"] if entry["kind"] == "equal"}
    assert sorted(named) == [6, 8, 9, 10]
    assert (named[8]["train_shard"], named[8]["train_offset"]) == ("fineweb_train_000000.bin", begin)
    assert (named[6]["train_shard"], named[6]["train_offset"]) == (
        "fineweb_train_000002.bin", place([*short, BOS], train) - begin - 120)
    assert (named[8]["shard"], named[8]["offset"]) == ("fineweb_val_000000.bin", place(long, val))
    assert (named[9]["tokens"], named[9]["text"], named[10]["tokens"]) == (1, "", 150)
    assert 0 < len(named[8]["text"]) <= 60 and named[8]["text"] in printed
    assert said["shared_tokens"] >= 350 and said["shared_documents"] >= 2
    assert not {entry["document"] for entry in said["named"] if entry["kind"] == "shared"} & set(named)


def test_the_text_of_a_document_is_shown(corpus: Path, made: Path) -> None:
    """A validation document put into training as well."""
    tokens = np.fromfile(corpus / "fineweb_val_000000.bin", "<u2", offset=1024)
    second, third = np.flatnonzero(tokens == BOS)[1:3]
    write_shard(corpus / "fineweb_train_000009.bin", tokens[second:third].tolist())
    printed, _ = ends(1, corpus)
    (entry,) = [entry for entry in result_of(corpus)["named"] if entry["kind"] == "equal"]
    texts = [json.loads(line)["text"] for line in (made.parent / "own.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(entry["text"]) == 60 and sum(text.startswith(entry["text"].strip()) for text in texts) == 1
    assert (entry["document"], entry["offset"], entry["tokens"]) == (1, second, third - second)
    where = f"fineweb_val_000000.bin at {second:,}, {third - second:,} tokens), fineweb_train_000009.bin at 0"
    assert f"document 1 ({where}: {entry['text']}\n" in printed


@pytest.mark.parametrize(("manifest", "published"), [
    (PUBLISHED, True), ({"kind": "fineweb", "origin": {"repository": "someone/else", "revision": "0123"}}, False),
    ({"origin": {"repository": "kevclark/parameter-golf", "revision": None}}, False), ({"origin": ["a"]}, False)])
def test_the_equal_documents_of_published_data_are_its_own(manifest: dict, published: bool, rng: random.Random,
                                                           tmp_path: Path) -> None:
    twice = document(rng, 100)
    folder = write_folder(tmp_path / "a", [*twice, *split_of(rng, 9)], [*split_of(rng, 3), *twice])
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    printed, errors = ends(0 if published else 1, folder)
    said = result_of(folder)
    assert said["equal_documents"] == 1 and said["published"] is published and said["named"][0]["document"] == 3
    assert len(errors) == (not published) and ("they are its own" in printed) is published


def planted(tmp_path: Path, rng: random.Random, length: int, in_train: int, in_val: int, sizes=(500, 400), **cuts):
    """Splits that share one run of `length` tokens, at these positions."""
    train, val = ids(rng, sizes[0], 2, 500), ids(rng, sizes[1], 500, 1000)
    train[in_train : in_train + length] = val[in_val : in_val + length] = [BOS, *ids(rng, length - 1, 1000, 2000)]
    assert (len(train), len(val)) == sizes
    return survey(write_folder(tmp_path, train, val, **cuts), jobs=1)


@pytest.mark.parametrize("length", [64, 63])
def test_a_run_of_64_tokens_is_found_at_every_alignment(length: int, rng: random.Random, tmp_path: Path) -> None:
    for align in range(41):
        found = planted(tmp_path / f"{align}", rng, length, 200 + align, 100 + 3 * align % 41).overlap
        expected = [[100 + 3 * align % 41, 164 + 3 * align % 41]] if length == 64 else []
        assert found.runs.tolist() == expected, align
        if expected:
            assert found.in_training(expected[0][0], 400) == 200 + align


@pytest.mark.parametrize("length", [64, 63])
@pytest.mark.parametrize(("in_train", "in_val"), [(0, 0), (436, 336), (0, 336), (436, 0)])
def test_a_run_at_the_edges_of_the_splits(in_train: int, in_val: int, length: int, rng: random.Random,
                                          tmp_path: Path) -> None:
    in_train, in_val = (at and at + 64 - length for at in (in_train, in_val))
    found = planted(tmp_path / "a", rng, length, in_train, in_val).overlap
    assert found.runs.tolist() == ([[in_val, in_val + 64]] if length == 64 else [])
    assert len(planted(tmp_path / "b", rng, 64, 0, 0, (64, 64)).overlap.runs) == 1, "splits of one window"
    assert planted(tmp_path / "c", rng, 63, 0, 0, (63, 64)).overlap.windows is None, "shorter than one"


def test_what_is_read_beyond_the_end_is_no_text(rng: random.Random, tmp_path: Path) -> None:
    """Zeros stand for it, which is a token id too."""
    last = ids(rng, 60)
    train, val = [*ids(rng, 100), *last], [*ids(rng, 50), *last, *[0] * 40, *last]
    assert survey(write_folder(tmp_path / "a", train, val)).overlap.runs.size == 0
    assert survey(write_folder(tmp_path / "b", [*last, *ids(rng, 100)], [BOS, *[0] * 40, *last])).overlap.runs.size == 0


@pytest.mark.parametrize("jobs", [1, 4])
def test_the_first_place_in_training_is_told(jobs: int, rng: random.Random, tmp_path: Path) -> None:
    often, between = document(rng, 64), [ids(rng, 40 + number) for number in range(60)]
    train = [token for part in between for token in (*part, *often)]
    folder = write_folder(tmp_path / "a", train, [*often, *document(rng, 70)], (1500, 2000, 3000))
    found = survey(folder, jobs).overlap
    assert found.in_training(0, 64) == 40 == found.windows.first_in_training(0)


def test_the_end_of_a_long_document(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(overlap, "CHUNK", 1 << 13)
    tokens = [BOS, *[7] * 40_000]
    for end in (1, 2, 4095, 4096, 4097, 4098, 12_288, 12_289, 12_290, 20_481, 39_999, 40_000):
        folder = write_folder(tmp_path / f"{end}", [*tokens[:end], BOS, *tokens[end + 1 :]], [], (1, 3000))
        split = overlap.Split(verify.shard_paths(folder, "train"))
        assert overlap.next_document(split, 1) == end
        assert overlap.scan(split, 0, lambda *_: None).lengths.tolist() == [end]
        assert overlap.next_document(split, end + 1) == len(split) == 40_001


def test_a_run_over_the_borders_of_shards(rng: random.Random, tmp_path: Path) -> None:
    for cut in range(150, 280, 3):
        found = planted(tmp_path / f"{cut}", rng, 64, 200, 100, cuts=(cut,), val_cuts=(130,)).overlap
        assert found.runs.tolist() == [[100, 164]], cut
    for name, length in (("many", 64), ("few", 63)):
        shards = tuple(range(7, 500, 7))
        found = planted(tmp_path / name, rng, length, 200, 100, cuts=shards, val_cuts=tuple(range(5, 400, 11))).overlap
        assert found.runs.tolist() == ([[100, 164]] if length == 64 else []), name


def test_runs_over_the_borders_of_chunks(rng: random.Random, tmp_path: Path, monkeypatch) -> None:
    """Where a reading, a batch or a slice ends."""
    for name, size in (("CHUNK", 64), ("BATCH", 2), ("SLICE", 10)):
        monkeypatch.setattr(overlap, name, size)
    for align in range(64):
        found = planted(tmp_path / f"{align}", rng, 64, 150 + align, 100 + align, cuts=(333,))
        assert found.overlap.runs.tolist() == [[100 + align, 164 + align]], align
        assert found.documents("train") == 1
        said = hashlib.sha256((tmp_path / f"{align}" / "fineweb_train_000000.bin").read_bytes()).hexdigest()
        assert found.shards["train"][0].sha256 == said


def test_shared_runs_are_reported_and_no_fault(rng: random.Random, tmp_path: Path) -> None:
    """The documents with most shared tokens come first; training's place is where the longest run begins."""
    train, val, expected = split_of(rng, 30), [], []
    for number in range(25):
        run_ = ids(rng, 64 + number, 1000, 2000)
        expected.append((len(train) + 50, len(val)))
        train += [*document(rng, 50), *run_, *ids(rng, 20)]
        val += [*document(rng, 30), *run_, *ids(rng, 30)]
    folder = write_folder(tmp_path / "a", train, val)
    printed, _ = ends(0, folder)
    said = result_of(folder)
    assert said["shared_tokens"] == sum(range(64, 64 + 25)) and said["shared_documents"] == 25
    assert [entry["document"] for entry in said["named"]] == list(range(24, 4, -1))
    for entry in said["named"]:
        in_train, in_val = expected[entry["document"]]
        assert (entry["kind"], entry["train_offset"], entry["offset"]) == ("shared", in_train, in_val)
        assert entry["shared_tokens"] == 64 + entry["document"] and entry["tokens"] == 124 + entry["document"]
    assert "in 25 of 25 (100.00%) documents" in printed


# ---- beside a plain search ----


def documents_of(tokens: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    begins = [i for i, token in enumerate(tokens) if token == BOS]
    return [(a, tuple(tokens[a:b])) for a, b in zip(begins, [*begins, len(tokens)][1:], strict=True)]


def plain_overlap(train: list[int], val: list[int]) -> tuple[set[int], dict[int, int]]:
    """Validation's positions in shared runs, and of each equal document where training has it first."""
    windows = {tuple(train[i : i + WINDOW]) for i in range(len(train) - WINDOW + 1)}
    hits = [i for i in range(len(val) - WINDOW + 1) if tuple(val[i : i + WINDOW]) in windows
            and BOS not in val[i + 1 : i + WINDOW]]
    first = {}
    for begin, tokens in documents_of(train):
        first.setdefault(tokens, begin)
    equal = {i: first[tokens] for i, (_, tokens) in enumerate(documents_of(val)) if tokens in first}
    return {position for hit in hits for position in range(hit, hit + WINDOW)}, equal


def patchwork(rng: random.Random, pool: list[list[int]], count: int) -> list[int]:
    """Pieces of the pool and few other tokens, so that much repeats, in part."""
    tokens = [BOS] if rng.random() < 0.8 else []
    while len(tokens) < count:
        piece = rng.choice(pool)
        begin = rng.randrange(len(piece)) if rng.random() < 0.5 else 0
        tokens += rng.choice([piece, piece[begin:], piece[:begin], ids(rng, rng.randrange(3), 1, 4)])
    return tokens


@pytest.mark.parametrize("chunk", [64, 1 << 19])
def test_the_same_as_a_plain_search(chunk: int, tmp_path: Path, monkeypatch) -> None:
    """On texts of few tokens that share much by chance, in shards of any size."""
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    some = 0
    for seed in range(25):
        rng = random.Random(seed)
        pool = [[BOS] * (rng.random() < 0.4) + ids(rng, rng.choice([2, 5, 30, 63, 64, 90, 200]), 2, rng.choice([4, 50]))
                for _ in range(12)]
        train, val = patchwork(rng, pool, rng.choice([70, 1500])), patchwork(rng, pool, rng.choice([70, 900]))
        cuts, val_cuts = (tuple(sorted(rng.sample(range(1, len(tokens)), rng.choice([0, 1, 6, 40]))))
                          for tokens in (train, val))
        found = survey(write_folder(tmp_path / f"{seed}", train, val, cuts, val_cuts), jobs=1 + seed % 3).overlap
        positions, equal = plain_overlap(train, val)
        assert {i for begin, end in found.runs.tolist() for i in range(begin, end)} == positions, seed
        is_equal = np.flatnonzero(found.documents.first < len(train)).tolist()
        assert {i: int(found.documents.first[i]) for i in is_equal} == equal, seed
        shared = [sum(begin + i in positions for i in range(len(tokens))) for begin, tokens in documents_of(val)]
        assert found.shared.tolist() == shared, seed
        for (begin, tokens), count in zip(documents_of(val), shared, strict=True):
            if count:
                at = found.in_training(begin, begin + len(tokens))
                assert any(train[at : at + WINDOW] == val[i : i + WINDOW] for i in found.starts.tolist()
                           if begin - WINDOW < i < begin + len(tokens))
        some += bool(equal) and 0 < len(positions) < len(val)
    assert some > 6, "and that is no trifle"


def test_hashes_that_collide_in_the_filter_miss_nothing(rng: random.Random, tmp_path: Path, monkeypatch) -> None:
    """A bitmap that takes everything costs time and no answer; nor do equal keys of documents."""
    monkeypatch.setattr(overlap.Bitmap, "holds", lambda self, hashes: np.ones(hashes.shape, bool))
    monkeypatch.setattr(overlap, "document_keys", lambda lengths, heads, tails: np.zeros(len(lengths), np.uint64))
    twice = document(rng, 40)
    train, val = [*split_of(rng, 5), *twice, *split_of(rng, 5)], [*split_of(rng, 3), *twice, *twice]
    found = survey(write_folder(tmp_path / "a", train, val, (300, 500)))
    begin = place(twice, train)
    assert found.overlap.runs.size == 0
    assert found.overlap.documents.first.tolist() == [overlap.NEVER] * 3 + [begin] * 2


# ---- the command ----


def test_folders_that_cannot_be_checked(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "no"
    for args, variables, said in (((missing,), {}, "no such folder"), ((tmp_path / "empty",), {}, "holds no shards"),
                                  ((clean, missing), {}, "no such folder"),
                                  ((), {"DATA_PATH": str(missing)}, f"DATA_PATH={missing}: no such folder")):
        printed, (error,) = ends(2, *args, **variables)
        assert printed == "" and said in error
    _, (error,) = ends(2, clean, "--jobs", "0")
    assert "--jobs" in error


def test_the_folders_without_arguments(clean: Path, tmp_path: Path) -> None:
    """DATA_PATH's, else all that lie beside the script; through run.sh."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "data", project / "data", ignore=shutil.ignore_patterns("datasets", "tokenizers", "__*"))
    script = project / "data" / "prepare.py"
    done = program(sys.executable, script, "verify")
    assert done.returncode == 2
    assert re.fullmatch("error: no shards in .+; fetch them with ./run.sh data.+\n", done.stderr)
    done = program(sys.executable, script, "verify", cwd=clean, DATA_PATH=".")
    assert done.returncode == 0 and done.stdout.startswith(f"{clean}\n"), "the folder's name is known"
    for name in ("one", "two"):
        shutil.copytree(clean, project / "data" / "datasets" / name)
    (project / "data" / "datasets" / "three").mkdir()
    write_shard(project / "data" / "datasets" / "two" / "fineweb_val_000001.bin", [2000])
    done = program("./run.sh", "data", "--verify", "--jobs", 1, cwd=project, PYTHON=sys.executable)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert re.findall(r"datasets/(\w+)$", done.stdout, re.M) == ["one", "two"]
    assert (project / "data" / "datasets" / "one" / "verified.json").exists()


def test_a_result_that_cannot_be_written_is_a_warning(clean: Path) -> None:
    (clean / "verified.json").mkdir()
    (clean / "verified.json" / "a").touch()
    before = sorted(path.name for path in clean.iterdir())
    _, (warning,) = ends(0, clean)
    assert "verified.json cannot be written" in warning
    assert sorted(path.name for path in clean.iterdir()) == before


def test_a_shard_that_changes_meanwhile(clean: Path, monkeypatch) -> None:
    def change(*args: object) -> dict:
        os.utime(clean / "fineweb_train_000000.bin", (0, 0))
        return {}

    monkeypatch.setattr(verify, "check", change)
    with pytest.raises(verify.PrepareError, match="changed while it was read; run again"):
        verify.verify(clean, 1)
    shard = overlap.Split([clean / "fineweb_train_000000.bin"])
    os.truncate(clean / "fineweb_train_000000.bin", 1500)
    with pytest.raises(verify.PrepareError, match="became shorter"):
        shard.read(0, 1000)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = overlap.Progress("train", 400_000_000)
    for second in range(1, 16):
        now = 100.0 + second
        progress.add(10_000_000)
    assert capsys.readouterr().out == "  train: 100,000,000 of 400,000,000 tokens, 10.0 million/s, 30 s left\n"


def test_a_failure_in_one_shard_ends_the_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(overlap, "CHUNK", 32)
    folder = write_folder(tmp_path / "a", [BOS] * 100_000, [], (32, 50_000))
    failed, seen = threading.Event(), []

    def look(at: int, *_: object) -> None:
        if at == 0:
            failed.set()
            raise OSError(5, "Input/output error", "a.bin")
        failed.wait(10)
        time.sleep(0.002)
        seen.append(at)

    with pytest.raises(OSError), overlap.Workers(2) as workers:
        workers.scan(overlap.Split(verify.shard_paths(folder, "train")), "train", look)
    assert len(seen) < 1000


def test_a_disk_that_fails_is_told(clean: Path, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error", "a.bin")

    monkeypatch.setattr(verify, "check", fail)
    with pytest.raises(verify.PrepareError, match="a.bin: cannot be read .Input/output error.; mend"):
        verify.verify(clean, 1)
