"""Pictures of runs, for tools/show.py and tools/record.py: PNG and SVG by matplotlib, readable in greyscale; where it
is missing, lines of text."""

import math
import statistics
import sys
from pathlib import Path

from run_log import Run
from runs import byte_parts
from sweep_results import LINES, MARKERS, bare, legend_below, pyplot, save, spread

# How the parts of an artifact are drawn; of two that lie beside each other none looks like the other.
PARTS = {"code": ("0.35", ""), "model": ("0.85", ""), "embed": ("0.95", "///"), "bigram": ("0.6", "..."),
         "attn": ("0.85", "\\\\\\"), "mlp": ("1.0", "xx"), "sidecar": ("0.7", "---"), "fp16": ("0.5", "+++"),
         "frame": ("0.2", "")}
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.,-~+*#"  # the second where a terminal does not know the first
FEW = 9  # a curve of fewer points has a marker at each
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


PANELS = ((training_loss, "training loss", "nats a token"), (validation, "validation, weights as trained",
                                                             "bits per byte"),
          (learning_rate, "learning rate of the matrices", ""), (step_time, "time of a step", "ms"))


def figures_of(run: Run) -> str:
    """A run's own figures, for titles and legends."""
    parts = [f"{run.score.bpb:.4f} BPB"] if run.score else ["no score yet"]
    parts += [f"{run.total_bytes:,} bytes"] if run.total_bytes else []
    parts += [f"{run.trainer.steps:,} steps"] if run.trainer.steps else []
    return ", ".join(parts)


def heading(runs: list[Run], names: list[str], name: str) -> str:
    if len(runs) == 1:
        return f"{name or names[0]}: {figures_of(runs[0])}"
    bpb = [run.score.bpb for run in runs if run.score]
    seeds = len({run.seed for run in runs}) == len(runs) == len(bpb) and name
    return f"{name or f'{len(runs)} runs'}" + (f": {spread(bpb)} BPB, {len(bpb)} seeds" if seeds else "")


def look(i: int) -> dict:
    """How line i is drawn: shade, dashes and marker tell lines apart without colour. Markers are evenly far apart."""
    return {"color": str(0.55 * (i % 4) / 3), "linestyle": LINES[i % 5], "marker": MARKERS[i % 8], "markersize": 4.5,
            "markevery": (0.03 * (i % 4), 0.12), "linewidth": 1.3}


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


def draw(axis, curves: list[tuple[list, list]], labels: list[str], title: str, unit: str, across: str):
    """A panel: a line for each curve that has points, in the looks of its place among all. matplotlib's evenly spaced
    markers miss a single point and the last one, which counts most."""
    for i, ((xs, ys), label) in enumerate(zip(curves, labels, strict=True)):
        if not xs:
            continue
        style = look(i) | ({"markevery": 1} if len(xs) < FEW else {})
        axis.plot(xs, ys, label=label, **style)
        last = max((k for k, y in enumerate(ys) if math.isfinite(y)), default=None)
        if last is not None:
            point = style | {"linestyle": "", "markevery": 1, "label": "_last"}
            axis.plot(xs[last : last + 1], ys[last : last + 1], **point)
    zoom(axis, [curve for curve in curves if curve[0]])
    axis.set(xlabel=across, ylabel=unit)
    axis.set_title(title, fontsize="medium")
    axis.ticklabel_format(axis="y", useOffset=False)
    bare(axis)


def legend(figure, axes):
    """One legend below for all panels, where there is more than one line."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        legend_below(figure, found, handlelength=4)


def legends(runs: list[Run], names: list[str]) -> list[str]:
    return [f"{name}: {figures_of(run)}" for run, name in zip(runs, names, strict=True)]


def training(plt, runs: list[Run], names: list[str], name: str, path: Path) -> bool:
    """Loss, validation, rate and step time against the step. False where no run has any."""
    panels = [(title, unit, [figure(run) for run in runs]) for figure, title, unit in PANELS]
    panels = [panel for panel in panels if any(xs for xs, _ in panel[2])]
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, min(len(panels), 2), figsize=(11 if len(panels) > 1 else 7, 3.4 * rows + 0.8),
                                constrained_layout=True, squeeze=False)
    for axis, (title, unit, curves) in zip(axes.flat, panels, strict=False):
        ends = [xs[-1] for xs, _ in curves if xs and xs[-1]]
        if max(ends, default=1) >= 5 * min(ends, default=1):  # runs of very different lengths
            curves = [([max(x, 1) for x in xs], ys) for xs, ys in curves]
            axis.set_xscale("log")
        draw(axis, curves, legends(runs, names), title, unit, "step")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(heading(runs, names, name), wrap=True)
    legend(figure, axes.flat)
    save(plt, figure, path)
    return True


def chunks(plt, runs: list[Run], names: list[str], name: str, path: Path) -> bool:
    """Running BPB by chunk, and where runs have the same chunks how far each is from the first."""
    curves, labels = [running_bpb(run) for run in runs], legends(runs, names)
    found = [(run, own, curve) for run, own, curve in zip(runs, names, curves, strict=True) if run.chunks]
    if not found:
        return False
    runs, names, drawn = (list(x) for x in zip(*found, strict=True))
    alike = len(runs) > 1 and all(xs == drawn[0][0] for xs, _ in drawn)
    figure, axes = plt.subplots(1, 1 + alike, figsize=(11 if alike else 8.5, 4.2), constrained_layout=True,
                                squeeze=False)
    across = "share of the chunks scored, %"
    draw(axes[0, 0], curves, labels, "BPB of everything scored so far", "bits per byte", across)
    if alike:
        first = drawn[0][1]
        less = [(xs, [y - y0 for y, y0 in zip(ys, first, strict=bool(xs))]) for xs, ys in curves]
        other = names[0] if len(names[0]) < 30 else "the first run"  # a sweep's names are longer than the panel
        draw(axes[0, 1], less, labels, f"the same, less that of {other}", "", across)
    figure.suptitle(f"test-time training, {heading(runs, names, name)}", wrap=True)
    legend(figure, axes.flat)
    save(plt, figure, path)
    return True


def sizes(plt, runs: list[Run], names: list[str], name: str, path: Path) -> bool:
    """A bar a run: the bytes of code and artifact by part."""
    found = [(byte_parts(run), own, run) for run, own in zip(runs, names, strict=True) if run.total_bytes]
    if not found:
        return False
    used = [part for part in PARTS if any(part in parts for parts, _, _ in found)]
    most = max(run.total_bytes for _, _, run in found)
    figure, axis = plt.subplots(figsize=(9.5, 1.8 + 0.5 * len(found)), constrained_layout=True)
    left = [0] * len(found)
    for part in used:
        widths = [parts.get(part, 0) for parts, _, _ in found]
        bars = axis.barh(range(len(found)), widths, left=left, height=0.6, color=PARTS[part][0], hatch=PARTS[part][1],
                         edgecolor="0.15", linewidth=0.6, label=part)
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
    axis.set_yticks(range(len(found)), [own for _, own, _ in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set(xlabel="bytes" + f" (dashed: the limit, {limit:,})" * (most > 0.5 * limit))
    axis.xaxis.set_major_locator(plt.MaxNLocator(6))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    titled = name or (found[0][1] if len(found) == 1 else f"{len(found)} runs")
    figure.suptitle(f"{titled}: {'at most ' * (len(found) > 1)}{most:,} bytes, {most / limit:.1%} of {limit:,}")
    figure.legend(loc="outside lower center", ncols=len(used), columnspacing=1.2, frameon=False, fontsize="small")
    save(plt, figure, path)
    return True


PICTURES = {"training": training, "running_bpb": chunks, "bytes": sizes}


def pictures(runs: list[Run], names: list[str], folder: Path, name: str = "") -> list[str] | None:
    """Draw every picture that the runs have figures for into `folder`, titled `name`. Returns their stems; None without
    matplotlib."""
    plt = pyplot("runs")
    if plt is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return [stem for stem, make in PICTURES.items() if make(plt, runs, names, name, folder / stem)]


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


def sketch(runs: list[Run], names: list[str]) -> str:
    """The curves as text, each between its first and its last value."""
    lines, wide = [], max(map(len, names))
    for figure, title, unit in (*PANELS, (running_bpb, "running BPB by chunk", "bits per byte")):
        found = [(own, figure(run)[1]) for run, own in zip(runs, names, strict=True) if figure(run)[0]]
        lines += [f"{title}, {unit}" if unit else title] if found else []
        lines += [f"  {own:{wide}} {ys[0]:.5g} {spark(ys)} {ys[-1]:.5g}" for own, ys in found]
    return "\n".join(lines)
