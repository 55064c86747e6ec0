"""What a record says in words: its README, its command; and the index of all records.

Used by tools/record.py.
"""

import json
import re
import shlex
import statistics
import textwrap
from pathlib import Path

import runs as reader
from record_checks import check_submission, reasons_against
from record_review import paragraph, table
from run_log import LIMIT_BYTES, ROOT, TITLES, Run, read_text, t
from runs import data_of, hardware_of
from sweep_results import plain, spread

SEEDS = 3  # that a record is usually shown with
UP = "../../.."  # from a record's folder to the project's


# ---- the command -----------------------------------------------------------------------------------------------------


def from_record(path: str, home: str) -> str:
    """A path of the run as it is given in a record's folder: what lies in the project by its place there, else `home`
    in the project and its name."""
    inside = Path(path)
    if inside.is_absolute():
        known = inside.is_relative_to(ROOT)
        inside = inside.relative_to(ROOT) if known else Path(home, inside.name)
    return f"{UP}/{inside}"


def words_of(run: Run) -> str:
    """The variables and the launch of a run, from inside the record's folder, but for its seed; wrapped."""
    given = {name: value for name, value in run.given.items() if name != "SEED"}
    data = run.settings.get("DATA_PATH")
    if data and not data_of(run).startswith("fineweb10B"):  # which a run takes by itself where it is there
        given["DATA_PATH"] = data
    for name, home in (("DATA_PATH", "data/datasets"), ("TOKENIZER_PATH", "data/tokenizers")):
        if given.get(name):
            given[name] = from_record(given[name], home)
    words = [f"{name}={shlex.quote(plain(value))}" for name, value in ({"PRESET": run.preset} | given).items()]
    ranks = run.hardware.get("world_size", 1)
    words += ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "train_gpt.py"]
    return " \\\n  ".join(textwrap.wrap(" ".join(words), 116, break_long_words=False, break_on_hyphens=False))


def command(runs: list[Run], folder: str) -> str:
    """What trains and scores all seeds again from inside the record's folder: a loop over the seeds, or where settings
    differ one for each."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(words_of(run), []).append(str(run.seed))
    return f"cd records/{folder}\n" + "\n".join(f"for seed in {' '.join(which)}; do\n  SEED=$seed RUN_ID=seed$seed \\\n"
                                                f"  {words}\ndone" for words, which in seeds.items())


# ---- the README ------------------------------------------------------------------------------------------------------


def blurb(runs: list[Run]) -> str:
    """What was run, in a sentence, from the settings."""
    run = runs[0]
    size = run.trainer.parameters if run.trainer.counted else None
    seconds = statistics.mean(r.training_seconds or 0.0 for r in runs)
    layers = run.settings.get("NUM_LAYERS")
    return (f"{layers} layer{'s' * (layers != 1)}, width {run.settings.get('MODEL_DIM')}"
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
    """Data, machine and versions."""
    run = runs[0]
    cores, threads = (run.hardware.get(name) for name in ("cpu_count", "threads"))
    machine = hardware_of(run) + (f", {cores} cores, {threads} thread{'s' * (threads != 1)} a rank" if
                                  run.hardware.get("device") == "cpu" else "")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [f"- Data: {data_of(run)}; scored: {run.targets:,} targets, {run.bytes:,} bytes",
             f"- Machine: {machine}", f"- Versions: {versions}"]
    return ["## Setup", *lines, ""]


def picture(stem: str, drawn: list[str], text: str) -> list[str]:
    return [f"![{text}]({stem}.png)", ""] if stem in drawn else []


def readme(runs: list[Run], facts: dict, reasons: list[str] | None, folder: str, drawn: list[str], files: list[str],
           idea: str, comparisons: list[str], review: list[str]) -> str:
    """README.md of a record. `reasons`: why it is none; None where it is one. `facts`: submission.json. `idea`: in the
    author's words. `comparisons`, `review`: sections of tools/record_review.py."""
    last = next(key for key in reversed(TITLES) if key in runs[0].scores)
    n = len(runs)
    head = (f"**val_bpb {spread([r.score.val_bpb for r in runs])}** ({TITLES[last]}"
            + (f", mean of {n} seeds" if n > 1 else ", one seed") + f"), {spread([r.score.val_loss for r in runs])} "
            f"nats/token; " + (f"{facts['bytes_total']:,} bytes at most" if facts["bytes_total"] else "no artifact"))
    lines = [f"# {facts['name']}", "", paragraph(head + "."), ""]
    if reasons is not None:
        lines += [paragraph("Not a record: " + ("; ".join(reasons) or "asked for as such, no check speaks against it")
                            + "."), ""]
    if n < SEEDS:
        lines += [paragraph(f"Caution: {n} seed{'s' * (n > 1)}; a record is usually shown with {SEEDS}, and fewer say "
                            "little about the deviation over seeds."), ""]
    lines += [paragraph(facts["blurb"].rstrip(".") + "."), ""]
    lines += ["## Idea", idea.strip(), ""] if idea else []
    lines += results(runs) + picture("training", drawn, "training loss, validation, learning rate and step time")
    lines += by_chunk(runs) + picture("running_bpb", drawn, "running BPB by chunk")
    lines += comparisons + parts(runs) + picture("bytes", drawn, "bytes of code and artifact by part") + setup(runs)
    lines += review
    data = runs[0].given.get("DATA_PATH", "")
    lines += ["## Command", "```sh", command(runs, folder), "```", ""]
    if Path(data).is_absolute() and not Path(data).is_relative_to(ROOT):
        lines += [paragraph(f"The data was elsewhere; the command takes it from data/datasets/{Path(data).name} of the "
                            "project."), ""]
    script = "train_gpt_readable.py" if runs[0].packed else "train_gpt.py"
    lines += [paragraph("Files: " + ", ".join(f"`{name}`" for name in files) + ". Paths in the logs are shortened, and "
                        f"the copy of the script in each is left out: it is `{script}`."), "",
              paragraph("When this was made, each log was held against the run's metrics.jsonl and summary.json, and "
                        "against its artifact where that was still there. Nothing but the log tells the versions, nor "
                        "the script, which was compiled and compared in length, and with its sha256 in the audit, and "
                        "in that of the sweep where there is one."), ""]
    return "\n".join(lines)


# ---- the index -------------------------------------------------------------------------------------------------------


def why_not(folder: Path) -> str:
    """What a record's README says of why it is none: its sentence that begins so."""
    found = re.search(r"Not a record: (.+?)\.(?=\s+[A-Z]|\s*\n\n|\s*\Z)", readme_of(folder), re.S)
    return " ".join(found[1].split()) if found else ""


def readme_of(folder: Path) -> str:
    path = folder / "README.md"
    return read_text(path) if path.is_file() else ""


def load(path: Path, *keys: str) -> dict:
    """A JSON file that holds at least `keys`."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise t.UserError(f"{path}: broken JSON ({t.one_line(error)}); mend it") from None
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise t.UserError(f"{path}: has not the keys of such a file ({', '.join(keys)}); mend it")
    return found


def submitted(folder: Path) -> dict:
    """submission.json of a record; empty where there is none."""
    path = folder / "submission.json"
    if not path.exists():
        return {}
    facts = load(path, "val_bpb", "seed_results", "bytes_total")
    numbers = [facts["val_bpb"], facts["bytes_total"] or 0, facts.get("val_bpb_std") or 0]
    sound = isinstance(facts["seed_results"], dict) and all(isinstance(e, dict) for e in facts["seed_results"].values())
    if not sound or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise t.UserError(f"{path}: val_bpb, val_bpb_std, bytes_total or seed_results is not of its kind; mend it")
    return facts


def logs_of(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs whose logs lie in a record's folder, and why others cannot be read."""
    found, problems = [], []
    try:
        paths = reader.find(str(folder))
    except t.UserError:  # holds none
        return [], []
    for path in paths:
        try:
            found.append(reader.read(path))
        except t.UserError as problem:
            problems.append(f"{path.name} cannot be read: {str(problem).removeprefix(f'{path}: ')}")
    return found, problems


def verdict(folder: Path, facts: dict, found: list[Run], problems: list[str]) -> str:
    """Whether a folder holds a record, or why not: of runs with a submission.json judged from their logs, as when it
    was made; of others what its README says."""
    why, faults = why_not(folder), list(dict.fromkeys(fault for run in found for fault in run.faults))
    if facts and found and not problems:
        reasons = reasons_against(found)
        return "; ".join(reasons) and f"not {'valid' if faults else 'a record'}: {'; '.join(reasons)}" or "yes"
    unsaid = [f"not valid: {'; '.join(f for f in faults if f not in why)}"] if any(f not in why for f in faults) else []
    lacks = [] if (folder / "README.md").is_file() else ["no README.md"]
    nothing = "no log that shows it" if facts else "no submission.json"
    return "; ".join(problems + unsaid + lacks + [f"not a record: {why or nothing}"])


def index_row(folder: Path) -> tuple[list[str], list[str]]:
    """A record's line: date, link, machine, data, BPB, bytes, valid or why not; - for what its files do not say. With
    it, what is wrong with the files."""
    facts, (found, problems) = submitted(folder), logs_of(folder)
    said = [load(path, "hardware") for path in sorted(folder.glob("summary*.json"))]
    machines = list(map(hardware_of, found))
    machines += [entry.get("hardware") for entry in facts.get("seed_results", {}).values()]
    machines = [facts.get("hardware"), *machines, *(f"{s['hardware']['world_size']} x {s['hardware']['name']}" for s in
                                                    said)]
    machines += re.findall(r"^Machine: ([^.;\n]+)", readme_of(folder), re.M)
    data = next(filter(None, map(data_of, found)), "-")
    partial = next((c for run in found for c in run.all_caveats if c.startswith("partial split")), "")
    data += re.sub(r"partial split: its (first \d+ targets).*", r", \1", partial)
    scores = sorted(run.score.bpb for run in found if run.score)
    if facts and scores and not problems:
        check_submission(found, facts, folder)
    bpb = f"{facts['val_bpb']:.4f}" if facts else f"{scores[0]:.4f}" if scores else "-"
    bpb += f" ± {facts['val_bpb_std']:.4f}" if facts.get("val_bpb_std") else ""
    bpb += f" (lowest of {len(scores)} runs)" if not facts and len(scores) > 1 else ""
    size = max((run.total_bytes or 0 for run in found), default=0) or facts.get("bytes_total")
    cells = [str(next(filter(None, machines), "-")), data, bpb, f"{size:,}" if size else "-"]
    return [*linked(folder), *cells, verdict(folder, facts, found, problems)], problems


def linked(folder: Path) -> list[str]:
    """Date and link of a record."""
    date, _, name = folder.name.partition("_")
    return [date, f"[{name}]({folder.parent.name}/{folder.name})"]


def row_of(folder: Path, problems: list[str]) -> list[str]:
    """A record's line, also of a folder with which something is wrong; that is added to `problems`."""
    try:
        row, wrong = index_row(folder)
        problems += [f"{folder}: {problem}" for problem in wrong]
    except t.UserError as problem:
        problems.append(str(problem))
        said = str(problem).replace(f"{folder}/", "").removeprefix(f"{folder}: ")
        return [*linked(folder), *["-"] * 4, f"not a record: {said}"]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        problems.append(f"{folder}: its files do not agree with each other ({type(error).__name__}: {error}); mend it")
        return [*linked(folder), *["-"] * 4, "not a record: its files do not agree with each other"]
    return row


def index(records: Path, problems: list[str] | None = None) -> str:
    """records/README.md: every record, newest first, from what lies in the folders; `problems` takes what is wrong with
    them. What tools/measure.py found on GPUs, in records/gpu, is no record."""
    problems = [] if problems is None else problems
    folders = [p for p in records.glob("*/*") if p.is_dir() and not p.name.startswith(".") and p.parent.name != "gpu"]
    rows = [row_of(folder, problems) for folder in sorted(folders, key=lambda p: (p.name, p.parent.name), reverse=True)]
    heads = ["date", "record", "machine", "data", "BPB", "bytes", "valid, or why not"]
    text = ("Made by `./run.sh record --index`, and by each `./run.sh record`, from the files of the folders; not to "
            "be edited. BPB is bits per byte, the mean over seeds ± sample standard deviation; - where the files do "
            "not say.")
    return "\n".join(["# Records", "", paragraph(text), "", *table(heads, rows), ""])
