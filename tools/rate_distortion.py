"""Bytes against loss: the same weights rounded by every rule at several bit widths, coded and scored.

    DATA_PATH=... QUANT_MIN_NUMEL=16384 python tools/rate_distortion.py RUN/final_model.float.ptz ... --out FOLDER

Takes float files (SAVE_FLOAT=1) and the script's own variables; writes table.csv, a line for each file and setting, and
plot.png and plot.svg. The loss is of windows side by side on the first --tokens validation targets, over that of the
float weights; the bytes are those of the whole file.
"""

import argparse
import csv
import dataclasses
import os
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# (rule, bits) of matrices; embeddings have 2 bits more, 8 at most
SETTINGS = [*(("rowmax", bits) for bits in (4, 4.5, 5, 5.5, 6, 6.5)), *(("gptq", bits) for bits in (3, 4, 5, 6)),
            *(("balanced", bits) for bits in (3, 4, 5, 6, 7, 8))]


def configuration(rule: str, bits: float) -> dict:
    """The script's fields for a setting."""
    fine = min(bits + 2, 8)
    return {"quant": rule, "quant_bits_attn": bits, "quant_bits_mlp": bits, "quant_bits_sidecar": bits,
            "quant_bits_embed": fine, "quant_bits_bigram": fine}


def measure(path: str, tokens: int, settings: list) -> list[dict]:
    """A row for each setting. Raises the script's UserError for what cannot be read."""
    cfg, problems, _ = t.load_config(os.environ | {"TRAIN_ENABLED": "0", "MODEL_PATH": path, "TTT_ENABLED": "0",
                                                   "FINAL_SLIDING_EVAL_ENABLE": "0", "VAL_TOKEN_LIMIT": str(tokens)})
    if problems:
        raise t.UserError("; ".join(problems))
    process = t.Process(cfg.compute_dtype)
    run = t.Run(cfg, process)
    if not run.float:
        raise t.UserError(f"{path}: holds no float weights; make it with SAVE_FLOAT=1")
    cfg, model, log = run.cfg, t.build_model(run.cfg, run.artifact[1], process), t.Log(process, Path()).silent()
    text, size = run.calibration_text()
    exporter = t.Exporter(dataclasses.replace(cfg, quant="balanced"), log, model, text, size, 1 << 60, 0.0)

    def score() -> float:
        return t.evaluate(cfg, process, log, model, run.stream, cfg.eval_len, "score").result().val_loss

    whole, rows = score(), []
    for rule, bits in settings:
        exporter.cfg = dataclasses.replace(cfg, **configuration(rule, bits))
        wanted = {g: getattr(exporter.cfg, f"quant_bits_{g}") for g in exporter.groups}
        blob, stored, _ = exporter.attempt(wanted)
        exporter.put(stored)
        row = {"run": Path(path).parent.name, "rule": rule, "bits": bits, "bytes": len(blob), "loss_float": whole,
               "loss_added": score() - whole}
        print(f"{row['run']}: {rule:8} {bits:3g} bits: {len(blob):9,} bytes, loss {row['loss_added']:+.5f}", flush=True)
        rows.append(row)
    return rows


def plot(rows: list[dict], folder: Path):
    """A panel for each file: bytes against the loss that rounding added, a line for each rule."""
    files = list(dict.fromkeys(r["run"] for r in rows))
    figure, axes = plt.subplots(1, len(files), figsize=(4.6 * len(files), 4.2), sharey=True, squeeze=False)
    styles = {"rowmax": "ks-", "gptq": "kd:", "balanced": "ko-"}
    for axis, file in zip(axes[0], files, strict=True):
        for rule in styles:
            line = sorted((float(r["bytes"]) / 1e6, max(float(r["loss_added"]), 5e-5)) for r in rows
                          if r["run"] == file and r["rule"] == rule)
            axis.plot(*zip(*line, strict=True), styles[rule], label=rule, markersize=5,
                      markerfacecolor="white" if rule == "rowmax" else None)
        axis.set(yscale="log", xlabel="file, MB", title=file)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss added, nats a token")
    axes[0][-1].legend()
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"plot.{kind}", dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        rows = [row for path in options.files for row in measure(path, options.tokens, SETTINGS)]
    except t.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
