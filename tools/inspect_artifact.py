#!/usr/bin/env python3
"""What an artifact of train_gpt.py holds, tensor by tensor.

    ./run.sh inspect logs/first/final_model.int6.ptz [FILE ...]

Nominal bits set a tensor's steps, as QUANT_BITS_* do; coded bits are what a value takes in the file, on the average,
and entropy what it would take by a table of that tensor's own. Bytes of a tensor are those of its coded values, and its
share of the steps and spreads beside them, which are compressed as one. Code and limit are those of the run whose
summary.json lies beside the file, else of this script and of the challenge. Exit codes: 0; 2 a file that is no
artifact.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402

import train_gpt as t  # noqa: E402


@dataclass
class Contents:
    """A file: its parts add up to all of it."""

    settings: dict  # of the model
    tensors: dict[str, t.Stored]
    bytes: dict[str, float]  # of each tensor
    coded: dict[str, float]  # bits that a value of each coded tensor takes
    tables: float  # bytes of the values' frequencies
    header: int  # bytes of header, magic and checksum
    payload: int  # bytes of the coded values of all tensors
    size: int


def entropy(values: np.ndarray) -> float:
    """Order-0 entropy of int8 values, in bits a value."""
    counts = np.bincount(values.ravel().view(np.uint8), minlength=256)
    shares = counts[counts > 0] / max(values.size, 1)
    return abs(float((shares * np.log2(shares)).sum()))


def value_bits(coded: dict[str, t.Stored]) -> dict[str, float]:
    """Bits of each coded tensor's values under the file's tables, which count the values of all."""
    counts = {name: t.count(s.values, t.classes(*t.spreads(s.values))) for name, s in coded.items()}
    cost = t.PRECISION - np.log2(np.maximum(t.frequencies(sum(counts.values())), 1)) if counts else 0.0
    return {name: float((count * cost).sum()) for name, count in counts.items()}


def contents(path: str) -> Contents:
    """The parts of a file. Raises UserError where it is no artifact."""
    blob = t.read_file(path)
    header, tensors = t.unpack(blob, path)
    frame = t.read_header(blob)[1] + hashlib.sha256().digest_size
    layout = t.side_parts(header["tensors"])
    words = sum(count for _, count in layout)
    sizes = collections.Counter()
    for (name, _), count in layout:
        sizes[name] += header["sides"] * count / words
    payload = len(blob) - frame - header["sides"]
    bits = value_bits({name: s for name, s in tensors.items() if s.coded})
    coded = {}
    for name, expected in bits.items():
        taken = payload * expected / (sum(bits.values()) or 1)
        sizes[name] += taken
        coded[name] = 8 * taken / tensors[name].values.size
    tables = sizes.pop("", 0.0)
    return Contents(header["config"], tensors, dict(sizes), coded, tables, frame, payload, len(blob))


def find(word: str) -> str:
    """The artifact that a word names: its path, a run's folder, or that folder's name under LOG_DIR."""
    folders = [Path(word), Path(os.environ.get("LOG_DIR") or t.Config.log_dir, word)]
    return next((str(folder / t.ARTIFACT_NAME) for folder in folders if folder.is_dir()), word)


def code_and_limit(path: str) -> tuple[int, int]:
    """Bytes of the code and of the limit that the file counts against: of its run, where a summary.json beside it is of
    this file, else of this script and of the challenge."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        told = json.loads(Path(path).with_name("summary.json").read_bytes())["artifact"]
        if told["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest():
            return int(told["bytes_code"]), int(told["limit"])
    return len(t.read_script(t.Config(), None).counted), t.Config.artifact_limit_bytes


def table(path: str) -> str:
    """What a file holds, as text."""
    found, (code, limit) = contents(path), code_and_limit(path)
    settings = [(name.upper(), int(value) if isinstance(value, bool) else value) for name, value in
                found.settings.items()]
    lines = [" ".join(f"{name}={value}" for name, value in settings), "",
             f"{'tensor':32}{'shape':>14}{'kind':>6}{'nominal':>9}{'coded':>7}{'entropy':>9}{'bytes':>12}{'share':>8}"]
    for name, s in found.tensors.items():
        shape, size = "x".join(map(str, s.values.shape)), found.bytes[name]
        coded, order0 = (f"{found.coded[name]:.2f}", f"{entropy(s.values):.3f}") if s.coded else ("", "")
        lines.append(f"{name:32}{shape:>14}{s.kind:>6}{s.nominal:9.2f}{coded:>7}{order0:>9}{size:12,.0f}"
                     f"{size / found.size:8.2%}")
    elements = sum(s.values.size for s in found.tensors.values())
    values = sum(s.values.size for s in found.tensors.values() if s.coded)
    order0 = sum(entropy(s.values) * s.values.size / 8 for s in found.tensors.values() if s.coded)
    total = found.size + code
    lines += ["", f"elements: {elements:,}, {8 * found.size / elements:.3f} bits of the file each; tables "
              f"{found.tables:,.0f} bytes, header and checksum {found.header:,}",
              f"values: {found.payload:,} bytes, {8 * found.payload / max(values, 1):.3f} coded bits each; their "
              f"order-0 entropies are {order0:,.0f} bytes",
              f"file {found.size:,} + code {code:,} = {total:,} bytes, {limit - total:,} left of {limit:,}"]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"a run's folder, its RUN_ID, or its "
                        f"{t.ARTIFACT_NAME}")
    try:
        for number, word in enumerate(parser.parse_args(argv).files):
            t.show("\n" * bool(number) + table(find(word)))
    except t.UserError as problem:
        sys.stderr.write(f"error: {t.one_line(problem)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
