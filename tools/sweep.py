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
from the first too.

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
import shutil
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

import sweep_results as results  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

FIELDS = {f.name.upper(): f for f in t.VARIABLES}
OURS = ("RUN_ID", "LOG_DIR", "RESUME")  # a sweep sets these itself
# The sections of --help whose variables training does not see, by the stage that does. A variable of any other section,
# also of one that is new, counts as training's: then too much is repeated, and nothing wrong is shared.
AFTER_TRAINING = {"Export": "export", "Evaluation": "score", "Test-time training": "adapt", "Audit": "adapt"}
SECTIONS = dict(zip(FIELDS, itertools.accumulate((f.metadata["stage"] for f in t.VARIABLES), lambda a, b: b or a),
                    strict=True))
STAGES = {name: AFTER_TRAINING.get(section, "train") for name, section in SECTIONS.items()}
QUIET_SECONDS = 60.0  # between two lines about the whole where there is no terminal


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
    state: str = "waiting"  # or running, finished, failed, cut
    reason: str = ""
    began: float = 0.0
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
    def keeps_scores(self) -> bool:
        """Whether its test-time training is all that is left to do."""
        return self.scores is not self and self.cfg.ttt_enabled

    def stage_key(self, *stages: str) -> tuple:
        """What decides the outcome of these stages: the settings, and the seconds that the export leaves to a training
        with a cap."""
        cfg = self.cfg
        left = cfg.max_wallclock_seconds and cfg.max_wallclock_seconds - cfg.export_enabled * cfg.export_seconds
        settings = (getattr(cfg, name.lower()) for name, stage in STAGES.items() if stage in stages and
                    name not in OURS)
        return (*settings, left)

    def summary(self) -> dict | None:
        """Its summary.json if it is finished."""
        try:
            text = (self.folder / "summary.json").read_text()
            return None if (self.folder / "progress.json").exists() else json.loads(text)
        except (OSError, ValueError):
            return None

    def settle(self):
        """Set state and reason by what its folder holds."""
        if summary := self.summary():
            # as train_gpt.py's exit code: without an export there is nothing to fail
            bad = [r for r in summary["reasons"] if not r.startswith("EXPORT_ENABLED=0")]
            self.state, self.reason = "finished", "; ".join(bad)

    def source(self) -> Path | None:
        """The weights to start from when another run makes them; None while they are not there.

        Raises FileNotFoundError when they will not come."""
        maker = self.weights if self.kind == "export" else self.artifact
        if maker.weights is maker and not maker.cfg.train_enabled:  # the whole sweep starts from a file
            given = Path(maker.cfg.model_path).absolute()
            if self.kind == "export" or not holds_floats(maker.cfg.model_path):
                return given
        names = [t.FLOAT_NAME] if self.kind == "export" else [t.ARTIFACT_NAME]
        over = maker.state not in ("waiting", "running")
        if over and (self.kind == "score"):  # nothing fitted, or EXPORT_ENABLED=0: then from the same weights
            names.append(t.FLOAT_NAME)
        for path in (maker.folder / name for name in names):
            if path.exists():
                return path
        if over and self.kind == "score" and maker.state == "finished" and maker.weights is not maker:
            return maker.source()
        if over:
            why = "failed" if maker.state == "failed" else (f"is finished, but its {names[0]} is not there; put it "
                                                            f"back, or remove {maker.folder} to run that one again")
            raise FileNotFoundError(f"not started: {maker.name}, whose weights it needs, {why}")
        return None


FLOATS: dict[str, bool] = {}


def holds_floats(path: str) -> bool:
    """Whether MODEL_PATH has weights that are yet to be exported. UserError for a file that is none of ours."""
    if path not in FLOATS:
        FLOATS[path] = any(s.kind == "fp32" for s in t.unpack(t.read_file(path, "MODEL_PATH="), path)[1].values())
    return FLOATS[path]


def assignment(word: str, where: str) -> tuple[str, str]:
    """Name and value of VAR=value. Ends the process for what is none, or no variable of train_gpt.py."""
    name, equals, value = word.partition("=")
    if not equals:
        fail(f"{where}{word!r}: not of the form VAR=value")
    if name in OURS:
        fail(f"{where}{name}: the sweep sets it for each run; give --name, and LOG_DIR in the environment")
    if name in t.NOT_IMPLEMENTED:
        fail(f"{where}{name}: not implemented in this script")
    if name not in FIELDS:
        near = difflib.get_close_matches(name.upper(), FIELDS, 1, 0.0)[0]
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
            fail(f"{word}: a value is missing; give {name}=a,b,c, and in a --list what is empty or has a comma")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_list(path: Path) -> list[dict[str, str]]:
    """The runs of a --list file."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"--list {path}: {getattr(problem, 'strerror', None) or 'not a text file'}")
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as problem:
            fail(f"{path}:{number}: {problem}; quote as in a shell")
        if words:
            pairs = [assignment(word, f"{path}:{number}: ") for word in words]
            if twice := [name for name, n in results.counted(name for name, _ in pairs) if n > 1]:
                fail(f"{path}:{number}: {twice[0]} is given twice")
            runs.append(dict(pairs))
    return runs or fail(f"--list {path}: holds no run")


def combine(listed: list[dict], grid: list[dict]) -> list[dict]:
    if both := {name for run in listed for name in run} & {name for run in grid for name in run}:
        fail(f"{min(both)}: both in the list and in the grid; give it in one of them")
    return [a | b for a in listed for b in grid]


def configured(given: list[dict], ranks: int, folder: Path) -> list[Run]:
    """The runs with their checked configurations. Ends the process, a line a problem, when one is not accepted."""
    runs, problems, warnings, width = [], {}, {}, len(str(len(given)))
    for number, variables in enumerate(given, 1):
        environ = {name: value for name, value in os.environ.items() if name not in OURS} | variables
        cfg, bad, notes = t.load_config(environ, ranks)
        label = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", "_".join(f"{k}={v}" for k, v in variables.items()))[:100]
        name = f"{number:0{width}}_{label}"
        runs.append(Run(name, variables, cfg, folder / name))
        for found, lines in ((problems, bad), (warnings, notes)):
            for line in lines:
                found.setdefault(line, []).append(number)
    said = [text + ("" if len(n) == len(runs) else f" (run {n[0]}{f' and {len(n) - 1} more' * (len(n) > 1)})")
            for found in (problems, warnings) for text, n in found.items()]
    if problems:
        fail(*said[: len(problems)])
    sys.stderr.writelines(f"warning: {t.one_line(line)}\n" for line in said)
    seen: dict[tuple, Run] = {}
    for run in runs:
        first = seen.setdefault(run.stage_key(*STAGES.values()), run)
        if first is not run:
            fail(f"{run.title}: the same run as {first.title}; leave one out")
        if any(run.cfg.nll_dump == other.cfg.nll_dump != "" for other in runs if other is not run):
            fail(f"NLL_DUMP={run.cfg.nll_dump}: more than one run would write it; give each its own in a --list")
    return runs


def share(runs: list[Run]):
    """Let the first of the runs that agree on a stage and all before it do it for the others."""
    trained, exported, scored = {}, {}, {}
    for run in runs:
        run.weights = trained.setdefault(run.stage_key("train"), run)
        run.artifact = exported.setdefault(run.stage_key("train", "export"), run)
        run.scores = scored.setdefault(run.stage_key("train", "export", "score"), run)
        if run.weights is run and not run.cfg.train_enabled:
            holds_floats(run.cfg.model_path)


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
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        return [sys.executable, *(several if self.ranks > 1 else []), str(t.SCRIPT)]

    def environment(self) -> dict[str, str]:
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        set_already = self.ranks > 1 or "OMP_NUM_THREADS" in os.environ  # torchrun gives each of several ranks one
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

    def __init__(self, folder: Path, runs: list[Run], slots: list[Slot], lock):
        self.folder, self.runs, self.slots, self.lock = folder, runs, slots, lock
        self.active: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        self.caught, self.signals, self.began = 0, 0, time.monotonic()
        self.terminal, self.shown, self.shown_at = sys.stdout.isatty(), 0, time.monotonic()

    def say(self, text: str):
        results.tell(("\033[J" if self.terminal else "") + text)

    def catch(self, number: int, frame):
        self.caught, self.signals = self.caught or number, self.signals + 1

    def console(self, run: Run) -> Path:
        return self.folder / f"{run.name}.out"

    def environment(self, run: Run, slot: Slot) -> dict[str, str]:
        """What the process of `run` is started with."""
        env = {name: value for name, value in os.environ.items() if name not in OURS} | run.given
        env |= slot.environment() | {"LOG_DIR": str(self.folder), "RUN_ID": run.name}
        if run.folder.exists():
            env["RESUME"] = "1"
        if run.kind == "whole":
            others = [r for r in self.runs if r.weights is run and r is not run]
            if run.cfg.train_enabled and any(r.kind == "export" or not r.cfg.export_enabled for r in others):
                env["SAVE_FLOAT"] = "1"
            return env
        env |= {"TRAIN_ENABLED": "0", "MODEL_PATH": str(run.source())}
        if run.cfg.train_enabled and run.cfg.max_wallclock_seconds:  # its share of a cap, which is no more known there
            env["EXPORT_MAX_SECONDS"] = repr(run.cfg.export_seconds)
        if run.keeps_scores:
            env |= {"FINAL_EVAL_ENABLE": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
        return env

    def start(self, run: Run, place: int):
        slot, again = self.slots[place], run.folder.exists()
        with open(self.console(run), "ab") as out:
            run.output_from = out.tell()
            # a session of its own: Ctrl-C reaches the sweep alone, which tells the runs; with the lock, so that no
            # second sweep starts while a run of one that was killed goes on
            process = subprocess.Popen(slot.command(), env=self.environment(run, slot), stdin=subprocess.DEVNULL,
                                       stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                                       pass_fds=(self.lock.fileno(),))
        run.state, run.reason, run.began = "running", "", time.monotonic()
        self.active[place] = run, process
        if not self.terminal:
            self.say(f"started  {run.name}" + " again" * again)

    def reap(self):
        """Take in the processes that have ended."""
        for place, (run, process) in list(self.active.items()):
            if process.poll() is None:
                continue
            del self.active[place]
            run.settle()
            if run.state == "running":
                run.state, run.reason = ("cut" if self.caught else "failed"), self.why(run, process.returncode)
            self.record()
            if not self.terminal:
                self.say(f"{run.state:8} {run.name}: {self.outcome(run)}; {self.counts()}")

    def why(self, run: Run, code: int) -> str:
        """One line on why a run ended early, from what it printed."""
        with open(self.console(run), "rb") as file:
            file.seek(run.output_from)
            lines = file.read().decode(errors="replace").splitlines()
        for pattern in (r"error: (.*)", r"(interrupted by .*)", r"(\w*(?:Error|Exception)\b.*)"):
            if found := [m.group(1) for m in map(re.compile(pattern).match, lines) if m]:
                return re.split("; (?:last good checkpoint: |LOG_DIR=|not saved: )", found[0])[0]  # how to go on alone
        if code == 0:
            return f"its summary.json cannot be read; remove {run.folder} to run it again"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def fill(self):
        """Start what can be started."""
        for run in self.runs:
            if run.state == "waiting" and run.kind != "whole":
                try:
                    run.source()
                except FileNotFoundError as problem:
                    run.state, run.reason = "failed", str(problem)
                    self.record()
                    if not self.terminal:
                        self.say(f"failed   {run.name}: {run.reason}")
        for place in range(len(self.slots)):
            ready = (r for r in self.runs if r.state == "waiting" and (r.kind == "whole" or r.source()))
            if place not in self.active and (run := next(ready, None)):
                self.start(run, place)

    def go(self) -> int:
        """Run what is left. Returns the signal that ended it early, else 0. Whatever happens, no process stays."""
        passed = 0
        hung_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []  # not under nohup
        before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM, *hung_up)}
        try:
            while True:
                self.reap()
                if not self.caught:
                    self.fill()
                if not self.active:
                    break
                if self.signals > passed:
                    passed = self.signals
                    self.stop(signal.SIGTERM if passed == 1 else signal.SIGKILL)
                self.show()
                time.sleep(0.1)
        finally:
            self.stop(signal.SIGTERM, say=False)
            for _, process in self.active.values():
                process.wait()
        self.show(last=True)
        for number, handler in before.items():
            signal.signal(number, handler)
        return self.caught

    def stop(self, number: int, say: bool = True):
        """Pass a signal on: the first to each launcher or single rank, which save and end; SIGKILL to all."""
        if say:
            self.say(f"{signal.Signals(self.caught).name}: {len(self.active)} running " + (
                "save and end; a second signal ends them at once" if number == signal.SIGTERM else "are killed"))
            self.shown = 0
        for _, process in self.active.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)

    def record(self):
        """Keep in sweep.json how the runs ended, for people: what goes on is told by their folders."""
        path = self.folder / "sweep.json"
        try:
            record = json.loads(path.read_text())
            record["states"] = {r.name: {"state": r.state, "reason": r.reason} for r in self.runs}
            t.write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        except (t.UserError, OSError, ValueError) as problem:
            self.say(f"warning: {path}: {t.one_line(problem)}; the runs go on")

    # -- what is shown

    def counts(self) -> str:
        number = dict(results.counted(run.state for run in self.runs))
        states = ", ".join(f"{number.get(state, 0)} {state}" for state in ("running", "waiting", "failed", "cut")
                           if number.get(state) or state in ("running", "waiting"))
        left = self.seconds_left()
        left = "time left unknown before a run ends" if left is None else f"about {t.duration(left)} left"
        ended = not number.get("running") and not number.get("waiting")
        return f"{number.get('finished', 0)} of {len(self.runs)} finished, {states}" + (f", {left}" * (not ended))

    def seconds_left(self) -> float | None:
        """From the mean time of the finished runs of each kind; a kind of which none is known takes the longest."""
        known: dict[str, list[float]] = {}
        for run in self.runs:
            if summary := run.state == "finished" and run.summary():
                known.setdefault(run.kind, []).append(summary["seconds"]["total"])
        if not known:
            return None
        means = {kind: statistics.mean(values) for kind, values in known.items()}
        now, most = time.monotonic(), max(means.values())
        waits = [means.get(run.kind, most) - (now - run.began) * (run.state == "running") for run in self.runs
                 if run.state in ("running", "waiting")]
        waits = [max(seconds, 0.0) for seconds in waits]
        return max(sum(waits) / len(self.slots), *waits, 0.0) if waits else 0.0

    def outcome(self, run: Run) -> str:
        """What there is to say of a run beside its state."""
        if run.state == "finished":
            summary = run.summary()
            score = "no score" if summary["val_bpb"] is None else f"{summary['val_bpb']:.4f} BPB"
            why = f"; not valid: {run.reason}" if run.reason else ""
            return f"{score}, {t.duration(summary['seconds']['total'])}{why}"
        if run.state == "running":
            return f"{t.duration(time.monotonic() - run.began)}, {self.progress(run)}"
        if run.state == "waiting" and run.kind != "whole" and not run.source():
            return f"for weights of {(run.weights if run.kind == 'export' else run.artifact).name}"
        return run.reason

    def progress(self, run: Run) -> str:
        """The newest line of progress that a running run has printed."""
        with open(self.console(run), "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, run.output_from))
            lines = re.findall(r"^(.*: +\d+%, .* left)$", file.read().decode(errors="replace"), re.M)
        return re.sub(" +", " ", lines[-1]) if lines else "no progress printed yet"

    def show(self, last: bool = False):
        """On a terminal the whole table, written over the one before; else a line now and then."""
        now = time.monotonic()
        if not last and now - self.shown_at < (0.5 if self.terminal else QUIET_SECONDS) and self.shown_at > self.began:
            return
        self.shown_at = now
        if not self.terminal:
            for run, _ in self.active.values():
                self.say(f"running  {run.name}: {self.outcome(run)}")
            return self.say(self.counts()) if self.active else None
        size = shutil.get_terminal_size()
        room, order = size.lines - 3, {"running": 0, "failed": 1, "cut": 1, "finished": 2, "waiting": 3}
        fits, width = len(self.runs) <= room, max(len(run.name) for run in self.runs)
        runs = self.runs if fits else sorted(self.runs, key=lambda run: order[run.state])[: max(room - 1, 0)]
        lines = [f"{run.state:9}{run.name:{min(width, size.columns // 2)}}  {self.outcome(run)}" for run in runs]
        lines += [] if fits else [f"and {len(self.runs) - len(runs)} more"]
        lines = [line[: size.columns - 1] for line in (*lines, self.counts())]
        results.tell(f"\033[{self.shown}A" * bool(self.shown) + "\033[J" + "\n".join(lines))
        self.shown = len(lines)


# ---- a sweep's folder ------------------------------------------------------------------------------------------------


def described(runs: list[Run], slot: Slot) -> dict:
    """What makes a sweep this one: script, base, runs and their share of the machine. A variable that every run sets
    has no base."""
    own = set.intersection(*(set(run.given) for run in runs))
    base = {n: v for n, v in os.environ.items() if n in FIELDS and n not in OURS and n not in own}
    return {"script": hashlib.sha256(t.SCRIPT.read_bytes()).hexdigest(), "base": dict(sorted(base.items())),
            "share": slot.share, "runs": {run.name: run.given for run in runs}}


def differences(then: dict, now: dict) -> list[str]:
    """What two descriptions do not share, a phrase each."""
    found = ["train_gpt.py was another version"] if then["script"] != now["script"] else []
    if then["share"] != now["share"]:
        found.append(f"{then['share']} for each run then, {now['share']} now (--jobs)")
    for name in sorted(then["base"].keys() | now["base"].keys()):
        old, new = (f"{name}={d['base'][name]}" if name in d["base"] else f"{name} unset" for d in (then, now))
        found += [f"{old} then, {new} now"] if old != new else []
    old, new = ([" ".join(f"{k}={v}" for k, v in run.items()) for run in d["runs"].values()] for d in (then, now))
    for here, there, word in ((old, new, "gone"), (new, old, "new")):
        if odd := [run for run in here if run not in there]:
            found.append(f"{len(odd)} of its runs {word}, such as {odd[0]}")
    return found or (["the order of its runs"] if old != new else [])


def take(folder: Path, description: dict, command: str):
    """Lock a new or an old sweep's folder. Returns the lock. Ends the process where it holds something else."""
    path = folder / "sweep.json"
    if folder.exists():
        try:
            record = json.loads(path.read_text())
            odd = differences(record, description)
        except FileNotFoundError:
            fail(f"{folder}: exists and holds no sweep; choose another --name")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}: cannot be read as a sweep's record; choose another --name")
        if odd:
            fail(f"{folder}: begun with other settings: {'; '.join(odd)}; give the same again to go on with it, or "
                 "another --name")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = t.lock(folder)
    except t.UserError:
        fail(f"{folder}: this sweep, or a run that it left, is still going; wait for it or choose another --name")
    if not path.exists():
        record = description | {"command": command, "states": {}}
        t.write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return lock


def check(runs: list[Run], slot: Slot, log_dir: Path):
    """train_gpt.py's own --check of files and folders, once for each data and starting file; it says what is wrong."""
    kinds = {}
    for run in runs:
        if run.kind == "whole":
            data = [getattr(run.cfg, name.lower()) for name, section in SECTIONS.items() if section == "Data"]
            kinds.setdefault((*data, run.cfg.model_path), run)
    for run in kinds.values():
        env = {name: value for name, value in os.environ.items() if name not in OURS} | run.given
        done = subprocess.run([sys.executable, str(t.SCRIPT), "--check", "--ranks", str(slot.ranks)],
                              env=env | slot.environment() | {"LOG_DIR": str(log_dir)}, capture_output=True, text=True)
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
    if os.environ.get("RESUME", "0") not in ("", "0", "1"):
        fail(f"RESUME={os.environ['RESUME']}: a sweep finds by itself what to go on with; unset it")
    return options


def launched(argv: list[str]) -> int:
    """One launch, from its arguments to its results. Returns the exit code."""
    options = read_arguments(argv)
    given = combine(read_list(options.list) if options.list else [{}], read_grid(options.grid))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slots = slots_of(options.jobs, visible_gpus(), cores)
    log_dir = Path(os.environ.get("LOG_DIR") or t.Config.log_dir).absolute()
    name = os.environ.get("RUN_ID", "") if options.name is None else options.name
    runs = configured(given, slots[0].ranks, log_dir)
    description = described(runs, slots[0])
    if name or options.name is not None:
        try:
            t.parse(str, FIELDS["RUN_ID"].metadata["accepts"], name or ".")
        except ValueError:
            fail(f"--name {name!r}: must be the name of a folder under LOG_DIR, without slashes, under 200 bytes")
    else:
        swept = dict.fromkeys(name for run in given for name in run)
        code = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:8]
        name = f"sweep_{'_'.join(swept)[:100]}_{code}"
    folder = log_dir / name
    for run in runs:
        run.folder = folder / run.name
        run.settle()
    share(runs)
    if not folder.exists():
        check(runs, slots[0], log_dir)
    words = [*options.grid, *(["--list", str(options.list)] if options.list else []), "--jobs", str(options.jobs)]
    command = f"./run.sh sweep {shlex.join(words)} --name {shlex.quote(name)}"
    lock = take(folder, description, command)
    sweep = Sweep(folder, runs, slots, lock)
    trained, exported = (sum(run.kind in kinds for run in runs) for kinds in (("whole",), ("whole", "export")))
    sweep.say(f"{len(runs)} runs in {folder}: {trained} from the start, {exported - trained} from their float weights, "
              f"{len(runs) - exported} from their artifacts; {len(slots)} at a time, {slots[0].share} each")
    if number := sweep.go():
        try:
            results.write_tables(folder, runs, description["base"], command, list(FIELDS))
            sweep.say(f"what is finished is in {folder}/results.csv and results.md")
        except t.UserError as problem:  # how to go on counts more
            sweep.say(f"warning: {t.one_line(problem)}")
        sys.stderr.write(f"interrupted by {signal.Signals(number).name}; under the same variables this goes on: "
                         f"{command}\n")
        return 128 + number
    code = results.write(folder, runs, description["base"], command, list(FIELDS))
    if failed := [run for run in runs if run.state == "failed"]:
        results.tell(f"{len(failed)} failed; what they printed is in {folder}/*.out; the same command tries them again")
    lock.close()
    (folder / "lock").unlink(missing_ok=True)
    return code


def main(argv: list[str]) -> int:
    try:
        return launched(argv)
    except t.UserError as problem:
        return fail(str(problem))
    except OSError as problem:
        return fail(f"{problem.filename or 'output'}: {problem.strerror}")


if __name__ == "__main__":
    t.leave(main(sys.argv[1:]))
