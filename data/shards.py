"""A corpus folder: its shards, its tokenizer and its manifest. The form of a shard is told in prepare.py."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from errors import PrepareError
from texts import TRAIN, VAL
from tokenizer import BOS, SPACE, Tokenizer

DATA_ROOT = Path(__file__).resolve().parent
HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
SHARD_TOKENS = 100_000_000
TOLERATED = 0.005  # share of the text's bytes that normalisation may add, or that may be unknown, without a word
BATCH_CHARS = 4_000_000  # text held in memory before it is tokenised


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def as_json(manifest: dict) -> bytes:
    """A manifest as it stands in its file."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def shard_name(split: str, number: int) -> str:
    return f"fineweb_{split}_{number:06d}.bin"


def shard_fault(path: Path) -> str:
    """What is wrong with a shard file, judged by its header and size; "" if nothing."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(12)
    if len(header) < 12:
        return f"only {size} bytes"
    magic, version, tokens = struct.unpack("<3i", header)
    if (magic, version) != (MAGIC, VERSION):
        return f"header starts with {magic}, {version} instead of {MAGIC}, {VERSION}"
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        return f"header promises {tokens} tokens, the file's size is {size} bytes"
    return ""


class SplitWriter:
    """Writes one split's documents into shards and keeps its figures."""

    def __init__(self, split: str, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        self._split, self._folder, self._tokenizer, self._shard_tokens = split, folder, tokenizer, shard_tokens
        self._file, self._in_shard = None, 0
        self._texts, self._chars = [], 0
        self.documents = self.tokens = self.empty = 0
        self.raw_bytes = self.counted_bytes = self.lost_bytes = self.space_marks = 0
        self.files = []

    def add(self, text: str) -> None:
        """Takes one document; written with its batch or at finish()."""
        self._texts.append(text)
        self._chars += len(text)
        if self._chars >= BATCH_CHARS:
            self._write_batch()

    def finish(self) -> dict:
        """Completes the last shard; returns the split's part of the manifest. PrepareError if empty."""
        self._write_batch()
        self._close_shard()
        if not self.documents:
            remedy = "give --val or a larger --val-fraction" if self._split == VAL else "give more documents"
            raise PrepareError(f"no document in the {self._split} split; {remedy}")
        figures = ("documents", "tokens", "raw_bytes", "counted_bytes", "lost_bytes", "space_marks", "files")
        return {name: getattr(self, name) for name in figures}

    def _write_batch(self) -> None:
        import numpy as np

        ids = []
        for text, encoded in zip(self._texts, self._tokenizer.encode(self._texts), strict=True):
            if not encoded or not text.strip():  # white space only, or nothing else once normalised
                self.empty += 1
                continue
            ids.append(BOS)
            ids.extend(encoded)
            self.documents += 1
            self.raw_bytes += len(text.encode())
            self.lost_bytes += self._tokenizer.lost_bytes(text, encoded)
            self.space_marks += text.count(SPACE)
        self._texts, self._chars = [], 0
        tokens = np.array(ids, dtype="<u2")
        self.tokens += len(tokens)
        self.counted_bytes += self._tokenizer.counted_bytes(tokens)
        while len(tokens):
            if self._file is None:
                self._file = open(self._folder / shard_name(self._split, len(self.files)), "w+b")
                self._file.write(bytes(HEADER_BYTES))
            part = tokens[: self._shard_tokens - self._in_shard]
            self._file.write(part.tobytes())
            self._in_shard += len(part)
            tokens = tokens[len(part) :]
            if self._in_shard == self._shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(struct.pack("<3i", MAGIC, VERSION, self._in_shard))
        self._file.close()
        path = Path(self._file.name)
        self.files.append({"name": path.name, "tokens": self._in_shard, "sha256": sha256_file(path)})
        print(f"{path.name}: {self._in_shard:,} tokens", flush=True)
        self._file, self._in_shard = None, 0


def check_replaceable(folder: Path) -> None:
    """Refuses to replace a folder that holds anything this script does not write. Raises PrepareError."""
    for path in folder.iterdir():
        if path.name not in ("manifest.json", "tokenizer.model", "verified.json") and not path.match("fineweb_*.bin"):
            raise PrepareError(f"{folder} holds {path.name} besides a corpus; choose another --out")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name, in place of what was there, only if the block succeeds."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_corpus(documents: Iterable[tuple[str, str]], out: Path, tokenizer: Tokenizer, shard_tokens: int,
                 facts: dict) -> None:
    """Writes (split, text) documents as a corpus folder and prints how to train on it.

    `facts` are further entries for its manifest.json. Raises PrepareError.
    """
    with staged(out) as folder:
        writers = {split: SplitWriter(split, folder, tokenizer, shard_tokens) for split in (TRAIN, VAL)}
        for split, text in documents:
            writers[split].add(text)
        manifest = facts | {
            "splits": {split: writer.finish() for split, writer in writers.items()},
            "empty_documents": sum(writer.empty for writer in writers.values()),
            "tokenizer": tokenizer.facts(),
        }
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        (folder / "manifest.json").write_bytes(as_json(manifest))
    for split, figures in manifest["splits"].items():
        print(f"{split}: {figures['documents']:,} documents, {figures['tokens']:,} tokens, "
              f"{figures['raw_bytes']:,} bytes of text, {figures['counted_bytes']:,} counted")
        for note in notes(figures):
            print(f"note: {split}: {note}")
        for doubt in doubts(figures):
            print(f"warning: {split}: {doubt}")
    if manifest["empty_documents"]:
        print(f"skipped {manifest['empty_documents']:,} empty documents")
    print_command(out, out / "tokenizer.model", tokenizer.vocab_size)


def notes(figures: dict) -> list[str]:
    """What the tokens do not keep of a split's text, a line each."""
    raw, marks = figures["raw_bytes"], figures["space_marks"]
    known = raw - figures["lost_bytes"] - marks * (len(SPACE.encode()) - 1)
    changed = known - figures["counted_bytes"]
    lines = [f"{marks:,} characters {SPACE} (U+2581) become spaces"] if marks else []
    if changed > 0:
        lines.append(f"the tokenizer drops {changed:,} bytes of {raw:,}, mostly line breaks and other white space; BPB "
                     "is of the bytes counted, and summary.json has it of all bytes too")
    return lines


def doubts(figures: dict) -> list[str]:
    """What a split's figures say against its BPB, a line each."""
    raw, counted, lost = (figures[name] for name in ("raw_bytes", "counted_bytes", "lost_bytes"))
    lines = []
    if counted > (1 + TOLERATED) * raw:
        lines.append(f"the tokenizer's normalisation makes {counted:,} bytes of {raw:,}, so BPB is too low; "
                     "--vocab-size makes a tokenizer that keeps text as it is")
    if lost > TOLERATED * raw:
        lines.append(f"the tokenizer does not know characters of {lost:,} of {raw:,} bytes, which BPB leaves out; "
                     "take one with byte fallback")
    return lines


def print_command(dataset: Path, model: Path, vocab_size: int) -> None:
    """Prints the command that trains on a data set, to be run in the folder above this script's."""

    def shown(path: Path) -> str:
        project = DATA_ROOT.parent
        return shlex.quote(str(path.relative_to(project) if path.is_relative_to(project) else path))

    print("Train on it with:")
    print(f"DATA_PATH={shown(dataset)} TOKENIZER_PATH={shown(model)} VOCAB_SIZE={vocab_size} ./run.sh")
