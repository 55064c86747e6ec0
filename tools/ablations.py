#!/usr/bin/env python3
"""What each idea is worth at equal training time and equal bytes: the runs to make, and the table of what they gave.

    python tools/ablations.py plan CANDIDATES > runs.txt       measure what a step of each costs, print the runs
    ./run.sh sweep --list runs.txt SEED=13,1337 --name NAME    make them (the base is the environment, as for `plan`)
    python tools/ablations.py table CANDIDATES...              write their folder's README.md, from LOG_DIR/<stem>

CANDIDATES has an idea a line, `name | VAR=value VAR=value | verdict`; # opens a comment. The first is the base, which
the others are compared with. Equal time: a machine that does other work too cannot give two runs the same seconds, so
`plan` times a step of each idea and one of the base in turn, many times, and gives the idea the ITERATIONS (and the
same share of WARMDOWN_ITERS) that fit into the base's time by the ratio of their medians; it keeps them in costs.json
beside CANDIDATES. Equal bytes: with EXPORT_FILL=1 the export fills ARTIFACT_LIMIT_BYTES, the same for all. NAME is the
file's name without its ending.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import train_gpt as t  # noqa: E402

SCORES = ("ttt", "sliding", "int6", "float")  # the first of these that a run has is what it is compared by
MARK = "`python tools/ablations.py table"  # in each README.md that it writes
SCORE_NAMES = {"ttt": "test-time training", "sliding": "sliding windows", "int6": "the artifact read back",
               "float": "float weights"}


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
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        fail(f"{path}: {error.strerror}; give a file of lines `name | VAR=value ... | verdict`")
    ideas = []
    for line in filter(None, lines):
        name, settings, verdict = ([part.strip() for part in line.split("|")] + ["", ""])[:3]
        try:
            pairs = [word.partition("=") for word in shlex.split(settings)]
        except ValueError as error:
            fail(f"{path}: {error} in the line of {name!r}")
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
        """Seconds of a step."""
        began = self.clock()
        self.trainer.step(self.tokens, 0, 0.0)
        self.trainer.synchronize()
        return (self.clock() - began) / (1 if self.process.cuda else torch.get_num_threads())


def configuration(given: dict[str, str]) -> t.Config:
    cfg, problems, _ = t.load_config({**os.environ, **given})
    if problems:
        fail(problems[0])
    return cfg


def plan(ideas: list[Idea], path: Path, rounds: int):
    """Time each idea against the base, keep what it costs, print the runs."""
    if path.with_suffix(".json").exists():
        fail(f"{path.with_suffix('.json')} holds runs of the costs beside it; copy {path.name} to a folder of its own")
    varied = sorted({n for idea in ideas for n in idea.given} & os.environ.keys() - {"ITERATIONS", "WARMDOWN_ITERS"})
    if varied:
        fail(f"{varied[0]} is set, and {path} varies it; unset it and give it in each line, the base's too")
    base = Timed(configuration(ideas[0].given), t.Process(os.environ.get("COMPUTE_DTYPE", "auto")))
    costs = {}
    for idea in ideas:
        other = Timed(configuration(idea.given), base.process)
        pairs = [(other.seconds(), base.seconds()) for _ in range(rounds + 2)][2:]
        ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
        ratio = 1.0 if idea is ideas[0] else ratio
        steps = max(round(base.cfg.iterations / ratio), 1)
        warmdown = round(other.cfg.warmdown_iters * steps / base.cfg.iterations)
        costs[idea.settings] = {"ratio": ratio, "step_ms": 1000 * statistics.median(a for a, _ in pairs),
                                "steps": steps, "warmdown": warmdown, "parameters": other.weights}
        given = idea.given | {"ITERATIONS": str(steps), "WARMDOWN_ITERS": str(warmdown)}
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in given.items()), f"# {idea.name}", flush=True)
        sys.stderr.write(f"{idea.name}: {ratio:.3f} of the base's step, {steps} steps\n")
    write_costs(path, costs)


def costs_of(path: Path) -> dict:
    """What `plan` measured: {stem of CANDIDATES: {settings: cost}}."""
    costs = path.parent / "costs.json"
    return json.loads(costs.read_text(encoding="utf-8")) if costs.exists() else {}


def write_costs(path: Path, costs: dict):
    text = json.dumps(costs_of(path) | {path.stem: costs}, indent=1)
    (path.parent / "costs.json").write_text(text + "\n", encoding="utf-8")


# ---- table -----------------------------------------------------------------------------------------------------------


def plain(value) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def matches(idea: Idea, summary: dict, varied: set[str], cost: dict) -> bool:
    """Whether a run is of this idea: it sets of the variables that any idea sets what the idea gives, for its steps."""
    set_ = {name: plain(value) for name, value in summary["overrides"].items() if name in varied}
    set_ |= {"PRESET": summary["preset"]} if "PRESET" in varied else {}
    given = {name: plain(float(value)) if re.fullmatch(r"[\d.e-]+", value) else value for name, value in
             idea.given.items() if name in varied}
    set_ = {name: plain(float(value)) if re.fullmatch(r"[\d.e-]+", value) else value for name, value in set_.items()}
    wanted = cost["steps"], cost["warmdown"]
    return set_ == given and wanted == (summary["config"]["iterations"], summary["config"]["warmdown_iters"])


def score_of(summary: dict) -> tuple[str, float]:
    key = next(key for key in SCORES if summary["eval"].get(key))
    return key, summary["eval"][key]["val_bpb"]


def summaries_of(path: Path) -> list[dict]:
    """What the table needs of the summaries in LOG_DIR/<stem>, which is kept beside CANDIDATES; without such a folder
    what was kept."""
    kept, found = path.with_suffix(".json"), Path(os.environ.get("LOG_DIR", "logs"), path.stem).glob("*/summary.json")
    if summaries := [json.loads(file.read_text(encoding="utf-8")) for file in sorted(found)]:
        said = [{name: value for name, value in s["overrides"].items() if not name.endswith(("_PATH", "_DIR", "_ID"))}
                for s in summaries]  # nothing of this machine
        lines = [json.dumps({"seed": s["seed"], "preset": s["preset"], "overrides": overrides, "eval": s["eval"],
                             "config": {name: s["config"][name] for name in ("iterations", "warmdown_iters")},
                             "artifact": {"bytes_model": s["artifact"]["bytes_model"]}})
                 for s, overrides in zip(summaries, said, strict=True)]
        kept.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []


def rows_of(ideas: list[Idea], summaries: list[dict], costs: dict) -> list[dict]:
    """For each idea that has runs among the summaries what the table says of it; the base first."""
    varied = {name for idea in ideas for name in idea.given} - {"ITERATIONS", "WARMDOWN_ITERS"}
    rows, base = [], {}
    for idea in ideas:
        cost = costs.get(idea.settings)
        mine = {s["seed"]: s for s in summaries if cost and matches(idea, s, varied, cost)}
        if idea is ideas[0]:
            base = mine
        if mine:
            scores = {seed: score_of(s)[1] for seed, s in mine.items()}
            rows.append({"idea": idea, "cost": cost, "score": score_of(mine[min(mine)])[0], "bpb": scores,
                         "gains": [scores[seed] - score_of(base[seed])[1] for seed in scores if seed in base],
                         "bytes": max(s["artifact"]["bytes_model"] for s in mine.values())})
    if not base:
        fail(f"no finished run of the base ({ideas[0].name}) among {len(summaries)}; make it first, see --help")
    return rows


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}" if values else "-"


def table(paths: list[Path]):
    """README.md beside the files of candidates: its `about.md`, then a table for each of them."""
    about = paths[0].parent / "about.md"
    lines = [about.read_text(encoding="utf-8").rstrip() if about.exists() else f"# Ablations\n\nMade by {MARK} ...`."]
    for path in paths:
        ideas = read_ideas(path)
        first, *rest = rows_of(ideas, summaries_of(path), costs_of(path).get(path.stem, {}))
        seeds = ", ".join(map(str, sorted(first["bpb"])))
        lines += ["", f"## {path.stem}", "", f"`{path.name}`, seed {seeds}, BPB of {SCORE_NAMES[first['score']]}; "
                  "difference to the base on the same seed, mean ± sample standard deviation.", "",
                  "| idea | settings | step, of the base's | steps | parameters | model bytes | BPB | difference | "
                  "verdict |", "| --- " * 9 + "|"]
        for row in [first, *sorted(rest, key=lambda row: statistics.mean(row["gains"] or [0.0]))]:
            idea, cost = row["idea"], row["cost"]
            cells = (idea.name, f"`{idea.settings}`" if idea.given else "", f"{cost['ratio']:.2f}",
                     f"{cost['steps']:,}", f"{cost['parameters']:,}", f"{row['bytes']:,}",
                     spread(list(row["bpb"].values())),
                     "" if row is first else spread(row["gains"], "+"), idea.verdict)
            lines.append(f"| {' | '.join(cells)} |")
    readme = paths[0].parent / "README.md"
    if readme.exists() and MARK not in readme.read_text(encoding="utf-8"):
        fail(f"{readme}: not made by this tool; put the file of candidates into a folder of its own")
    readme.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("plan", "table"))
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=9, help="timed pairs of steps (%(default)s)")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        fail("--rounds must be at least 1")
    if options.job == "plan":
        plan(read_ideas(options.candidates[0]), options.candidates[0], options.rounds)
    else:
        table(options.candidates)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
