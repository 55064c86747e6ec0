"""data/prepare.py, through its command line: files in, shards and manifest out."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))
from embedded import finished_corpus  # noqa: E402

BOS = 1


def run(*args: object, seed: str = "0", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs prepare.py; no variable of the caller's shell steers the hub client or its proxy."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "MATCHED_")) and not name.lower().endswith("_proxy")
    }
    environment = inherited | {"PYTHONHASHSEED": seed} | variables
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def succeed(*args: object, **variables: str) -> str:
    """Standard output of a run that must succeed."""
    result = run(*args, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(*args: object, **variables: str) -> str:
    """The error line of a run that must fail as promised: status 2, one line with a remedy."""
    result = run(*args, **variables)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(r"error: .+; .+", lines[0])
    return lines[0]


def shard_tokens(path: Path) -> np.ndarray:
    """A shard's tokens, after a check of its header."""
    header = np.fromfile(path, "<i4", 256)
    tokens = np.fromfile(path, "<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)]
    assert not header[3:].any()
    return tokens


def split_documents(folder: Path, split: str) -> list[list[int]]:
    """Token ids of each document of a split, without BOS."""
    tokens = np.concatenate([shard_tokens(path) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))])
    starts = np.flatnonzero(tokens == BOS)
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def decoded(folder: Path, split: str) -> list[str]:
    """Text of each document of a split."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [pieces.decode(ids) for ids in split_documents(folder, split)]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(compressed(path.suffix, "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    return path


def compressed(suffix: str, data: bytes) -> bytes:
    half = len(data) // 2  # .zst in two frames, as tools that compress in parallel write it
    compress = zstandard.ZstdCompressor().compress
    return {
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": lambda all_of_it: compress(all_of_it[:half]) + compress(all_of_it[half:]),
    }.get(suffix, bytes)(data)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """120 documents of made-up words, already in the form the tokenizer normalises to."""
    rng = random.Random(1)
    words = ["".join(rng.choices("aeioubdgklmnrst", k=rng.randint(2, 8))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=rng.randint(20, 120))) + "." for _ in range(120)]


def make_tokenizer(path: Path, texts: list[str], **options: object) -> Path:
    settings = dict(model_type="bpe", vocab_size=400, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **(settings | options)
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model") / "byte.model", texts, byte_fallback=True)


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


# ---------------------------------------------------------------------------------------------------
# docs


def test_help_needs_no_package() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"sys.argv = ['prepare.py', 'docs', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'sentencepiece', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_round_trip(suffix: str, texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / f"lines.jsonl{suffix}", texts)
    one = tmp_path / f"one.txt{suffix}"
    one.write_bytes(compressed(suffix, b"One document.\nIts second line."))
    out = tmp_path / "out"
    printed = succeed("docs", lines, one, "--val", write_jsonl(tmp_path / "val.jsonl", texts[:7]),
                      "--tokenizer", tokenizer, "--out", out)  # fmt: skip
    assert decoded(out, "train") == texts + ["One document. Its second line."]
    assert decoded(out, "val") == texts[:7]
    assert (out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    command = f"DATA_PATH={out} TOKENIZER_PATH={out}/tokenizer.model VOCAB_SIZE=400 ./run.sh"
    assert printed.splitlines()[-1] == command


def test_shards_are_full_and_documents_span_them(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    options = ("docs", corpus, "--tokenizer", tokenizer, "--val-fraction", "0.2", "--out")
    succeed(*options, tmp_path / "one")
    succeed(*options, tmp_path / "many", "--shard-tokens", 1000)
    many = sorted((tmp_path / "many").glob("fineweb_train_*.bin"))
    assert [path.name for path in many] == [f"fineweb_train_{n:06d}.bin" for n in range(len(many))]
    sizes = [len(shard_tokens(path)) for path in many]
    assert len(sizes) > 3 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert any(shard_tokens(path)[0] != BOS for path in many)
    for split in ("train", "val"):
        assert split_documents(tmp_path / "many", split) == split_documents(tmp_path / "one", split)
    figures = manifest_of(tmp_path / "many")["splits"]["train"]
    assert [file["tokens"] for file in figures["files"]] == sizes
    assert figures["tokens"] == sum(sizes)


def test_batches_join_without_a_seam(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    """More text than is tokenised at a time (4 million characters): batches end in the middle of a shard."""
    long = [" ".join(texts[n:] * 20) for n in range(12)]
    assert sum(map(len, long)) > 6_000_000
    val = write_jsonl(tmp_path / "v.jsonl", texts)
    succeed("docs", write_jsonl(tmp_path / "t.jsonl", long), "--val", val, "--tokenizer", tokenizer,
            "--out", tmp_path / "out", "--shard-tokens", 700_000)  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert split_documents(tmp_path / "out", "train") == pieces.encode(long)
    sizes = [file["tokens"] for file in manifest_of(tmp_path / "out")["splits"]["train"]["files"]]
    assert len(sizes) > 3 and set(sizes[:-1]) == {700_000} and sizes[-1] <= 700_000


def test_manifest_figures(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    """Documents that normalisation leaves alone: the counted bytes are the bytes of the decoded text."""
    odd = ["snow \u2603 and \u96ea, na\u00efve", "\U0001f600", "nab \u2603"]  # only in bytes
    out = tmp_path / "out"
    train, val = write_jsonl(tmp_path / "t.jsonl", texts + odd), write_jsonl(tmp_path / "v.jsonl", odd)
    succeed("docs", train, "--val", val, "--tokenizer", tokenizer, "--out", out)
    manifest = manifest_of(out)
    for split, expected in (("train", texts + odd), ("val", odd)):
        figures = manifest["splits"][split]
        assert decoded(out, split) == expected
        size = sum(len(text.encode()) for text in expected)
        # A document may begin with a byte piece: the tokenizer then puts a mark of its own before it,
        # which follows BOS and so counts nothing.
        assert figures["counted_bytes"] == figures["raw_bytes"] == size
        assert figures["documents"] == len(expected)
        assert figures["tokens"] == sum(len(ids) + 1 for ids in split_documents(out, split))
        for file in figures["files"]:
            assert file["sha256"] == hashlib.sha256((out / file["name"]).read_bytes()).hexdigest()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert any(pieces.is_byte(token) for ids in split_documents(out, "val") for token in ids)
    model_hash = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert manifest["tokenizer"] == {"vocab_size": 400, "sha256": model_hash, "source": "byte.model"}


def test_unknown_pieces_count_nothing(texts: list[str], tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "unk.model", texts, byte_fallback=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "nab \u2603 nab \u96ea\u2603 nab"
    ids = pieces.encode(text)
    # Space marks stand before each unknown run and before the "nab" after it. The latter follows a
    # boundary or not, depending on whether its mark is a piece of its own, so count piece by piece.
    size, previous = 0, BOS
    for token in ids:
        piece = pieces.id_to_piece(token)
        if token != pieces.unk_id():
            size += len(piece.replace("\u2581", "").encode())
            size += piece.startswith("\u2581") and previous not in (BOS, pieces.unk_id())
        previous = token
    assert ids.count(pieces.unk_id()) == 2 and 0 < size < len(text.encode())
    path = write_jsonl(tmp_path / "v.jsonl", [text])
    succeed("docs", write_jsonl(tmp_path / "t.jsonl", texts), "--val", path, "--tokenizer", model,
            "--out", tmp_path / "out")  # fmt: skip
    figures = manifest_of(tmp_path / "out")["splits"]["val"]
    assert figures["counted_bytes"] == size
    assert figures["raw_bytes"] == len(text.encode())


def test_split_by_hash_is_stable(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    """The same documents land in validation whatever their order, file and company."""
    shuffled = random.Random(2).sample(texts, len(texts))
    a = write_jsonl(tmp_path / "a.jsonl", shuffled[:50])
    b = write_jsonl(tmp_path / "b.jsonl.gz", shuffled[50:])
    options = ("--tokenizer", tokenizer, "--val-fraction", "0.25", "--out")
    succeed("docs", write_jsonl(tmp_path / "c.jsonl", texts), *options, tmp_path / "one")
    succeed("docs", a, b, *options, tmp_path / "two", seed="7")
    for split in ("train", "val"):
        assert sorted(decoded(tmp_path / "one", split)) == sorted(decoded(tmp_path / "two", split))
    held_out = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 64}  # a quarter of 256
    assert set(decoded(tmp_path / "one", "val")) == held_out
    assert decoded(tmp_path / "two", "train") == [text for text in shuffled if text not in held_out]


def test_trained_tokenizer_is_reproducible(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("two", "2")):
        succeed("docs", corpus, "--vocab-size", 320, "--out", tmp_path / name, seed=seed)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one" / "tokenizer.model"))
    assert pieces.vocab_size() == 320
    assert (pieces.pad_id(), pieces.bos_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    assert sum(pieces.is_byte(token) for token in range(320)) == 256


@pytest.mark.parametrize("how", ["given", "by hash"])
def test_tokenizer_learns_nothing_from_validation(how: str, texts: list[str], tmp_path: Path) -> None:
    """Two corpora that differ in their validation documents only get the same tokenizer."""

    def held_out(text: str) -> bool:
        return hashlib.sha256(text.encode()).digest()[0] < 64

    train = [text for text in texts if not held_out(text)]
    models = []
    for word in ("zzyzx", "qwfpg"):
        val = next(text for n in range(1000) if held_out(text := f"{word} " * 500 + str(n)))
        path = write_jsonl(tmp_path / f"{word}.jsonl", [val] if how == "given" else [val, *train])
        files = [write_jsonl(tmp_path / "t.jsonl", train), "--val", path] if how == "given" else [path]
        options = [] if how == "given" else ["--val-fraction", "0.25"]
        succeed("docs", *files, *options, "--vocab-size", 320, "--out", tmp_path / word)
        assert len(split_documents(tmp_path / word, "val")) == 1
        models.append((tmp_path / word / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_empty_documents_are_skipped_and_counted(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["", *texts, " \n\t "])
    path.write_text(path.read_text() + "\n\n")  # blank lines are no documents
    val = write_jsonl(tmp_path / "v.jsonl", ["", texts[0]])
    succeed("docs", path, "--val", val, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert manifest["empty_documents"] == 3
    assert manifest["splits"]["train"]["documents"] == len(texts)


def test_existing_folder_is_refused_or_replaced(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("docs", corpus, "--tokenizer", tokenizer, "--val-fraction", "0.2", "--out", out)
    succeed(*options, "--shard-tokens", 1000)
    before = folder_bytes(out)
    assert "--force" in fail(*options)
    assert folder_bytes(out) == before
    succeed(*options, "--force")
    assert len(folder_bytes(out)) == 4 < len(before)
    (out / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in fail(*options, "--force")
    assert (out / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


HOSTILE = [
    "a\n\n    b\tc  d", "  both ends  ", "\r\n line\r", "\ufdfa \ufb01 \u2460 \uff21", "e\u0301 \u00e9",
    "\u200b\ufeff\u00a0\u3000", "<s> </s> <unk> <0x41>", "nul\0 and \x7f", "\U0001f600\u2585", "\n.",
]


def odd_texts(count: int) -> list[str]:
    """Texts of any characters, most of them white space, marks and controls, but for U+2581."""
    random_ = random.Random(7)
    planes = [(0, 0x80), (0x80, 0x250), (0x2000, 0x2070), (0x300, 0x370), (0xE000, 0x10000), (0x10000, 0x110000)]

    def sign() -> str:
        low, high = random_.choice(planes)
        return random_.choice(" \t\n\r  ") if random_.random() < 0.4 else chr(random_.randrange(low, high))

    return ["x" + "".join(sign() for _ in range(random_.randrange(40))) for _ in range(count)]


def test_a_new_tokenizer_keeps_text_as_it_is(texts: list[str], tmp_path: Path) -> None:
    """But for U+2581, by which pieces write a space: it is counted, and said."""
    hostile, out = HOSTILE + odd_texts(300), tmp_path / "out"
    path, marked = write_jsonl(tmp_path / "t.jsonl", HOSTILE + texts), "\u2581a \u2581\u2581"
    printed = succeed("docs", path, "--val", write_jsonl(tmp_path / "v.jsonl", [*hostile, marked]), "--vocab-size", 330,
                      "--out", out)  # fmt: skip
    assert decoded(out, "train") == HOSTILE + texts
    assert decoded(out, "val") == [*hostile, marked.replace("\u2581", " ")]
    train, val = (manifest_of(out)["splits"][split] for split in ("train", "val"))
    assert train["counted_bytes"] == train["raw_bytes"] and train["lost_bytes"] == train["space_marks"] == 0
    assert val["counted_bytes"] == val["raw_bytes"] - 6 and val["space_marks"] == 3
    notes = [line for line in printed.splitlines() if line.startswith(("note", "warning"))]
    assert notes == ["note: val: 3 characters \u2581 (U+2581) become spaces"]


def test_what_normalisation_drops_is_said(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    text = "a\n\n    b\tc  d nab"
    path, val = write_jsonl(tmp_path / "t.jsonl", texts), write_jsonl(tmp_path / "v.jsonl", [text])
    printed = succeed("docs", path, "--val", val, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    figures = manifest_of(tmp_path / "out")["splits"]["val"]
    assert (figures["raw_bytes"], figures["counted_bytes"]) == (len(text), len("a b c d nab"))
    (note,) = [line for line in printed.splitlines() if line.startswith(("note: val", "warning"))]
    assert note.startswith(f"note: val: the tokenizer drops {len(text) - 11} bytes of {len(text)}, mostly line breaks")


ARABIC = "\u0642\u0627\u0644 \u0627\u0644\u0646\u0628\u064a \ufdfa \u062b\u0645 \ufdf2 \u0623\u0639\u0644\u0645"
EMOJI = "all \U0001f600 good " * 6 + "\U0001f680\U0001f680"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [(ARABIC, {"byte_fallback": True}, "normalisation makes"), (EMOJI, {}, "does not know characters of 32 of 92"),
     ("\ufdfa", {}, "does not know characters of 3 of 3 bytes")],
)
def test_bytes_that_a_tokenizer_makes_or_loses_are_said(text, options, words, texts, tmp_path: Path) -> None:
    """NFKC writes two of the letters out as whole phrases; without byte fallback an emoji is lost."""
    model = make_tokenizer(tmp_path / "nfkc.model", texts, **options)
    path, val = write_jsonl(tmp_path / "t.jsonl", texts), write_jsonl(tmp_path / "v.jsonl", [text])
    printed = succeed("docs", path, "--val", val, "--tokenizer", model, "--out", tmp_path / "out")
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: val: ") and words in warnings[0]


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("\n one two\n\nthree\nfour\r\n \r\nfive six\n", "five six\n"),
        ("one two three\nfour five six\nseven\n", "seven\n"),
        (" one two three four five", "five"),
        ("title\n\none two three\nfour five six seven\neight\n", "eight\n"),
        ("title\n\none\ntwo three four five six seven eight", "seven eight"),
        ("\u96ea\n\n" + "\u96ea" * 20, "\u96ea" * 5),
        ("\u96ea" * 20, "\u96ea" * 4),
    ],
)
def test_one_document_is_divided(text: str, tail: str, texts: list[str], tmp_path: Path) -> None:
    """At a paragraph, where none is near at a line, where none is near at a word. Nothing is lost."""
    path, out = tmp_path / "book.TXT", tmp_path / "out"
    path.write_bytes(text.encode())
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    tokenizer = make_tokenizer(tmp_path / "exact.model", texts, **exact)
    options = ("docs", path, "--tokenizer", tokenizer, "--val-fraction", "0.2", "--out", out)
    message = f"one document: its last {len(tail)} of {len(text)} characters are held out for validation"
    assert message in succeed(*options)
    assert decoded(out, "train") + decoded(out, "val") == [text.removesuffix(tail), tail]


def test_one_document_that_is_one_character(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", " x\n"])
    assert "cannot be divided" in fail("docs", path, "--tokenizer", tokenizer, "--out", tmp_path / "out")


def test_lines_without_text_are_skipped_and_counted(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "a.JSONL", texts), tmp_path / "out"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3:3] = [b'{"text": null}\n', b"{oops\n", b"[1]\n", b'{"text": "\\ud800"}\n', b'"\xff"\n']
    path.write_bytes(b"".join(lines))
    options = ("docs", path, "--val-fraction", "0.2", "--tokenizer", tokenizer, "--out", out)
    assert "a.JSONL line 4: 'text' is no text" in fail(*options)
    printed = succeed(*options, "--skip-bad")
    assert f"skipped 5 lines without text, the first: {path} line 4: 'text' is no text" in printed
    assert manifest_of(out)["skipped_lines"] == 5
    assert sorted(decoded(out, "train") + decoded(out, "val")) == sorted(texts)


def test_a_file_without_text_beside_others_is_said(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    names = ("a.jsonl", "b.txt", "c.jsonl.GZ")
    for name in names:
        (tmp_path / name).write_bytes(compressed(Path(name.lower()).suffix, b"\n"))
    printed = succeed("docs", corpus, *(tmp_path / name for name in names), "--val-fraction", "0.2",
                      "--tokenizer", tokenizer, "--out", tmp_path / "out")  # fmt: skip
    assert [line for line in printed.splitlines() if "warning" in line] == [
        f"warning: {tmp_path / name}: no text in it" for name in names]


GOOD = b'{"text": "a good line"}\n'
RANDOM = random.Random(3).randbytes(4000)
MANY = b"".join(b'{"text": "%s"}\n' % RANDOM[n : n + 40].hex().encode() for n in range(0, 4000, 40))
BAD_FILES = {
    "foreign name": ("a.csv", b"x,y", "a.csv: unknown kind of file"),
    "binary": ("a.jsonl", b"\x89PNG\r\n" + RANDOM, "a.jsonl line 1: not valid JSON"),
    "bad line": ("a.jsonl", GOOD * 2 + b"{oops\n" + GOOD, "a.jsonl line 3: not valid JSON"),
    "array": ("a.jsonl", GOOD + b"[1]\n", "a.jsonl line 2: not a JSON object"),
    "no key": ("a.jsonl", GOOD + b'{"body": "x"}\n', "a.jsonl line 2: no text under 'text'"),
    "no string": ("a.jsonl", GOOD + b'{"text": 3}\n', "a.jsonl line 2: 'text' is no text"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1: text with half a surrogate pair"),
    "not UTF-8": ("a.txt", b"\xff\xfe\x00", "a.txt: not UTF-8"),
    "not gzip": ("a.jsonl.gz", RANDOM, "a.jsonl.gz: cannot be read"),
    "not xz": ("a.jsonl.xz", RANDOM, "a.jsonl.xz: cannot be read"),
    "not zstd": ("a.jsonl.zst", RANDOM, "a.jsonl.zst: cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(MANY)[:-900], "a.jsonl.gz: cannot be read"),
    "cut xz": ("a.txt.xz", lzma.compress(MANY)[:-900], "a.txt.xz: cannot be read"),
    "empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz: cannot be read (the file is empty"),
    "empty xz": ("a.txt.xz", b"", "a.txt.xz: cannot be read (the file is empty"),
    "empty zstd": ("a.txt.zst", b"", "a.txt.zst: cannot be read (the file is empty"),
    "more than gzip": ("a.jsonl.gz", gzip.compress(GOOD) + GOOD, "a.jsonl.gz: cannot be read"),
    "more than xz": ("a.jsonl.xz", lzma.compress(GOOD) + GOOD, "a.jsonl.xz: cannot be read"),
    "more than zstd": ("a.jsonl.zst", zstandard.compress(GOOD) + GOOD, "a.jsonl.zst: cannot be read"),
    "cut zstd": ("a.txt.zst", zstandard.compress(MANY)[:-900], "a.txt.zst: cannot be read (the file ends in"),
    "no document": ("a.jsonl", b"\n", "no document in the train split"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    name, data, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert message in fail("docs", path, "--val", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_arguments(corpus: Path, texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    use = ("--tokenizer", tokenizer, *out)
    assert "gone.jsonl: no such file" in fail("docs", tmp_path / "gone.jsonl", *use)
    assert "both training and validation" in fail("docs", corpus, "--val", corpus, *use)
    assert "text under 'body'" in fail("docs", corpus, "--text-key", "body", *use)
    assert "no document in the val split" in fail("docs", corpus, "--val-fraction", "0.000001", *use)
    assert "not between 0 and 1" in fail("docs", corpus, "--val-fraction", "1.5", *use)
    assert "required" in fail("docs", corpus, *out)
    assert "unrecognized arguments: --shards" in fail("docs", corpus, *use, "--shards=5")
    assert "not at least 264 and at most 65535" in fail("docs", corpus, "--vocab-size", 70000, *out)
    assert "Vocabulary size too high" in fail("docs", corpus, "--vocab-size", 60000, *out)
    assert "gone.model" in fail("docs", corpus, "--tokenizer", tmp_path / "gone.model", *out)
    (tmp_path / "text.model").write_text("not a model")
    message = fail("docs", corpus, "--tokenizer", tmp_path / "text.model", *out)
    assert "text.model: not a SentencePiece model" in message
    (tmp_path / "text.model").unlink()
    words = make_tokenizer(tmp_path / "word.model", texts, model_type="word", byte_fallback=True)
    assert "spells a space as the three bytes" in fail("docs", corpus, "--tokenizer", words, *out)
    other = make_tokenizer(tmp_path / "bos.model", texts, bos_id=2, eos_id=1)
    assert "BOS id is 2" in fail("docs", corpus, "--tokenizer", other, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bos.model", "corpus.jsonl", "word.model"]


# ---------------------------------------------------------------------------------------------------
# embedded


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="the embedded corpus is made of torch's docstrings, and torch is not installed",
)


@needs_torch
def test_embedded_corpus(embedded: Path, tmp_path: Path) -> None:
    """Built, recognised, and not recognised after a change of versions."""
    manifest = manifest_of(embedded)
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    assert train["raw_bytes"] > 3_000_000 and val["documents"] > 20
    assert 0.01 < val["raw_bytes"] / train["raw_bytes"] < 0.15
    documents = split_documents(embedded, "train") + split_documents(embedded, "val")
    assert len({tuple(ids) for ids in documents}) > 0.99 * len(documents)  # equal only once normalised
    together = decoded(embedded, "train") + decoded(embedded, "val")
    assert any(text.startswith('The "yield" statement') for text in together)
    assert "up to date" in succeed("embedded", "--out", embedded)
    assert finished_corpus(embedded, manifest["versions"], 1024)
    assert not finished_corpus(embedded, manifest["versions"] | {"numpy": "0.0"}, 1024)
    assert not finished_corpus(embedded, manifest["versions"], 400)


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order sets have in this process."""
    texts = [f"{word} number {n} of a few. " * 5 for n in range(120) for word in ("apple", "pear", "plum")]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for seed in "12":
        succeed("docs", source, "--vocab-size", 300, "--val-fraction", 0.2, "--out", tmp_path / seed, seed=seed)
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


@needs_torch
def test_embedded_leaves_other_folders_alone(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("docs", corpus, "--tokenizer", tokenizer, "--val-fraction", "0.2", "--out", out)
    before = folder_bytes(out)
    assert "is no embedded corpus" in fail("embedded", "--out", out)
    assert folder_bytes(out) == before


# ---------------------------------------------------------------------------------------------------
# fineweb, against a server that answers like the hub


def shard(tokens: int, promised: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens if promised is None else promised
    return header.tobytes() + np.random.default_rng(tokens).integers(1, 1024, tokens).astype("<u2").tobytes()


class Hub(ThreadingHTTPServer):
    """The hub's download addresses for one dataset repository, on 127.0.0.1."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.repo = "willdepueoai/parameter-golf"
        self.got: list[tuple[str, str]] = []  # (path, Range header) of each GET
        self.cut: set[str] = set()  # paths whose next GET breaks off half-way
        self.home = ""  # HF_HOME of the client
        self.revision = "0" * 40
        self.token = ""  # the only one that is accepted, where one is sent

    def variables(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": self.home}

    def shards_got(self) -> list[str]:
        """Names of the shards fetched since the last call."""
        names = [Path(path).name for path, _ in self.got if path.endswith(".bin")]
        self.got.clear()
        return names


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        start = f"/datasets/{self.server.repo}/resolve/{self.server.revision}/"
        asked_for = self.path.replace("/resolve/main/", f"/resolve/{self.server.revision}/")
        path = asked_for.removeprefix(start)
        data = self.server.files.get(path)
        if self.headers.get("Authorization", f"Bearer {self.server.token}") != f"Bearer {self.server.token}":
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not asked_for.startswith(start) or data is None:
            self.send_response(404)
            code = "EntryNotFound" if asked_for.startswith(start) else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range", "") if send_body else ""
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        body = data[first:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.revision)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if send_body:
            self.server.got.append((path, asked))
            if path in self.server.cut:
                self.server.cut.remove(path)
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)


@pytest.fixture
def hub(texts: list[str], tmp_path: Path) -> Iterator[Hub]:
    reason = "prepare.py fineweb downloads with huggingface_hub: pip install -r data/requirements.txt"
    pytest.importorskip("huggingface_hub", reason=reason)
    model = make_tokenizer(tmp_path / "m.model", texts, vocab_size=1024)
    dataset = {
        "name": "fineweb10B_sp1024",
        "tokenizer_name": "sp_bpe_1024",
        "stats": {"files_train": 3, "files_val": 1},
    }
    pieces = {"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}
    folder = "datasets/datasets/fineweb10B_sp1024"
    files = {
        "datasets/manifest.json": json.dumps({"datasets": [dataset], "tokenizers": [pieces]}).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": model.read_bytes(),
        f"{folder}/fineweb_val_000000.bin": shard(3_000),
    }
    files |= {f"{folder}/fineweb_train_{n:06d}.bin": shard(50_000 + n) for n in range(3)}
    model.unlink()
    server = Hub(files)
    server.home = str(tmp_path / "home")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SHARD = "datasets/datasets/fineweb10B_sp1024/fineweb_train_00000{}.bin"


def test_fineweb_downloads_and_resumes(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder = root / "datasets" / "fineweb10B_sp1024"
    options = ("fineweb", "--train-shards", 2, "--out", root)
    printed = succeed(*options, **hub.variables())
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    expected = {name: hub.files[f"datasets/datasets/fineweb10B_sp1024/{name}"] for name in names}
    assert shard_bytes(folder) == expected
    model = root / "tokenizers" / "fineweb_1024_bpe.model"
    assert folder_bytes(model.parent) == {model.name: hub.files[f"datasets/tokenizers/{model.name}"]}
    assert printed.splitlines()[-1] == f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE=1024 ./run.sh"
    cached = [path for path in Path(hub.home).rglob("*") if path.is_file() and path.stat().st_size > 5_000]
    assert not cached, "the hub client kept a second copy"
    assert sorted(hub.shards_got()) == names

    succeed(*options, **hub.variables())
    assert hub.shards_got() == []
    os.truncate(folder / names[1], 40_000)
    (folder / names[2]).write_bytes(b"")
    succeed(*options, **hub.variables())
    assert sorted(hub.shards_got()) == names[1:]
    assert shard_bytes(folder) == expected
    succeed("fineweb", "--train-shards", 3, "--out", root, **hub.variables())
    assert hub.shards_got() == ["fineweb_train_000002.bin"]


def test_fineweb_continues_after_a_broken_connection(hub: Hub, tmp_path: Path) -> None:
    hub.files[SHARD.format(0)] = shard(12_000_000)  # the client keeps what came in whole blocks of 10 MB
    hub.cut = {SHARD.format(0)}
    succeed("fineweb", "--train-shards", 1, "--out", tmp_path / "data", **hub.variables())
    assert [bool(asked) for path, asked in hub.got if path == SHARD.format(0)] == [False, True]
    local = tmp_path / "data" / "datasets" / "fineweb10B_sp1024" / "fineweb_train_000000.bin"
    assert local.read_bytes() == hub.files[SHARD.format(0)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (shard(1000, promised=2000), "promises 2000 tokens"),
        (b"\0\0\0\0" + shard(1000)[4:], "header starts with 0, 1"),
        (b"<html>", "only 6 bytes"),
    ],
)
def test_fineweb_refuses_a_lying_shard(data: bytes, message: str, hub: Hub, tmp_path: Path) -> None:
    hub.files[SHARD.format(1)] = data
    line = fail("fineweb", "--train-shards", 2, "--out", tmp_path / "data", **hub.variables())
    assert "fineweb_train_000001.bin" in line and message in line
    left = shard_bytes(tmp_path / "data" / "datasets" / "fineweb10B_sp1024")
    assert sorted(left) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]


def test_fineweb_errors(hub: Hub, tmp_path: Path) -> None:
    options = ("fineweb", "--train-shards", 1, "--out", tmp_path / "data")
    assert "has 3 training shards" in fail("fineweb", "--out", tmp_path / "data", **hub.variables())
    missing = fail(*options, **hub.variables(), MATCHED_FINEWEB_REPO_ID="some/where")
    assert "some/where" in missing and "MATCHED_FINEWEB_REPO_ID" in missing
    missing = fail(*options, **hub.variables(), MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="elsewhere")
    assert "elsewhere/manifest.json" in missing
    hub.files["datasets/manifest.json"] = b'{"datasets": 3}'
    assert "manifest.json does not describe" in fail(*options, **hub.variables())
    hub.files["datasets/manifest.json"] = b"[]"
    assert "manifest.json does not describe" in fail(*options, **hub.variables())
    assert list((tmp_path / "data" / "datasets").iterdir()) == []


def test_fineweb_without_network(hub: Hub, tmp_path: Path) -> None:
    """Offline by setting; a network that is down ends the same way, after half a minute of retries."""
    variables = hub.variables() | {"HF_HUB_OFFLINE": "1"}
    assert "check the network" in fail("fineweb", "--out", tmp_path / "data", **variables)


def test_fineweb_from_another_repository(hub: Hub, tmp_path: Path) -> None:
    hub.repo = "my/copy"
    hub.files = {path.removeprefix("datasets/"): data for path, data in hub.files.items()}
    variables = {"MATCHED_FINEWEB_REPO_ID": "my/copy", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    succeed("fineweb", "--train-shards", 1, "--out", tmp_path / "data", **hub.variables(), **variables)
    assert len(hub.shards_got()) == 2


def retokenised(hub: Hub, texts: list[str], tmp_path: Path) -> None:
    """A new revision of the hub: another tokenizer, and all shards but one are others."""
    model = make_tokenizer(tmp_path / "n.model", texts[1:], vocab_size=1024)
    hub.files["datasets/tokenizers/fineweb_1024_bpe.model"] = model.read_bytes()
    for number in range(2):
        hub.files[SHARD.format(number)] = shard(60_000 + number)
    hub.revision = "1" * 40


@pytest.mark.parametrize("left", ["manifest", "no manifest", "odd manifest"])
def test_fineweb_of_a_changed_hub_is_fetched_again(left: str, hub: Hub, texts: list[str], tmp_path: Path) -> None:
    """Whatever is here ends as one revision's shards and tokenizer; what is the same there is not fetched twice."""
    root = tmp_path / "data"
    folder = root / "datasets" / "fineweb10B_sp1024"
    succeed("fineweb", "--train-shards", 3, "--out", root, **hub.variables())
    if left == "no manifest":
        (folder / "manifest.json").unlink()
    if left == "odd manifest":
        (folder / "manifest.json").write_text('{"origin": {"repository": null, "revision": 3}}')
    hub.shards_got()
    retokenised(hub, texts, tmp_path)
    printed = succeed("fineweb", "--train-shards", 1, "--out", root, **hub.variables())
    was = {"manifest": f"{hub.repo} at {'0' * 40}", "no manifest": "unknown origin", "odd manifest": "None at 3"}[left]
    assert f"the shards here are of {was}; comparing" in printed
    assert sorted(hub.shards_got()) == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    for name, data in shard_bytes(folder).items():
        assert data == hub.files[f"datasets/datasets/fineweb10B_sp1024/{name}"]
    model = (root / "tokenizers" / "fineweb_1024_bpe.model").read_bytes()
    assert model == hub.files["datasets/tokenizers/fineweb_1024_bpe.model"]
    manifest = manifest_of(folder)
    assert manifest["origin"] == {"repository": hub.repo, "revision": "1" * 40}
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert "comparing" not in succeed("fineweb", "--train-shards", 1, "--out", root, **hub.variables())
    assert hub.shards_got() == []


def test_fineweb_interrupted_between_two_revisions_is_not_usable(hub: Hub, texts: list[str], tmp_path: Path) -> None:
    """Shards of both lie there until a launch succeeds, also where it goes back to the first one's tokenizer."""
    root = tmp_path / "data"
    folder, model = root / "datasets" / "fineweb10B_sp1024", root / "tokenizers" / "fineweb_1024_bpe.model"
    options = ("fineweb", "--train-shards", 2, "--out", root)
    variables = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(model)}
    command = [sys.executable, str(SCRIPT.parents[1] / "train_gpt.py"), "--check"]

    def check() -> str:
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode in (0, 2), done.stderr
        return done.stderr

    succeed(*options, **hub.variables())
    assert check() == ""
    first, before = dict(hub.files), model.read_bytes()
    retokenised(hub, texts, tmp_path)
    second = dict(hub.files)
    for files, revision in ((second, "1" * 40), (first, "0" * 40)):
        hub.files, hub.revision = files | {SHARD.format(int(revision[0])): b"<html>"}, revision
        assert f"fineweb_train_00000{revision[0]}.bin" in fail(*options, **hub.variables())
        assert model.read_bytes() == before and "its shards may be of several origins" in check()

    hub.files, hub.revision = second, "1" * 40
    hub.shards_got()
    succeed(*options, **hub.variables())
    assert hub.shards_got() == ["fineweb_train_000001.bin"] and check() == ""


def test_fineweb_of_another_repository_keeps_what_that_lacks(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder = root / "datasets" / "fineweb10B_sp1024"
    succeed("fineweb", "--train-shards", 3, "--out", root, **hub.variables())
    before = shard_bytes(folder)
    hub.repo = "my/copy"
    hub.files["datasets/manifest.json"] = hub.files["datasets/manifest.json"].replace(b": 3", b": 2")
    options = ("fineweb", "--train-shards", 2, "--out", root)
    message = fail(*options, **hub.variables(), MATCHED_FINEWEB_REPO_ID="my/copy")
    assert "fineweb_train_000002.bin, which my/copy does not have; move it away" in message
    assert shard_bytes(folder) == before


@pytest.mark.parametrize("token", ["hf_old", "hf_\u00e9"])
def test_a_token_that_the_hub_does_not_accept(token: str, hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_new"
    message = fail("fineweb", "--out", tmp_path / "data", **hub.variables(), HF_TOKEN=token)
    assert "the hub does not accept HF_TOKEN" in message
    options = ("fineweb", "--train-shards", 1, "--out", tmp_path / "data")
    succeed(*options, **hub.variables(), HF_TOKEN="hf_new")
