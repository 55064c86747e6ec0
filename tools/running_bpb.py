"""Running BPB along a stream, from the losses that runs left with NLL_DUMP, as a table, a CSV file and a plot.

    python tools/running_bpb.py --data DATA_PATH --out FOLDER 'no TTT=none.npy' 'default=lora.npy' ...

The first run is the reference: the plot shows how far below it the others are. Every run must have scored the same
targets, the first of DATA_PATH's validation split. Needs tools/requirements.txt.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]
from looks import NO_PLOT, bare, legend_below, look, pyplot, save  # noqa: E402
from sweep_results import tell, utf_8  # noqa: E402

import train_gpt  # noqa: E402


def running(nats: np.ndarray, counted: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets seen and BPB over all of them, at the end of each chunk."""
    ends = np.unique(np.append(np.arange(chunk, len(nats), chunk), len(nats)))
    bits = np.cumsum(nats.astype(np.float64))[ends - 1] / math.log(2)
    return ends, bits / np.cumsum(counted)[ends - 1]


def plot(curves: dict[str, np.ndarray], ends: np.ndarray, path: Path):
    """Running BPB of each run, and its difference to the first. PNG and SVG."""
    if not (plt := pyplot("running_bpb")):
        return tell(f"no plot: {NO_PLOT}")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    reference = next(iter(curves.values()))
    handles = {}
    for i, (name, curve) in enumerate(curves.items()):
        (handles[f"{name}: {curve[-1]:.4f}"],) = axes[0].plot(ends, curve, **look(i, len(ends)))
        axes[1].plot(ends, curve - reference, **look(i, len(ends)))
    axes[0].set(title="BPB of everything scored so far", xlabel="targets scored", ylabel="bits per byte")
    axes[1].set(title=f"the same, less that of \u201c{next(iter(curves))}\u201d", xlabel="targets scored")
    legend_below(figure, handles, handlelength=4)
    for axis in axes:
        bare(axis)
    save(plt, figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE.npy")
    parser.add_argument("--data", required=True, type=Path, help="folder of the shards and tokenizer.model")
    parser.add_argument("--out", required=True, type=Path, help="folder for running_bpb.csv, .png and .svg")
    parser.add_argument("--chunk", type=int, default=32768, help="targets between two points")
    args = parser.parse_args()
    try:
        named = [run.rpartition("=") for run in args.runs]
        nats = {utf_8(name): np.load(file) for name, _, file in named}
        sizes = {len(x) for x in nats.values()}
        if len(sizes) != 1:
            raise ValueError(f"the runs scored different numbers of targets: {sorted(sizes)}; give runs of one stream")
        model = str(args.data / "tokenizer.model")
        vocab = train_gpt.sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()
        tokenizer = train_gpt.Tokenizer(Path(model), vocab)
        ids = train_gpt.Tokens(args.data, "val", vocab).read(0, sizes.pop() + 1)
    except (OSError, ValueError, train_gpt.UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    curves = {name: running(x, tokenizer.target_bytes(ids), args.chunk) for name, x in nats.items()}
    ends = next(iter(curves.values()))[0]
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "running_bpb.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["targets", *curves])
        table.writerows([end, *(f"{curve[i]:.6f}" for _, curve in curves.values())] for i, end in enumerate(ends))
    plot({name: curve for name, (_, curve) in curves.items()}, ends, args.out / "running_bpb")
    tell("| targets | " + " | ".join(curves) + " |\n|---|" + "---|" * len(curves))
    for i, end in enumerate(ends):
        print(f"| {end:,} | " + " | ".join(f"{curve[i]:.4f}" for _, curve in curves.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
