"""Documents out of .jsonl and .txt files, plain or compressed, and the split that each falls into."""

import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from errors import PrepareError, first_line

TRAIN, VAL = "train", "val"


def text_hash(text: str) -> bytes:
    """SHA-256 of a document's text. Bytes 0-7 decide its split, the later ones any order made from it."""
    return hashlib.sha256(text.encode()).digest()


def split_of(text: str, val_fraction: float) -> str:
    """Split of a document: a text lands in the same one in every run and order."""
    return VAL if int.from_bytes(text_hash(text)[:8], "big") / 2**64 < val_fraction else TRAIN


def file_kind(path: Path) -> tuple[str, str, str]:
    """(stem, kind, compression) by name, as ("notes", ".jsonl", ".xz"); "" for uncompressed. Raises PrepareError."""
    name, compression = path.name, ""
    if path.suffix.lower() in NEW_STREAM:
        name, compression = path.stem, path.suffix.lower()
    stem, kind = os.path.splitext(name)
    if kind.lower() not in (".jsonl", ".txt"):
        raise PrepareError(f"{path}: unknown kind of file; give .jsonl or .txt, plain or as .xz, .gz or .zst")
    return stem, kind.lower(), compression


def zstd_stream():
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# How each compression's decompressor is made. A file is one stream or several, one after another.
NEW_STREAM = {
    ".xz": lzma.LZMADecompressor,
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: with gzip's header
    ".zst": zstd_stream,
}


def decompressed(path: Path, new_stream: Callable) -> Iterator[bytes]:
    """Blocks of a compressed file's text. Raises EOFError or OSError where it is not whole.

    The libraries' own readers pass over an empty file, bytes behind the end and (zstandard) a cut in the middle, which
    would silently shorten a corpus.
    """
    stream, streams = None, 0
    with open(path, "rb") as file:
        while data := file.read(1 << 16):
            while data:
                if stream is None and streams:
                    data = data.lstrip(b"\0")  # padding between streams and behind the last
                    if not data:
                        break
                if stream is None:
                    stream, streams = new_stream(), streams + 1
                try:
                    block = stream.decompress(data)
                except Exception as error:  # each library has errors of its own
                    raise OSError(first_line(error)) from error
                yield block
                data = stream.unused_data
                if stream.eof:
                    stream = None
    if stream is not None:
        raise EOFError("the file ends in the middle")
    if streams == 0:
        raise EOFError("the file is empty")


class BlockStream(io.RawIOBase):
    """Blocks of bytes as a file to read."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._ready = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and (block := next(self._blocks, None)) is not None:
            self._ready = memoryview(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def open_bytes(path: Path, compression: str):
    """The file's decompressed bytes, as a stream."""
    if compression == "":
        return open(path, "rb")
    return io.BufferedReader(BlockStream(decompressed(path, NEW_STREAM[compression])), 1 << 16)


def json_text(line: bytes, key: str) -> str:
    """The text in one .jsonl line. Raises PrepareError with what is wrong with the line and what to do."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({first_line(error)})"
        raise PrepareError(f"{reason}; a .jsonl file holds one JSON object a line") from error
    if not isinstance(record, dict):
        raise PrepareError(f"not a JSON object; write it as {{{json.dumps(key)}: ...}}")
    if key in record and not isinstance(record[key], str):
        raise PrepareError(f"{key!r} is no text; mend or drop this line")
    if key not in record:
        found = ", ".join(sorted(record)[:8]) or "no keys"
        raise PrepareError(f"no text under {key!r} (found: {found}); name the key with --text-key")
    try:
        record[key].encode()
    except UnicodeEncodeError as error:
        raise PrepareError("text with half a surrogate pair; mend or drop this line") from error
    return record[key]


class Reader:
    """Reads documents, and notes what a person should know about them.

    A .jsonl line without text is a PrepareError, with `skip_bad` it is passed over and counted.
    """

    def __init__(self, key: str, skip_bad: bool):
        self.key, self.skip_bad = key, skip_bad
        self.notes, self._skipped, self._first = [], 0, ""  # lines to print; lines passed over, and why the first

    def read(self, paths: list[Path]) -> Iterator[str]:
        """The documents of the files: each line of a .jsonl, the whole of a .txt. Raises PrepareError."""
        for path in paths:
            found = False
            try:
                for text in self._texts(path):
                    found = found or bool(text.strip())
                    yield text
            except UnicodeDecodeError as error:
                raise PrepareError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
            except (EOFError, OSError) as error:
                raise PrepareError(f"{path}: cannot be read ({first_line(error)}); check or replace it") from error
            if not found:
                self.notes.append(f"warning: {path}: no text in it")

    def _texts(self, path: Path) -> Iterator[str]:
        _, kind, compression = file_kind(path)
        with open_bytes(path, compression) as stream:
            if kind == ".txt":
                yield stream.read().decode("utf-8-sig")
                return
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    text = json_text(line, self.key)
                except PrepareError as error:
                    where = f"{path} line {number}: {error}"
                    if not self.skip_bad:
                        raise PrepareError(f"{where}, or pass over such lines with --skip-bad") from error
                    self._skipped, self._first = self._skipped + 1, self._first or where
                    continue
                yield text

    def report(self) -> int:
        """Prints the notes; returns how many lines were passed over."""
        if self._skipped:
            self.notes.append(f"skipped {self._skipped:,} lines without text, the first: {self._first}")
        for note in self.notes:
            print(note)
        return self._skipped
