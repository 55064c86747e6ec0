"""A folder records/gpu/DATE_CARD of what tools/measure.py found: tables, a plot of a step's time, where the time goes
beyond what was counted, and what the figures of one GPU let one expect of eight, each with its arithmetic."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import measure_book as book_of  # noqa: E402
import measure_profile  # noqa: E402
from looks import NO_PLOT, bare, pyplot  # noqa: E402
from measure import PLAN, TOKENS, fail, tell  # noqa: E402
from record_text import paragraph, table  # noqa: E402

from train_gpt import Config, UserError, one_line  # noqa: E402

PROFILE, COUNTS, NOTES = KEPT = "profile.json", "counts.json", "notes.md"  # beside the book, where they are
RANKS, STEP_TOKENS = 8, 786_432
LINK = 450e9  # bytes/s that NVLink 4 is said to move one way, of an H100; not measured here
UNITS = {"_gb_per_s": " GB/s", "_per_s": "/s", "_ms": " ms", "_s": " s", "_percent": "%", "_gib": " GiB",
         "_tflops": " TFLOP/s", "_bytes": " bytes"}  # the first that a figure's name ends in


def number(value, unit: str = "") -> str:
    """A figure for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, dict) and "median" in value:
        return f"{number(value['median'], unit)} (±{value['spread_percent']:.1f}% of {value['n']})"
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value}{unit}"


def labelled(name: str, value) -> list[str]:
    """The cells of a figure, with the unit that its name ends in."""
    stem, comma, rest = name.partition(", ")
    end = next((end for end in UNITS if stem.endswith(end)), "")
    return [stem.removesuffix(end).replace("_", " ") + comma + rest, number(value, UNITS.get(end, ""))]


def rows(entry: dict, leave: tuple = ()) -> list[str]:
    """A table of a stage's figures that are one number or word each; of what is missing, why."""
    cells, missing = [], entry.get("missing", {})
    for name, value in entry.get("figures", {}).items():
        flat = not isinstance(value, (dict, list)) or (isinstance(value, dict) and "median" in value)
        if flat and name not in leave and (value is not None or name in missing):
            label, said = labelled(name, value)
            cells.append([label, said if value is not None else f"not measured: {missing[name]}"])
    return table(["figure", "value"], cells) if cells else ["Nothing was found."]


# ---- the sections ----------------------------------------------------------------------------------------------------


def of_tests(entry: dict) -> list[str]:
    """Each test and its outcome."""
    tests = entry.get("figures", {}).get("tests", {})
    cells = [[f"`{name}`", test["outcome"], f"{test['seconds']:.1f}", test.get("message", "")[:300]]
             for name, test in tests.items()]
    return table(["test", "outcome", "seconds", "message"], cells) if cells else ["No test ran."]


def of_step(entry: dict) -> list[str]:
    """The step's figures, its time by class and its longest kernels."""
    figures = entry.get("figures", {})
    lines = rows(entry)
    lines += ["", *graphs(figures)] if figures.get("graphs") else []
    return lines + by_class(figures, "a step")


def by_class(figures: dict, each: str) -> list[str]:
    """The classes of a profile and its longest kernels, for each step or iteration."""
    if not figures.get("classes_ms"):
        return []
    total = sum(figures["classes_ms"].values())
    cells = [[kind, f"{ms:.3f}", f"{100 * ms / total:.1f}%"] for kind, ms in figures["classes_ms"].items()]
    lines = ["", f"By class, of {figures['profiled']} under the profiler, {figures['profiled_ms']:.2f} ms {each}; "
             "idle is the time in which nothing ran:", "", *table(["class", f"ms {each}", "share"], cells)]
    cells = [[f"`{row['name'][:100]}`", row["class"], f"{row['ms']:.3f}", f"{row['calls']:.1f}"]
             for row in figures["kernels"]]
    return [*lines, "", f"The {len(cells)} that took the most time:", "",
            *table(["name", "class", f"ms {each}", f"calls {each}"], cells)]


def gaps(figures: dict, counts: dict) -> list[str]:
    """What was counted of a step, the time that it would take at the rates measured here, and the time that it took."""
    rate, bandwidth = 1e12 * figures["peak_tflops"], 1e9 * figures["copy_gb_per_s"]["median"]
    cells = []
    for kind, ms in figures["classes_ms"].items():
        both = [counts[stage].get(kind, {"bytes": 0, "operations": 0}) for stage in ("forward", "backward")]
        work, moved = (sum(part[what] for part in both) for what in ("operations", "bytes"))
        if kind in ("attention", "products"):
            said, least = f"{work / 1e12:.2f} TF", 1000 * work / rate
        elif kind == "fused":
            said, least = f"{moved / 1e9:.1f} GB", 1000 * moved / bandwidth
        else:
            said, least = "-", 0.0
        cells.append((ms - least, [kind, said, f"{least:.2f}", f"{ms:.2f}", f"{ms - least:.2f}"]))
    rates = f"{figures['peak_tflops']:.0f} TFLOP/s and {figures['copy_gb_per_s']['median']:,.0f} GB/s"
    said = (f"Counted by `tools/step_cost.py` for {counts['tokens']:,} tokens, at the {rates} that a large product and "
            "a large copy reached; the largest gap first. Of attention half is counted, which the causal mask leaves.")
    rows = [row for _, row in sorted(cells, key=lambda cell: -cell[0])]
    return [paragraph(said), "", *table(["class", "counted", "ms at these rates", "ms measured", "gap"], rows)]


def graphs(figures: dict) -> list[str]:
    """What was compiled."""
    cells = [[str(graph.get("graph", "")), str(graph.get("shape")), f"{graph.get('seconds', 0):.1f}"]
             for graph in figures["graphs"]]
    return table(["compiled graph", "for", "seconds"], cells)


def of_export(entry: dict) -> list[str]:
    """The parts of the export."""
    report = entry.get("figures", {}).get("report")
    return rows(entry) + (["", f"The search's own report: `{json.dumps(report)}`"] if report else [])


def of_ttt(entry: dict) -> list[str]:
    """An iteration's time by window."""
    figures = entry.get("figures", {})
    lines = rows(entry) + (["", "Shapes: " + "; ".join(figures["shape"])] if figures.get("shape") else [])
    lines += ["", *graphs(figures)] if figures.get("graphs") else []
    cells = [[window, number(times["iterations"]), number(times["score"]), number(times["learn"]),
              number(times["whole"])] for window, times in figures.get("iteration_ms", {}).items()]
    lines += ["", *table(["window", "iterations", "score ms", "learn ms", "iteration ms, all of it (mean)"],
                         cells)] if cells else []
    return lines + by_class(figures, "an iteration")


def of_run(entry: dict) -> list[str]:
    """A whole run, from its log and its summary."""
    figures = entry.get("figures", {})
    cells = [[f"seconds of {name}", number(value)] for name, value in (figures.get("seconds") or {}).items()]
    for name, score in (figures.get("eval") or {}).items():
        cells += [[f"{name}: BPB, targets, seconds", f"{score['val_bpb']:.4f}, {score['tokens']:,}, "
                   f"{score['seconds']:.1f}"]] if score else []
    for name, value in {**(figures.get("train") or {}), **(figures.get("artifact") or {})}.items():
        cells.append([name.replace("_", " "), number(value)])
    for name, found in (figures.get("audit") or {}).items():
        if isinstance(found, dict):
            cells.append([f"audit {name}", f"{'ok' if found['ok'] else 'FAILED'}: {found['detail']}"])
    reasons = [f"Not valid: {'; '.join(figures['reasons'])}", ""] if figures.get("reasons") else []
    flat = rows(entry, ("seconds",))
    return [*reasons, *flat, "", *(table(["of its summary", "value"], cells) if cells else [])]


def of_peers(entry: dict) -> list[str]:
    """Steps beside ours."""
    figures = entry.get("figures", {})
    found = figures.get("steps", {})
    ours = found.get("ours", {}).get("step_ms")
    cells = [[name, number(row.get("step_ms")), f"{row['step_ms'] / ours:.2f}" if ours and "step_ms" in row else "-",
              number(row.get("start_s")), row.get("failed", "")] for name, row in found.items()]
    return [f"{number(figures.get('tokens'))} tokens a step on one GPU, which the others divide into 8 passes.", "",
            *table(["script", "step ms", "of ours", "launch to first step s", "failed"], cells)]


def of_presets(entry: dict) -> list[str]:
    """The runs and their means."""
    figures = entry.get("figures", {})
    runs = [{**run, "seed": str(run["seed"])} for run in figures.get("runs", [])]
    if not runs:
        return ["No run finished."]
    means = ", ".join(f"{preset} {bpb:.4f}" for preset, bpb in figures["mean_bpb"].items())
    return [*table(list(runs[0]), [list(map(number, run.values())) for run in runs]), "", f"Mean BPB: {means}"]


SECTIONS = {"tests": ("Tests", of_tests), "step": ("A training step", of_step), "export": ("Export", of_export),
            "ttt": ("Test-time training", of_ttt), "audit": ("Audit of a tiny run", of_run),
            "run": ("A whole run, PRESET=seed", of_run), "frontier": ("A whole run, PRESET=frontier", of_run),
            "peers": ("Other scripts", of_peers), "presets": ("seed against frontier", of_presets)}


# ---- eight GPUs ------------------------------------------------------------------------------------------------------


def training(step: dict, export: dict) -> list[str]:
    """Steps in the published time."""
    ms = step["step_ms"]["median"]
    matrices, others = step["muon_parameters"], step["parameters"] - step["muon_parameters"]
    sent = 4 * matrices, 2 * 4 * (others + 1), 2 * matrices  # a sum that everyone gets travels twice
    exchange = 1000 * (RANKS - 1) / RANKS * sum(sent) / LINK
    cap, guard = Config.max_wallclock_seconds, Config().export_seconds
    cap -= guard
    low, high = (int(1000 * cap / each) for each in (ms + exchange, ms))
    said = [f"- A step: {ms:.2f} ms of work at {TOKENS:,} tokens a GPU, as measured. Added is the exchange between "
            f"GPUs, not measured: 7/8 x ({sent[0]:,} bytes of the matrices' gradients + {sent[1]:,} of the others, "
            f"there and back + {sent[2]:,} of Muon's updates) / {LINK / 1e9:.0f} GB/s = {exchange:.2f} ms, if it hides "
            "behind nothing and reaches what NVLink is said to. Left out are the padding of what is sent, and what "
            "eight GPUs save: each turns an eighth of Muon's matrices only.",
            f"- Steps in {Config.max_wallclock_seconds:g} s less the {guard:.1f} s kept for the export: {cap:.1f} s / "
            f"{ms + exchange:.2f} ms = {low:,}, without the exchange {high:,}; {low * STEP_TOKENS / 1e9:.2f} G tokens."]
    if "export_s" in export:
        said.append(f"- Export: calibration and search took {export['export_s']:.1f} s where {guard:.1f} s are kept.")
    return said


def evaluation(run: dict, ttt: dict, vocabulary: int) -> list[str]:
    """Seconds of the evaluation behind val_bpb, and of the one in sliding windows."""
    said, sliding = [], (run.get("eval") or {}).get("sliding")
    if sliding:
        seconds, n, whole = sliding["seconds"], sliding["tokens"], book_of.fineweb(vocabulary)
        said.append(f"- Sliding windows: {seconds:.2f} s for {n:,} targets on one GPU, compilation included; "
                    f"{seconds:.2f} s x {whole:,} / {n:,} / {RANKS} = {seconds * whole / n / RANKS:.1f} s, in "
                    "which compilation is counted many times over.")
    if "eight" in ttt:
        walk, first = ttt["eight"]["seconds"], ttt["prime_s"]
        said.append(f"- Test-time training: {ttt['eight']['arithmetic']}; before it {first:.1f} s of compiling, as in "
                    f"this measurement: {walk + first:.1f} s of the 600 s.")
    return said


def estimate(stages: dict) -> list[str]:
    """What eight of these GPUs would do."""
    step, export, run, ttt = (stages.get(name, {}).get("figures", {}) for name in ("step", "export", "run", "ttt"))
    entry = stages.get("step", {})
    gpu = entry.get("machine", {}).get("device") == "cuda"
    preset = entry.get("settings", {}).get("PRESET")
    if not ("step_ms" in step and gpu and step.get("tokens") == TOKENS and preset == "seed"):
        return [f"None: it needs a step of PRESET=seed at {TOKENS:,} tokens on a GPU, which was not measured."]
    return ["Estimates, not measurements: of one GPU's figures, by the arithmetic shown.", "", *training(step, export),
            *evaluation(run, ttt, entry["settings"].get("VOCAB_SIZE", 1024))]


# ---- the folder ------------------------------------------------------------------------------------------------------


def unknown(stages: dict) -> list[str]:
    """What was not measured."""
    said = []
    for name in PLAN:
        entry = stages.get(name)
        if not entry:
            said.append(f"- {name}: not asked for")
        elif entry["status"] != "done":
            said.append(f"- {name}: {entry['status']}, {entry.get('why', 'no reason given')}; what it found is above")
    said += [f"- {name}: {what}, {why}" for name, entry in stages.items()
             for what, why in entry.get("missing", {}).items()]
    return [*said, "- more than one GPU, and so NCCL and every exchange between ranks",
            "- a run as long as the challenge's, and so its score"]


def story(stages: dict) -> list[str]:
    """How each stage went."""
    cells = [[name, entry["status"], number(entry.get("took")), number(entry.get("cached_files")),
              str(1 + len(entry.get("earlier", []))), entry.get("script", "")[:12], entry.get("why", "")]
             for name, entry in stages.items()]
    return table(["stage", "status", "seconds", "files in the compiler's cache before", "attempts", "script's sha256",
                  "why"], cells)


def readme(book: dict, title: str, drawn: bool, counts: dict | None, notes: str) -> str:
    """The README of the record."""
    stages = {name: book["stages"][name] for name in PLAN if name in book["stages"]}
    machine = next((entry["machine"] for entry in stages.values() if "machine" in entry), {})
    about = "; ".join(f"{name} {value}" for name, value in machine.items())
    made = paragraph("Made by `./run.sh measure --report` from measure.json, which holds every figure; times are "
                     "medians, ± the distance of the quartiles in percent.")
    lines = [f"# {title}", "", made, "", f"Machine: {about or 'not told'}", "", *story(stages), "", notes,
             "## Eight GPUs", "", *estimate(stages), ""]
    for name, entry in stages.items():
        heading, section = SECTIONS[name]
        said = [f"Data {entry['data']}, settings `{json.dumps(entry['settings'])}`", ""] if "settings" in entry else []
        lines += [f"## {heading}", "", *said, *section(entry), ""]
        if name == "step" and counts and entry.get("figures", {}).get("classes_ms"):
            lines += [*gaps(entry["figures"], counts), ""]
        lines += ["![a step's time by class](step_time.png)", ""] if name == "step" and drawn else []
    return "\n".join([*lines, "## Not measured", "", *unknown(stages), ""])


def draw(classes: dict, path: Path, title: str) -> bool:
    """A bar for each class of a step's time. Returns whether there is a plot."""
    if not classes or not (plt := pyplot("measure")):
        return False
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    kinds = [kind for kind in measure_profile.CLASSES if kind in classes]
    bars = axis.barh(kinds[::-1], [classes[kind] for kind in kinds[::-1]], color="0.5")
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
    axis.set_xlabel("ms a step")
    axis.set_title(title, fontsize="small")
    bare(axis)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return True


def place(book: dict) -> str:
    """DATE_CARD."""
    began = min(entry["began"] for entry in book["stages"].values() if "began" in entry)
    names = [entry["machine"]["name"] for entry in book["stages"].values() if "machine" in entry]
    return f"{began[:10]}_{re.sub(r'[^A-Za-z0-9]+', '_', names[0]).strip('_') if names else 'unknown'}"


def make(out: Path, records: Path) -> int:
    """Write the folder, whole or not at all."""
    if not (out / book_of.NAME).exists():
        fail(f"{out / book_of.NAME}: no such file; measure first, or name its folder with --out")
    try:
        book = book_of.read(out)
        if not any(entry.get("figures") for entry in book["stages"].values()):
            raise UserError(f"{out / book_of.NAME}: nothing was measured yet; measure first")
        folder = records / "gpu" / place(book)
        step = book["stages"].get("step", {})
        texts = {name: (out / name).read_text(encoding="utf-8") for name in KEPT if (out / name).exists()}
        if PROFILE in texts and step.get("figures", {}).get("classes_ms"):  # in the classes of today
            step["figures"] |= measure_profile.regrouped(json.loads(texts[PROFILE]))
        counts = json.loads(texts[COUNTS]) if COUNTS in texts else None
        title = f"{step.get('machine', {}).get('name', 'a machine')}: what tools/measure.py found"
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        if folder.exists():
            raise UserError(f"{folder}: exists, and none is overwritten; remove it first")
        try:
            partial.mkdir(parents=True)
            figures = step.get("figures", {})
            drawn = draw(figures.get("classes_ms"), partial / "step_time.png",
                         f"{step.get('machine', {}).get('name', '')}, {figures.get('tokens', 0):,} tokens a step")
            text = readme(book, title, drawn, counts, texts.pop(NOTES, ""))
            (partial / "README.md").write_text(text, encoding="utf-8")
            for name in (book_of.NAME, *texts):
                shutil.copyfile(out / name, partial / name)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (book_of.BookError, UserError) as problem:
        fail(one_line(problem))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fail(f"{out / book_of.NAME}: its entries do not agree with each other ({type(error).__name__}: "
             f"{one_line(error)}); measure again")
    if not drawn:
        tell(f"no plot: {NO_PLOT if figures.get('classes_ms') else 'no profile was taken'}")
    tell(f"written: {folder}")
    return 0
