"""Whether runs make a record: what tools/record.py refuses, and what the index of the records says of each folder."""

import hashlib
import json
import statistics
from pathlib import Path

from audit import CHECKS
from pack import packs
from run_checks import agree
from run_log import LIMIT_BYTES, ROOT, Run, read_text, t
from runs import data_of, hardware_of
from sweep_results import plain

LIMIT_SECONDS = 600  # of the challenge, for training and for evaluation
PLACED = ("DATA_PATH", "TOKENIZER_PATH")


def same_place(value) -> str:
    """A path with the same text however it was given, where it is still there: relative to here or to the project."""
    for base in (Path.cwd(), ROOT):
        if value and (base / str(value)).exists():
            return str((base / str(value)).resolve())
    return str(value)


def told_apart(facts: list[dict]) -> dict[str, list[str]]:
    """By name the values of each run, where they differ; of its seed nothing."""
    names = dict.fromkeys(name for own in facts for name in own if name != "SEED")
    values = {name: [plain(own.get(name, "unset")) for own in facts] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def settings_apart(runs: list[Run]) -> dict[str, list[str]]:
    """The settings in which the runs differ beside the seed, by name the value of each run."""
    return told_apart([{name: same_place(value) if name in PLACED else value for name, value in run.settings.items()}
                       for run in runs])


def differences(runs: list[Run]) -> list[str]:
    """In what the runs differ beside the seed, a phrase each."""
    machines = [{
        "the machine": hardware_of(run), "the threads": run.hardware.get("threads"), "the preset": run.preset,
        "the data": data_of(run), "the split": f"{run.targets} targets", "the scores": ", ".join(run.scores)}
        | {f"the version of {name}": version for name, version in run.versions.items()} for run in runs]
    found = []
    for name, values in (settings_apart(runs) | told_apart(machines)).items():
        seeds: dict[str, list[str]] = {}
        for run, value in zip(runs, values, strict=True):
            seeds.setdefault(value, []).append(str(run.seed))
        found.append(f"the runs differ in {name}: " + ", ".join(f"{value} (seed {', '.join(which)})" for value, which in
                                                                seeds.items()))
    return found


def facts_of_data(text: str, path: Path) -> dict:
    """What data.json says. UserError where it is not of its kind."""
    try:
        found = json.loads(text)
        counts = ("equal_documents", "shared_documents", "shared_tokens", "faults")
        if all(isinstance(found[name], int) for name in counts):
            return found | {"date": str(found["date"]), "sha256": str(found["sha256"])}
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise t.UserError(f"{path}: not what a record holds of its data; put back the one that was written")


def verified_of(run: Run) -> dict | None:
    """What `./run.sh data --verify` has found in a run's data: as the run knew, as lies beside its log in a record, or
    as its folder of data says today."""
    if found := run.about_data.get("verified"):
        return found
    if run.path.is_file():
        path = run.path.with_name("data.json")
        return facts_of_data(read_text(path), path) if path.is_file() else None
    folder = Path(run.config.get("data_path") or "nowhere")
    return t.read_verified(folder)[0] if t.state_of(folder) == run.about_data.get("state_sha256") else None


def against_data(run: Run) -> list[str]:
    """What the verification of its data says against a run, where it has not said so itself."""
    if not run.about_data:
        return ["its log has no line 'data'"] if run.code_file else []  # older scripts wrote neither
    found = verified_of(run)
    if not found:
        return ["data not verified (./run.sh data --verify)"]
    unsaid = found["faults"] and not run.about_data["verified"]
    return [f"verified data has {found['faults']} faults (./run.sh data --verify)"] if unsaid else []


def last_step(run: Run) -> float:
    """Seconds of a step, of a training that its cap ended: the step in progress is finished. 0 for another training."""
    return run.train_seconds / run.steps if run.stop and run.steps and run.train_seconds else 0.0


def problems(run: Run) -> list[str]:
    """What keeps a run from a record."""
    found = list(run.faults)
    found += [reason for maker in run.makers for reason in maker.reasons if reason.partition(":")[0] in run.scores]
    if run.trainer.steps is None:
        found.append("the run that trained its weights is not to be found, so nothing of its training is known")
    elif run.trainer.seed != run.seed:
        found.append(f"trained with seed {run.trainer.seed}, evaluated with seed {run.seed}")
    found += [f"its log has no line {name!r}" for name in run.lacks]
    limit, scored = run.config.get("val_token_limit"), run.targets
    if limit and limit == scored and not any(line.startswith("partial split") for line in run.all_caveats):
        found.append(f"VAL_TOKEN_LIMIT={limit}, and as many targets: nothing shows that they are the whole split")
    found += [f"{maker.name} worked for it on {hardware_of(maker)}, not on {hardware_of(run)}" for maker in run.makers
              if hardware_of(maker) != hardware_of(run)]
    failed = [name for name, ok in run.audits.items() if not ok and not any(f"audit: {name}" in f for f in found)]
    missing = [name for name in CHECKS if name not in run.audits]
    found += [f"the audit of {name} failed" for name in failed]
    if run.audited or len(missing) == len(CHECKS):
        found.append(f"{run.audited or 'no audit'} (./run.sh audit)")
    else:
        found += [f"no audit of {name}" for name in missing]
    limit = min(run.config.get("artifact_limit_bytes", LIMIT_BYTES), LIMIT_BYTES)
    if run.total_bytes is None:
        found.append("no artifact")
    elif run.total_bytes > limit and not any("over the limit" in f for f in found):
        found.append(f"{run.total_bytes:,} bytes, over {limit:,}")
    for what, seconds, last in (("training", run.training_seconds, last_step(run.trainer)),
                                ("evaluation", run.evaluation_seconds, 0.0)):
        if seconds is not None and seconds - last > LIMIT_SECONDS:
            found.append(f"{what} took {seconds:.1f} s, over {LIMIT_SECONDS}")
    return found + run.all_caveats + against_data(run)


def reasons_against(runs: list[Run]) -> list[str]:
    """Every reason why these runs make no record; those of single runs name the seed."""
    by_text: dict[str, list[str]] = {}
    for run in runs:
        for problem in dict.fromkeys(problems(run)):
            by_text.setdefault(problem, []).append(str(run.seed))
    return differences(runs) + [problem if len(seeds) == len(runs) else f"seed {', '.join(seeds)}: {problem}"
                                for problem, seeds in by_text.items()]


def check_submission(runs: list[Run], facts: dict, folder: Path):
    """UserError where submission.json, or the script that lies in a record's folder, is not what its logs say."""
    mean = statistics.mean(run.score.val_bpb for run in runs)
    if abs(mean - facts["val_bpb"]) > 1e-6:
        raise t.UserError(f"{folder}: submission.json says {facts['val_bpb']:.6f} BPB, its logs {mean:.6f}; one of "
                          "them was edited")
    logged, told = sorted(str(run.seed) for run in runs), sorted(facts["seed_results"])
    if logged != told:
        raise t.UserError(f"{folder}: submission.json is of the seeds {', '.join(told)}, its logs of "
                          f"{', '.join(logged)}; one of them was edited")
    for run in runs:
        entry = facts["seed_results"][str(run.seed)]
        for figure, value in (("val_bpb", run.score.val_bpb), ("val_loss", run.score.val_loss),
                              ("bytes_total", run.total_bytes), ("step_stop", run.trainer.steps)):
            agree(run, f"{figure} of seed {run.seed}", value, entry[figure], 6e-9, run.path.name, "submission.json")
        for worker in (run, *run.makers):
            names = ("train_gpt_readable.py", "train_gpt.py") if worker.packed else ("train_gpt.py", "train_gpt.py")
            for name, told in zip(names, (worker.script, worker.code_file), strict=True):
                path = folder / name
                if told and not path.is_file():
                    raise t.UserError(f"{folder}: has no {name}, which its logs name; put it back")
                if told:
                    agree(worker, "the script's bytes", told[0], path.stat().st_size, 0, worker.path.name, name)
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    agree(worker, "the script's sha256", told[1], digest, 0, worker.path.name, name)
            if worker.packed and not packs(*((folder / name).read_bytes() for name in reversed(names))):
                raise t.UserError(f"{folder}: train_gpt.py does something else than to run train_gpt_readable.py; put "
                                  "back what the run left")
    most = max(run.total_bytes or 0 for run in runs) or None
    agree(runs[0], "bytes_total", most, facts["bytes_total"], 0, "its logs", "submission.json")
