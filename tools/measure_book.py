"""The book of tools/measure.py, measure.json: each figure is in it from the moment it is known, whatever comes after.

As a plugin of pytest (`-p measure_book`) it enters the outcome of each test.
"""

import json
import math
import os
from pathlib import Path

NAME, CUT = "measure.json", "not finished"
FOLDER_VARIABLE = "MEASURE_OUT"  # tells the plugin where the book is
FINEWEB = {1024: 62_021_632, 8192: 40_540_160}  # targets of the challenge's validation split, by vocabulary


def fineweb(vocabulary: int) -> int:
    """Targets of the challenge's validation split; of a vocabulary that is not known those of the smallest."""
    return FINEWEB.get(vocabulary, FINEWEB[1024])


class BookError(Exception):
    """A book that cannot be used; one line for people."""


def read(folder: Path) -> dict:
    """The book in a folder, an empty one where there is none. Raises BookError."""
    path = folder / NAME
    if not path.exists():
        return {"stages": {}}
    try:
        book = json.loads(path.read_text(encoding="utf-8"))
        entries = book["stages"].values()
        if all(isinstance(entry, dict) and isinstance(entry.get("status"), str) for entry in entries):
            return book
    except OSError as error:
        raise BookError(f"{path}: {error.strerror}; mend its permissions or choose another --out") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise BookError(f"{path}: not a book of this tool; remove it or choose another --out")


def finite(value):
    """The same without the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, book: dict):
    """Put a book in place of the old one: at no moment is there half of one."""
    partial = folder / f".{NAME}.{os.getpid()}"
    partial.write_text(json.dumps(finite(book), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, folder / NAME)


class Figures:
    """The figures of one stage: figures(name=value) enters them, `missing` says why one is null."""

    def __init__(self, folder: Path, stage: str):
        self.folder, self.stage = folder, stage

    def __call__(self, **values):
        book = read(self.folder)
        book["stages"].setdefault(self.stage, {"status": "running"}).setdefault("figures", {}).update(values)
        write(self.folder, book)

    def missing(self, name: str, why: str):
        """A figure that this machine cannot tell: null, and the reason."""
        book = read(self.folder)
        entry = book["stages"].setdefault(self.stage, {"status": "running"})
        entry.setdefault("figures", {})[name] = None
        entry.setdefault("missing", {})[name] = why
        write(self.folder, book)

    def about(self, **facts):
        """What the figures are of: the machine, the settings."""
        book = read(self.folder)
        book["stages"].setdefault(self.stage, {"status": "running"}).update(facts)
        write(self.folder, book)

    def known(self) -> dict:
        """What has been entered so far."""
        return read(self.folder)["stages"].get(self.stage, {}).get("figures", {})


# ---- the plugin ------------------------------------------------------------------------------------------------------


def message_of(report) -> str:
    """Why a test failed or was skipped: the error's own words."""
    if report.outcome == "skipped":
        return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:2000]


def pytest_runtest_logreport(report):
    """Called by pytest after each phase of a test. Its seconds are of all phases."""
    figures = Figures(Path(os.environ[FOLDER_VARIABLE]), "tests")
    tests = figures.known().get("tests", {})
    entry = tests.setdefault(report.nodeid, {"outcome": CUT, "seconds": 0.0})  # as it stays where it is killed
    entry["seconds"] = round(entry["seconds"] + report.duration, 3)
    if report.outcome != "passed":
        entry |= {"outcome": report.outcome, "message": message_of(report)}
    elif report.when == "call":
        entry["outcome"] = "passed"
    kinds = "passed", "failed", "skipped", CUT
    figures(tests=tests, counts={kind: sum(test["outcome"] == kind for test in tests.values()) for kind in kinds})
