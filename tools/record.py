#!/usr/bin/env python3
"""Make of finished runs, one a seed, a folder that is ready to submit; and keep the index of these folders.

    ./run.sh record logs/a logs/b logs/c --name NAME --author AUTHOR            records/track_10min_16mb/DATE_NAME
    ./run.sh record a b c --reference-name "PR 1855" --reference-bpb 1.0611,1.0607,1.0614 ...    tested against others
    ./run.sh record a b c --idea idea.md --baseline logs/base ...               with what is new, and what it changes
    ./run.sh record ... --non-record                                            records/track_non_record_16mb/DATE_NAME
    ./run.sh record --index                                                     only records/README.md

The folder holds train_gpt.py, packed as the runs counted it, train_gpt_readable.py, submission.json, a log a seed,
requirements.txt, README.md and the plots. Every figure is computed from the logs. It is refused, each reason on a line,
when the runs differ in more than the seed, an audit is missing or failed, the data was not verified, a limit is
exceeded, or a run has caveats; with --non-record the reasons come first in its README. It is written whole or not at
all, and none is overwritten. Exit codes: 0; 2 refused, or something to mend.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import figures  # noqa: E402
import record_review as review  # noqa: E402
import record_text as text  # noqa: E402
import runs as reader  # noqa: E402
from command_line import Parser, answer  # noqa: E402
from looks import NO_PLOT  # noqa: E402
from pack import packs  # noqa: E402
from record_checks import check_submission, reasons_against, settings_apart, verified_of  # noqa: E402
from run_log import ROOT, TITLES, Run, read_text, split_log, t  # noqa: E402
from runs import hardware_of  # noqa: E402
from sweep_results import counted, launcher, tell, utf_8  # noqa: E402

NON_RECORD = "track_non_record_16mb"


# ---- whether the runs make a record ----------------------------------------------------------------------------------


def whole(run: Run):
    """UserError where a file is gone that its log could be held against, or where the script in its log did not run."""
    if (run.train or run.val or run.chunks) and not (run.path / "metrics.jsonl").exists():
        run.wrong("has no metrics.jsonl, which its log is held against; give the run as it was left")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(run.code, "train_gpt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        run.wrong(f"the script in its train.log was edited, it does not compile ({t.one_line(error)}); give the run as "
                  "it was left")
    if script_of_sweep(run) not in (None, hashlib.sha256(run.code).hexdigest()):
        run.wrong("the script in its train.log is not that of its sweep.json; one of them was edited: give the run as "
                  "it was left")


def check_packed(run: Run):
    """UserError where the file that counted as its code is gone, is another, or does not run the script of its log."""
    path = run.path / t.PACKED_NAME
    if not path.is_file():
        run.wrong(f"has no {path.name}, which its bytes count; give the run as it was left")
    packed = path.read_bytes()
    size, digest = len(packed), hashlib.sha256(packed).hexdigest()
    if (size, digest) != run.code_file:
        told = f"{run.code_file[0]} and says {run.code_file[1][:16]}..."
        run.wrong(f"its {path.name} has {size} bytes and sha256 {digest[:16]}..., its log counts {told}; give the run "
                  "as it was left")
    if not packs(packed, run.code):
        run.wrong(f"its {path.name} does not unpack to the script in its train.log; give the run as it was left")


def script_of_sweep(run: Run) -> str | None:
    """sha256 of the script, where the run lies in the folder of a sweep, which keeps it."""
    try:
        told = json.loads((run.path.parent / "sweep.json").read_text(encoding="utf-8"))
        return told["script"] if run.name in told["runs"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def usable(runs: list[Run]):
    """UserError for what no record can be made of, not even one outside the competition."""
    for run in runs:
        if not run.path.is_dir() or not run.ours:
            run.wrong("not a run's folder; a record is made of LOG_DIR/RUN_ID as train_gpt.py leaves it")
        if not run.finished:
            place = f"LOG_DIR={shlex.quote(str(run.path.parent))} RUN_ID={shlex.quote(run.name)}"
            swept = (run.path.parent / "sweep.json").exists()
            again = "the same sweep again" if swept else f"{place} RESUME=1 {launcher()}"
            run.wrong(f"has not finished; to go on: {again}")
        if run.score is None:
            run.wrong("has no score; give runs with an evaluation")
        if not (math.isfinite(run.score.val_bpb) and run.bytes):
            run.wrong("its score is not a number; give runs that did not diverge")
        if not run.code:
            run.wrong("its train.log does not hold the script that ran; run it again")
        for worker in (run, *run.makers):
            whole(worker)
            if worker.packed:
                check_packed(worker)
            if worker.code_file != runs[0].code_file:
                worker.wrong(f"counted another packed script than {runs[0].name}; give runs of one")
        if run.code != runs[0].code:
            run.wrong(f"ran another train_gpt.py than {runs[0].name}; give runs of one script")
        for maker in run.makers:
            if maker.code != run.code:
                run.wrong(f"its weights are of {maker.name}, which ran another train_gpt.py; give runs of one script")


def one_a_seed(runs: list[Run], argv: list[str], options: argparse.Namespace) -> list[str]:
    """Nothing where each run has a seed of its own. Else what is to be said: the settings in which the runs differ, and
    the command for each of their values."""
    doubled = next((seed for seed, n in counted(run.seed for run in runs) if n > 1), None)
    if doubled is None:
        return []
    apart = settings_apart(runs)
    groups: dict[tuple, list[Run]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(tuple(values[i] for values in apart.values()), []).append(run)
    twice = [run.path.name for run in runs if run.seed == doubled]
    if any(len({run.seed for run in group}) < len(group) for group in groups.values()):
        return [f"{' and '.join(twice)}: have the same seed, {doubled}, and settings; give one run a seed"]
    rest = [word for word in argv if word not in options.runs and not word.startswith("--name=")]
    if "--name" in rest:
        at = rest.index("--name")
        del rest[at : at + 2]
    lines = [f"the runs differ in {' and '.join(apart)}, not in the seed alone; give those of one value:"]
    for values, group in groups.items():
        label = re.sub(r"[^A-Za-z0-9._-]", "-", "_".join([options.name, *values]))
        paths = [os.path.relpath(run.path) if run.path.is_relative_to(Path.cwd()) else str(run.path) for run in group]
        lines.append(f"{launcher()} record {shlex.join([*paths, *rest, '--name', label])}")
    return lines


# ---- what the folder holds -------------------------------------------------------------------------------------------


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def submission(runs: list[Run], options: argparse.Namespace, date: str) -> dict:
    """submission.json in the field's keys; bytes are those of the largest artifact."""
    losses, scores = [run.score.val_loss for run in runs], [run.score.val_bpb for run in runs]
    largest = max(runs, key=lambda run: run.total_bytes or 0)
    results = {str(run.seed): {
        "val_loss": run.score.val_loss, "val_bpb": run.score.val_bpb, "bytes_total": run.total_bytes,
        "step_stop": run.trainer.steps, "wallclock_seconds": run.training_seconds,
        "hardware": hardware_of(run)} for run in runs}
    return {"author": options.author, "github_id": options.github_id, "name": options.name,
            "blurb": options.blurb or text.blurb(runs), "date": date,
            "val_loss": statistics.mean(losses), "val_bpb": statistics.mean(scores),
            "val_loss_std": deviation(losses), "val_bpb_std": deviation(scores), "seeds": [run.seed for run in runs],
            "seed_results": results, "bytes_total": largest.total_bytes, "bytes_code": largest.code_bytes,
            "bytes_model_int6_zstd": largest.model_bytes}


def without_paths(log: str, run: Run) -> str:
    """A log without the places of the machine it ran on: paths in the project become relative, of others the last
    part stays."""
    known = [str(run.config.get(name) or "") for name in ("data_path", "tokenizer_path", "model_path", "nll_dump",
                                                          "log_dir")]
    known = [path for path in [str(ROOT), *known] if path.startswith("/")]
    for path in sorted(known, key=len, reverse=True):
        inside = Path(path).is_relative_to(ROOT)
        short = str(Path(path).relative_to(ROOT)) if inside else Path(path).name
        log = log.replace(f"{path}/", "" if short == "." else f"{short}/")
        log = re.sub(rf"{re.escape(path)}(?![\w.-])", lambda _, short=short: short, log)
    return re.sub(r"""(?<![\w./*-])(?:/[^\s/"',;:=()\[\]{}]+)+/([^\s/"',;:=()\[\]{}]+)""", r"\1", log)


def log_of(run: Run) -> str:
    """A run's log for the record: the script, which lies beside it, is named instead of copied."""
    _, body = split_log(read_text(run.path / "train.log"))
    digest, name = hashlib.sha256(run.code).hexdigest(), "train_gpt_readable.py" if run.packed else "train_gpt.py"
    return f"script {name} bytes:{len(run.code)} sha256:{digest}\n" + without_paths(body, run)


def logs(runs: list[Run]) -> dict[str, str]:
    """File name and text of each log: one a seed, or where other runs trained or exported for it one for each stage."""
    found = {}
    for run in runs:
        chain = [run, *run.makers]
        for maker, stage in zip(chain, ["eval", "export", "train"], strict=False):
            stage = "train" if maker is chain[-1] else stage
            found[f"{stage}_seed{run.seed}.log"] = log_of(maker)
    return found


def requirements(run: Run) -> str:
    """The packages as they were when it ran."""
    lines = [f"{name}=={version.partition('+')[0]}" for name, version in run.versions.items() if name != "python"]
    return "\n".join(lines) + "\n" if lines else read_text(ROOT / "requirements.txt")


def fill(folder: Path, place: str, runs: list[Run], options: argparse.Namespace, reasons: list[str] | None) -> bool:
    """Write everything into `folder`, which is to become records/`place`. Returns whether there are plots."""
    facts = submission(runs, options, time.strftime("%Y-%m-%d"))
    found = logs(runs)
    audits = {f"audit_seed{run.seed}.json": run.path / "audit.json" for run in runs if run.audits}
    found |= {name: read_text(path) for name, path in audits.items() if path.exists()}
    for name, log in found.items():
        (folder / name).write_text(log, encoding="utf-8")
    scripts = {"train_gpt.py": runs[0].code}
    if runs[0].packed:
        scripts = {"train_gpt.py": (runs[0].path / t.PACKED_NAME).read_bytes(), "train_gpt_readable.py": runs[0].code}
    for name, script in scripts.items():
        (folder / name).write_bytes(script)
    data = {}
    if not runs[0].about_data.get("verified") and (seen := verified_of(runs[0])):
        data = {"data.json": json.dumps(seen, indent=1) + "\n"}
        (folder / "data.json").write_text(data["data.json"], encoding="utf-8")
    (folder / "submission.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(runs[0]), encoding="utf-8")
    drawn = figures.pictures(runs, [f"seed {run.seed}" for run in runs], folder, options.name)
    files = [*scripts, "submission.json", "requirements.txt", *found, *data, *(f"{stem}.{end}" for stem in drawn or []
                                                                              for end in ("png", "svg"))]
    comparisons = [line for scores, name in zip(options.reference_bpb, options.reference_name, strict=True)
                   for line in review.against(runs, scores, name)]
    comparisons += review.baseline(runs, options.base) if options.base else []
    about = review.timings(runs) + review.origin(runs)
    readme = text.readme(runs, facts, reasons, place, drawn or [], files, options.idea_text, comparisons, about)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    check_submission(reader.read_all([str(folder)]), facts, folder)
    return drawn is not None


def write(records: Path, place: str, runs: list[Run], options: argparse.Namespace, reasons: list[str] | None) -> bool:
    """Write the record's folder beside its place, then move it there. Whatever stops it, nothing half-written stays."""
    final = records / place
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        plots = fill(partial, place, runs, options, reasons)
        if final.exists():
            raise t.UserError(f"{final}: exists, and no record is overwritten; choose another --name")
        os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return plots


# ---- the command line ------------------------------------------------------------------------------------------------


def scores(word: str) -> list[float]:
    values = [float(part) for part in word.split(",")]
    if not all(0 < value < 100 for value in values):
        raise argparse.ArgumentTypeError(f"{word}: not BPB, which are above 0")
    return values


def read_idea(path: Path) -> str:
    """The author's words for the README. UserError where there are none."""
    try:
        text = path.read_bytes().decode().strip()
    except UnicodeDecodeError:
        raise t.UserError(f"--idea {path}: not UTF-8; save it as that") from None
    except OSError as error:
        raise t.UserError(f"--idea {path}: cannot be read ({error.strerror}); give a text file") from None
    t.require(text, f"--idea {path}: is empty; write what is new, in some sentences")
    return text


def one_run(word: str) -> Run:
    """The run that --baseline names. UserError for several."""
    found = reader.read_all([word])
    t.require(len(found) == 1, f"--baseline {word}: {len(found)} runs; give one of them")
    return found[0]


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="./run.sh record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder or RUN_ID, one a seed; a sweep's folder")
    parser.add_argument("--name", help="of the record; its folder is DATE_NAME")
    parser.add_argument("--author", type=utf_8, help="for submission.json")
    parser.add_argument("--github-id", default="", help="for submission.json")
    parser.add_argument("--blurb", default="", type=utf_8, help="what is new, in a sentence (from the settings)")
    parser.add_argument("--track", help=f"folder under records/ (track_10min_16mb; with --non-record {NON_RECORD})")
    parser.add_argument("--non-record", action="store_true", help="write it all the same, and say why it is none")
    parser.add_argument("--idea", type=Path, metavar="FILE", help="what is new, in your words, for the README")
    parser.add_argument("--baseline", metavar="RUN", help="a run or log; the README says in what these differ from it")
    parser.add_argument("--reference-bpb", type=scores, action="append", default=[], metavar="X[,X...]",
                        help="scores of an entry to test against, one a seed; may be given again for another entry")
    parser.add_argument("--reference-name", type=utf_8, action="append", default=[], metavar="NAME",
                        help="whose scores these are (the reference)")
    parser.add_argument("--index", action="store_true", help="only write the index again")
    parser.add_argument("--records", type=Path, default=ROOT / "records", metavar="FOLDER", help="records/ of this "
                        "project")
    options = parser.parse_args(argv)
    if options.index and options.runs:
        raise t.UserError("--index takes no runs; leave it out, each record writes the index")
    if not options.index and not (options.runs and options.name is not None and options.author):
        raise t.UserError("give the runs, --name and --author; ./run.sh record --help says how")
    if len(options.reference_bpb) == 1 and not options.reference_name:
        options.reference_name = ["the reference"]
    if len(options.reference_name) != len(options.reference_bpb):
        raise t.UserError("give a --reference-name for each --reference-bpb, in the same order")
    options.idea_text = read_idea(options.idea) if options.idea else ""
    options.base = None
    options.track = options.track or (NON_RECORD if options.non_record else "track_10min_16mb")
    for flag, value in (("--name", options.name), ("--track", options.track)):
        if value is not None and not re.fullmatch(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_][A-Za-z0-9._-]{0,150}", value):
            raise t.UserError(f"{flag} {value[:200]!r}: give letters, digits and . _ - only, at most 150, the first no "
                              ". or -: it is a folder's name, and part of a command")
    return options


def launched(argv: list[str]) -> int:
    options = read_arguments(argv)
    if not options.index:
        place = f"{options.track}/{time.strftime('%Y-%m-%d')}_{options.name}"
        if (options.records / place).exists():
            raise t.UserError(f"{options.records / place}: exists, and no record is overwritten; choose another --name")
        runs = sorted(reader.read_all(options.runs), key=lambda run: run.seed or 0)
        usable(runs)
        options.base = one_run(options.baseline) if options.baseline else None
        if lines := one_a_seed(runs, argv, options):
            sys.stderr.writelines(f"{line}\n" for line in [f"error: {lines[0]}", *lines[1:]])
            return 2
        reasons = reasons_against(runs)
        if reasons and not options.non_record:
            sys.stderr.writelines(f"error: not a record: {t.one_line(reason)}\n" for reason in reasons)
            sys.stderr.write(f"error: {len(reasons)} reasons; --non-record writes it all the same, and says them\n")
            return 2
        if not write(options.records, place, runs, options, reasons if options.non_record else None):
            tell(f"no plots: {NO_PLOT}")
        what = TITLES[next(key for key in reversed(TITLES) if key in runs[0].scores)]
        said = f"not a record: {len(reasons)} reasons" if reasons else "no check speaks against it"
        tell(f"{statistics.mean(run.score.val_bpb for run in runs):.4f} BPB ({what}), {len(runs)} "
             f"seed{'s' * (len(runs) > 1)}, at most {max(run.total_bytes or 0 for run in runs):,} bytes; {said}")
        tell(f"written: {options.records / place}")
    return write_index(options.records, options.index)


def write_index(records: Path, asked: bool) -> int:
    """Write records/README.md. What is wrong with a folder is in its row, and said; the exit code says it too where the
    index was all that was `asked` for."""
    problems, path = [], records / "README.md"
    t.write_atomically(path, text.index(records, problems).encode())
    tell(f"written: {path}")
    kind = "error" if asked else "warning"
    sys.stderr.writelines(f"{kind}: {t.one_line(problem)}\n" for problem in problems)
    return 2 if asked and problems else 0


def main(argv: list[str]) -> int:
    return answer(launched, argv)


if __name__ == "__main__":
    for caught in t.SIGNALS:  # as an exception, so that nothing half-written stays
        signal.signal(caught, lambda number, frame: sys.exit(128 + number))
    t.leave(main(sys.argv[1:]))
