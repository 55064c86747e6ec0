"""Bytes and seconds of the coders on an artifact's values.

    python tools/coders.py FILE ...

For each file: the values by rANS and by zstd 22 against the sum of the tensors' order-0 entropies, the whole file
against the same values as int8 bytes in a torch.save container under zstd 22, and the seconds to code and to decode it.
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]
from inspect_artifact import entropy  # noqa: E402

import train_gpt as t  # noqa: E402


def container(stored: dict) -> int:
    """Bytes of the same arrays in torch.save under zstd 22."""
    arrays = {n: [torch.from_numpy(np.array(a)) for a in (s.values, s.rows, s.cols) if a is not None]
              for n, s in stored.items()}
    torch.save(arrays, buffer := io.BytesIO())
    return len(zstandard.compress(buffer.getvalue(), 22))


def main() -> int:
    for path in sys.argv[1:]:
        began = time.perf_counter()
        try:
            header, stored = t.unpack(t.read_file(path), path)
        except t.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        decoded, cfg = time.perf_counter() - began, t.Config(**header["config"])
        began = time.perf_counter()
        blob = t.pack(cfg, stored)
        coded, values = time.perf_counter() - began, [s.values for s in stored.values() if s.coded]
        entropies = sum(entropy(v) * v.size / 8 for v in values)
        others = len(t.pack(cfg, {n: s for n, s in stored.items() if not s.coded}))
        zstd = len(zstandard.compress(b"".join(v.tobytes() for v in values), 22))
        saved = container(stored)
        print(f"{path}: entropies {entropies:,.0f}, zstd {zstd:,} ({zstd / entropies - 1:+.1%}), rANS with its tables "
              f"and steps {len(blob) - others:,}; file {len(blob):,}, torch.save {saved:,} "
              f"({len(blob) / saved - 1:+.1%}); decoded in {decoded:.2f} s, coded in {coded:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
