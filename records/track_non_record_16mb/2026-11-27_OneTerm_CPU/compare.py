"""A search by measured slopes of each group against one common term of all bits, at equal bytes.

    DATA_PATH=... QUANT_MIN_NUMEL=... python compare.py SCRIPT FLOAT_FILE ... --out table.csv

SCRIPT: train_gpt.py of commit bde14a1, the last with slopes. For each float file and each of --rates bits a parameter
its search fits the file, and all bits are shifted alike until the bytes are within 0.05% of that file's. Both are taken
at --moves too, bits that are added to all, since each rounds the weights to another pattern. Over the float weights, on
windows side by side of the first --tokens validation targets: the loss added, and the mean divergence (KL) of the
predictions from those of the float weights, which is measured more finely. Nats a token; COMPUTE_DTYPE says in what.
"""

import argparse
import csv
import importlib.util
import os
import sys
from pathlib import Path

import torch


def load(path: str):
    spec = importlib.util.spec_from_file_location("with_slopes", path)
    module = sys.modules["with_slopes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Scores:
    """Loss and divergence from the model as it is now. `tokens` int [n + 1]: the text."""

    def __init__(self, model, tokens: torch.Tensor, length: int):
        count = (len(tokens) - 1) // length * length
        self.model, self.ids = model, tokens[:count].view(-1, length)
        self.targets = tokens[1 : count + 1].view(-1, length, 1).long()
        self.float = [self.predictions(part) for part in self.ids.split(16)]
        self.loss = sum(self.of_batch(i, p)[0] for i, p in enumerate(self.float)) / count

    @torch.no_grad()
    def predictions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).log_softmax(-1)

    def of_batch(self, i: int, found: torch.Tensor) -> tuple[float, float]:
        """Sums over a batch's targets."""
        loss = -found.gather(-1, self.targets[16 * i : 16 * i + 16]).double().sum()
        return float(loss), float((self.float[i].exp() * (self.float[i] - found)).double().sum())

    def now(self) -> tuple[float, float]:
        sums = [self.of_batch(i, self.predictions(part)) for i, part in enumerate(self.ids.split(16))]
        loss, divergence = (sum(part) / self.ids.numel() for part in zip(*sums, strict=True))
        return loss - self.loss, divergence


def alike(exporter, nominal: dict, size: int) -> tuple[bytes, dict, dict]:
    """What one common term gives at `size` bytes, by bisection."""
    low, high = -8.0, 6.0
    while True:
        found = exporter.attempt(exporter.shifted(nominal, {}, (low + high) / 2))
        if abs(len(found[0]) - size) <= 0.0005 * size or high - low < 1e-4:
            return found
        low, high = ((low + high) / 2, high) if len(found[0]) < size else (low, (low + high) / 2)


def compare(t, path: str, rates: list[float], tokens: int, moves: list[float]):
    """A row for the float file's every rate, move and search."""
    cfg, problems, _ = t.load_config(os.environ | {
        "TRAIN_ENABLED": "0", "MODEL_PATH": path, "TTT_ENABLED": "0", "FINAL_SLIDING_EVAL_ENABLE": "0",
        "VAL_TOKEN_LIMIT": str(tokens), "EXPORT_FILL": "1"})
    if problems:
        sys.exit("error: " + "; ".join(problems))
    process = t.Process(cfg.compute_dtype)
    run = t.Run(cfg, process)
    cfg, model, log = run.cfg, t.build_model(run.cfg, run.artifact[1], process), t.Log(process, Path()).silent()
    text, size = run.calibration_text()
    exporter = t.Exporter(cfg, log, model, text, size, 0, 0.0)
    nominal = {g: getattr(cfg, f"quant_bits_{g}") for g in exporter.groups}
    scores, kept = Scores(model, run.stream.tokens, cfg.eval_len), []

    def judged(first, best, fits):  # the larger file in any case, so that both sides spend the same bytes
        kept.append(best)
        return best

    exporter.judged = judged
    parameters = sum(w.numel() for w in exporter.weights.values())
    for rate in rates:
        exporter.room = int(parameters * rate / 8)
        exporter.search()
        for move in moves:
            by_slopes = exporter.attempt({g: bits + move for g, bits in kept[-1][2].items()})
            by_one = alike(exporter, nominal, len(by_slopes[0]))
            for search, (blob, tensors, bits) in (("slopes", by_slopes), ("one term", by_one)):
                exporter.put(tensors)
                added, divergence = scores.now()
                row = {"run": Path(path).parent.name, "parameters": parameters, "bits_a_parameter": rate, "move": move,
                       "search": search, "bytes": len(blob), "loss_float": scores.loss, "loss_added": added,
                       "divergence": divergence, **{f"bits_{g}": round(bits.get(g, 0), 3) for g in t.GROUPS}}
                print(row, flush=True)
                yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.77, 3.5])
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--moves", type=float, nargs="+", default=[0.0, -0.04, 0.04])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    script = load(options.script)
    rows = [row for path in options.files
            for row in compare(script, path, options.rates, options.tokens, options.moves)]
    new = not options.out.exists()
    with open(options.out, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
