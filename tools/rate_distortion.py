"""Bytes against loss: the same weights rounded by every rule at several bit widths, coded and scored.

    DATA_PATH=... QUANT_MIN_NUMEL=16384 python tools/rate_distortion.py RUN ... --out FOLDER

Takes folders of runs whose last checkpoint is kept (CKPT_EVERY_SECONDS) and the script's own variables; writes
table.csv, a line for each run and setting, and plot.png and plot.svg. The loss is of windows side by side on the first
--tokens validation targets, over that of the float weights; the bytes are those of the whole file. Beside the script's
own rules: GPTQ, a step a row and error feedback, with steps that reach each row's largest weight (gptq), or only so
many standard deviations of the row (std), as entries of this field set them.
"""

import argparse
import csv
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]
from looks import NO_PLOT, bare, look, pyplot, save  # noqa: E402

import train_gpt as t  # noqa: E402

# (rule, nominal bits) of matrices; embeddings have 2 bits more, 8 at most
SETTINGS = [*(("rowmax", bits) for bits in (4, 4.5, 5, 5.5, 6, 6.5)), *(("gptq", bits) for bits in (3, 4, 5, 6)),
            *(("std", bits) for bits in (4, 5, 6, 7)), *(("balanced", bits) for bits in (3, 4, 5, 6, 7, 8))]
DEVIATIONS = {False: 12.85, True: 20.0}  # that the values of a matrix or of an embedding reach under "std"


def in_steps(w: torch.Tensor, most: torch.Tensor, bits: float, sensitivity: t.Sensitivity) -> list[t.Stored]:
    """Round matrices of one shape, [n, rows, cols], with error feedback and a step a row by which `bits` reach `most`
    [n, rows]."""
    top, last = 2 ** (bits - 1) - 1, math.ceil(2 ** (bits - 1)) - 1
    steps = (most / top).clamp(2**-24, 65504).half()  # for fp16
    values = sensitivity.feed_back(w / steps.float()[:, :, None], torch.ones_like(w[:, 0]), -last, last)
    return [t.Stored("rows", bits, v.to(torch.int8).cpu().numpy(), s.cpu().numpy())
            for v, s in zip(values, steps, strict=True)]


def by_rows(w: torch.Tensor, rule: str, bits: float, embedding: bool, sensitivity: t.Sensitivity) -> list[t.Stored]:
    """Round matrices of one shape, [n, rows, cols], by the rules gptq and std."""
    most = w.abs().amax(2) if rule == "gptq" else DEVIATIONS[embedding] * w.std(2)
    return in_steps(w, most, bits, sensitivity)


def rounded(exporter: t.Exporter, rule: str, bits: float) -> dict[str, t.Stored]:
    """The large tensors of a file at a setting."""
    found = {}
    for group, names, weights, cost in exporter.stacks:
        embedding = group in ("embed", "bigram")
        wanted = min(bits + 2, 8) if embedding else bits
        if rule == "balanced":
            stored = t.balanced(weights, wanted, embedding, cost)
        elif rule == "rowmax":
            stored = t.rowmax(weights, wanted, embedding)
        else:
            stored = by_rows(weights, rule, wanted, embedding, cost)
        found |= zip(names, stored, strict=True)
    return found


def opened(path: str, tokens: int) -> tuple[t.Config, t.Exporter, Callable]:
    """A run's settings, an exporter that has calibrated on its averaged weights, and score(tensors), with these
    in place of its own. Raises the script's UserError for what cannot be read."""
    cfg, problems, _ = t.load_config(os.environ | {"TRAIN_ENABLED": "0", "MODEL_PATH": path, "TTT_ENABLED": "0",
                                                   "FINAL_SLIDING_EVAL_ENABLE": "0", "VAL_TOKEN_LIMIT": str(tokens),
                                                   "EXPORT_ENABLED": "1"})
    t.require(not problems, "; ".join(problems))
    process = t.Process(cfg.compute_dtype)
    cfg, inputs = t.open_inputs(cfg, process, None, {}, t.read_script(cfg, None))
    t.require(inputs.weights is not None, f"{path}: no run with a checkpoint; CKPT_EVERY_SECONDS keeps the last one")
    cfg, log = dataclasses.replace(cfg, quant="balanced"), t.Log(process, Path()).silent()
    model, trained = (t.train_and_average(cfg, process, log, {}, inputs, None) for _ in range(2))
    text, size = t.calibration_text(cfg, process, inputs.train)
    exporter = t.Exporter(cfg, log, trained, text, size, 1 << 60, 0.0)

    def score(stored: dict[str, t.Stored]) -> t.Score:
        model.load_state_dict(exporter.weights | {name: entry.tensor() for name, entry in stored.items()})
        return t.evaluate(cfg, process, log, model, inputs.stream, cfg.eval_len, "score").result()

    return cfg, exporter, score


def measure(path: str, tokens: int, settings: list) -> list[dict]:
    """A row for each setting."""
    cfg, exporter, score = opened(path, tokens)
    small_too, whole, rows = exporter.rounded(0.0), score({}).val_loss, []
    for rule, bits in settings:
        stored = small_too | rounded(exporter, rule, bits)
        blob = t.pack(cfg, stored)
        row = {"run": Path(path).name, "rule": rule, "bits": bits, "bytes": len(blob),
               "loss_float": whole, "loss_added": score(stored).val_loss - whole}
        print(f"{row['run']}: {rule:8} {bits:3g} nominal bits: {len(blob):9,} bytes, loss {row['loss_added']:+.5f}",
              flush=True)
        rows.append(row)
    return rows


def plot(rows: list[dict], folder: Path):
    """A panel for each file: bytes against the loss that rounding added, a line for each rule."""
    if not (plt := pyplot("rate_distortion")):
        return print(f"no plot: {NO_PLOT}")
    files = list(dict.fromkeys(r["run"] for r in rows))
    figure, axes = plt.subplots(1, len(files), figsize=(4.6 * len(files), 4.2), sharey=True, squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        for i, rule in enumerate(dict.fromkeys(rule for rule, _ in SETTINGS)):
            line = sorted((float(r["bytes"]) / 1e6, max(float(r["loss_added"]), 5e-5)) for r in rows
                          if r["run"] == file and r["rule"] == rule)
            axis.plot(*zip(*line, strict=True), label=rule, **look(i))
        axis.set(yscale="log", xlabel="file, MB", title=file)
        bare(axis)
    axes[0][0].set_ylabel("loss added, nats a token")
    axes[0][-1].legend()
    figure.tight_layout()
    save(plt, figure, folder / "plot")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        rows = [row for path in options.runs for row in measure(path, options.tokens, SETTINGS)]
    except t.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
