#!/usr/bin/env python3
"""Pack train_gpt.py into a short script that runs it, as a run leaves it in its folder; or unpack such a script.

    python tools/pack.py                                train_gpt.packed.py beside train_gpt.py
    python tools/pack.py other.py --out short.py        any script
    python tools/pack.py --unpack short.py              the lines that it runs, on stdout

A packed script behaves like the readable one: help, errors, exit codes, artifacts. It needs nothing but Python to
unpack. Comments and docstrings are gone, except for the first, which --help shows, and __doc__ of others is None;
tracebacks show the lines that are left. Exit codes: 0; 2 something to mend.
"""

import argparse
import ast
import hashlib
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import Parser, answer  # noqa: E402

import train_gpt as t  # noqa: E402


def read_source(path: Path) -> bytes:
    """A script that can be packed. UserError for another."""
    source = path.read_bytes()
    t.require(not t.unpack_script(source), f"{path}: is packed already; --unpack shows its lines")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source.decode()
            ast.parse(source, path.name, feature_version=(3, 10))
    except UnicodeDecodeError:
        raise t.UserError(f"{path}: not UTF-8; save it as that") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise t.UserError(f"{path}: not a script for Python 3.10 ({t.one_line(error)}); mend it") from None
    return source


def packs(packed: bytes, source: bytes) -> bool:
    """Whether a packed script runs what this one does, and nothing else."""
    short = t.lean(source.decode())
    return t.unpack_script(packed) == short.encode() and same_program(source.decode(), short)


def same_program(source: str, short: str) -> bool:
    """Whether a script and what t.lean makes of it have the same syntax tree, docstrings apart."""
    try:
        return tree_of(source) == tree_of(short)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def tree_of(source: str) -> str:
    """The syntax tree of a script as text, with 0 for docstrings and other strings that stand alone, but for those
    outside of functions and classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source.removeprefix("\ufeff"))
    for node in ast.walk(tree):
        string = isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        if string and node not in tree.body:
            node.value = ast.Constant(0)
    return ast.dump(tree)


def packed(path: Path, out: Path) -> str:
    """Pack a script into `out`. Returns what to say. UserError where that cannot be done."""
    source = read_source(path)
    t.require(same_program(source.decode(), t.lean(source.decode())), f"{path}: would not be the same program packed; "
              "keep line breaks out of the braces of f-strings, and unusual white space out of it")
    short = t.pack_script(source)
    t.write_atomically(out, short)
    return f"{out}: {len(short):,} bytes for {len(source):,}, sha256 {hashlib.sha256(short).hexdigest()}"


def launched(argv: list[str]) -> int:
    parser = Parser(prog="python tools/pack.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", type=Path, default=t.SCRIPT, help="default: train_gpt.py of this project")
    parser.add_argument("--out", type=Path, help=f"default: {t.PACKED_NAME} beside the script")
    parser.add_argument("--unpack", action="store_true", help="print what a packed script runs")
    options = parser.parse_args(argv)
    if options.unpack:
        source = t.unpack_script(options.script.read_bytes())
        t.require(not options.out, "--unpack: prints, so it takes no --out")
        t.require(source, f"{options.script}: is not packed, or damaged; give a {t.PACKED_NAME}")
        t.show(source.decode("utf-8", "backslashreplace").rstrip("\n"))
        return 0
    out = options.out or options.script.with_name(options.script.stem + ".packed.py")
    t.require(out.resolve() != options.script.resolve(), f"{out}: is the script itself; choose another --out")
    t.show(packed(options.script, out))
    return 0


def main(argv: list[str]) -> int:
    return answer(launched, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
