"""Read runs into one form: our folders, finished or not, and plain logs, also published ones.

Every figure is taken from the log lines. Where a run has a metrics.jsonl and a summary.json too, they are held against
the lines, and a figure that differs is an error that names it. A run that took its weights from another one (a sweep
shares stages) is traced to the runs that trained and exported for it. Used by tools/show.py and tools/record.py.
"""

import json
import os
from pathlib import Path

from inspect_artifact import contents
from run_checks import agree, check_artifact, check_log, check_scores, check_summary, read_metrics
from run_log import Run, artifact, read_log, read_text, t


def read_folder(folder: Path, trace: bool = True) -> Run:
    """A run's folder. `trace`: also the runs whose weights it took."""
    run = Run(folder, folder.name)
    metrics = folder / "metrics.jsonl"
    read_log(folder / "train.log", run)
    run.summary = read_summary(folder / "summary.json", run)
    if run.summary is None:
        run.valid = None  # its end is being written, or it was taken up again
    elif run.valid is None:
        run.wrong("summary.json is finished, but train.log has not come to its end; give the run as it was left")
    if run.summary is not None and not run.ours:
        run.wrong("summary.json is there, but train.log has no line of config; give the run as it was left")
    if run.ours and run.finished and run.lacks:
        run.wrong(f"train.log has no line {run.lacks[0]!r}, which every run writes; give the run as it was left")
    if metrics.exists():
        read_metrics(metrics, run)
    check_log(run) if run.ours else check_scores(run)
    if run.summary is not None:
        try:
            check_summary(run)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            run.wrong(f"summary.json is not that of a run ({type(error).__name__}: {error}); give it as it was left")
    check_artifact(run)
    run.makers = makers_of(run) if trace else []
    return run


def read_summary(path: Path, run: Run) -> dict | None:
    """The summary of a run that has ended."""
    if not path.exists():
        return None
    try:
        found = json.loads(read_text(path))
        return found if found.get("finished", True) else None  # older scripts wrote it at their end alone
    except (ValueError, RecursionError, AttributeError) as error:
        return run.wrong(f"summary.json is broken ({t.one_line(error)}); give the run as it was left")


def makers_of(run: Run) -> list[Run]:
    """The runs, nearest first, whose artifact or float weights it took; none where they are not to be found."""
    found = []
    while not run.config.get("train_enabled", True):
        given = Path(run.config.get("model_path", ""))
        places = (given.parent, run.path.parent / given.parent.name)  # or beside it, where LOG_DIR was moved
        folder = next((p.resolve() for p in places if (p / "train.log").exists()), None)
        if folder is None or folder in (r.path.resolve() for r in (run, *found)):
            break
        maker = read_folder(folder, trace=False)
        if given.name == t.ARTIFACT_NAME and run.summary and maker.summary:
            agree(run, "the sha256 of its artifact", artifact(run), artifact(maker), 0, "its summary.json",
                  f"that of {maker.name}")
        found.append(maker)
        run = maker
    return found


def find(word: str) -> list[Path]:
    """The folders and logs that an argument names: a run's folder, a log, a sweep's or a record's folder, each by its
    path or by its name under LOG_DIR."""
    log_dir = Path(os.environ.get("LOG_DIR") or t.Config.log_dir)
    path = next((p for p in (Path(word), log_dir / word) if p.exists()), None)
    if path is None:
        raise t.UserError(f"{word}: no such run, neither here nor in {log_dir}; give a run's folder, its RUN_ID or a "
                          "log")
    if path.is_file():
        return [path.parent if path.name == "train.log" else path]
    if (path / "train.log").exists():
        return [path]
    inside = sorted(p.parent for p in path.glob("*/train.log")) if (path / "sweep.json").exists() else []
    seeds = {p.stem.partition("_seed")[2]: p for pattern in ("train_seed*.log", "eval_seed*.log") for p in
             sorted(path.glob(pattern))}  # the log of an evaluation apart stands for its training's too
    inside = inside or list(seeds.values()) or sorted(path.glob("log_*.txt"))
    if not inside:
        raise t.UserError(f"{path}: holds no run, that is no train.log; give a run's folder or a log")
    return inside


def read(path: Path) -> Run:
    """A run's folder or a log. Whatever an edited file holds, what cannot be read is said in a line."""
    try:
        return read_any(path)
    except t.UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise t.UserError(f"{path}: its files do not agree with each other ({type(error).__name__}: {error}); give it "
                          "as it was left") from None


def read_any(path: Path) -> Run:
    if path.is_dir():
        return read_folder(path)
    run = Run(path, path.stem)
    read_log(path, run)
    if not (run.ours or run.train or run.val or run.own or run.chunks):
        run.wrong("not a log of this field: no line of training and no score in the forms of train_gpt.py, PR 581 or "
                  "PR 549; give a run's folder or a log")
    check_log(run) if run.ours else check_scores(run)
    if path.name.startswith("eval_seed"):  # in a record: what the weights come from lies beside it
        beside = [path.with_name(path.name.replace("eval", stage, 1)) for stage in ("export", "train")]
        run.makers = [read(p) for p in beside if p.exists()]
    return run


def of_output(word: str) -> str:
    """The run's folder, where a word is what a run of a sweep printed, which lies beside it: NAME/1_* names both."""
    path = Path(word)
    folder = path.parent / path.stem
    printed = path.suffix == ".out" and path.is_file() and (folder / "train.log").exists()
    return str(folder) if printed else word


def read_all(words: list[str]) -> list[Run]:
    """The runs that arguments name."""
    named = {Path(word).resolve() for word in words}
    folders = [(word, of_output(word)) for word in words]
    words = [folder for word, folder in folders if word == folder or Path(folder).resolve() not in named]
    paths = [path.resolve() for word in words for path in find(word)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise t.UserError(f"{twice[0]}: given twice; give each run once")
    return [read(path) for path in paths]


def byte_parts(run: Run) -> dict[str, int]:
    """The bytes of code and artifact by part: by group of tensors where the artifact is at hand, else the model as
    one."""
    if run.total_bytes is None:
        return {}
    folders = [r.path for r in (run, *run.makers)]
    path = next((p / t.ARTIFACT_NAME for p in folders if (p / t.ARTIFACT_NAME).is_file()), None)
    if run.code_bytes is None or run.model_bytes is None:  # a published log need not say both
        return {"model": run.total_bytes}
    parts = {"code": run.code_bytes}
    if path is None or path.stat().st_size != run.model_bytes:
        return parts | {"model": run.model_bytes}
    try:
        found = contents(str(path))
    except t.UserError:  # of another version of the script
        return parts | {"model": run.model_bytes}
    sizes = dict.fromkeys((*t.GROUPS, "fp16"), 0.0)
    for name, s in found.tensors.items():
        sizes[t.group_of(name) if s.coded else "fp16"] += found.bytes[name]
    groups = {group: round(size) for group, size in sizes.items() if size}
    return parts | groups | {"frame": run.model_bytes - sum(groups.values())}


def hardware_of(run: Run) -> str:
    """Such as 8 x NVIDIA H100; empty where the log does not say."""
    named = run.hardware.get("name")
    return f"{run.hardware['world_size']} x {named}" if named else f"{run.ranks} GPUs" if run.ranks else ""


def data_of(run: Run) -> str:
    """The name of the data; empty where the log does not say."""
    path = run.config.get("data_path") or run.overrides.get("DATA_PATH") or ""
    return run.trainer.data or Path(str(path)).name
