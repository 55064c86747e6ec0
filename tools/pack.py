#!/usr/bin/env python3
"""Pack train_gpt.py into a short script that runs it, as a run leaves it in its folder; or unpack such a script.

    python tools/pack.py                                train_gpt.packed.py beside train_gpt.py
    python tools/pack.py other.py --out short.py        any script
    python tools/pack.py --unpack short.py              the lines that it runs, on stdout

A packed script behaves like the readable one: help, errors, exit codes, artifacts. It needs nothing but Python to
unpack. Comments and docstrings are gone, except for the first, which --help shows; tracebacks show the lines that are
left. Exit codes: 0; 2 something to mend.
"""

import argparse
import ast
import hashlib
import sys
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
        ast.parse(source, path.name, feature_version=(3, 10))
    except (SyntaxError, ValueError) as error:
        raise t.UserError(f"{path}: not a script for Python 3.10 ({t.one_line(error)}); mend it") from None
    return source


def packed(path: Path, out: Path) -> str:
    """Pack a script into `out`. Returns what to say. UserError where that cannot be done."""
    source = read_source(path)
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
        t.require(source, f"{options.script}: is not packed, or damaged; give a {t.PACKED_NAME}")
        t.show(source.decode().rstrip("\n"))
        return 0
    out = options.out or options.script.with_name(options.script.stem + ".packed.py")
    t.require(out.resolve() != options.script.resolve(), f"{out}: is the script itself; choose another --out")
    t.show(packed(options.script, out))
    return 0


def main(argv: list[str]) -> int:
    return answer(launched, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
