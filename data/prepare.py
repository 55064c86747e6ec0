#!/usr/bin/env python3
"""Make or fetch the token shards that train_gpt.py reads.

    prepare.py docs FILE...   shards from your own .jsonl or .txt files
    prepare.py embedded       a small corpus from the installed Python, torch and numpy; needs no network
    prepare.py fineweb        the published FineWeb shards and their tokenizer
    prepare.py verify         whether shards are what they say, and what validation and training share

A shard is 256 little-endian int32 words (20240520, 1, token count, zeros) and then little-endian
uint16 tokens. A document is BOS (id 1) and its tokens; a document may span two shards.

Every failure is one line on stderr and exit status 2, and leaves nothing under the final name. Where `verify` finds a
fault in shards, its status is 1, and each fault a line.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# None of these imports an installed package before it is used, so that --help and bad arguments answer at once.
from docs import run_docs
from embedded import run_embedded
from errors import PrepareError, first_line
from fineweb import REPOS, run_fineweb
from shards import DATA_ROOT, SHARD_TOKENS
from tokenizer import MAX_VOCAB
from verify import run_verify

WHAT_VERIFY_DOES = """Checks headers, sizes, numbering and token ids of shards, what manifest.json says of them, the
published figures of FineWeb's validation split, and which documents and runs of 64 tokens of validation are in training
too. Writes FOLDER/verified.json. Ends with 0 where nothing is wrong, with 1 where something is, or where a validation
document is in training too and the data is not the published one, with 2 where a folder cannot be checked."""


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, like all others."""

    def error(self, message: str):
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


def utf_8(word: str) -> str:
    """Argument type: text, which in a locale without UTF-8 arrives as bytes."""
    return os.fsencode(word).decode("utf-8", "replace")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> Parser:
    """The command line; each subcommand sets `run` to the function that carries it out."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    here = "datasets beside this script"
    vocab = number_from(264, MAX_VOCAB)  # 256 byte pieces, 4 special ones and some text

    docs = commands.add_parser("docs", help="shards from your own files", allow_abbrev=False)
    docs.add_argument("files", nargs="+", type=Path, metavar="FILE",
                      help=".jsonl (an object a line) or .txt (one document), plain or as .xz, .gz, .zst; documents "
                           "keep their order, so shuffle sorted sources first")
    pieces = docs.add_mutually_exclusive_group(required=True)
    pieces.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model with BOS id 1")
    pieces.add_argument("--vocab-size", type=vocab, metavar="N", help="train a tokenizer of N pieces")
    held_out = docs.add_mutually_exclusive_group()
    held_out.add_argument("--val", nargs="+", type=Path, metavar="FILE", help="the validation documents")
    held_out.add_argument("--val-fraction", type=fraction, default=0.05, metavar="F",
                          help="without --val: share of the documents held out, by a hash of their text (%(default)s)")
    docs.add_argument("--out", type=Path, metavar="DIR", help=f"default: {here}, <first FILE>_sp<pieces>")
    docs.add_argument("--force", action="store_true", help="replace DIR if it exists")
    docs.add_argument("--shard-tokens", type=number_from(1, 2**31 - 1), default=SHARD_TOKENS, metavar="N",
                      help="tokens in a full shard (%(default)s)")
    docs.add_argument("--text-key", default="text", type=utf_8, metavar="KEY",
                      help="key of a .jsonl text (%(default)s)")
    docs.add_argument("--skip-bad", action="store_true", help="pass over .jsonl lines without text, and count them")
    docs.set_defaults(run=run_docs)

    embedded = commands.add_parser("embedded", help="corpus from installed packages", allow_abbrev=False)
    embedded.add_argument("--out", type=Path, metavar="DIR", help=f"default: {here}, embedded_sp<pieces>")
    embedded.add_argument("--vocab-size", type=vocab, default=1024, metavar="N", help="pieces (%(default)s)")
    embedded.set_defaults(run=run_embedded)

    fineweb = commands.add_parser("fineweb", help="download published shards", allow_abbrev=False)
    fineweb.add_argument("--variant", choices=REPOS, default="sp1024", help="default: %(default)s")
    fineweb.add_argument("--train-shards", type=number_from(0), default=80, metavar="N",
                         help="training shards of 100 million tokens, 200 MB each (%(default)s)")
    fineweb.add_argument("--out", type=Path, metavar="DATA_ROOT", help="default: the folder of this script")
    fineweb.set_defaults(run=run_fineweb)

    verify = commands.add_parser("verify", help="check shards", description=WHAT_VERIFY_DOES, allow_abbrev=False)
    verify.add_argument("folders", nargs="*", type=Path, metavar="FOLDER",
                        help=f"default: the one that DATA_PATH names, else each of {here} that holds shards")
    verify.add_argument("--jobs", type=number_from(1), default=cores(), metavar="N",
                        help="threads, each of which reads a shard (%(default)s)")
    verify.set_defaults(run=run_verify)
    return parser


def main() -> int:
    """Runs the command line; returns the exit status: 0, 2 after an error, 130 after Ctrl-C, 1 as verify has it."""
    try:
        args = build_parser().parse_args()
        return args.run(args) or 0
    except PrepareError as error:
        message = " ".join(str(error).split())
    except ImportError as error:
        message = f"{error.name} is not installed; pip install -r {DATA_ROOT / 'requirements.txt'}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or first_line(error)}; check permissions and free disk space, or " \
                  "choose another --out, which DATA_PATH then names"
    except KeyboardInterrupt:
        print("error: interrupted; run it again to start over", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
