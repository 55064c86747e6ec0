"""prepare.py docs: a corpus from the user's own files."""

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from errors import PrepareError
from shards import DATA_ROOT, check_replaceable, write_corpus
from texts import TRAIN, VAL, Reader, file_kind, split_of
from tokenizer import Tokenizer, train_tokenizer


def check_files(train: list[Path], val: list[Path]) -> None:
    for path in train + val:
        file_kind(path)
        if not path.is_file():
            raise PrepareError(f"{path}: no such file; check the path")
    if both := {path.resolve() for path in train} & {path.resolve() for path in val}:
        raise PrepareError(f"{both.pop()} is both training and validation; give it once")


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer(path.read_bytes(), path.name)
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}; check the path") from error


def divided(text: str, val_fraction: float) -> tuple[str, str]:
    """A text in two: the second is about the last `val_fraction` of it, from a paragraph on. Where no paragraph begins
    near there it begins with a line, where no line does with a word, and where no word does with any character.

    Raises PrepareError for a text of one character.
    """
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if end - begin < 2:
        raise PrepareError("one document that cannot be divided; give more documents, or --val")
    share = (end - begin) * val_fraction
    for gap in (r"\n\s*\n", r"\n", r"\s"):
        ends = [found.end() for found in re.finditer(gap, text) if begin < found.start() and found.end() < end]
        if near := [cut for cut in ends if abs(end - cut - share) <= share / 2]:
            cut = min(near, key=lambda cut: abs(end - cut - share))
            return text[:cut], text[cut:]
    cut = min(max(round(end - share), begin + 1), end - 1)
    return text[:cut], text[cut:]


def split_documents(args: argparse.Namespace, reader: Reader) -> Iterator[tuple[str, str]]:
    """Split and text of each document. A single one is divided, which `reader` notes."""
    texts, first = reader.read(args.files), []
    for text in texts:
        if not text.strip():
            yield TRAIN, text  # to be counted as empty
            continue
        first.append(text)
        if len(first) == 2:
            break
    if len(first) == 1 and not args.val:
        head, tail = divided(first[0], args.val_fraction)
        held_out = f"its last {len(tail):,} of {len(first[0]):,} characters"
        reader.notes.append(f"one document: {held_out} are held out for validation")
        yield from ((TRAIN, head), (VAL, tail))
        return
    for text in itertools.chain(first, texts):
        yield TRAIN if args.val else split_of(text, args.val_fraction), text
    for text in reader.read(args.val or []):
        yield VAL, text


def run_docs(args: argparse.Namespace) -> None:
    """Makes the corpus. Raises PrepareError."""
    check_files(args.files, args.val or [])
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
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
        documents = split_documents(args, Reader(args.text_key, args.skip_bad))
        tokenizer = train_tokenizer((text for split, text in documents if split == TRAIN), vocab_size)
    reader, facts = Reader(args.text_key, args.skip_bad), {"kind": "docs"}

    def read_and_report() -> Iterator[tuple[str, str]]:
        yield from split_documents(args, reader)
        facts["skipped_lines"] = reader.report()

    write_corpus(read_and_report(), out, tokenizer, args.shard_tokens, facts)
