"""What the command lines of the tools share: bad words, and what goes wrong, are one line, and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import train_gpt as t  # noqa: E402


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise t.UserError(f"{message}; {self.prog} --help says how")


def answer(launched: Callable[[list[str]], int], argv: list[str], remedy: str = "mend the path or make room") -> int:
    """The exit code of a tool; 2 where it raises what its user can mend. `remedy`: of a file that cannot be used."""
    try:
        return launched(argv)
    except t.UserError as problem:
        sys.stderr.write(f"error: {t.one_line(problem)}\n")
    except OSError as problem:
        sys.stderr.write(f"error: {problem.filename or 'output'}: {problem.strerror}; {remedy}\n")
    return 2
