"""What rounding loses at the same bytes: the script's rule beside those of two entries of this field.

    DATA_PATH=... python tools/equal_bytes.py RUN --bits 3.5

RUN is the folder of a run whose last checkpoint is kept (CKPT_EVERY_SECONDS); the script's own variables hold. Each
rule is brought to a file of so many bits a parameter: `balanced` by its common term, the others, GPTQ with a step a
row by which int6 and int8 values reach k standard deviations of it, by one factor to their k, as their authors tune it.
Their values are coded as they do it, by brotli over shuffled bytes, and once more in our file, which tells the rule
from the coder. Printed: the loss and the BPB added to those of the float weights, in windows side by side on the first
--tokens validation targets; then for each group of tensors its bits a value (their entropy), and the loss that is
added when only this group is rounded. --json FILE keeps all.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import brotli
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]
from inspect_artifact import entropy  # noqa: E402
from rate_distortion import in_steps, opened  # noqa: E402

import train_gpt as t  # noqa: E402

# By group the bits of a value and the standard deviations of its row that they reach.
PUBLISHED = {"PR 1394": {"attn": (6, 12.85), "mlp": (6, 12.85), "embed": (8, 20.0)},
             "PR 1855": {"attn": (6, 13.0), "mlp": (6, 11.5), "embed": (7, 14.0)}}


def published(exporter: t.Exporter, rule: str, factor: float) -> dict[str, t.Stored]:
    """All tensors by a published rule, its k times a factor."""
    found = exporter.rounded(0.0)
    for group, names, weights, cost in exporter.stacks:
        t.require(group in PUBLISHED[rule], f"{names[0]}: {rule} has no such tensors; take a run of PRESET=frontier")
        bits, reach = PUBLISHED[rule][group]
        found |= zip(names, in_steps(weights, factor * reach * weights.std(2), bits, cost), strict=True)
    return found


def brotli_bytes(stored: dict[str, t.Stored]) -> int:
    """Bytes of the same arrays in torch.save, even bytes before odd ones, under brotli 11."""
    arrays = {name: [torch.from_numpy(np.array(a)) for a in (s.values, s.rows) if a is not None]
              for name, s in stored.items()}
    torch.save(arrays, buffer := io.BytesIO())
    raw = np.frombuffer(buffer.getvalue(), np.uint8)
    return len(brotli.compress(np.concatenate((raw[::2], raw[1::2])).tobytes(), quality=11))


def bring_to(target: int, make, size_of, low: float, high: float) -> dict[str, t.Stored]:
    """The tensors of make(setting) whose bytes are `target` to 0.1%, or as near as they come, by halves between a
    setting `low` whose file is smaller and one `high` whose file is larger."""
    for _ in range(20):
        stored = make((low + high) / 2)
        size = size_of(stored)
        if abs(size / target - 1) < 1e-3:
            break
        low, high = ((low + high) / 2, high) if size < target else (low, (low + high) / 2)
    return stored


def compare(path: str, bits: float, tokens: int, rules: list[str]) -> list[dict]:
    """A row for each rule and coder."""
    cfg, exporter, score = opened(path, tokens)
    parameters = sum(w.numel() for w in exporter.weights.values())
    whole, rows = score({}), []

    def ours(stored: dict[str, t.Stored]) -> int:
        return t.lay_out(cfg, stored).size

    kinds = [("balanced", "ours", exporter.rounded, ours, -6.0, 4.0)]
    for rule in PUBLISHED:
        for coder, size_of in (("brotli", brotli_bytes), ("ours", ours)):
            kinds.append((rule, coder, lambda f, rule=rule: published(exporter, rule, f), size_of, 8.0, 0.1))
    for rule, coder, make, size_of, low, high in (kind for kind in kinds if kind[0] in rules):
        stored = bring_to(int(bits * parameters / 8), make, size_of, low, high)
        found, groups = score(stored), {}
        for group in sorted({group for group, *_ in exporter.stacks}):
            mine = {name: stored[name] for of, names, *_ in exporter.stacks if of == group for name in names}
            coded = sum(entropy(s.values) * s.values.size for s in mine.values())
            groups[group] = {"bits": coded / sum(s.values.size for s in mine.values()),
                             "loss_added": score(mine).val_loss - whole.val_loss}
        size = size_of(stored)
        row = {"rule": rule, "coder": coder, "bytes": size, "bits_a_parameter": 8 * size / parameters,
               "loss_float": whole.val_loss, "loss_added": found.val_loss - whole.val_loss,
               "bpb_added": found.val_bpb - whole.val_bpb, "groups": groups}
        alone = ", ".join(f"{group} {g['bits']:.2f} bits {g['loss_added']:+.5f}" for group, g in groups.items())
        print(f"{rule:8} {coder:6} {row['bytes']:10,} bytes, {row['bits_a_parameter']:.3f} bits a parameter: loss "
              f"{row['loss_added']:+.5f}, BPB {row['bpb_added']:+.5f}; alone {alone}", flush=True)
        rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--bits", type=float, default=3.5, help="bits a parameter (%(default)s)")
    parser.add_argument("--tokens", type=int, default=262144, help="validation targets (%(default)s)")
    parser.add_argument("--rules", nargs="+", choices=("balanced", *PUBLISHED), default=["balanced", *PUBLISHED])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    try:
        rows = compare(options.run, options.bits, options.tokens, options.rules)
    except t.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
