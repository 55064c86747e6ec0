"""What rounding does with the rows of a tied embedding, by how often their tokens occur in the calibration text.

    QUANT_FISHER=empirical python records/track_non_record_16mb/2026-11-29_Frontier_CPU/by_hand.py RUN COMMON

RUN and variables are those of tools/equal_bytes.py; COMMON is the common term of the search, as its log says it.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import rate_distortion  # noqa: E402
from inspect_artifact import entropy  # noqa: E402

import train_gpt as t  # noqa: E402

NAME = "tok_emb.weight"


def main(run: str, common: float):
    cfg, exporter, _ = rate_distortion.opened(run, 1)
    process = t.Process(cfg.compute_dtype)
    text, _ = t.calibration_text(cfg, process, t.Tokens(Path(cfg.data_path), "train", cfg.vocab_size))
    seen = torch.bincount(text[:, :-1].flatten().long(), minlength=cfg.vocab_size)
    weights, stored = exporter.weights[NAME], exporter.rounded(common)[NAME]
    (cost,) = (cost for group, names, _, cost in exporter.stacks if NAME in names)
    order = seen.argsort(descending=True)
    print(f"QUANT_FISHER={cfg.quant_fisher}, {int(seen.sum()):,} tokens, {int((seen == 0).sum()):,} rows without any")
    for begin, end in ((0, 64), (64, 512), (512, 2048), (2048, 4096), (4096, 8192)):
        rows = order[begin:end]
        error = (stored.tensor()[rows] - weights[rows]).norm() / weights[rows].norm()
        print(f"rows {begin}-{end} by frequency: {seen[rows].sum() / seen.sum():.3f} of the tokens, G "
              f"{cost.weight[0, rows].mean():.2e}, {entropy(stored.values[rows.numpy()]):.2f} bits a value, error "
              f"{error:.1%} of the rows' length")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
