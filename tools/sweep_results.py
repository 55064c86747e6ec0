"""What a sweep ends in: results.csv, results.md and a plot, from the summary.json of each of its runs.

Used by tools/sweep.py. The plot needs tools/requirements.txt; without it the tables come all the same.
"""

import collections
import contextlib
import csv
import io
import math
import os
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from looks import COLOURS, NO_PLOT, bare, entitle, fold, legend_below, look, pyplot, save

from train_gpt import write_atomically

SCORES = ("float", "int6", "sliding", "ttt")
PLACES = ("RUN_ID", "LOG_DIR", "RESUME", "NLL_DUMP")  # say where a run writes, not what it does
MOST_LINES = 8  # beyond it a plot has a row for each setting instead


def tell(text: str):
    """Print; a closed terminal or pipe loses only what is shown, and one that knows fewer signs shows ? for them."""
    with contextlib.suppress(OSError):
        code = sys.stdout.encoding or "utf-8"
        print(text.encode(code, "replace").decode(code), flush=True)


def utf_8(word: str) -> str:
    """A word of the command line, which in a locale without UTF-8 arrives as bytes."""
    return os.fsencode(word).decode("utf-8", "replace")


def launcher() -> str:
    """run.sh, by the command that started this."""
    return os.environ.get("LAUNCHED_BY", "./run.sh")


def counted(items) -> list[tuple]:
    """Each item and how often it occurs, in the order of their first."""
    return list(collections.Counter(items).items())


def plain(value) -> str:
    """A setting as it would be given: the same text for the same value."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(int(value)) if isinstance(value, bool) else str(value)


@dataclass
class Result:
    """A run's figures; what it did not do itself is from the runs that did it for it."""

    run: object  # tools/sweep.py's Run
    settings: dict[str, str]  # of the variables in which the runs differ
    bpb: dict[str, float]  # of each score that there is
    val_bpb: float | None = None
    val_loss: float | None = None
    bytes: int | None = None
    train_seconds: float | None = None  # search included
    eval_seconds: float | None = None  # of the score that counts, with reading and compiling
    seconds: float | None = None  # of its own launches
    valid: bool = False
    reason: str = ""
    caveats: list[str] = field(default_factory=list)


def columns(runs) -> list[str]:
    """The settings that tell the runs apart: the variables that any of them sets, and TTT_MODE where another one
    chooses it."""
    swept = dict.fromkeys(name for run in runs for name in run.given)
    modes = {run.cfg.ttt_mode for run in runs}
    return list(swept | dict.fromkeys(["TTT_MODE"] if len(modes) > 1 else []))


def collect(runs) -> list[Result]:
    """The figures of every run. A score that was not repeated comes from a run that agrees on all stages up to it."""
    summaries = {run.name: run.summary() for run in runs}
    settings, before_adaptation = columns(runs), {}
    for run in runs:
        key = run.stage_key("train", "export", "score")
        for score, entry in (summaries[run.name] or {"eval": {}})["eval"].items():
            if entry and score != "ttt":
                before_adaptation.setdefault(key, {}).setdefault(score, (entry, summaries[run.name]))
    return [result_of(run, settings, summaries, before_adaptation.get(run.stage_key("train", "export", "score"), {}))
            for run in runs]


def result_of(run, names: list[str], summaries: dict, shared: dict) -> Result:
    """`shared`: by score what a run that agrees with this one has found, and that run's summary."""
    settings, summary = {name: plain(getattr(run.cfg, name.lower())) for name in names}, summaries[run.name]
    if not summary:
        return Result(run, settings, {}, reason=run.reason or run.state)
    own = {score: entry for score, entry in summary["eval"].items() if entry}
    foreign = {score: found for score, found in shared.items() if score not in own}
    found = own | {score: entry for score, (entry, _) in foreign.items()}
    faults = [reason for score, (_, other) in foreign.items() for reason in other["reasons"]
              if reason.startswith(f"{score}:")]
    audit = run.audit_faults()
    faults += [f"not audited: {run.reason}"] if audit is None else audit
    result = Result(run, settings, {score: found[score]["val_bpb"] for score in SCORES if score in found})
    result.val_bpb, result.seconds = summary["val_bpb"], summary["seconds"]["total"]
    if last := next((score for score in reversed(SCORES) if score in own), None):
        clocks = summary["seconds"]
        result.val_loss = own[last]["val_loss"]
        result.eval_seconds = own[last]["seconds"] + clocks.get("read", 0.0) + clocks.get("compile", 0.0)
    result.bytes = (summary["artifact"] or {}).get("bytes_total")
    trainer, exporter = (summaries[other.name] or {} for other in (run.weights, run.artifact))
    if trainer.get("train"):
        result.train_seconds = trainer["train"]["seconds"] + exporter.get("seconds", {}).get("search", 0.0)
    result.valid = summary["valid"] and not faults
    result.caveats = [c for c in summary["caveats"] if not c.startswith("not audited")]
    result.caveats += [] if run.audited else ["not audited"]
    result.reason = "; ".join(dict.fromkeys(summary["reasons"] + faults))
    return result


@dataclass
class Group:
    """Results that differ in SEED alone."""

    settings: dict[str, str]
    results: list[Result]
    shown: list[str] = field(default_factory=list)  # the settings in which the groups differ
    missing: int = 0  # seeds of the sweep for which it has no score

    def values(self, figure) -> list[float]:
        """`figure` of each result, where there is one."""
        return [x for x in map(figure, self.results) if x is not None]

    def bpb(self) -> list[float]:
        return self.values(lambda r: r.val_bpb)

    @property
    def mean(self) -> float:
        """Infinite without a score, so that it sorts last."""
        return statistics.mean(self.bpb()) if self.bpb() else math.inf

    @property
    def valid(self) -> int:
        return sum(r.valid for r in self.results)

    @property
    def good(self) -> bool:
        """Whether every run that has a score is valid."""
        return all(r.valid for r in self.results if r.val_bpb is not None)

    @property
    def rank(self) -> tuple:
        """Its place in the table: by the mean, after those that lack no seed."""
        return bool(self.missing), self.mean

    @property
    def title(self) -> str:
        return ", ".join(f"{name}={self.settings[name]}" for name in self.shown)


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and, of several, sample standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def seed_of(result: Result) -> int:
    return result.run.cfg.seed


def grouped(results: list[Result]) -> list[Group]:
    """Groups in the order of their first run."""
    groups: dict[tuple, Group] = {}
    for result in results:
        settings = {name: value for name, value in result.settings.items() if name not in {*PLACES, "SEED"}}
        groups.setdefault(tuple(settings.values()), Group(settings, [])).results.append(result)
    found, seeds = list(groups.values()), set(map(seed_of, results))
    for group in found:
        group.shown = [name for name in group.settings if len({g.settings[name] for g in found}) > 1]
        group.missing = len(seeds - {seed_of(r) for r in group.results if r.val_bpb is not None})
    return found


def best_of(groups: list[Group]) -> Group | None:
    """The lowest mean among those whose runs are all valid and lack no seed, or else among those that are valid, or
    else among all with a score."""
    scored = [g for g in groups if g.bpb()]
    good = [g for g in scored if g.good]
    return min([g for g in good if not g.missing] or good or scored, key=lambda g: g.mean, default=None)


def headline(groups: list[Group]) -> str:
    """The best setting in a line."""
    best = best_of(groups)
    if best is None:
        return "no run has a score"
    n = len(best.bpb())
    seeds = f" ({n} of {n + best.missing} seeds)" if best.missing else f" ({n} seeds)" if n > 1 else ""
    lacking = "lowest, of a setting that lacks a seed," if best.missing else "best"
    kind = lacking if best.good else "lowest, though not valid,"
    return f"{kind} {spread(best.bpb())} BPB{seeds}" + (f" at {best.title}" if best.title else "")


def write_csv(path: Path, results: list[Result]):
    rows = [["run", *results[0].settings, "val_bpb", *(f"{key}_bpb" for key in SCORES), "val_loss", "bytes",
             "train_seconds", "eval_seconds", "seconds", "valid", "reason"]]
    for r in results:
        bpb = [r.bpb.get(key) for key in SCORES]
        figures = (r.val_bpb, *bpb, r.val_loss, r.bytes, r.train_seconds, r.eval_seconds, r.seconds)
        known = ["" if x is None else x for x in figures]
        rows.append([r.run.name, *r.settings.values(), *known, "yes" if r.valid else "no", r.reason])
    csv.writer(buffer := io.StringIO(), lineterminator="\n").writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def markdown(name: str, groups: list[Group], base: dict, command: str) -> str:
    """The table by BPB, what failed, and how it was made."""
    results = [r for g in groups for r in g.results]
    swept = list(groups[0].settings)
    heads = [*swept, "seeds", "BPB", *(f"{key} BPB" for key in SCORES), "bytes", "training s", "evaluation s", "valid"]
    lines = [f"# {name}: {headline(groups)}", "", "Mean ± sample standard deviation over seeds, lowest BPB first, "
             "settings that lack a seed after the others; bytes are the most of a seed; training with calibration and "
             "search, evaluation with reading and compiling; - where there is no figure.", "",
             "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for g in sorted(groups, key=lambda g: g.rank):
        done = len(g.bpb())
        seeds = str(done) if not g.missing else f"{done} of {done + g.missing}"
        cells = [*g.settings.values(), seeds, f"**{spread(g.bpb())}**" if done else "-"]
        cells += [spread(g.values(lambda r, key=key: r.bpb.get(key))) for key in SCORES]
        sizes = g.values(lambda r: r.bytes)
        cells += [f"{max(sizes):,}" if sizes else "-"]
        cells += [spread(g.values(lambda r, key=key: getattr(r, key)), 1) for key in ("train_seconds", "eval_seconds")]
        cells += ["yes" if g.valid == len(g.results) else f"{g.valid} of {len(g.results)}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if bad := [r for r in results if not r.valid]:
        lines += ["", "Not valid:", ""] + [f"- {r.run.title}: {r.reason}" for r in bad]
    if notes := counted(caveat for r in results for caveat in r.caveats):
        lines += ["", "Caveats:", ""] + [f"- {text}" + (f" ({n} of {len(results)} runs)" if n < len(results) else "")
                                         for text, n in notes]
    lines += ["", "Made by:", "", "```sh", *(f"{n}={shlex.quote(v)} \\" for n, v in base.items()), command, "```"]
    return "\n".join(lines) + "\n"


# ---- the plot --------------------------------------------------------------------------------------------------------


def number(text: str) -> float | None:
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def choose_axis(groups: list[Group]) -> str | None:
    """The swept variable to plot against: the one of the most numbers, among those that leave few enough lines for the
    others; None where there is none. What has no score is not drawn, and does not count."""
    best, groups = None, [g for g in groups if g.bpb()]
    for name in groups[0].shown:
        values = {g.settings[name] for g in groups}
        lines = {tuple(v for n, v in g.settings.items() if n != name) for g in groups}
        numeric = len(values) > 1 and None not in map(number, values)
        if numeric and len(lines) <= MOST_LINES and (best is None or len(values) > best[0]):
            best = len(values), name
    return best and best[1]


def against_variable(axis, groups: list[Group], name: str):
    """BPB against a variable: the mean as a line for each combination of the others, the seeds as small points. The
    axis is logarithmic where the values span a decade or more."""
    families: dict[tuple, list[Group]] = {}
    for g in groups:
        if g.bpb():
            families.setdefault(tuple((n, g.settings[n]) for n in g.shown if n != name), []).append(g)
    texts = {float(g.settings[name]): g.settings[name] for g in groups if g.bpb()}
    for i, (others, members) in enumerate(families.items()):
        members.sort(key=lambda g: float(g.settings[name]))
        spots = [float(g.settings[name]) for g in members]
        points = [(x, r) for x, g in zip(spots, members, strict=True) for r in g.results if r.val_bpb is not None]
        if len({seed_of(r) for _, r in points}) > 1:
            seeds_of(axis, points, colour=look(i)["color"])
        axis.plot(spots, [g.mean for g in members], label=", ".join(f"{n}={v}" for n, v in others) or "mean", zorder=3,
                  **look(i) | {"markersize": 7})
        crosses(axis, points)
    sizes = [abs(x) for x in texts if x]
    if max(sizes) >= 10 * min(sizes):
        axis.set_xscale("symlog", linthresh=min(sizes))  # which has a place for 0
        axis.minorticks_off()
    if len(texts) <= 12:
        axis.set_xticks(list(texts), list(texts.values()), rotation=30 if len(texts) > 8 else 0)
    axis.set(xlabel=name, ylabel="bits per byte")


def seeds_of(axis, points: list, turned: bool = False, colour: str = COLOURS[0]):
    """Each seed's BPB as a small hollow point at (place, BPB), or turned at (BPB, place)."""
    spots = [(r.val_bpb, x) if turned else (x, r.val_bpb) for x, r in points]
    axis.plot(*zip(*spots, strict=True), linestyle="", marker="o", markersize=3.5, markerfacecolor="white",
              markeredgecolor=colour, zorder=4, label="_seeds")


def crosses(axis, points: list, turned: bool = False):
    """A cross over each run that is not valid."""
    if spots := [(r.val_bpb, x) if turned else (x, r.val_bpb) for x, r in points if not r.valid]:
        axis.plot(*zip(*spots, strict=True), linestyle="", marker="x", markersize=10, color="black", zorder=5,
                  label="_not valid")


def in_rows(axis, groups: list[Group]):
    """A row for each setting, the best at the top; where SEED alone was swept, one for each seed and their mean."""
    scored = sorted((g for g in groups if g.bpb()), key=lambda g: g.mean)
    if len(scored) == 1:
        results = sorted((r for r in scored[0].results if r.val_bpb is not None), key=lambda r: r.val_bpb)
        rows, labels = list(enumerate(results)), [f"SEED={seed_of(r)}" for r in results]
        axis.axvline(scored[0].mean, color="0.4", linestyle="--", label=f"mean {spread(scored[0].bpb())}")
    else:
        rows = [(i, r) for i, g in enumerate(scored) for r in g.results if r.val_bpb is not None]
        labels = [fold(g.title, 50) for g in scored]
        axis.plot([g.mean for g in scored], range(len(scored)), linestyle="", marker="o", markersize=7, color="black",
                  label="mean", zorder=3)
    seeds_of(axis, rows, turned=True)
    crosses(axis, rows, turned=True)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set(xlabel="bits per byte")


def plot(groups: list[Group], name: str, path: Path) -> str:
    """Draw PNG and SVG. Returns why there is none, else nothing."""
    if not any(g.bpb() for g in groups):
        return "no run has a score"
    if not (plt := pyplot("sweep")):
        return NO_PLOT
    variable, rows = choose_axis(groups), sum(bool(g.bpb()) for g in groups)
    rows = len(groups[0].results) if len(groups) == 1 else rows
    height = 4.6 if variable else min(1.7 + 0.3 * rows, 40)
    figure, axis = plt.subplots(figsize=(8.5, height), constrained_layout=True)
    against_variable(axis, groups, variable) if variable else in_rows(axis, groups)
    results = [r for g in groups for r in g.results]
    failed, bad = sum(r.val_bpb is None for r in results), sum(not r.valid for r in results if r.val_bpb is not None)
    several = any(len(g.bpb()) > 1 for g in groups)
    handles, drawn = axis.get_legend_handles_labels()
    notes = [f"{len(results) - failed} of {len(results)} runs have a score"] if failed else [f"{len(results)} runs"]
    notes += ["small circles: seeds"] * several + [f"crosses: {bad} not valid"] * bool(bad)
    entitle(figure, f"{name}: {headline(groups)}", fontsize="medium")
    axis.set_title("; ".join(notes), fontsize="small", color="0.3")
    if len(drawn) > 1 or several:
        legend_below(figure, dict(zip(drawn, handles, strict=True)))
    axis.ticklabel_format(axis="y" if variable else "x", useOffset=False)
    bare(axis)
    save(plt, figure, path)
    return ""


def write(folder: Path, runs, base: dict, command: str):
    """Write and print the results of a sweep, of what is finished."""
    results = collect(runs)
    groups = grouped(results)
    write_csv(folder / "results.csv", results)
    text = markdown(folder.name, groups, base, command)
    write_atomically(folder / "results.md", text.encode())
    tell("\n" + text.split("\n\nMade by:")[0] + "\n")
    problem = plot(groups, folder.name, folder / "results")
    if problem:
        tell(f"no plot: {problem}")
    ends = ("csv", "md") if problem else ("csv", "md", "png", "svg")
    tell("written: " + ", ".join(str(folder / f"results.{end}") for end in ends))
