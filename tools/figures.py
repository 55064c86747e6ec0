"""Pictures of runs, for tools/show.py and tools/record.py: PNG and SVG by matplotlib; where it is missing, lines of
text."""

import math
import re
import statistics
import sys
from pathlib import Path

from looks import COLOURS, bare, entitle, fold, legend_below, look, pyplot, save
from record_checks import differences, settings_apart
from run_log import PATHS, Run
from runs import byte_parts
from sweep_results import spread

# The parts of an artifact, and the hatches that are a second sign beside the colour.
PARTS = {"code": "", "model": "", "embed": "///", "bigram": "...", "attn": "\\\\\\", "mlp": "xx", "sidecar": "---",
         "fp16": "+++", "frame": ""}
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.,-~+*#"  # the second where a terminal does not know the first
CURVE = 3  # validations that make a curve; fewer are marks beside the training loss
MANY = 40  # a noisy curve of as many points is drawn as a running mean
SETTLED = 0.05  # the share of a curve that may leave the picture: its first points are far from the rest


def training_loss(run: Run) -> tuple[list, list]:
    points = run.trainer.train
    return [p.step for p in points], [p.loss for p in points]


def validation(run: Run) -> tuple[list, list]:
    points = run.trainer.val
    return [p.step for p in points], [p.bpb for p in points]


def learning_rate(run: Run) -> tuple[list, list]:
    """The rate of the matrices; the other rates have the same course."""
    full = run.trainer.config.get("matrix_lr", 1.0)
    points = [p for p in run.trainer.train if p.rate is not None]
    return [p.step for p in points], [full * p.rate for p in points]


def step_time(run: Run) -> tuple[list, list]:
    """Milliseconds a step, each the mean since the line before."""
    points = run.trainer.train
    pairs = list(zip(points, points[1:], strict=False))
    return [b.step for _, b in pairs], [1000 * (b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs]


def running_bpb(run: Run) -> tuple[list, list]:
    """BPB of all that test-time training has scored, against the share of its chunks in percent."""
    return [100 * c.step / c.count for c in run.chunks], [c.bpb for c in run.chunks]


PANELS = ((training_loss, "training loss", "nats a token"),
          (validation, "validation, weights as trained", "bits per byte"),
          (learning_rate, "learning rate of the matrices", ""), (step_time, "time of a step", "ms"))
NOISY = (training_loss, step_time)


def figures_of(run: Run) -> str:
    """A run's own figures, for titles and legends."""
    parts = [f"{run.score.bpb:.4f} BPB"] if run.score else ["no score yet"]
    parts += [f"{run.total_bytes:,} bytes"] if run.total_bytes else []
    parts += [f"{run.trainer.steps:,} steps"] if run.trainer.steps else []
    return ", ".join(parts)


def heading(runs: list[Run], labels: list[str], title: str) -> str:
    if len(runs) == 1:
        return f"{title or labels[0]}: {figures_of(runs[0])}"
    bpb = [run.score.bpb for run in runs if run.score]
    seeds = {run.seed for run in runs}
    if len(seeds) == len(runs) == len(bpb) and all(run.ours for run in runs) and not differences(runs):
        return f"{title}: {spread(bpb)} BPB, {len(bpb)} seeds".removeprefix(": ")
    return f"{title}: {len(runs)} runs".removeprefix(": ")


# ---- what tells runs apart -------------------------------------------------------------------------------------------

WORD = re.compile(r"(?:[A-Z][A-Z0-9_]*=)?(?:[^_/ -]|(?<=\de)-)+[_/ -]*")  # of a name; VAR=1e-3 is one
DATED = re.compile(r"\d{8}-\d{6}_seed\d+.*")  # a name that nobody chose


def differing(names: list[str]) -> tuple[list[str], str]:
    """Of each name the words that not all have, and what all begin with; the names where these are not told apart."""
    words = [WORD.findall(name) for name in names]
    most, head, tail = min(map(len, words)) - 1, 0, 0
    while head < most and len({found[head] for found in words}) == 1:
        head += 1
    while tail < most - head and len({found[-1 - tail] for found in words}) == 1:
        tail += 1
    own = [found[head : len(found) - tail] for found in words]
    if head and all("".join(found).strip("_/ -").isdigit() for found in own):  # a number alone says too little
        head -= 1
    labels = ["".join(found[head : len(found) - tail]).strip("_/ -") for found in words]
    if len(names) < 2 or len(set(labels)) < len(labels) or not all(labels):
        return names, ""
    return labels, "".join(words[0][:head]).strip("_/ -")


def setting_labels(runs: list[Run]) -> list[str]:
    """Of each run the given settings in which the runs differ, the seed last; of a path its end."""
    given = {name for run in runs for name in run.given}
    values = {name: found for name, found in settings_apart(runs).items() if name in given}
    values |= {name: [Path(value).name for value in found] for name, found in values.items() if name.lower() in PATHS}
    if len({run.seed for run in runs}) > 1:
        values["SEED"] = [str(run.seed) for run in runs]
    return [", ".join(f"{name}={found[i]}" for name, found in values.items()) for i in range(len(runs))]


def cut(labels: list[str]) -> list[str]:
    """Long ones without their middle, where they are told apart all the same."""
    found = [own if len(own) <= 60 else f"{own[:28]} … {own[-28:]}" for own in labels]
    return found if len(set(found)) == len(found) > 1 else labels


def labels_of(runs: list[Run]) -> tuple[list[str], str]:
    """A short label for each run, of what tells it from the others, and a title of what they share: in a sweep, and
    where the names are dates, of the settings; else of the names."""
    homes, names = {run.path.parent for run in runs}, [run.name for run in runs]
    swept = len(homes) == 1 and (runs[0].path.parent / "sweep.json").exists()
    if len(runs) > 1 and (swept or all(map(DATED.fullmatch, names))):
        labels = setting_labels(runs)
        if len(set(labels)) == len(labels):
            return cut(labels), runs[0].path.parent.name if swept else ""
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    labels, shared = differing(names)
    if len(runs) > 1 and len(homes) == 1 and all(run.path.is_file() for run in runs):  # the logs of a record
        shared = runs[0].path.parent.name
    return cut(labels), shared


# ---- panels ----------------------------------------------------------------------------------------------------------


def smooth(ys: list[float]) -> list[float]:
    """The mean of each value with its neighbours, as many on either side but at the end; what is not finite stays."""
    found = []
    for i, y in enumerate(ys):
        reach = min(i, max(6, len(ys) // 25))
        near = [x for x in ys[i - reach : i + reach + 1] if math.isfinite(x)]
        found.append(statistics.fmean(near) if math.isfinite(y) else y)
    return found


def zoom(axis, curves: list[tuple[list, list]]):
    """Limits for what comes after the first points of the curves, and a word where they are left out."""
    later, every = [], [y for _, ys in curves for y in ys if math.isfinite(y)]
    for xs, ys in curves:
        kept = [y for x, y in zip(xs, ys, strict=True) if x >= SETTLED * xs[-1] and math.isfinite(y)]
        later += kept if len(kept) > 2 else [y for y in ys if math.isfinite(y)]
    if not later:
        return
    low, high = min(later), max(later)
    room = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    outside = max(every) > high + 3 * room or min(every) < low - 3 * room
    if outside:
        axis.set_ylim(low - room, high + room)
        axis.text(0.99, 0.98, "the first points lie outside", transform=axis.transAxes, ha="right", va="top",
                  fontsize="x-small", color="0.35")


def draw(axis, curves: list[tuple[list, list]], labels: list[str], title: str, unit: str, across: str, marks=()):
    """A panel: a line for each curve that has points, in the looks of its place among all. matplotlib's evenly spaced
    markers miss a single point and the last one, which counts most. `marks` of the same looks are hollow."""
    for i, ((xs, ys), label) in enumerate(zip(curves, labels, strict=True)):
        if not xs:
            continue
        style = look(i, len(xs))
        axis.plot(xs, ys, label=label, **style)
        last = max((k for k, y in enumerate(ys) if math.isfinite(y)), default=None)
        if last is not None:
            point = style | {"linestyle": "", "markevery": 1, "label": "_last"}
            axis.plot(xs[last : last + 1], ys[last : last + 1], **point)
    for i, (xs, ys) in enumerate(marks):
        style = look(i) | {"linestyle": "", "markersize": 10, "markerfacecolor": "none"}
        if xs:
            axis.plot(xs, ys, label="_mark" if curves[i][0] else labels[i], **style)
    zoom(axis, [curve for curve in (*curves, *marks) if curve[0]])
    axis.set(xlabel=across, ylabel=unit)
    axis.set_title(title, fontsize="medium")
    axis.ticklabel_format(axis="y", useOffset=False)
    bare(axis)


def draw_noisy(axis, curves: list[tuple[list, list]], labels: list[str], title: str, unit: str, marks: list):
    """A panel of running means, where there are many points; of a few runs with a faint line of all points, which may
    leave it. `marks` are validations."""
    many = [len(xs) >= MANY for xs, _ in curves]
    smoothed = [(xs, smooth(ys) if long else ys) for (xs, ys), long in zip(curves, many, strict=True)]
    notes = ["running mean"] * any(many) + ["hollow: validation"] * any(xs for xs, _ in marks)
    draw(axis, smoothed, labels, f"{title} ({'; '.join(notes)})" if notes else title, unit, "step", marks)
    limits = axis.get_ylim()
    for i, ((xs, ys), long) in enumerate(zip(curves, many, strict=True)):
        if long and len(curves) <= 4:
            axis.plot(xs, ys, color=look(i)["color"], linewidth=0.7, alpha=0.35, zorder=1.5, label="_each")
    axis.set_ylim(limits)


def legend(figure, axes):
    """One legend below for all panels, where there is more than one line."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        legend_below(figure, found, handlelength=4)


def legends(runs: list[Run], labels: list[str]) -> list[str]:
    return [f"{own}: {run.score.bpb:.4f} BPB" if run.score else f"{own}: no score yet"
            for run, own in zip(runs, labels, strict=True)]


def places(plt, count: int) -> tuple:
    """A figure and the axes for `count` panels, two a row; of an odd number the first has a row for itself."""
    rows, columns = -(-count // 2), min(count, 2)
    figure = plt.figure(figsize=(11 if count > 1 else 8, 3.4 * rows + 0.8), constrained_layout=True)
    grid = figure.add_gridspec(rows, columns)
    spots = [grid[0, :]] * (count % 2) + [grid[row, column] for row in range(count % 2, rows) for column in (0, 1)]
    return figure, [figure.add_subplot(spot) for spot in spots]


def training(plt, runs: list[Run], labels: list[str], title: str, path: Path) -> bool:
    """Loss, validation, rate and step time against the step. False where no run has any. Where no run has validated
    often enough for a curve, its losses are marks beside those of training, but for those before training."""
    validated = any(len(run.trainer.val) >= CURVE for run in runs)
    found = [(figure, name, unit, [figure(run) for run in runs]) for figure, name, unit in PANELS]
    found = [panel for panel in found if any(xs for xs, _ in panel[3]) and (validated or panel[0] is not validation)]
    if not found:
        return False
    figure, axes = places(plt, len(found))
    for axis, (kind, name, unit, curves) in zip(axes, found, strict=True):
        ends = [xs[-1] for xs, _ in curves if xs and xs[-1]]
        if max(ends, default=1) >= 5 * min(ends, default=1):  # runs of very different lengths
            curves = [([max(x, 1) for x in xs], ys) for xs, ys in curves]
            axis.set_xscale("log")
        if kind in NOISY:
            few = kind is training_loss and not validated
            points = [[p for p in run.trainer.val if p.step and few] for run in runs]
            marks = [([p.step for p in own], [p.loss for p in own]) for own in points]
            draw_noisy(axis, curves, legends(runs, labels), name, unit, marks)
        else:
            draw(axis, curves, legends(runs, labels), name, unit, "step")
        if axis.get_xscale() == "linear":
            axis.xaxis.get_major_locator().set_params(integer=True)  # steps are whole
    entitle(figure, heading(runs, labels, title))
    legend(figure, axes)
    save(plt, figure, path)
    return True


def chunks(plt, runs: list[Run], labels: list[str], title: str, path: Path) -> bool:
    """Running BPB by chunk, and where runs have the same chunks how far each is from the first."""
    curves, told = [running_bpb(run) for run in runs], legends(runs, labels)
    found = [(run, own, curve) for run, own, curve in zip(runs, labels, curves, strict=True) if run.chunks]
    if not found:
        return False
    runs, labels, drawn = (list(x) for x in zip(*found, strict=True))
    alike = len(runs) > 1 and all(xs == drawn[0][0] for xs, _ in drawn)
    figure, axes = plt.subplots(1, 1 + alike, figsize=(11 if alike else 8.5, 4.2), constrained_layout=True,
                                squeeze=False)
    across = "share of the chunks scored, %"
    draw(axes[0, 0], curves, told, "BPB of everything scored so far", "bits per byte", across)
    if alike:
        first = drawn[0][1]
        less = [(xs, [y - y0 for y, y0 in zip(ys, first, strict=bool(xs))]) for xs, ys in curves]
        other = labels[0] if len(labels[0]) < 30 else "the first run"
        draw(axes[0, 1], less, told, f"the same, less that of {other}", "", across)
    entitle(figure, f"test-time training, {heading(runs, labels, title)}")
    legend(figure, axes.flat)
    save(plt, figure, path)
    return True


def sizes(plt, runs: list[Run], labels: list[str], title: str, path: Path) -> bool:
    """A bar a run: the bytes of code and artifact by part."""
    found = [(byte_parts(run), own, run) for run, own in zip(runs, labels, strict=True) if run.total_bytes]
    if not found:
        return False
    used = [part for part in PARTS if any(part in parts for parts, _, _ in found)]
    most = max(run.total_bytes for _, _, run in found)
    names = [fold(own, 30) for _, own, _ in found]
    each = max(0.5, *(0.2 * (own.count("\n") + 1) for own in names))  # inches a bar
    figure, axis = plt.subplots(figsize=(9.5, 1.8 + each * len(found)), constrained_layout=True)
    left = [0] * len(found)
    for part in used:
        widths = [parts.get(part, 0) for parts, _, _ in found]
        bars = axis.barh(range(len(found)), widths, left=left, height=0.6, color=COLOURS[list(PARTS).index(part) % 8],
                         hatch=PARTS[part], edgecolor="white", linewidth=0.6, label=part)
        texts = [f"{width:,}" if width > 0.09 * most else "" for width in widths]
        axis.bar_label(bars, texts, label_type="center", fontsize="small",
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ends = [f"{run.total_bytes:,}" for _, _, run in found]
    for row, end in enumerate(ends):
        axis.text(left[row] + 0.012 * most, row, end, va="center", fontsize="small")
    limit = max(run.config.get("artifact_limit_bytes", 16_000_000) for _, _, run in found)
    if most > 0.5 * limit:
        axis.axvline(limit, color="black", linestyle="--", linewidth=1)
    axis.set_xlim(0, 1.14 * max(most, limit if most > 0.5 * limit else 0))
    axis.set_yticks(range(len(found)), names)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set(xlabel="bytes" + f" (dashed: the limit, {limit:,})" * (most > 0.5 * limit))
    axis.xaxis.set_major_locator(plt.MaxNLocator(6))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    titled = title or (found[0][1] if len(found) == 1 else f"{len(found)} runs")
    entitle(figure, f"{titled}: {'at most ' * (len(found) > 1)}{most:,} bytes, {most / limit:.1%} of {limit:,}")
    figure.legend(loc="outside lower center", ncols=len(used), columnspacing=1.2, frameon=False, fontsize="small")
    save(plt, figure, path)
    return True


PICTURES = {"training": training, "running_bpb": chunks, "bytes": sizes}


def pictures(runs: list[Run], labels: list[str], folder: Path, title: str) -> list[str] | None:
    """Draw every picture that the runs have figures for into `folder`. Returns their stems; None without matplotlib."""
    plt = pyplot("runs")
    if plt is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return [stem for stem, make in PICTURES.items() if make(plt, runs, labels, title, folder / stem)]


# ---- without matplotlib ----------------------------------------------------------------------------------------------


def spark(values: list[float], width: int = 48) -> str:
    """A curve as one line of text, the mean of what each character stands for."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    each = max(len(values) / width, 1.0)
    ends = [int(i * each) for i in range(int(len(values) / each) + 1)]
    means = [statistics.mean(values[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    low, high, blocks = min(means), max(means), BLOCKS
    try:
        blocks.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        blocks = PLAIN_BLOCKS
    return "".join(blocks[int(7.99 * (m - low) / ((high - low) or 1.0))] for m in means)


def sketch(runs: list[Run], labels: list[str]) -> str:
    """The curves as text, each between its first and its last value."""
    lines, wide = [], max(map(len, labels))
    for figure, title, unit in (*PANELS, (running_bpb, "running BPB by chunk", "bits per byte")):
        found = [(own, figure(run)[1]) for run, own in zip(runs, labels, strict=True) if figure(run)[0]]
        lines += [f"{title}, {unit}" if unit else title] if found else []
        lines += [f"  {own:{wide}} {ys[0]:.5g} {spark(ys)} {ys[-1]:.5g}" for own, ys in found]
    return "\n".join(lines)
