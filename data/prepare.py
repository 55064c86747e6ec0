#!/usr/bin/env python3
"""Make or fetch the token shards that train_gpt.py reads.

    prepare.py docs FILE...   shards from your own .jsonl or .txt files
    prepare.py embedded       a small corpus from the installed Python, torch and numpy; needs no network
    prepare.py fineweb        the published FineWeb shards and their tokenizer

A shard is 256 little-endian int32 words (20240520, 1, token count, zeros) and then little-endian
uint16 tokens. A document is BOS (id 1) and its tokens; a document may span two shards.

Every failure is one line on stderr and exit status 2, and leaves nothing under the final name.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import hashlib
import heapq
import inspect
import io
import json
import os
import platform
import shlex
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:  # numpy is imported where it is used, so that --help and bad arguments answer at once
    import numpy as np

DATA_ROOT = Path(__file__).resolve().parent
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAGIC, VERSION = 20240520, 1
BOS = 1
MAX_VOCAB = 65535  # a token is a uint16
BATCH_CHARS = 4_000_000  # text held in memory before it is tokenised
TOKENIZER_SAMPLE_BYTES = 64_000_000  # text a new tokenizer is trained on: seconds, and under 1 GB of memory
TRAIN, VAL = "train", "val"

# Part of the embedded corpus's identity: raise it whenever the way the corpus is made changes.
EMBEDDED_RECIPE = 1
MIN_DOCSTRING_CHARS = 64  # shorter ones say little more than the name they belong to
EMBEDDED_VAL_FRACTION = 0.05
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
)

FINEWEB_REPOS = {  # variant -> dataset repository on the hub
    "sp1024": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}


class PrepareError(Exception):
    """A failure the user can act on; its text is `<what is wrong>; <what to do>`."""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_hash(text: str) -> bytes:
    """SHA-256 of a document's text. Bytes 0-7 decide its split, the later ones any order made from it."""
    return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """Split of a document with that text hash: a text lands in the same split in every run and order."""
    return VAL if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else TRAIN


# ---------------------------------------------------------------------------------------------------
# Reading documents


class ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    The library's own reader takes a file cut in the middle of a frame for a complete one, which
    would silently shorten a corpus; this one raises EOFError.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._file = open(path, "rb")
        self._frame: Any = None
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._input or self._file.read(1 << 16)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def file_kind(path: Path) -> tuple[str, str, str]:
    """(stem, kind, compression) of a document file, e.g. ("notes", ".jsonl", ".xz"); "" for uncompressed.

    Raises PrepareError for any other name.
    """
    name, compression = path.name, ""
    if path.suffix in (".xz", ".gz", ".zst"):
        name, compression = path.stem, path.suffix
    stem, kind = os.path.splitext(name)
    if kind not in (".jsonl", ".txt"):
        raise PrepareError(f"{path}: unknown kind of file; give .jsonl or .txt, plain or as .xz, .gz or .zst")
    return stem, kind, compression


def open_bytes(path: Path) -> BinaryIO:
    """The file's decompressed bytes, as a stream."""
    compression = file_kind(path)[2]
    if compression == ".xz":
        import lzma

        return lzma.open(path)
    if compression == ".gz":
        import gzip

        return gzip.open(path)  # type: ignore[return-value]
    if compression == ".zst":
        return io.BufferedReader(ZstdStream(path), 1 << 16)  # type: ignore[return-value]
    return open(path, "rb")


def json_text(line: bytes, where: str, key: str) -> str:
    """The text in one .jsonl line; `where` names the line in a PrepareError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PrepareError(
            f"{where}: not valid JSON ({first_line(error)}); a .jsonl file holds one JSON object a line"
        ) from error
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
    kind = file_kind(path)[1]
    import lzma
    import zlib

    try:
        with open_bytes(path) as stream:
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


# ---------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A SentencePiece model and, per token id, what that token counts for in bytes."""

    def __init__(self, model: bytes, source: str) -> None:
        """Loads a model from its file's bytes; `source` names it in errors and in the manifest.

        Raises PrepareError where it cannot serve: not SentencePiece, BOS id not 1, too many pieces,
        a space inside a piece.
        """
        import numpy as np
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise PrepareError(f"{source}: not a SentencePiece model; give a .model file") from error
        if not 0 < pieces.vocab_size() <= MAX_VOCAB:
            raise PrepareError(
                f"{source}: {pieces.vocab_size()} pieces, shards hold at most {MAX_VOCAB}; use a smaller one"
            )
        if pieces.bos_id() != BOS:
            raise PrepareError(
                f"{source}: BOS id is {pieces.bos_id()}, shards need {BOS}; use a tokenizer with bos_id={BOS}"
            )
        self.model, self.source, self.pieces = model, source, pieces
        self.vocab_size: int = pieces.vocab_size()
        self._bytes = np.zeros(self.vocab_size, np.int64)
        self._spaced = np.zeros(self.vocab_size, bool)
        self._boundary = np.zeros(self.vocab_size, bool)
        for token in range(self.vocab_size):
            if pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token):
                self._boundary[token] = True
            elif pieces.is_byte(token):
                self._bytes[token] = 1
            else:
                piece = pieces.id_to_piece(token)
                if "\u2581" in piece[1:]:  # the canonical count knows one space, at the start
                    raise PrepareError(
                        f"{source}: piece {piece!r} marks a space past its start; use a tokenizer without such"
                    )
                self._spaced[token] = piece.startswith("\u2581")
                self._bytes[token] = len(piece.removeprefix("\u2581").encode())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS."""
        return self.pieces.encode(texts, num_threads=os.cpu_count() or 1)

    def counted_bytes(self, tokens: np.ndarray) -> int:
        """Canonical BPB bytes of a run of tokens that begins with BOS.

        Each target counts its piece without the leading space mark, and one byte for that space
        unless the token before is a boundary (control, unknown, unused): there the mark is the
        tokenizer's own addition. A byte piece counts 1, a boundary 0.
        """
        previous, target = tokens[:-1], tokens[1:]
        spaces = self._spaced[target] & ~self._boundary[previous]
        return int(self._bytes[target].sum() + spaces.sum())


def sample_texts(texts: Iterable[str], budget: int) -> list[str]:
    """Texts of at most about `budget` UTF-8 bytes, drawn evenly in one pass, the same ones each time.

    Keeps the texts with the smallest hashes: that needs no knowledge of how many there will be.
    """
    heap: list[tuple[int, str]] = []  # largest hash on top, negated
    held = 0
    for text in texts:
        rank = int.from_bytes(text_hash(text)[8:16], "big")
        heapq.heappush(heap, (-rank, text))
        held += len(text.encode())
        while held > budget and len(heap) > 1:
            held -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts in pieces of at most 1000 characters: SentencePiece drops any above 4192 bytes."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), 1000):
                if (piece := line[start : start + 1000].strip()) and "\0" not in piece:
                    yield piece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model of `vocab_size` pieces, as its file's bytes. Raises PrepareError."""
    import sentencepiece

    lines = list(sentences(sample_texts(texts, TOKENIZER_SAMPLE_BYTES)))
    if not lines:
        raise PrepareError("no training text to make a tokenizer from; give more documents")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            num_threads=1,  # written into the model, so the machine's core count would change its bytes
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = first_line(error).rsplit("] ", 1)[-1].rstrip(".")
        raise PrepareError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text ({reason}); "
            "choose another --vocab-size or give more text"
        ) from error
    return model.getvalue()


# ---------------------------------------------------------------------------------------------------
# Writing a corpus


class SplitWriter:
    """Writes one split's documents into shards and keeps its figures."""

    def __init__(self, split: str, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._split, self._folder, self._tokenizer = split, folder, tokenizer
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._texts: list[str] = []
        self._chars = 0
        self.files: list[dict[str, Any]] = []
        self.documents = self.tokens = self.raw_bytes = self.counted_bytes = self.empty = 0

    def add(self, text: str) -> None:
        """Takes one document; written with its batch or at finish()."""
        self._texts.append(text)
        self._chars += len(text)
        if self._chars >= BATCH_CHARS:
            self._write_batch()

    def finish(self) -> dict[str, Any]:
        """Completes the last shard; returns the split's part of the manifest. PrepareError if empty."""
        self._write_batch()
        self._close_shard()
        if not self.documents:
            remedy = "give --val or a larger --val-fraction" if self._split == VAL else "give more documents"
            raise PrepareError(f"no document in the {self._split} split; {remedy}")
        figures = ("documents", "tokens", "raw_bytes", "counted_bytes", "files")
        return {name: getattr(self, name) for name in figures}

    def _write_batch(self) -> None:
        import numpy as np

        ids: list[int] = []
        for text, encoded in zip(self._texts, self._tokenizer.encode(self._texts), strict=True):
            if not encoded:  # white space only, or nothing else once normalised
                self.empty += 1
                continue
            ids.append(BOS)
            ids.extend(encoded)
            self.documents += 1
            self.raw_bytes += len(text.encode())
        self._texts, self._chars = [], 0
        tokens = np.array(ids, dtype="<u2")
        self.tokens += len(tokens)
        self.counted_bytes += self._tokenizer.counted_bytes(tokens)
        while len(tokens):
            if self._file is None:
                name = f"fineweb_{self._split}_{len(self.files):06d}.bin"
                self._file = open(self._folder / name, "w+b")
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
        ours = path.name in ("manifest.json", "tokenizer.model")
        if not ours and not (path.name.startswith("fineweb_") and path.suffix == ".bin"):
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


def write_corpus(
    documents: Iterable[tuple[str, str]], out: Path, tokenizer: Tokenizer, shard_tokens: int, facts: dict
) -> None:
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
            "tokenizer": {
                "vocab_size": tokenizer.vocab_size,
                "sha256": hashlib.sha256(tokenizer.model).hexdigest(),
                "source": tokenizer.source,
            },
        }
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for split, figures in manifest["splits"].items():
        print(
            f"{split}: {figures['documents']:,} documents, {figures['tokens']:,} tokens, "
            f"{figures['raw_bytes']:,} bytes of text, {figures['counted_bytes']:,} counted"
        )
    if manifest["empty_documents"]:
        print(f"skipped {manifest['empty_documents']:,} empty documents")
    print_command(out, out / "tokenizer.model", tokenizer.vocab_size)


def print_command(dataset: Path, model: Path, vocab_size: int) -> None:
    """Prints the command that trains on a data set, to be run in the folder above this script's."""

    def shown(path: Path) -> str:
        project = DATA_ROOT.parent
        return shlex.quote(str(path.relative_to(project) if path.is_relative_to(project) else path))

    print("Train on it with:")
    print(f"DATA_PATH={shown(dataset)} TOKENIZER_PATH={shown(model)} VOCAB_SIZE={vocab_size} ./run.sh")


# ---------------------------------------------------------------------------------------------------
# docs


def run_docs(args: argparse.Namespace) -> None:
    """Makes a corpus from the user's own files. Raises PrepareError."""
    val_files = args.val or []
    for path in args.files + val_files:
        file_kind(path)
        if not path.is_file():
            raise PrepareError(f"{path}: no such file; check the path")
    both = {path.resolve() for path in args.files} & {path.resolve() for path in val_files}
    if both:
        raise PrepareError(f"{both.pop()} is both training and validation; give it once")

    def documents(training_only: bool = False) -> Iterator[tuple[str, str]]:
        for path in args.files:
            for text in read_texts(path, args.text_key):
                split = TRAIN if val_files else split_of(text_hash(text), args.val_fraction)
                if split == TRAIN or not training_only:
                    yield split, text
        for path in [] if training_only else val_files:
            for text in read_texts(path, args.text_key):
                yield VAL, text

    tokenizer = None
    if args.tokenizer:  # loaded first: the default folder's name holds its size
        try:
            tokenizer = Tokenizer(args.tokenizer.read_bytes(), args.tokenizer.name)
        except OSError as error:
            raise PrepareError(f"{args.tokenizer}: {error.strerror}; check the path") from error
    vocab_size = tokenizer.vocab_size if tokenizer else args.vocab_size
    default = DATA_ROOT / "datasets" / f"{file_kind(args.files[0])[0]}_sp{vocab_size}"
    out = (args.out or default).resolve()
    if out.exists():
        if not args.force or not out.is_dir():
            remedy = " or replace it with --force" if out.is_dir() else ""
            raise PrepareError(f"{out} already exists; choose another --out{remedy}")
        check_replaceable(out)
    if tokenizer is None:
        print(f"training a tokenizer of {vocab_size} pieces", flush=True)
        model = train_tokenizer((text for _, text in documents(training_only=True)), vocab_size)
        tokenizer = Tokenizer(model, "trained on the training split")
    write_corpus(documents(), out, tokenizer, args.shard_tokens, {"kind": "docs"})


# ---------------------------------------------------------------------------------------------------
# embedded


def parse_quietly(path: Path) -> ast.Module:
    """Syntax tree of a Python file, which is not run. Raises SyntaxError or ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's strings
        return ast.parse(path.read_bytes())


def docstrings(path: Path) -> str:
    """A Python file's docstrings in the order they stand in it, joined into one document; "" if none.

    One document a file, not one a docstring: a single docstring is mostly too short (a few hundred
    bytes) for a language model to use what came before, and those of one file are about one thing.
    """
    try:
        tree = parse_quietly(path)
    except (SyntaxError, ValueError):  # a template, or code for another Python version
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= MIN_DOCSTRING_CHARS:
                found.append((getattr(node, "lineno", 0), text))
    found.sort(key=lambda item: item[0])
    return "\n\n".join(text for _, text in found)


def language_reference(stdlib: Path) -> list[str]:
    """The topics of the language reference that `help()` shows, each one document. Raises PrepareError."""
    path = stdlib / "pydoc_data" / "topics.py"
    try:
        for node in parse_quietly(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
                return [inspect.cleandoc(text) for text in ast.literal_eval(node.value).values()]
        reason = "no `topics` in it"
    except (OSError, ValueError, SyntaxError) as error:
        reason = first_line(error)
    raise PrepareError(f"cannot read {path} ({reason}); install the complete Python standard library")


def embedded_texts(roots: list[Path]) -> list[str]:
    """The embedded corpus's documents, without duplicates, in an order that mixes the sources."""
    import multiprocessing
    import signal

    files = [
        path
        for root in roots
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    # Workers leave Ctrl-C to this process, which stops them.
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.Pool(initializer=signal.signal, initargs=ignore_interrupt) as pool:
        texts = pool.map(docstrings, files, chunksize=16)
    by_hash = {}
    for text in language_reference(roots[0]) + texts:
        text = text.encode(errors="ignore").decode()  # a docstring may hold half a surrogate pair
        if text.strip():
            by_hash[text_hash(text)] = text
    return [by_hash[digest] for digest in sorted(by_hash, key=lambda digest: digest[8:])]


def finished_corpus(out: Path, versions: dict[str, str], vocab_size: int) -> bool:
    """Whether `out` is a whole embedded corpus of these versions. PrepareError if it is none at all."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest["kind"] != "embedded":
            raise ValueError("another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{out} is no embedded corpus; remove it or choose another --out") from error
    try:
        if manifest["versions"] != versions or manifest["tokenizer"]["vocab_size"] != vocab_size:
            return False
        hashes = {"tokenizer.model": manifest["tokenizer"]["sha256"]}
        for split in (TRAIN, VAL):
            hashes |= {file["name"]: file["sha256"] for file in manifest["splits"][split]["files"]}
        return all(sha256_file(out / name) == digest for name, digest in hashes.items())
    except (OSError, KeyError, TypeError):
        return False


def run_embedded(args: argparse.Namespace) -> None:
    """Builds the embedded corpus unless it is there already. Raises PrepareError."""
    import importlib.metadata
    import importlib.util
    import sysconfig

    out = (args.out or DATA_ROOT / "datasets" / f"embedded_sp{args.vocab_size}").resolve()
    versions = {"recipe": str(EMBEDDED_RECIPE), "python": platform.python_version()}
    roots = [Path(sysconfig.get_path("stdlib"))]
    try:
        for package in ("torch", "numpy", "sentencepiece"):
            versions[package] = importlib.metadata.version(package)
        for package in ("torch", "numpy"):
            spec = importlib.util.find_spec(package)  # finds the package without importing it
            roots.append(Path(spec.origin).parent)  # type: ignore[union-attr,arg-type]
    except importlib.metadata.PackageNotFoundError as error:
        raise PrepareError(f"{error.name} is not installed; install it, the corpus is made of it") from error
    if out.exists():
        if finished_corpus(out, versions, args.vocab_size):
            print(f"{out} is complete and up to date")
            return
        check_replaceable(out)
    print("reading the docstrings of Python, torch and numpy", flush=True)
    documents = [(split_of(text_hash(text), EMBEDDED_VAL_FRACTION), text) for text in embedded_texts(roots)]
    model = train_tokenizer((text for split, text in documents if split == TRAIN), args.vocab_size)
    tokenizer = Tokenizer(model, "trained on the training split")
    write_corpus(documents, out, tokenizer, 100_000_000, {"kind": "embedded", "versions": versions})


# ---------------------------------------------------------------------------------------------------
# fineweb


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


def hub_reader(repo: str, staging: Path) -> Callable[[str], Path]:
    """A function that downloads one file of the repository and returns where under `staging` it lies.

    With `local_dir` the hub client writes there and nowhere else; the chunk cache that it would
    also fill is turned off, so that each byte is on the disk once.
    """
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")  # read when the client is imported
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings about retries would break up the bars

    def read(remote: str) -> Path:
        try:
            return Path(
                huggingface_hub.hf_hub_download(repo, remote, repo_type="dataset", local_dir=str(staging))
            )
        except Exception as error:  # the client's three transports each raise errors of their own
            reason = first_line(error.__cause__ or error)
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise PrepareError(f"disk full at {remote}; free some space and run again") from error
            if "NotFound" in type(error).__name__ and "Local" not in type(error).__name__:
                remedy = "check MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and HF_TOKEN"
            else:
                remedy = "check the network and HF_ENDPOINT, run again: shards already here are kept"
            raise PrepareError(f"cannot download {remote} of {repo} ({reason}); {remedy}") from error

    return read


def fineweb_plan(manifest_path: Path, name: str, train_shards: int) -> tuple[list[str], str]:
    """Shard file names to fetch and the tokenizer's path, from the hub's manifest. Raises PrepareError."""
    try:
        manifest = json.loads(manifest_path.read_text())
        dataset = next((entry for entry in manifest["datasets"] if entry["name"] == name), None)
        if dataset is None:
            raise PrepareError(f"the repository has no data set {name}; check MATCHED_FINEWEB_REPO_ID")
        available, val_shards = int(dataset["stats"]["files_train"]), int(dataset["stats"]["files_val"])
        model = next(
            entry.get("model_path") or entry["path"]
            for entry in manifest["tokenizers"]
            if entry["name"] == dataset["tokenizer_name"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise PrepareError(
            f"manifest.json does not describe {name} as expected; check MATCHED_FINEWEB_REPO_ID"
        ) from error
    if train_shards > available:
        raise PrepareError(f"{name} has {available} training shards; lower --train-shards {train_shards}")
    shards = [f"fineweb_{VAL}_{number:06d}.bin" for number in range(val_shards)]
    return shards + [f"fineweb_{TRAIN}_{number:06d}.bin" for number in range(train_shards)], model


def fetch_shards(read: Callable[[str], Path], remote: str, folder: Path, names: list[str]) -> None:
    """Downloads the shards that are missing or broken in `folder`; checks each before it gets its name."""
    from tqdm.auto import tqdm

    missing = [name for name in names if not (folder / name).is_file() or shard_fault(folder / name)]
    print(f"{len(names) - len(missing)} of {len(names)} shards are here already", flush=True)
    # `disable=None` hides the bar where stderr is no terminal; a line a shard takes its place there.
    with tqdm(desc="shards", total=len(names), initial=len(names) - len(missing), disable=None) as bar:
        for name in missing:
            path = read(f"{remote}/{name}")
            if fault := shard_fault(path):
                raise PrepareError(f"{name} from the hub is broken ({fault}); report it to the repository")
            os.replace(path, folder / name)
            bar.update()
            if bar.disable:
                print(f"{name}: downloaded", flush=True)


def run_fineweb(args: argparse.Namespace) -> None:
    """Downloads published shards and their tokenizer. Raises PrepareError."""
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or FINEWEB_REPOS[args.variant]
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    name = f"fineweb10B_{args.variant}"
    root = (args.out or DATA_ROOT).resolve()
    folder, staging = root / "datasets" / name, root / "datasets" / name / ".download"

    def remote(path: str) -> str:
        return f"{prefix}/{path}".lstrip("/")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        read = hub_reader(repo, staging)
        print(f"asking the hub for {repo}", flush=True)  # without a network it retries for half a minute
        shards, model_path = fineweb_plan(read(remote("manifest.json")), name, args.train_shards)
        model = read(remote(model_path)).read_bytes()
        tokenizer = Tokenizer(model, model_path)
        if args.variant != f"sp{tokenizer.vocab_size}":
            fault = f"{model_path} has {tokenizer.vocab_size} pieces, not those of {args.variant}"
            raise PrepareError(f"{fault}; check MATCHED_FINEWEB_REPO_ID")
        target = root / "tokenizers" / Path(model_path).name
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        partial.write_bytes(model)
        partial.replace(target)
        fetch_shards(read, remote(f"datasets/{name}"), folder, shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing came
    print_command(folder, target, tokenizer.vocab_size)


# ---------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise PrepareError(f"{message}; see {self.prog} --help")


def number_from(low: int, high: int | None = None) -> Callable[[str], int]:
    """Argument type: an integer of at least `low` and, where given, at most `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise argparse.ArgumentTypeError(f"{value} is not {wanted}")
        return value

    parse.__name__ = "integer"  # argparse names it in its message
    return parse


def fraction(text: str) -> float:
    """Argument type: a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def build_parser() -> Parser:
    """The command line; each subcommand sets `run` to the function that carries it out."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    here = "datasets beside this script"
    vocab = number_from(264, MAX_VOCAB)  # 256 byte pieces, 4 special ones and some text

    docs = commands.add_parser("docs", help="shards from your own files", allow_abbrev=False)
    docs.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".jsonl (an object a line) or .txt (one document), plain or as .xz, .gz, .zst; documents keep "
        "their order, so shuffle sorted sources first",
    )
    pieces = docs.add_mutually_exclusive_group(required=True)
    pieces.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model with BOS id 1")
    pieces.add_argument("--vocab-size", type=vocab, metavar="N", help="train a tokenizer of N pieces")
    held_out = docs.add_mutually_exclusive_group()
    held_out.add_argument("--val", nargs="+", type=Path, metavar="FILE", help="the validation documents")
    held_out.add_argument(
        "--val-fraction",
        type=fraction,
        default=0.05,
        metavar="F",
        help="without --val: share of the documents held out, by a hash of their text (%(default)s)",
    )
    docs.add_argument("--out", type=Path, metavar="DIR", help=f"default: {here}, <first FILE>_sp<pieces>")
    docs.add_argument("--force", action="store_true", help="replace DIR if it exists")
    docs.add_argument(
        "--shard-tokens",
        type=number_from(1, 2**31 - 1),
        default=100_000_000,
        metavar="N",
        help="tokens in a full shard (%(default)s)",
    )
    docs.add_argument("--text-key", default="text", metavar="KEY", help="key of a .jsonl text (%(default)s)")
    docs.set_defaults(run=run_docs)

    embedded = commands.add_parser("embedded", help="corpus from installed packages", allow_abbrev=False)
    embedded.add_argument("--out", type=Path, metavar="DIR", help=f"default: {here}, embedded_sp<pieces>")
    embedded.add_argument("--vocab-size", type=vocab, default=1024, metavar="N", help="pieces (%(default)s)")
    embedded.set_defaults(run=run_embedded)

    fineweb = commands.add_parser("fineweb", help="download published shards", allow_abbrev=False)
    fineweb.add_argument("--variant", choices=FINEWEB_REPOS, default="sp1024", help="default: %(default)s")
    fineweb.add_argument(
        "--train-shards",
        type=number_from(0),
        default=80,
        metavar="N",
        help="training shards of 100 million tokens, 200 MB each (%(default)s)",
    )
    fineweb.add_argument("--out", type=Path, metavar="DATA_ROOT", help="default: the folder of this script")
    fineweb.set_defaults(run=run_fineweb)
    return parser


def main() -> int:
    """Runs the command line; returns the exit status: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        args = build_parser().parse_args()
        args.run(args)
        return 0
    except PrepareError as error:
        message = " ".join(str(error).split())
    except ImportError as error:
        message = f"{error.name} is not installed; pip install -r {DATA_ROOT / 'requirements.txt'}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or first_line(error)}; check permissions and free disk space"
    except KeyboardInterrupt:
        print("error: interrupted; run it again to start over", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
