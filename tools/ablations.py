#!/usr/bin/env python3
"""What each idea is worth at equal training time and equal bytes: the runs to make, and the table of what they gave.

    python tools/ablations.py plan CANDIDATES > runs.txt       measure what a step of each costs, print the runs
    ./run.sh sweep --list runs.txt SEED=13,1337 --name NAME    make them (its base is the environment, as for `plan`)
    python tools/ablations.py table CANDIDATES LOG_DIR/NAME... write CANDIDATES' folder's README.md

CANDIDATES has an idea a line, `name | VAR=value VAR=value | verdict`; # opens a comment. The first is the base, which
the others are compared with. Equal time: a machine that does other work too cannot give two runs the same seconds, so
`plan` times a step of each idea and one of the base in turn, many times, and gives the idea the ITERATIONS (and the
same share of WARMDOWN_ITERS) that fit into the base's time by the ratio of their medians; it keeps them in costs.json
beside CANDIDATES. Equal bytes: with EXPORT_FILL=1 the export fills ARTIFACT_LIMIT_BYTES, the same for all.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import train_gpt as t  # noqa: E402

SCORES = ("ttt", "sliding", "int6", "float")  # the last of these that a run has is what it is compared by


@dataclasses.dataclass
class Idea:
    """A line of CANDIDATES."""

    name: str
    given: dict[str, str]
    verdict: str

    @property
    def settings(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.given.items())


def fail(problem: str):
    sys.stderr.write(f"error: {t.one_line(problem)}\n")
    sys.exit(2)


def read_ideas(path: Path) -> list[Idea]:
    """The lines of CANDIDATES; the base first."""
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        fail(f"{path}: {error.strerror}; give a file of lines `name | VAR=value ... | verdict`")
    ideas = []
    for line in filter(None, lines):
        name, settings, verdict = ([part.strip() for part in line.split("|")] + ["", ""])[:3]
        pairs = [word.partition("=") for word in shlex.split(settings)]
        if bad := [word for word, equals, _ in pairs if not equals]:
            fail(f"{path}: {bad[0]!r} in the line of {name!r} is no VAR=value")
        ideas.append(Idea(name, {variable: value for variable, _, value in pairs}, verdict))
    if not ideas:
        fail(f"{path}: no line in it; the first is the base")
    return ideas


# ---- plan ------------------------------------------------------------------------------------------------------------


class Timed:
    """A model that can take training steps, and the seconds that they took."""

    def __init__(self, cfg: t.Config, process: t.Process):
        self.cfg, self.process = cfg, process
        self.clock = time.perf_counter if process.cuda else time.process_time  # other work takes none of the latter
        torch.manual_seed(cfg.seed)
        self.model = t.GPT(cfg, process.dtype).to(process.device)
        self.trainer = t.Trainer(cfg, process, self.model)
        self.weights = sum(p.numel() for p in self.model.parameters())
        shape = self.trainer.share, cfg.train_seq_len + 1
        self.tokens = torch.randint(2, cfg.vocab_size, shape, dtype=torch.int32).to(process.device)

    def seconds(self) -> float:
        """Mean seconds of a step over the run: with looped layers, before and after they are looped."""
        looped = self.cfg.enable_looping_at if self.cfg.num_loops else 1.0
        total = 0.0
        for looping, share in ((False, looped), (True, 1 - looped)):
            if share:
                self.model.looping = looping and bool(self.cfg.num_loops)
                began = self.clock()
                self.trainer.step(self.tokens, 0, 0.0)
                self.trainer.synchronize()
                total += share * (self.clock() - began) / (1 if self.process.cuda else torch.get_num_threads())
        return total


def configuration(given: dict[str, str]) -> t.Config:
    cfg, problems, _ = t.load_config({**os.environ, **given})
    if problems:
        fail(problems[0])
    return cfg


def plan(ideas: list[Idea], path: Path, rounds: int):
    """Time each idea against the base, write costs.json, print the runs."""
    base = Timed(configuration(ideas[0].given), t.Process(os.environ.get("COMPUTE_DTYPE", "auto")))
    costs_path = path.parent / "costs.json"
    costs = json.loads(costs_path.read_text()) if costs_path.exists() else {}
    for idea in ideas:
        other = Timed(configuration(idea.given), base.process)
        pairs = [(other.seconds(), base.seconds()) for _ in range(rounds + 2)][2:]
        ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
        ratio = 1.0 if idea is ideas[0] else ratio
        steps = max(round(base.cfg.iterations * min(1.0, other.cfg.iterations / base.cfg.iterations) / ratio), 1)
        costs[idea.settings] = {"ratio": ratio, "step_ms": 1000 * statistics.median(a for a, _ in pairs),
                                "steps": steps, "parameters": other.weights}
        warmdown = round(other.cfg.warmdown_iters * steps / base.cfg.iterations)
        given = idea.given | {"ITERATIONS": str(steps), "WARMDOWN_ITERS": str(warmdown)}
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in given.items()), f"# {idea.name}", flush=True)
        sys.stderr.write(f"{idea.name}: {ratio:.3f} of the base's step, {steps} steps\n")
    costs_path.write_text(json.dumps(costs, indent=1) + "\n")


# ---- table -----------------------------------------------------------------------------------------------------------


def plain(value) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def matches(idea: Idea, summary: dict, varied: set[str]) -> bool:
    """Whether a run is of this idea: what it sets of the variables that any idea sets is what the idea gives."""
    wanted = configuration(idea.given).settings()
    return all(plain(summary["config"].get(n.lower())) == plain(wanted[n.lower()]) for n in varied)


def score_of(summary: dict) -> tuple[str, float]:
    key = next(key for key in SCORES if summary["eval"].get(key))
    return key, summary["eval"][key]["val_bpb"]


def rows_of(ideas: list[Idea], folder: Path) -> list[dict]:
    """For each idea that has runs in the folder what the table says of it."""
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]
    if not summaries:
        fail(f"{folder}: no finished run in it")
    varied = {name for idea in ideas for name in idea.given} - {"ITERATIONS", "WARMDOWN_ITERS"}
    rows, base = [], {}
    for idea in ideas:
        mine = {s["seed"]: s for s in summaries if matches(idea, s, varied)}
        base = base or mine
        if not mine:
            continue
        scores = {seed: score_of(s)[1] for seed, s in mine.items()}
        gains = [scores[seed] - score_of(base[seed])[1] for seed in scores if seed in base]
        some = next(iter(mine.values()))
        rows.append({"idea": idea, "score": score_of(some)[0], "bpb": scores, "gains": gains,
                     "steps": some["train"]["steps"],
                     "bytes": max(s["artifact"]["bytes_model"] for s in mine.values())})
    return rows


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}" if values else "-"


def table(ideas: list[Idea], path: Path, folders: list[Path]):
    """README.md beside CANDIDATES: its `about.md`, then a table for each folder of runs."""
    about, costs = path.parent / "about.md", json.loads((path.parent / "costs.json").read_text())
    lines = [about.read_text().rstrip() if about.exists() else "# Ablations"]
    for folder in folders:
        rows = rows_of(ideas, folder)
        seeds = sorted({seed for row in rows for seed in row["bpb"]})
        lines += ["", f"## {folder.name}", "", f"Seeds {', '.join(map(str, seeds))}; BPB of {rows[0]['score']}; "
                  "difference to the base on the same seed, mean ± sample standard deviation.", "",
                  "| idea | settings | ms a step, of the base's | steps | parameters | model bytes | BPB | difference "
                  "| verdict |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        first, *rest = rows
        for row in [first, *sorted(rest, key=lambda row: statistics.mean(row["gains"] or [0.0]))]:
            idea, cost = row["idea"], costs.get(row["idea"].settings, {})
            lines.append("| " + " | ".join((
                idea.name, f"`{idea.settings}`" if idea.given else "", f"{cost.get('ratio', float('nan')):.2f}",
                f"{row['steps']:,}", f"{cost.get('parameters', 0):,}", f"{row['bytes']:,}",
                spread(list(row["bpb"].values())), "" if row is first else spread(row["gains"], "+"),
                idea.verdict)) + " |")
    (path.parent / "README.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("plan", "table"))
    parser.add_argument("candidates", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=9, help="timed pairs of steps (%(default)s)")
    options = parser.parse_args()
    ideas = read_ideas(options.candidates)
    if options.job == "plan":
        plan(ideas, options.candidates, options.rounds)
    else:
        table(ideas, options.candidates, options.folders)


if __name__ == "__main__":
    main()
