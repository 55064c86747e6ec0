"""A run as its log tells it: the lines of train_gpt.py, and of the logs that this field publishes.

Of the field, the line formats of the seed (PR 581) and of PR 549 are read. Where a log holds several launches, as some
published ones do, the last one counts. Used by tools/runs.py.
"""

import ast
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from sweep import OURS, STAGES  # noqa: E402
from sweep_results import SCORES  # noqa: E402

import train_gpt as t  # noqa: E402

CODE_END = re.compile("^={100}\n", re.M)  # the line after the script in a log
LIMIT_BYTES = 16_000_000  # of the challenge, code included
TITLES = {"float": "float", "int6": "int6 standard", "sliding": "int6 sliding", "ttt": "TTT score-first"}
# Settings that say where a run is and where it writes, not what it does.
PLACES = {*OURS, "NLL_DUMP", "MODEL_PATH", "TRAIN_ENABLED", "CKPT_EVERY_SECONDS"}


class Point(NamedTuple):
    """A line about training: its loss (nats/token), or BPB of the validation; `rate` is a share of the full rate."""

    step: int
    seconds: float
    loss: float
    bpb: float | None = None
    rate: float | None = None


class Chunk(NamedTuple):
    """Test-time training after chunk `step` of `count`: BPB of all that it has scored."""

    step: int
    seconds: float
    bpb: float
    count: int


@dataclass
class Score:
    """A score as its lines give it; `rough` has the four decimals of the first line, val_loss and val_bpb eight."""

    rough: tuple[float, float] | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    seconds: float | None = None
    stride: int | None = None

    @property
    def bpb(self) -> float:
        return self.rough[1] if self.val_bpb is None else self.val_bpb


@dataclass
class Run:
    """A run, or a launch in a published log. Figures that the log does not give are None or empty."""

    path: Path  # its folder, or the log
    name: str
    ours: bool = False
    code: bytes = b""  # the script that ran, where the log holds it
    seed: int | None = None
    config: dict = field(default_factory=dict)  # every setting, of ours
    overrides: dict = field(default_factory=dict)
    preset: str = ""
    hardware: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    data: str = ""
    targets: int | None = None  # of the validation split, and their bytes
    bytes: int | None = None
    parameters: int | None = None
    ranks: int | None = None
    iterations: int | None = None
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    epochs: int = 0  # of test-time training over the whole split before it was scored, as the seed did
    own: dict[str, Score] = field(default_factory=dict)  # by SCORES
    rows: dict[str, tuple] = field(default_factory=dict)  # the same in the table at its end: loss, BPB, targets
    code_bytes: int | None = None  # that count
    source_bytes: int | None = None  # of the script, where what counts is another file
    model_bytes: int | None = None
    total_bytes: int | None = None
    audits: dict[str, bool] = field(default_factory=dict)  # its checks, by audit.json; of older scripts by their lines
    audited: str = ""  # what is wrong with its audit.json
    audit_saw: tuple[int, int] | None = None  # targets of the excerpt, and of the split
    about_data: dict = field(default_factory=dict)  # sha256 of the tokenizer; what was known of the shards when it ran
    spent: dict[str, float] = field(default_factory=dict)  # seconds by stage
    valid: bool | None = None
    reasons: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    summary: dict | None = None
    stop: tuple[int, float] | None = None  # step and seconds where a cap ended training
    end: tuple[int, float] | None = None  # steps of all its training, and milliseconds a step
    resumed: bool = False  # in its training
    again: bool = False  # resumed at all
    dropped: bool = False  # steps of its training that were not finite
    counted: bool = False  # its parameters were counted in its artifact
    script: tuple[int, str] | None = None  # bytes and sha256 of the script that lies beside a record's log
    code_file: tuple[int, str] | None = None  # the same of the file that counts as code
    makers: "list[Run]" = field(default_factory=list)  # whose artifact, then whose float weights it took

    @property
    def finished(self) -> bool:
        """Whether it has come to its end; of a published log, whether it has a score."""
        return self.valid is not None if self.ours else bool(self.own)

    @property
    def steps(self) -> int | None:
        """Steps of training so far; of a finished run, all."""
        return max((p.step for p in (*self.train, *self.val)), default=self.end and self.end[0])

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training so far; where no step was logged, to a twentieth of a millisecond a step."""
        told = self.end and self.end[0] * self.end[1] / 1000
        return max((p.seconds for p in (*self.train, *self.val)), default=told)

    @property
    def score(self) -> Score | None:
        """The score that counts: the last enabled."""
        return next((self.own[key] for key in reversed(SCORES) if key in self.own), None)

    def wrong(self, problem: str):
        raise t.UserError(f"{self.path}: {problem}")

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of a step of training, on average."""
        return 1000 * self.train_seconds / self.steps if self.steps and self.train_seconds is not None else None

    @property
    def packed(self) -> bool:
        """Whether the file that counts as its code is another one than its script."""
        source = len(self.code) or (self.script or (0,))[0]
        return bool(source and self.code_file) and self.code_file[0] != source

    # -- with what other runs did for it

    @property
    def trainer(self) -> "Run":
        """The run that trained its weights, as far as it can be told."""
        return next((run for run in (self, *self.makers) if run.steps is not None), self)

    @property
    def exporter(self) -> "Run":
        chain = (self, *self.makers)
        return next((run for run in chain if run.spent.get("search") is not None), self)

    @property
    def scores(self) -> dict[str, Score]:
        """Its scores, with those before its own last one that a sweep left to the run it took the artifact from."""
        found, last = dict(self.own), max((SCORES.index(key) for key in self.own), default=-1)
        for maker in self.makers:
            for key in SCORES[: last + 1]:
                if key in maker.own and self.measures_alike(maker, key):
                    found.setdefault(key, maker.own[key])
        return {key: found[key] for key in SCORES if key in found}

    def measures_alike(self, other: "Run", key: str) -> bool:
        """Whether a score of `other` is what this run would have found."""
        switches = ("FINAL_EVAL_ENABLE", "FINAL_SLIDING_EVAL_ENABLE")
        names = [n.lower() for n, stage in STAGES.items() if (stage == "score" or n in ("VAL_TOKEN_LIMIT", "DATA_PATH"))
                 and n not in (*PLACES, *switches)]
        same = key == "float" or (self.model_bytes == other.model_bytes and artifact(self) == artifact(other))
        return same and all(self.config.get(n) == other.config.get(n) for n in names)

    @property
    def settings(self) -> dict:
        """Every setting by its variable, each from the run that did the stage it is for."""
        scorer = next((run for run in (self, *self.makers) if {"int6", "sliding"} & run.own.keys()), self)
        done_by = {"train": self.trainer, "export": self.exporter, "score": scorer, "adapt": self}
        names = dict.fromkeys(name for run in done_by.values() for name in run.config)
        return {name.upper(): done_by[STAGES.get(name.upper(), "train")].config.get(name) for name in names
                if name.upper() not in PLACES}

    @property
    def given(self) -> dict:
        """The settings that were not the preset's."""
        named = {name for run in (self, *self.makers) for name in run.overrides}
        return {name: value for name, value in self.settings.items() if name in named}

    @property
    def training_seconds(self) -> float | None:
        """Training with calibration and search, which count as training."""
        seconds = self.trainer.train_seconds
        return None if seconds is None else seconds + self.exporter.spent.get("search", 0.0)

    @property
    def strict_training_seconds(self) -> float | None:
        """The same with the warm-up, which compiles before training's clock starts."""
        seconds = self.training_seconds
        return None if seconds is None else seconds + self.trainer.spent.get("warm_up", 0.0)

    @property
    def evaluation_seconds(self) -> float | None:
        """What EVAL_MAX_SECONDS limits: reading the artifact, compiling and the evaluation behind its score."""
        if not self.score or self.score.seconds is None:
            return None
        return self.score.seconds + self.spent.get("read", 0.0) + self.spent.get("compile", 0.0)

    @property
    def all_caveats(self) -> list[str]:
        """Its own and those of the runs that worked for it, but for what concerns a stage that it did itself, and for
        what every run says before its audit."""
        lines = [line for run in (self, *self.makers) for line in run.caveats if not line.startswith("not audited; ")]
        return [line for line in dict.fromkeys(lines) if line != "no final evaluation ran" or not self.score]

    @property
    def faults(self) -> list[str]:
        """Why it is not valid, as far as its log shows."""
        found, size = list(self.reasons), self.total_bytes or 0
        if self.epochs:
            found.append(f"{self.epochs} epochs of test-time training on the split before its score")
        if not self.ours and size > LIMIT_BYTES:
            found.append(f"{size:,} bytes, over {LIMIT_BYTES:,}")
        return found

    def status(self) -> str:
        """Whether it is valid, in a word or two."""
        if not self.finished:
            return "unfinished" if self.ours else "not said: form not known, read as far as possible"
        return "no" if self.faults else "yes" if self.ours and self.config else "not said"

    @property
    def lacks(self) -> list[str]:
        """The lines of a finished run of ours that its log does not have, though every run writes them."""
        here = {"config": self.config, "preset": self.preset, "hardware": self.hardware, "python": self.versions,
                "val_loader:tokens": self.targets}
        return [name for name, found in here.items() if not found]


def artifact(run: Run) -> str:
    """sha256 of the artifact that it wrote or read, where a summary says so."""
    return ((run.summary or {}).get("artifact") or {}).get("sha256", "")


# ---- lines -----------------------------------------------------------------------------------------------------------

N = r"(-?\d+(?:\.\d+)?|nan|-?inf)"  # a number, whole: what follows it in a pattern shows that it was not cut
SCORE_TAGS = {"final_float": "float", "DIAGNOSTIC post_ema": "float", "final_int6_roundtrip": "int6",
              "final_float_sliding_window": "sliding", "final_int6_sliding_window": "sliding",
              "final_int6_sliding_window_s64": "sliding", "legal_ttt": "ttt"}
FORMS = {
    "train": rf"step:(\d+)/(\d+) train_loss:{N} train_time:(\d+)ms step_avg:{N}ms",
    "val": rf"step:(\d+)/(\d+) val_loss:{N} val_bpb:{N} train_time:(\d+)ms step_avg:{N}ms",
    "chunk": r" *ttt_chunk \[(\d+)/(\d+)\] bpb=(\d+\.\d{6}|nan|inf)(?: rate=(\S+))? time=(\d+\.\d)s(?: .*)?",
    "elapsed": rf"ttt:elapsed={N}s",
    "epoch": rf"ttt_epoch:(\d+)/(\d+) loss:{N}(?: lr:{N})? time:{N}s",
    "exact": r"(\w+)_exact val_loss:(-?\d+\.\d{8}|nan|-?inf) val_bpb:(-?\d+\.\d{8}|nan|-?inf)",
    "score": rf"(DIAGNOSTIC post_ema|\w+) val_loss:{N} val_bpb:{N} (?:.*?stride:(\d+) )?(?:.* )?eval_time:(\d+)ms",
    "code": r"Code size(?: \(compressed\))?: (\d+) bytes",
    "source": r"Code size \(uncompressed\): (\d+) bytes",
    "code_file": r"code counted: (\d+) bytes, sha256 ([0-9a-f]{64})",
    "model": r"Serialized model int6\+\w+: (\d+) bytes",
    "total": r"Total submission size int6\+\w+: (\d+) bytes",
    "stop": r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/(\d+)",
    "config": r"config (\{.*\})",
    "preset": r"preset:(\S+) seed:(\d+) overrides:(\{.*\})",
    "hardware": r"hardware (\{.*\})",
    "versions": r"python (\S+) (\{.*\})",
    "seed": r"seed:(\d+)",
    "data": r"train_loader:dataset:(.+?) train_shards:\d+.*",
    "about_data": r"data (\{.*\})",
    "warm_up": r"warm-up: ([\d.]+) s before training's clock",
    "split": r"val_loader:(?:shards .*)?tokens:(\d+)(?: bytes:(\d+))?",
    "parameters": r"model_params:(\d+)",
    "ranks": r"world_size:(\d+) .*",
    "audit": r"audit (\w+): (ok|FAILED), .*",
    "resumed": r"resumed from step (\d+) in .*",
    "again": r"resumed from .*",
    "dropped": r".*; the step is dropped, \d+ in a row",
    "script": r"script train_gpt(?:_readable)?\.py bytes:(\d+) sha256:([0-9a-f]{64})",
    "trained": r"trained: ([\d,]+) steps, [\d,]+ tokens, ([\d.]+) ms a step",
    "clocks": r"evaluation clocks: .*? \(reading ([\d.]+), compiling ([\d.]+), walk [\d.]+\), .*",
    "exported": r"export: took ([\d.]+) s of the [\d.]+ s kept for it",
    "row": rf"(float, averaged|int6, read back|sliding window|test-time training) +{N} +{N} +([\d,]+) +[\d.]+",
    "seconds": r"seconds: (\w+ [\d.]+(?:, \w+ [\d.]+)*)",
    "valid": r"valid: (?:(yes)|NO, (.*))",
    "note": r"note: (.*)",
}
PATTERNS = {kind: re.compile(form) for kind, form in FORMS.items()}
# How the lines begin that hold a figure: one that begins so and has none of the forms was cut or edited.
OPENINGS = re.compile(r"step:\d|stopping_early: w| *ttt_chunk \[|legal_ttt|final_(?:float|int6)|Code size|Serialized "
                      r"model int6|Total submission size int6|(?:valid|note|seconds|bytes): *$|config \{|preset:")


def redo(points: list, new):
    """Add a point; what was kept for its step or later was lost by a kill and is repeated now."""
    while points and points[-1].step >= new.step:
        points.pop()
    points.append(new)


def add_line(run: Run, kind: str, m: re.Match):
    """Take in a line that has the form `kind`. ValueError for one that no run writes."""
    g = m.groups()
    if kind in ("train", "val", "chunk"):
        share_of(int(g[0]), int(g[1]), kind != "val")
    if kind == "train":
        run.iterations = int(g[1])
        redo(run.train, Point(int(g[0]), int(g[3]) / 1000, float(g[2])))
    elif kind == "val":
        run.iterations = int(g[1])
        redo(run.val, Point(int(g[0]), int(g[4]) / 1000, float(g[2]), float(g[3])))
    elif kind == "chunk":
        redo(run.chunks, Chunk(int(g[0]), float(g[4]), float(g[2]), int(g[1])))
    elif kind == "epoch":
        run.epochs = int(g[1])
    elif kind == "elapsed":  # what the seed's adaptation took before its scores
        run.spent["compile"] = float(g[0])
    elif kind in ("score", "exact") and g[0] in SCORE_TAGS:
        score = run.own.setdefault(SCORE_TAGS[g[0]], Score())
        if kind == "exact":
            score.val_loss, score.val_bpb = float(g[1]), float(g[2])
        else:
            score.rough, score.seconds = (float(g[1]), float(g[2])), int(g[4]) / 1000
            score.stride = int(g[3]) if g[3] else None
    elif kind in ("code", "source", "model", "total"):
        setattr(run, f"{kind}_bytes", int(g[0]))
    elif kind == "row":
        key = dict(zip(("float", "int6", "sliding", "test"), SCORES, strict=True))[re.split("[, -]", g[0])[0]]
        run.rows[key] = float(g[1]), float(g[2]), int(g[3].replace(",", ""))
    elif kind == "stop":
        run.stop = int(g[1]), int(g[0]) / 1000
    elif kind == "audit":
        run.audits[g[0]] = g[1] == "ok" and run.audits.get(g[0], True)
    else:
        add_fact(run, kind, g)


def share_of(here: int, count: int, above_zero: bool):
    """ValueError for a step or chunk that is none of `count`, such as 30 of 0."""
    if not above_zero <= here <= count:
        raise ValueError(f"{here} of {count}")


NUMBERS = {f.name for f in t.VARIABLES if f.type in (int, float)}
PATHS = ("data_path", "model_path", "tokenizer_path", "log_dir", "nll_dump")


def settings_of(text: str) -> dict:
    """The settings of a config line. ValueError where one is not of its kind."""
    found = json.loads(text)
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (name in NUMBERS and not number) or (name in PATHS and not isinstance(value, str)):
            raise ValueError(name)
    return found


def machine_of(text: str) -> dict:
    """The facts of a hardware line. ValueError where it does not name a machine."""
    found = ast.literal_eval(text)
    if not isinstance(found, dict) or (type(found.get("name")), type(found.get("world_size"))) != (str, int):
        raise ValueError("hardware")
    return found


def versions_of(text: str) -> dict:
    found = ast.literal_eval(text)
    if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise ValueError("versions")
    return found


def data_facts_of(text: str) -> dict:
    """What a run knew of its data. ValueError where it is not of its kind."""
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("verified", 0), dict | None):
        raise ValueError("data")
    return found


def add_fact(run: Run, kind: str, g: tuple):
    """Take in a line about the run as a whole."""
    if kind == "config":
        run.ours, run.config, run.audits = True, settings_of(g[0]), {}
    elif kind == "preset":
        run.ours, run.preset, run.seed, run.overrides = True, g[0], int(g[1]), json.loads(g[2])
    elif kind == "hardware":
        run.hardware = machine_of(g[0])
    elif kind == "versions":
        run.versions = {"python": g[0]} | versions_of(g[1])
    elif kind == "split":
        run.targets, run.bytes = int(g[0]), int(g[1]) if g[1] else None
    elif kind == "seconds":
        run.spent = {name: float(value) for name, value in (part.split() for part in g[0].split(", "))}
    elif kind == "clocks":
        run.spent |= {"read": float(g[0]), "compile": float(g[1])}
    elif kind == "about_data":
        run.about_data = data_facts_of(g[0])
    elif kind == "warm_up":
        run.spent["warm_up"] = float(g[0])
    elif kind == "exported":
        run.spent["search"] = float(g[0])
    elif kind == "resumed":  # what was logged of later steps is lost
        run.resumed, run.again, last = True, True, int(g[0])
        run.train, run.val = ([p for p in points if p.step <= last] for points in (run.train, run.val))
    elif kind in ("again", "dropped"):
        setattr(run, kind, True)
    elif kind in ("script", "code_file"):
        setattr(run, kind, (int(g[0]), g[1]))
    elif kind == "trained":
        run.end = int(g[0].replace(",", "")), float(g[1])
    elif kind == "valid":
        run.valid, run.reasons, run.caveats = bool(g[0]), g[1].split("; ") if g[1] else [], []
    elif kind == "note":
        run.caveats.append(g[0])
    elif kind in ("seed", "data", "parameters", "ranks"):
        setattr(run, kind, g[0] if kind == "data" else int(g[0]))


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "backslashreplace")
    except OSError as error:
        raise t.UserError(f"{path}: cannot be read ({error.strerror}); give a run's folder or a log") from None


def split_log(text: str) -> tuple[str, str]:
    """The script that a log begins with, and its lines without any copy of it: each launch leaves one. Before the first
    there may be notes, so its size tells where it begins."""
    end = CODE_END.search(text)
    if not end:
        return "", text
    code = text[: end.start()].encode()
    if sizes := re.findall(r"^Code size(?: \(uncompressed\))?: (\d+) bytes$", text, re.M):
        notes = code[: -int(sizes[-1])]
        code = code[len(notes) :] if notes.endswith(b"\n") else code
    code = code.decode()
    return code, text.replace(code + end[0], "")


def read_log(path: Path, run: Run):
    """Fill `run` from its log."""
    whole = read_text(path)
    code, text = split_log(whole)
    run.code, first = code.encode(), whole.count("\n") - text.count("\n") + 1
    lines = text.split("\n")
    tail = lines.pop()
    ours = any(line.startswith("config {") or line.startswith("preset:") for line in lines)
    launches = [i for i, line in enumerate(lines) if line.startswith("val_bpb:enabled")]
    begin = launches[-1] if launches and not ours else 0
    if tail and (ours or not any(p.fullmatch(tail) for p in PATTERNS.values())):
        run.wrong(f"the log {path.name} is cut in its last line, {tail[:60]!r}; give it whole, up to its line break")
    for number, line in enumerate([*lines, tail][begin:], first + begin):
        found = next(((kind, m) for kind, p in PATTERNS.items() if (m := p.fullmatch(line))), None)
        if found:
            try:
                add_line(run, *found)
            except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
                run.wrong(f"{path.name}:{number}: cut or edited, {line[:60]!r}; give the log as the run left it")
        elif ours and OPENINGS.match(line):
            run.wrong(f"{path.name}:{number}: cut or edited, {line[:60]!r}; give the log as the run left it")
