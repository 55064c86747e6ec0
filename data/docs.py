"""prepare.py docs: a corpus from the user's own files."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from errors import PrepareError
from shards import DATA_ROOT, check_replaceable, write_corpus
from texts import TRAIN, VAL, file_kind, read_texts, split_of
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


def split_files(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Split and text of each document that is not of a --val file."""
    for path in args.files:
        for text in read_texts(path, args.text_key):
            yield TRAIN if args.val else split_of(text, args.val_fraction), text


def val_files(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for path in args.val or []:
        for text in read_texts(path, args.text_key):
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
        tokenizer = train_tokenizer((text for split, text in split_files(args) if split == TRAIN), vocab_size)
    documents = itertools.chain(split_files(args), val_files(args))
    write_corpus(documents, out, tokenizer, args.shard_tokens, {"kind": "docs"})
