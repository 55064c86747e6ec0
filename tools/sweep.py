#!/usr/bin/env python3
"""Run a grid of settings of train_gpt.py, each run in its own process and folder, and compare them.

    ./run.sh sweep TTT_LR=1e-4,3e-4 SEED=13,1111,1337            the grid: six runs
    ./run.sh sweep --list runs.txt SEED=13,1111 --jobs 2 --name rates

The list has a run a line, `VAR=value VAR=value`, quoted as in a shell, # opens a comment; with VAR=a,b beside it each
line is run for each value. A comma always separates in VAR=a,b: values that hold one go into a list. There are no
ranges; the shell has them: SEED=$(seq -s, 1 5). Variables of the environment are the base of every run.

Everything is in LOG_DIR/NAME: a folder a run, its output beside it, sweep.json, and in the end results.csv, results.md,
results.png and results.svg. The same command again skips what is finished, goes on with what was cut and tries again
what failed. Stages that do not differ are not repeated: of runs with the same settings of training the first trains,
of those that also export alike the first exports, and where only test-time training differs the other scores are taken
from the first too. With TRAIN_ENABLED=0 each run starts from MODEL_PATH by itself. AUDIT=1 audits each run after it.

With GPUs each of the --jobs gets its own share of them, one rank a GPU; without, its share of the cores.
Exit codes: 0 all runs finished; 1 one failed, or failed a check; 2 something to mend; 128+n after signal n.
"""

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet, and no traceback
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train_gpt.py does

import corpus  # noqa: E402
import sweep_results as results  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

FIELDS = {f.name.upper(): f for f in t.VARIABLES}
OURS = ("RUN_ID", "LOG_DIR", "RESUME")  # a sweep sets these itself
# The sections of --help whose variables training does not see, by the stage that does. A variable of any other section,
# also of one that is new, counts as training's: then too much is repeated, and nothing wrong is shared.
AFTER_TRAINING = {"Export": "export", "Evaluation": "score", "Test-time training": "adapt"}
STAGES = {name: AFTER_TRAINING.get(t.STAGES[f.name], "train") for name, f in FIELDS.items()}
AUDIT = ROOT / "tools" / "audit.py"
QUIET_SECONDS = 60.0  # between two lines about the whole


def fail(*problems: str):
    sys.stderr.writelines(f"error: {t.one_line(problem)}\n" for problem in problems)
    sys.exit(2)


# ---- what to run -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """A run of the sweep. `weights`, `artifact` and `scores` are the runs, maybe this one, that train for it, export
    for it, and score its artifact before test-time training."""

    name: str  # RUN_ID
    given: dict[str, str]  # what it sets beyond the base
    cfg: t.Config
    folder: Path
    audited: bool = False  # whether it is to be
    state: str = "waiting"  # or running, finished, failed, cut
    reason: str = ""
    began: float = 0.0
    spent: float = 0.0  # seconds of its processes, the audit's too
    output_from: int = 0  # where in its output file this attempt begins
    weights: "Run | None" = None
    artifact: "Run | None" = None
    scores: "Run | None" = None

    @property
    def title(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.given.items())

    @property
    def kind(self) -> str:
        """What it does: the whole, from the export on, or from the scores on."""
        return "whole" if self.weights is self else "export" if self.artifact is self else "score"

    @property
    def output(self) -> Path:
        return self.folder.with_name(f"{self.name}.out")

    def stage_key(self, *stages: str) -> tuple:
        """What decides the outcome of these stages: the settings, and the seconds that the export leaves to a training
        with a cap."""
        names = [name.lower() for name, stage in STAGES.items() if stage in stages and name not in results.PLACES]
        return *(getattr(self.cfg, name) for name in names), self.cfg.training_seconds

    def summary(self) -> dict | None:
        """Its summary.json if it has come to its end."""
        return self.summary_after("finished")

    def summary_after(self, stage: str) -> dict | None:
        """Its summary.json if there is something under this name."""
        try:
            found = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return found if found[stage] else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def audit_faults(self) -> list[str] | None:
        """The checks that its audit failed, where one is wanted; None where it has not been made."""
        if not self.audited:
            return []
        try:
            checks = json.loads((self.folder / "audit.json").read_text(encoding="utf-8"))
            return [f"audit, {name}: {check['detail']}" for name, check in checks.items()
                    if isinstance(check, dict) and not check["ok"]]
        except (OSError, ValueError, LookupError, AttributeError):
            return None

    def settle(self):
        """Set state and reason by what its folder holds."""
        summary, audit = self.summary(), self.audit_faults()
        if summary and audit is not None:
            # as train_gpt.py's exit code: without an export there is nothing to fail
            bad = [r for r in summary["reasons"] if not r.startswith("EXPORT_ENABLED=0")]
            self.state, self.reason = "finished", "; ".join(bad + audit)

    def source(self) -> Path | None:
        """The weights that another run makes for it; None while they are not there.

        Raises FileNotFoundError when they will not come."""
        maker = self.weights if self.kind == "export" else self.artifact
        path = maker.folder / t.ARTIFACT_NAME
        if self.kind == "export":  # the folder of a run that has trained; its last checkpoint is taken
            path = maker.folder / "checkpoints"
            if maker.summary_after("train") and t.checkpoints(maker.folder):
                return maker.folder
        elif path.exists():
            return path
        if maker.state == "failed":
            raise FileNotFoundError(f"not started: {maker.name}, whose weights it needs, failed")
        if maker.state == "finished":
            raise FileNotFoundError(f"not started: {maker.name} is finished, but its {path.name} is not there; put it "
                                    f"back, or remove {maker.folder} to run that one again")
        return None


def assignment(word: str, where: str) -> tuple[str, str]:
    """Name and value of VAR=value. Ends the process for what is none, or no variable of train_gpt.py."""
    name, equals, value = word.partition("=")
    if not equals:
        fail(f"{where}{word!r}: not of the form VAR=value")
    if name in OURS:
        fail(f"{where}{name}: the sweep sets it for each run; give --name, and LOG_DIR in the environment")
    if name in t.NOT_IMPLEMENTED or name in t.REMOVED:
        fail(f"{where}{name}: {t.REMOVED.get(name, 'not implemented in this script')}")
    if name not in FIELDS:
        near = t.meant(name) or difflib.get_close_matches(name.upper(), FIELDS, 1, 0.0)[0]
        fail(f"{where}{name}: no such variable; did you mean {near}? python train_gpt.py --help lists them")
    return name, value


def read_grid(words: list[str]) -> list[dict[str, str]]:
    """Every combination of VAR=a,b,c arguments, the last varying fastest."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, values = assignment(word, "")
        if name in axes:
            fail(f"{name}: given twice; give all its values at once, {name}=a,b,c")
        axes[name] = values.split(",")
        if "" in axes[name]:
            fail(f"{word}: a value is missing; give {name}=a,b,c (one that is empty or has a comma goes into a --list)")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_list(path: Path) -> list[dict[str, str]]:
    """The runs of a --list file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"--list {path}: {getattr(problem, 'strerror', None) or 'not a text file'}")
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as problem:
            fail(f"{path}:{number}: {problem}; quote as in a shell")
        pairs = [assignment(word, f"{path}:{number}: ") for word in words]
        if len(dict(pairs)) < len(pairs):
            fail(f"{path}:{number}: gives a variable twice; give it once")
        runs += [dict(pairs)] if pairs else []
    return runs or fail(f"--list {path}: holds no run")


def combine(listed: list[dict], grid: list[dict]) -> list[dict]:
    if both := {name for run in listed for name in run} & {name for run in grid for name in run}:
        fail(f"{min(both)}: both in the list and in the grid; give it in one of them")
    return [a | b for a in listed for b in grid]


def base_environment() -> dict[str, str]:
    """The environment of every run, but for what the sweep sets."""
    own = ("RUN_ID", "RESUME", "AUDIT", "LAUNCHED_BY")
    return {name: value for name, value in os.environ.items() if name not in own}


def configured(given: list[dict], ranks: int, folder: Path) -> list[Run]:
    """The runs with their checked configurations. Ends the process at the first that is not accepted."""
    runs, warnings, width, first = [], {}, len(str(len(given))), {}
    for number, variables in enumerate(given, 1):
        cfg, problems, notes = t.load_config(base_environment() | variables, ranks)
        if problems:
            fail(*(f"{line} (run {number})" for line in problems))
        warnings |= dict.fromkeys(notes)
        label = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", "_".join(f"{k}={v}" for k, v in variables.items()))[:100]
        name = f"{number:0{width}}_{label}"
        run = Run(name, variables, cfg, folder / name)
        same = first.setdefault(run.stage_key(*STAGES.values()), run)
        if same is not run:
            fail(f"{run.title}: the same run as {same.title}; leave one out")
        runs.append(run)
    dumps = [run.cfg.nll_dump for run in runs if run.cfg.nll_dump]
    if len(set(dumps)) < len(dumps):
        fail(f"NLL_DUMP={dumps[0]}: more than one run would write it; give each its own in a --list")
    sys.stderr.writelines(f"warning: {t.one_line(line)}\n" for line in warnings)
    return runs


def share(runs: list[Run]):
    """Let the first of the runs that agree on a stage and all before it do it for the others."""
    trained, exported, scored = {}, {}, {}
    for run in runs:
        run.weights = run.artifact = run
        if run.cfg.train_enabled:
            run.weights = trained.setdefault(run.stage_key("train"), run)
            if run.cfg.export_enabled:
                run.artifact = exported.setdefault(run.stage_key("train", "export"), run)
        run.scores = scored.setdefault(run.stage_key("train", "export", "score"), run)


# ---- where to run ----------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """What one job at a time has of the machine: GPUs, or none and some cores."""

    gpus: list[str]
    threads: int

    @property
    def ranks(self) -> int:
        return max(len(self.gpus), 1)

    @property
    def share(self) -> str:
        """What a run has of the machine, in words. Under a wall-clock cap a run's score hangs on it."""
        return f"{len(self.gpus)} GPUs" if self.gpus else f"{os.environ.get('OMP_NUM_THREADS', self.threads)} threads"

    def command(self) -> list[str]:
        """torchrun finds a free port for each launch; a single rank needs no launcher, which would hide its exit code
        and take seconds to start."""
        several = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                   f"--nproc_per_node={self.ranks}"]
        return [sys.executable, *(several if self.ranks > 1 else []), str(t.SCRIPT)]

    def environment(self) -> dict[str, str]:
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        set_already = self.ranks > 1 or "OMP_NUM_THREADS" in os.environ  # torchrun gives each of several ranks one
        if signal.SIGHUP not in t.SIGNALS:  # under nohup torchrun shall not heed it either
            shown["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
        return shown | ({} if set_already else {"OMP_NUM_THREADS": str(self.threads)})


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name them."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(i) for i in range(count)]


def slots_of(jobs: int, gpus: list[str], cores: int) -> list[Slot]:
    """An equal share for each job; GPUs that are left over stay idle."""
    if gpus and jobs > len(gpus):
        fail(f"--jobs {jobs}: this machine shows {len(gpus)} GPUs; give at most that")
    each = len(gpus) // jobs
    return [Slot(gpus[i * each : (i + 1) * each], max(cores // jobs, 1)) for i in range(jobs)]


# ---- running ---------------------------------------------------------------------------------------------------------


class Sweep:
    """The runs, at most one a slot at a time; what is said of them; what was caught."""

    def __init__(self, runs: list[Run], slots: list[Slot], lock: int | None = None):
        self.runs, self.slots, self.lock = runs, slots, lock
        self.active: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        self.caught, self.signals, self.shown_at = 0, 0, time.monotonic()

    def catch(self, number: int, frame):
        self.caught, self.signals = self.caught or number, self.signals + 1

    def environment(self, run: Run, slot: Slot) -> dict[str, str]:
        """What the process of `run` is started with."""
        env = base_environment() | run.given | slot.environment()
        env |= {"LOG_DIR": str(run.folder.parent), "RUN_ID": run.name, "RESUME": "1"}
        others = (other for other in self.runs if other is not run)
        if not run.cfg.ckpt_every_seconds and any(other.kind == "export" and other.weights is run for other in others):
            env["CKPT_EVERY_SECONDS"] = "1e9"  # so that its last checkpoint stays
        if run.kind != "whole":
            env |= {"TRAIN_ENABLED": "0", "MODEL_PATH": str(run.source())}
            if run.cfg.max_wallclock_seconds:  # its share of a cap, which is no more known there
                env["EXPORT_MAX_SECONDS"] = repr(run.cfg.export_seconds)
        if run.scores is not run and run.cfg.ttt_enabled:  # which is then all that is left to do
            env |= {"FINAL_EVAL_ENABLE": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
        return env

    def start(self, run: Run, place: int):
        """Start what is next of a run: train_gpt.py, or once that has come to its end the audit."""
        slot, again, audits = self.slots[place], run.folder.exists(), run.summary() is not None
        command = [sys.executable, str(AUDIT), str(run.folder)] if audits else slot.command()
        with open(run.output, "ab") as out:
            run.output_from = out.tell()
            # a session of its own: Ctrl-C reaches the sweep alone, which tells the runs; with the lock, so that no
            # second sweep starts while a run of one that was killed goes on
            process = subprocess.Popen(command, env=self.environment(run, slot), stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, start_new_session=True,
                                       pass_fds=(self.lock,))
        run.state, run.reason, run.began = "running", "", time.monotonic()
        self.active[place] = run, process
        results.tell(f"audits   {run.name}" if audits else f"started  {run.name}" + " again" * again)

    def reap(self):
        """Take in the processes that have ended."""
        for place, (run, process) in list(self.active.items()):
            if process.poll() is None:
                continue
            del self.active[place]
            run.spent += time.monotonic() - run.began
            run.settle()
            if run.state == "running" and run.summary() and AUDIT.name not in str(process.args):
                run.state = "waiting"  # for its audit
            elif run.state == "running":
                run.state, run.reason = "cut" if self.caught else "failed", self.why(run, process.returncode)
            state = "ran" if run.state == "waiting" else run.state
            results.tell(f"{state:8} {run.name}: {self.outcome(run)}; {self.counts()}")

    def why(self, run: Run, code: int) -> str:
        """One line on why a run ended early, from what it printed."""
        with open(run.output, "rb") as file:
            file.seek(run.output_from)
            lines = file.read().decode(errors="replace").splitlines()
        for pattern in (r"error: (.*)", r"(interrupted by .*)", r"(\w*(?:Error|Exception)\b.*)"):
            if found := [m.group(1) for m in map(re.compile(pattern).match, lines) if m]:
                alone = "; (?:last good checkpoint: |to go on: |nothing is saved yet, )"  # of how to go on with it
                return re.split(alone, found[0])[0]
        if code == 0:
            return f"its summary.json cannot be read; remove {run.folder} to run it again"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def fill(self):
        """Start what can be started."""
        for run in self.runs:
            try:
                ready = run.state == "waiting" and (run.kind == "whole" or run.source())
            except FileNotFoundError as problem:
                run.state, run.reason, ready = "failed", str(problem), False
                results.tell(f"failed   {run.name}: {run.reason}")
            free = [place for place in range(len(self.slots)) if place not in self.active]
            if ready and free:
                self.start(run, free[0])

    def go(self) -> int:
        """Run what is left. Returns the signal that ended it early, else 0. Whatever happens, no process stays."""
        passed = 0
        before = {number: signal.signal(number, self.catch) for number in t.SIGNALS}
        try:
            while True:
                self.reap()
                if not self.caught:
                    self.fill()
                if not self.active:
                    break
                if self.signals > passed:
                    passed = self.signals
                    self.stop(kill=passed > 1)
                self.show()
                time.sleep(0.1)
        finally:
            self.stop(kill=False)
            for _, process in self.active.values():
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.caught

    def stop(self, kill: bool):
        """SIGTERM to each launcher or single rank, which save and end; or SIGKILL to all of them."""
        if self.active:
            what = "are killed" if kill else "save and end; a second signal kills them"
            results.tell(f"{len(self.active)} running {what}")
        for _, process in self.active.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if kill else process.terminate()

    # -- what is shown

    def counts(self) -> str:
        """How many runs are in each state, and about how long the others take."""
        number = dict(results.counted(run.state for run in self.runs))
        parts = [f"{number.get('finished', 0)} of {len(self.runs)} finished"]
        parts += [f"{number[state]} {state}" for state in ("running", "waiting", "failed", "cut") if state in number]
        left = self.minutes_left()
        return ", ".join([*parts, f"about {left:.1f} min left"] if left else parts)

    def minutes_left(self) -> float:
        """By the mean time of the finished runs of each kind, or of all where none of the kind is; 0 if unknown."""
        known: dict[str, list[float]] = {}
        for run in self.runs:
            if run.state == "finished" and (summary := run.summary()):
                known.setdefault(run.kind, []).append(run.spent or summary["seconds"]["total"])
        every = [seconds for values in known.values() for seconds in values]
        left = [known.get(run.kind, every) for run in self.runs if run.state in ("running", "waiting")]
        return sum(statistics.mean(values) for values in left) / len(self.slots) / 60 if every else 0.0

    def outcome(self, run: Run) -> str:
        """What there is to say of a run that has ended."""
        if run.state != "finished":
            return run.reason or "its audit is next"
        summary = run.summary()
        score = "no score" if summary["val_bpb"] is None else f"{summary['val_bpb']:.4f} BPB"
        why = f"; not valid: {run.reason}" if run.reason else ""
        return f"{score}, {summary['seconds']['total']:.0f} s{why}"

    def show(self):
        """What runs, and a word about the whole, now and then; `./run.sh show NAME` tells more."""
        if time.monotonic() - self.shown_at > QUIET_SECONDS:
            self.shown_at = time.monotonic()
            running = (f"{run.name} for {self.shown_at - run.began:.0f} s" for run, _ in self.active.values())
            results.tell(f"running  {', '.join(running)}; {self.counts()}")


# ---- a sweep's folder ------------------------------------------------------------------------------------------------


def described(runs: list[Run], slot: Slot) -> dict:
    """What makes a sweep this one. A variable that every run sets has no base."""
    own = set.intersection(*(set(run.given) for run in runs))
    base = {n: v for n, v in sorted(os.environ.items()) if n in FIELDS and n not in OURS and n not in own}
    return {"script": hashlib.sha256(t.SCRIPT.read_bytes()).hexdigest(), "base": base, "share": slot.share,
            "runs": {run.name: run.given for run in runs}}


def differences(then: dict, now: dict) -> str:
    """The parts in which two descriptions differ, the first difference of each in brackets."""
    said = []
    for part, value in now.items():
        before = then.get(part)
        if isinstance(value, dict) and isinstance(before, dict):
            odd = sorted(name for name in value.keys() | before.keys() if value.get(name) != before.get(name))
            said += [f"{part} ({odd[0]})"] if odd else []
        elif before != value:
            said.append(part if part == "script" else f"{part} ({before})")
    return ", ".join(said)


def take(folder: Path, description: dict, command: str):
    """Lock a new or an old sweep's folder. Returns the lock. Ends the process where it holds something else."""
    path = folder / "sweep.json"
    if folder.exists():
        try:
            odd = differences(json.loads(path.read_text(encoding="utf-8")), description)
        except (OSError, ValueError, AttributeError):
            fail(f"{folder}: exists and holds no sweep; choose another --name")
        if odd:
            fail(f"{folder}: begun with another {odd}; give the same again to go on with it, or another --name")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = t.lock(folder)
    except t.UserError:
        fail(f"{folder}: this sweep, or a run that it left, is still going; wait for it or choose another --name")
    if not path.exists():
        t.write_atomically(path, (json.dumps(description | {"command": command}, indent=1) + "\n").encode())
    return lock


def check(run: Run, slot: Slot):
    """train_gpt.py's own --check of files and folders, which says what is wrong."""
    env = base_environment() | run.given | slot.environment()
    done = subprocess.run([sys.executable, str(t.SCRIPT), "--check", "--ranks", str(slot.ranks)], env=env,
                          capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = re.findall(r"^error: (.*)$", done.stderr, re.M)
        fail(*(lines or [f"train_gpt.py --check ended with exit code {done.returncode}: {done.stderr[-300:]}"]))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(f"{message}; ./run.sh sweep --help says how")


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="./run.sh sweep "
                    "[VAR=a,b,c ...] [--list FILE] [--jobs N] [--name NAME]")
    parser.add_argument("grid", nargs="*", metavar="VAR=a,b,c", help="a variable of train_gpt.py and its values")
    parser.add_argument("--list", type=Path, metavar="FILE", help="a run a line, VAR=value VAR=value")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--name", help="folder under LOG_DIR (RUN_ID, else from the variables and a hash of them)")
    options = parser.parse_intermixed_args(argv)
    if options.jobs < 1:
        fail("--jobs: must be at least 1")
    if not options.grid and not options.list:
        fail("nothing to run: give VAR=a,b,c or --list FILE; ./run.sh sweep --help says how")
    return options


def name_of(options: argparse.Namespace, given: list[dict], description: dict) -> str:
    """The sweep's folder under LOG_DIR."""
    name = (os.environ.get("RUN_ID") or None) if options.name is None else options.name
    if name is None:
        swept = dict.fromkeys(name for run in given for name in run)
        code = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:8]
        return f"sweep_{'_'.join(swept)[:100]}_{code}"
    try:
        return t.parse(str, FIELDS["RUN_ID"].metadata["accepts"], name or ".")
    except ValueError:
        fail(f"--name {name!r}: must be the name of a folder under LOG_DIR, without slashes, under 200 bytes")


def launched(argv: list[str]) -> int:
    """One launch, from its arguments to its results. Returns the exit code."""
    options = read_arguments(argv)
    given = combine(read_list(options.list) if options.list else [{}], read_grid(options.grid))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slots = slots_of(options.jobs, visible_gpus(), cores)
    log_dir = Path(os.environ.get("LOG_DIR") or t.Config.log_dir).absolute()
    runs = configured(given, slots[0].ranks, log_dir)
    share(runs)
    description = described(runs, slots[0])
    folder = log_dir / name_of(options, given, description)
    if not folder.exists():
        for run in runs:
            if run.cfg.train_enabled:
                corpus.provide(run.cfg)
        check(runs[0], slots[0])
    words = [*options.grid, *(["--list", str(options.list)] if options.list else []), "--jobs", str(options.jobs)]
    command = f"{results.launcher()} sweep {shlex.join(words)} --name {shlex.quote(folder.name)}"
    lock = take(folder, description, command)
    for run in runs:
        run.folder, run.audited = folder / run.name, os.environ.get("AUDIT", "0") == "1"
        run.settle()
    kinds = [run.kind for run in runs]
    results.tell(f"{len(runs)} runs in {folder}: {kinds.count('whole')} whole, {kinds.count('export')} from float "
                 f"weights of others, {kinds.count('score')} from artifacts of others; {len(slots)} at a time, "
                 f"{slots[0].share} each")
    number = Sweep(runs, slots, lock).go()
    names = sorted({*description["base"], "AUDIT", "CUDA_VISIBLE_DEVICES", "LOG_DIR", "OMP_NUM_THREADS"})
    given = {name: os.environ[name] for name in names if name in os.environ}
    results.write(folder, runs, given, command)
    os.close(lock)
    if number:
        words = [*(f"{name}={shlex.quote(value)}" for name, value in given.items()), command]
        sys.stderr.write(f"interrupted by {signal.Signals(number).name}; to go on: {' '.join(words)}\n")
        return 128 + number
    failed = [run for run in runs if run.state == "failed"]
    if failed:
        results.tell(f"{len(failed)} failed; what they printed is in {folder}/*.out; the same command tries them again")
    return int(any(run.state == "failed" or run.reason for run in runs))


def main(argv: list[str]) -> int:
    try:
        return launched(argv)
    except t.UserError as problem:
        return fail(str(problem))
    except OSError as problem:
        return fail(f"{problem.filename or 'output'}: {problem.strerror}; mend the path, or set LOG_DIR to another")


if __name__ == "__main__":
    t.leave(main(sys.argv[1:]))
