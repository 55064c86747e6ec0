"""Shards of made-up text, to time `./run.sh data --verify` on: tokens by Zipf's law, documents of 1,240 on average, of
which validation shares 3% with training.

    python made_up.py FOLDER [TRAIN_SHARDS] [VALIDATION_TOKENS]      default: 8 shards of 100 million, 60 million
"""

import struct
import sys
from pathlib import Path

import numpy as np

VOCABULARY, SHARD, BOS = 1024, 100_000_000, 1


def text(rng: np.random.Generator, count: int) -> np.ndarray:
    """So many tokens of documents."""
    chances = 1 / np.arange(1, VOCABULARY - 3)
    tokens = np.searchsorted(np.cumsum(chances / chances.sum()), rng.random(count, np.float32)).clip(max=VOCABULARY - 5)
    tokens = (tokens + 4).astype("<u2")
    tokens[np.unique(np.cumsum(rng.geometric(1 / 1240, count // 1000)).clip(max=count - 1))] = BOS
    tokens[0] = BOS
    return tokens


def write(path: Path, tokens: np.ndarray):
    head = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(head + tokens.tobytes())


def main(folder: Path, shards: int, count: int):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    validation = text(rng, count)
    write(folder / "fineweb_val_000000.bin", validation)
    for number in range(shards):
        tokens = text(rng, SHARD)
        share = int(0.03 * count) // shards  # of validation, in one piece
        tokens[SHARD // 2 : SHARD // 2 + share] = validation[number * share : (number + 1) * share]
        write(folder / f"fineweb_train_{number:06d}.bin", tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in (sys.argv[2:] + ["8", "60000000"][len(sys.argv) - 2 :])))
