"""Documents out of .jsonl and .txt files, plain or compressed, and the split that each falls into."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
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
    if path.suffix in (".xz", ".gz", ".zst"):
        name, compression = path.stem, path.suffix
    stem, kind = os.path.splitext(name)
    if kind not in (".jsonl", ".txt"):
        raise PrepareError(f"{path}: unknown kind of file; give .jsonl or .txt, plain or as .xz, .gz or .zst")
    return stem, kind, compression


def zstd_blocks(path: Path) -> Iterator[bytes]:
    """Decompressed blocks of a .zst file of one or more frames.

    The library's own reader takes a file cut in the middle of a frame for a complete one, which would silently
    shorten a corpus; this one raises EOFError.
    """
    import zstandard

    decompressor, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    with open(path, "rb") as file:
        while data := file.read(1 << 16):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                yield block
                data = frame.unused_data
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


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
    import gzip
    import lzma

    if compression == ".zst":
        return io.BufferedReader(BlockStream(zstd_blocks(path)), 1 << 16)
    return {".xz": lzma.open, ".gz": gzip.open, "": open}[compression](path, "rb")


def json_text(line: bytes, where: str, key: str) -> str:
    """The text in one .jsonl line; `where` names the line in a PrepareError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({first_line(error)})"
        raise PrepareError(f"{where}: {reason}; a .jsonl file holds one JSON object a line") from error
    if not isinstance(record, dict):
        raise PrepareError(f"{where}: not a JSON object; write it as {{{json.dumps(key)}: ...}}")
    if not isinstance(record.get(key), str):
        found = ", ".join(sorted(record)[:8]) or "no keys"
        raise PrepareError(f"{where}: no text under {key!r} (found: {found}); name the key with --text-key")
    try:
        record[key].encode()
    except UnicodeEncodeError as error:
        raise PrepareError(f"{where}: text with half a surrogate pair; mend or drop this line") from error
    return record[key]


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The file's documents: each line of a .jsonl, the whole of a .txt. Raises PrepareError."""
    _, kind, compression = file_kind(path)
    import lzma
    import zlib

    try:
        with open_bytes(path, compression) as stream:
            if kind == ".txt":
                yield stream.read().decode("utf-8-sig")
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield json_text(line, f"{path} line {number}", key)
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise PrepareError(f"{path}: cannot be read ({first_line(error)}); check or replace it") from error
