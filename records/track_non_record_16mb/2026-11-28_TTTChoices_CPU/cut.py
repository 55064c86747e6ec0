#!/usr/bin/env python3
"""Cut the documents of a validation split into short ones, about as long as those of the challenge.

    python cut.py DATA_PATH OUT

FineWeb's validation documents have 1,240 tokens on average at vocabulary 1024; the textbooks' have 5,700. Lengths are
drawn from a log-normal distribution whose pieces, which end where a document does, have that mean; its form is assumed,
not measured. Each piece begins with BOS; a rest of less than 32 tokens stays with the piece before it.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

BOS, HEADER = 1, 256


def main(source: Path, target: Path):
    target.mkdir(parents=True)
    shutil.copy(source / "tokenizer.model", target)
    for path in sorted(source.glob("fineweb_train_*.bin")):
        (target / path.name).symlink_to(path.resolve())
    path, = source.glob("fineweb_val_*.bin")
    header, ids = np.fromfile(path, "<i4", HEADER), np.fromfile(path, "<u2", offset=4 * HEADER)
    rng, pieces, lengths = np.random.default_rng(0), [], []
    for document in np.split(ids, np.flatnonzero(ids == BOS)[1:]):
        text = document[1:]
        while len(text):
            length = max(int(900 * np.exp(1.2 * rng.standard_normal())), 32)
            length = len(text) if len(text) - length < 32 else length
            pieces += [[BOS], text[:length]]
            lengths.append(length)
            text = text[length:]
    ids = np.concatenate(pieces).astype("<u2")
    header[2] = len(ids)
    (target / path.name).write_bytes(header.tobytes() + ids.tobytes())
    print(f"{len(lengths)} documents, mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f} tokens")


main(Path(sys.argv[1]), Path(sys.argv[2]))
