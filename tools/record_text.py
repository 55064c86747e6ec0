"""What a record says in words: its README, its command, the test against a reference; and the index of all records.

Used by tools/record.py.
"""

import json
import math
import re
import shlex
import statistics
import textwrap
from pathlib import Path

import runs as reader
from run_log import LIMIT_BYTES, ROOT, TITLES, Run, read_text, t
from runs import data_of, hardware_of
from sweep_results import plain, spread

LIMIT_SECONDS = 600  # of the challenge, for training and for evaluation
STEP_OVER = 1.01  # a capped training ends with the step that passes the cap
MARGIN = 0.005  # nats a token that a record must win
UP = "../../.."  # from a record's folder to the project's


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# ---- the command -----------------------------------------------------------------------------------------------------


def from_record(path: str, home: str) -> str:
    """A path of the run as it is given in a record's folder: what lies in the project by its place there, else `home`
    in the project and its name."""
    inside = Path(path)
    if inside.is_absolute():
        known = inside.is_relative_to(ROOT)
        inside = inside.relative_to(ROOT) if known else Path(home, inside.name)
    return f"{UP}/{inside}"


def command(runs: list[Run], folder: str) -> str:
    """What trains and scores all seeds again from inside the record's folder."""
    run = runs[0]
    given = {name: value for name, value in run.given.items() if name != "SEED"}
    for name, home in (("DATA_PATH", "data/datasets"), ("TOKENIZER_PATH", "data/tokenizers")):
        if given.get(name):
            given[name] = from_record(given[name], home)
    words = [f"{name}={shlex.quote(plain(value))}" for name, value in ({"PRESET": run.preset} | given).items()]
    ranks = run.hardware.get("world_size", 1)
    words += ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "train_gpt.py"]
    lines = textwrap.wrap(" ".join(words), 116, break_long_words=False, break_on_hyphens=False)
    seeds = " ".join(str(run.seed) for run in runs)
    return (f"cd records/{folder}\nfor seed in {seeds}; do\n  SEED=$seed RUN_ID=seed$seed \\\n  "
            + " \\\n  ".join(lines) + "\ndone")


# ---- the test against a reference ------------------------------------------------------------------------------------


def significance(gains: list[float], margin: float) -> tuple[float, float]:
    """t statistic and one-sided p of a mean gain above `margin`, over seeds; of Student's t test.

    Raises UserError where scipy is missing."""
    try:
        from scipy.special import stdtr
    except ImportError:
        raise t.UserError("scipy is missing, which the test against --reference-bpb needs; python -m pip install -r "
                          "tools/requirements.txt") from None
    deviation, over = statistics.stdev(gains), statistics.mean(gains) - margin
    value = math.copysign(math.inf, over) if deviation == 0 else over / (deviation / math.sqrt(len(gains)))
    return value, float(stdtr(len(gains) - 1, -value))


def small(p: float) -> str:
    return f"{p:.2g}" if p < 0.1 else f"{p:.3f}"


def against(runs: list[Run], bpb: float, name: str) -> list[str]:
    """The comparison with a reference, whose BPB is taken as known."""
    per_token = [math.log(2) * run.bytes / run.targets for run in runs]  # nats a token in a bit a byte
    reference = [bpb * factor for factor in per_token]
    losses, scores = [run.score.val_loss for run in runs], [run.score.val_bpb for run in runs]
    gains = [a - b for a, b in zip(reference, losses, strict=True)]
    rows = [[name, f"{bpb:.4f}", f"{statistics.mean(reference):.4f}"], ["this", spread(scores), spread(losses)],
            ["gain", f"{bpb - statistics.mean(scores):+.4f}", f"{statistics.mean(gains):+.4f}"]]
    lines = ["## Against the reference", *table(["", "BPB", "nats/token"], rows), ""]
    if data_of(runs[0]) != "fineweb10B_sp1024" or any("partial split" in c for run in runs for c in run.all_caveats):
        lines += [paragraph("This was scored on other text than the challenge's split: the figures compare only if the "
                            "reference was scored on the same targets."), ""]
    if len(runs) < 2:
        return [*lines, "One seed: no test is possible.", ""]
    tests = [["better", 0.0], [f"better by {MARGIN} nats/token, as a record must be", MARGIN]]
    figures = [significance(gains, margin) for _, margin in tests]
    rows = [[claim, f"{value:.2f}", small(p), "yes" if p < 0.01 else "no"] for (claim, _), (value, p) in
            zip(tests, figures, strict=True)]
    text = (f"Mean difference {statistics.mean(gains):+.5f} nats/token, sample standard deviation over "
            f"{len(runs)} seeds {statistics.stdev(gains):.5f}. Student's t test of one sample, one-sided, "
            f"{len(runs) - 1} degree{'s' * (len(runs) > 2)} of freedom; the reference counts as known:")
    return [*lines, paragraph(text), "", *table(["claim", "t", "p", "p < 0.01"], rows), ""]


# ---- the README ------------------------------------------------------------------------------------------------------


def blurb(runs: list[Run]) -> str:
    """What was run, in a sentence, from the settings."""
    run = runs[0]
    size = run.trainer.parameters
    seconds = statistics.mean(r.training_seconds or 0.0 for r in runs)
    return (f"{run.settings.get('NUM_LAYERS')} layers, width {run.settings.get('MODEL_DIM')}"
            + (f", {size:,} parameters" if size else "") + f"; trained {seconds:,.0f} s on {hardware_of(run)}, data "
            f"{data_of(run)}, {len(runs)} seed{'s' * (len(runs) > 1)}")


def results(runs: list[Run]) -> list[str]:
    """The table of the results, with mean and deviation."""
    def cells(run: Run) -> list[float | None]:
        bpb = {key: s.bpb for key, s in run.scores.items()}
        before = bpb.get("sliding", bpb.get("int6"))
        gain = before - bpb["ttt"] if "ttt" in bpb and before is not None else None
        return [run.trainer.steps, bpb.get("int6"), bpb.get("sliding"), bpb.get("ttt"), gain, run.total_bytes,
                run.training_seconds, run.evaluation_seconds]

    digits = (0, 4, 4, 4, 4, 0, 1, 1)
    columns = list(zip(*map(cells, runs), strict=True))
    rows = [[run.seed, *("-" if x is None else f"{x:,.{d}f}" for x, d in zip(cells(run), digits, strict=True))]
            for run in runs]
    if len(runs) > 1:
        whole = [[x for x in column if x is not None] for column in columns]
        rows.append(["**mean**", *(f"**{spread(c, d)}**" if d == 4 else f"{statistics.mean(c):,.{d}f}" if c else "-"
                                   for c, d in zip(whole, digits, strict=True))])
    heads = ["seed", "steps", TITLES["int6"], TITLES["sliding"], TITLES["ttt"], "gain", "bytes", "training s",
             "evaluation s"]
    what = "the artifact read back" if runs[0].total_bytes else "float weights, for there is no artifact"
    text = (f"Scores in bits per byte, of {what}; gain: what test-time training wins over sliding "
            "windows; ± is the sample standard deviation over seeds; bytes: code and artifact; training includes "
            "calibration and search; evaluation is reading, compiling and the evaluation behind val_bpb.")
    return ["## Results", *table(heads, rows), "", paragraph(text), ""]


def by_chunk(runs: list[Run]) -> list[str]:
    """Running BPB at about ten places of test-time training."""
    found = [run for run in runs if run.chunks]
    if not found:
        return []
    count = found[0].chunks[-1].count
    at = [{c.step: c.bpb for c in run.chunks} for run in found]
    shared = sorted(set.intersection(*(set(a) for a in at)))
    chosen = sorted({shared[round(i * (len(shared) - 1) / 9)] for i in range(10)}) if shared else []
    rows = [[f"{step} of {count}", *(f"{a[step]:.4f}" for a in at)] for step in chosen]
    mode = found[0].settings.get("TTT_MODE")
    what = ("A chunk here is a twentieth of the documents, in the order in which they are scored, of rank 0."
            if mode == "lora" else f"A chunk is {found[0].settings.get('TTT_CHUNK_TOKENS'):,} targets.")
    return ["## Running BPB by chunk", *table(["chunk", *(f"seed {run.seed}" for run in found)], rows), "",
            paragraph(f"BPB of everything scored so far. {what}"), ""]


def parts(runs: list[Run]) -> list[str]:
    sizes = [reader.byte_parts(run) for run in runs]
    names = list(dict.fromkeys(name for size in sizes for name in size))
    rows = [[f"seed {run.seed}", *(f"{size.get(name, 0):,}" for name in names), f"{run.total_bytes:,}"]
            for run, size in zip(runs, sizes, strict=True) if size]
    limit = min(LIMIT_BYTES, *(run.config.get("artifact_limit_bytes", LIMIT_BYTES) for run in runs))
    return ["## Bytes", *table(["", *names, "total"], rows), "", f"The limit was {limit:,}.", ""] if rows else []


def setup(runs: list[Run]) -> list[str]:
    """Data, machine, versions and audits."""
    run = runs[0]
    cores, threads = (run.hardware.get(name) for name in ("cpu_count", "threads"))
    machine = hardware_of(run) + (f", {cores} cores, {threads} thread{'s' * (threads != 1)} a rank" if
                                  run.hardware.get("device") == "cpu" else "")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [f"- Data: {data_of(run)}; scored: {run.targets:,} targets, {run.bytes:,} bytes",
             f"- Machine: {machine}", f"- Versions: {versions}"]
    for r in runs:
        said = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in r.audits.items()) or "none"
        lines.append(f"- Audit, seed {r.seed}: {said}")
    return ["## Setup", *lines, ""]


def picture(stem: str, drawn: list[str], text: str) -> list[str]:
    return [f"![{text}]({stem}.png)", ""] if stem in drawn else []


def readme(runs: list[Run], facts: dict, reasons: list[str] | None, folder: str, drawn: list[str], files: list[str],
           reference: tuple[float, str] | None) -> str:
    """README.md of a record. `reasons`: why it is none; None where it is one. `facts`: submission.json."""
    last = next(key for key in reversed(TITLES) if key in runs[0].scores)
    n = len(runs)
    head = (f"**val_bpb {spread([r.score.val_bpb for r in runs])}** ({TITLES[last]}"
            + (f", mean of {n} seeds" if n > 1 else ", one seed") + f"), {spread([r.score.val_loss for r in runs])} "
            f"nats/token; " + (f"{facts['bytes_total']:,} bytes at most" if facts["bytes_total"] else "no artifact"))
    lines = [f"# {facts['name']}", "", paragraph(head + "."), ""]
    if reasons is not None:
        lines += [paragraph("Not a record: " + ("; ".join(reasons) or "asked for as such, no check speaks against it")
                            + "."), ""]
    lines += [paragraph(facts["blurb"].rstrip(".") + "."), ""]
    lines += results(runs) + picture("training", drawn, "training loss, validation, learning rate and step time")
    lines += by_chunk(runs) + picture("running_bpb", drawn, "running BPB by chunk")
    lines += against(runs, *reference) if reference else []
    lines += parts(runs) + picture("bytes", drawn, "bytes of code and artifact by part") + setup(runs)
    data = runs[0].given.get("DATA_PATH", "")
    lines += ["## Command", "```sh", command(runs, folder), "```", ""]
    if Path(data).is_absolute() and not Path(data).is_relative_to(ROOT):
        lines += [paragraph(f"The data was elsewhere; the command takes it from data/datasets/{Path(data).name} of the "
                            "project."), ""]
    lines += [paragraph("Files: " + ", ".join(f"`{name}`" for name in files) + ". Paths in the logs are shortened, and "
                        "the copy of the script in each is left out: it is `train_gpt.py`."), ""]
    return "\n".join(lines)


# ---- the index -------------------------------------------------------------------------------------------------------


def why_not(folder: Path) -> str:
    """What a record's README says of why it is none: its sentence that begins so."""
    text = read_text(folder / "README.md")
    found = re.search(r"Not a record: (.+?)\.(?=\s+[A-Z]|\s*\n\n|\s*\Z)", text, re.S)
    return " ".join(found[1].split()) if found else ""


def summaries(folder: Path) -> list[dict]:
    return [json.loads(read_text(path)) for path in sorted(folder.glob("summary*.json"))]


def index_row(folder: Path) -> list[str]:
    """A record's line: date, link, machine, data, BPB, bytes, valid or why not; - for what its files do not say."""
    path = folder / "submission.json"
    try:
        facts = json.loads(read_text(path)) if path.exists() else {}
        said = summaries(folder)
    except ValueError as error:
        raise t.UserError(f"{folder}: a broken JSON file ({t.one_line(error)}); mend it") from None
    try:
        found = [reader.read(p) for p in reader.find(str(folder))]
    except t.UserError:
        found = []
    machines = [entry.get("hardware") for entry in facts.get("seed_results", {}).values()]
    machines += [facts.get("hardware"), *map(hardware_of, found)]
    machines += [f"{s['hardware']['world_size']} x {s['hardware']['name']}" for s in said]
    machines += re.findall(r"^Machine: ([^.;\n]+)", read_text(folder / "README.md"), re.M)
    data = next(filter(None, map(data_of, found)), "-")
    partial = next((c for run in found for c in run.all_caveats if c.startswith("partial split")), "")
    data += re.sub(r"partial split: its (first \d+ targets).*", r", \1", partial)
    scores = sorted(run.score.bpb for run in found if run.score)
    if facts and scores and abs(statistics.mean(scores) - facts["val_bpb"]) > 1e-6:
        raise t.UserError(f"{folder}: submission.json says {facts['val_bpb']:.6f} BPB, its logs "
                          f"{statistics.mean(scores):.6f}; one of them was edited")
    bpb = f"{facts['val_bpb']:.4f}" if facts else f"{scores[0]:.4f}" if scores else "-"
    bpb += f" ± {facts['val_bpb_std']:.4f}" if facts.get("val_bpb_std") else ""
    bpb += f" (lowest of {len(scores)} runs)" if not facts and len(scores) > 1 else ""
    size = facts.get("bytes_total") or max((run.total_bytes or 0 for run in found), default=0)
    why = why_not(folder)
    faults = [fault for fault in dict.fromkeys(fault for run in found for fault in run.faults) if fault not in why]
    problems = [f"not valid: {'; '.join(faults)}"] * bool(faults) + [f"not a record: {why}"] * bool(why)
    date, _, name = folder.name.partition("_")
    return [date, f"[{name}]({folder.parent.name}/{folder.name})", next(filter(None, machines), "-"), data, bpb,
            f"{size:,}" if size else "-", "; ".join(problems) or "yes"]


def index(records: Path) -> str:
    """records/README.md: every record, newest first, from what lies in the folders."""
    folders = [p for p in records.glob("*/*") if p.is_dir() and not p.name.startswith(".")]
    rows = [index_row(folder) for folder in sorted(folders, key=lambda p: (p.name, p.parent.name), reverse=True)]
    heads = ["date", "record", "machine", "data", "BPB", "bytes", "valid, or why not"]
    text = ("Made by `./run.sh record --index`, and by each `./run.sh record`, from the files of the folders; not to "
            "be edited. BPB is bits per byte, the mean over seeds ± sample standard deviation; - where the files do "
            "not say.")
    return "\n".join(["# Records", "", paragraph(text), "", *table(heads, rows), ""])
