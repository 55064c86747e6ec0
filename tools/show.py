#!/usr/bin/env python3
"""Table and plots of runs, finished or running, ours or published, side by side.

    ./run.sh show logs/first logs/second              folders; a name alone is looked for under LOG_DIR
    ./run.sh show rates                               all runs of a sweep, or of a records folder
    ./run.sh show mine train_seed1337.log             beside a log of the field

The plots go into --out (LOG_DIR/show): training (loss, validation BPB, learning rate, step time), running_bpb (by chunk
of test-time training) and bytes, each as .png and .svg; without matplotlib the curves come as text. Every figure is
read from the logs, and held against metrics.jsonl and summary.json where they are there.
Exit codes: 0; 2 something to mend.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import figures  # noqa: E402
import runs as reader  # noqa: E402
from command_line import Parser, answer  # noqa: E402
from looks import NO_PLOT  # noqa: E402
from run_log import TITLES, Run, t  # noqa: E402
from sweep_results import counted, tell  # noqa: E402


def progress(run: Run) -> str:
    """How far a run is that has not ended."""
    if run.chunks:
        return f"chunk {run.chunks[-1].step} of {run.chunks[-1].count}"
    if run.scores:
        return f"scored {', '.join(run.scores)}"
    return f"step {run.steps} of {run.iterations}" if run.steps is not None else "nothing logged"


def row(run: Run) -> list[str]:
    """The cells of a run."""
    trainer, scores = run.trainer, run.scores
    seconds = [run.training_seconds, run.evaluation_seconds]
    cells = [run.name, "-" if run.seed is None else str(run.seed), f"{trainer.steps:,}" if trainer.steps else "-"]
    cells += [f"{trainer.train[-1].loss:.4f}" if trainer.train else "-"]
    cells += [f"{trainer.val[-1].bpb:.4f}" if trainer.val else "-"]
    cells += [f"{scores[key].bpb:.4f}" if key in scores else "-" for key in TITLES]
    cells += [f"{run.total_bytes:,}" if run.total_bytes else "-"]
    cells += ["-" if s is None else f"{s:,.1f}" for s in seconds]
    return [*cells, run.status() if run.finished else f"{run.status()}: {progress(run)}"]


HEADS = ["run", "seed", "steps", "loss", "val BPB", *(f"{title} BPB" for title in TITLES.values()), "bytes",
         "training s", "evaluation s", "valid"]


def table(runs: list[Run]) -> str:
    """A column a figure; where that is too wide for the terminal, a row a figure."""
    rows = [HEADS, *map(row, runs)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADS))]
    if sum(widths) + 2 * len(widths) > shutil.get_terminal_size((130, 24)).columns and len(runs) <= 6:
        rows = [list(column) for column in zip(*rows, strict=True)]
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([r[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                         zip(r[1:], widths[1:], strict=True))]).rstrip() for r in rows)


def launched(argv: list[str]) -> int:
    parser = Parser(prog="./run.sh show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, its RUN_ID, a log, a sweep or a record")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the plots go (LOG_DIR/show)")
    options = parser.parse_args(argv)
    runs = reader.read_all(options.runs)
    tell(table(runs))
    for kind, lines in (("not valid", lambda run: run.faults), ("note", lambda run: run.all_caveats)):
        for text, n in counted(line for run in runs for line in lines(run)):
            who = next(run.name for run in runs if text in lines(run))
            tell(f"{kind}: {text}" + (f" ({who if n == 1 else f'{n} of {len(runs)} runs'})" if len(runs) > 1 else ""))
    folder = options.out or Path(os.environ.get("LOG_DIR") or t.Config.log_dir) / "show"
    labels, title = figures.labels_of(runs)
    drawn = figures.pictures(runs, labels, folder, title)
    if drawn is None:
        tell("\n" + figures.sketch(runs, labels) + f"\nno plots: {NO_PLOT}")
    else:
        tell("written: " + ", ".join(str(folder / f"{stem}.{end}") for stem in drawn for end in ("png", "svg")))
    return 0


def main(argv: list[str]) -> int:
    return answer(launched, argv, "mend the path, or choose another with --out")


if __name__ == "__main__":
    t.leave(main(sys.argv[1:]))
