#!/usr/bin/env python3
"""Audit finished runs from outside: try, on an excerpt, whether the evaluation behind val_bpb is what it should be.

    ./run.sh audit logs/first logs/second        runs by their folders, LOG_DIR/RUN_ID, or by their RUN_ID
    ./run.sh audit --tokens 4096 logs/first      targets of the excerpt, a window at least (four windows)
    AUDIT=1 ./run.sh                             after a run; AUDIT=1 ./run.sh sweep ... after each run of a sweep

The run's own script is imported, from its train.log, and its own evaluation is called, on the run's artifact, data and
settings. No part of it is replaced: it is called with tokens of ours, and each time that it scores a batch, the forward
pass it uses is asked more: for the whole distribution at some places, and for the losses when later inputs are others.
Six checks, each a line, and all in audit.json beside summary.json, which ./run.sh record demands:

    causal                random tokens from a cut on change no loss before it and not the distribution at it; other
                          inputs after a place do not change its loss; the run's own losses are met again
    normalised            the probabilities of the whole vocabulary sum to 1, and what is recorded is the target's
    one_pass              every target is scored once, in one walk
    score_before_update   no optimizer step has seen a target before its score
    bytes                 the bytes that losses are divided by are those of the decoded text
    figures               val_loss and val_bpb are those of the losses that the run left of its whole evaluation

It executes the script that the log holds: audit runs whose script you would run. Exit codes: 0 ok; 1 a check failed;
2 a run that cannot be audited, the reason in a line.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save, and in run.sh's background it is ignored at first
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train_gpt.py does

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT = "final_model.int6.ptz"
CHECKS = ("causal", "normalised", "one_pass", "score_before_update", "bytes", "figures")
WINDOWS = 4  # of an excerpt, if not said otherwise; a run leaves the losses of as many
START = b"\xff\xfe\xff"  # stands for a boundary in decoded text, where no text has it
DECODED = 2**22  # tokens at a time
CODE_END = re.compile(b"^={100}\n", re.M)  # the line after the script in a log
NEEDED = ("BOS_ID", "Config", "Evaluator.lesson", "Evaluator.record", "Evaluator.result", "Log.silent", "Process",
          "Stream", "Tokenizer", "Tokens", "UserError", "build_model", "compiled", "evaluate", "find_path",
          "open_stream", "read_file", "test_time_train", "unpack")  # of a script


class AuditError(Exception):
    """Why a run cannot be audited, and what to do: one line, exit code 2."""


def require(holds, problem: str):
    """AuditError with this problem unless it holds."""
    if not holds:
        raise AuditError(problem)


# ---- the run: its script, artifact, data ----------------------------------------------------------------------------


@dataclass
class Subject:
    """A run that is audited, with all that its evaluation takes."""

    folder: Path
    summary: dict
    code: bytes
    script: ModuleType
    blob: bytes  # the artifact
    weights: dict[str, Tensor]
    cfg: object  # the script's Config, as the run had it
    kind: str  # of the evaluation behind val_bpb: ttt, sliding or int6
    losses: np.ndarray | str  # of the first targets, as the run left them; or why there are none to compare with
    process: object = None
    tokenizer: object = None
    stream: object = None
    sums: np.ndarray | None = None  # of the run's losses over every EVAL_SEQ_LEN targets

    @property
    def exact(self) -> bool:
        """Whether honest evaluations agree bit for bit: not on a GPU, nor where a cut changes the batches of documents.
        Where they do not, all is computed in fp32 and uncompiled, with allowance for what is left."""
        return not torch.cuda.is_available() and not (self.kind == "ttt" and self.cfg.ttt_mode == "lora")


def read_summary(folder: Path) -> dict:
    """The summary of a finished run that has an artifact."""
    path = folder / "summary.json"
    require(path.is_file(), f"{folder}: no summary.json there; give the folder of a finished run, LOG_DIR/RUN_ID")
    try:
        summary = json.loads(path.read_bytes())
        require(summary.get("finished", True), f"{folder}: the run has not finished; to go on: LOG_DIR="
                f"{shlex.quote(str(folder.parent))} RUN_ID={shlex.quote(folder.name)} RESUME=1 "
                + os.environ.get("LAUNCHED_BY", "./run.sh"))
        require(summary["artifact"], f"{folder}: no artifact in its summary.json; only a run that exported can be "
                "audited")
        for name in ("config", "eval", "val_bpb", "hardware"):
            require(name in summary, f"{path}: has no {name}; give the run as it was left")
        return summary
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AuditError(f"{path}: not the summary of a run ({type(error).__name__}: {error}); give the run as it was "
                         "left") from None


def find_script(folder: Path, size: int) -> tuple[bytes, Path]:
    """The script that ran, of `size` bytes, and where it would look for data: the copy in train.log, whose last launch
    counts, else the one of the record's folder that the run lies in."""
    log = folder / "train.log"
    text = log.read_bytes() if log.is_file() else b""
    beside = [path / name for path in (folder, *folder.resolve().parents) for name in ("train_gpt_readable.py",
                                                                                      "train_gpt.py")]
    if ends := [m.start() for m in CODE_END.finditer(text)]:
        code, before = text[max(ends[-1] - size, 0) : ends[-1]], text[: max(ends[-1] - size, 0)]
        require(len(code) == size and before[-1:] in (b"", b"\n"), f"{log}: the script in it is not of the {size} "
                "bytes that summary.json counts; give the run as it was left")
    else:
        found = [path for path in beside if path.is_file()]
        require(found, f"{folder}: no script in a train.log and no train_gpt.py; give the run as it was left")
        code = found[0].read_bytes()
        require(len(code) == size, f"{found[0]}: {len(code)} bytes, summary.json counts {size}; give the run's own "
                "script")
    same = (path for path in beside if path.is_file() and path.read_bytes() == code)
    return code, next(same, ROOT / "train_gpt.py")


def load(code: bytes, place: Path) -> ModuleType:
    """The script as a module of its own, which looks for data from `place`."""
    name, folder = f"audited_{hashlib.sha256(code).hexdigest()[:16]}", tempfile.TemporaryDirectory(prefix="audit-")
    path = Path(folder.name, "train_gpt.py")
    path.write_bytes(code)
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where dataclasses look for it
    try:
        spec.loader.exec_module(script)
    except Exception as error:
        raise AuditError(f"the run's script cannot be imported ({type(error).__name__}: {error}); give the run as it "
                         "was left, on a machine with its packages") from None
    script.SCRIPT, script.kept = place, folder  # the folder stays as long as the module
    return script


def check_names(folder: Path, script: ModuleType):
    """AuditError where the script lacks what is called here."""
    missing = []
    for name in NEEDED:
        first, _, second = name.partition(".")
        found = getattr(script, first, None)
        if found is None or (second and not hasattr(found, second)):
            missing.append(name)
    require(not missing, f"{folder}: its script has no {', '.join(missing)}; it is older or another, audit it with the "
            "tools of its time or run it again with this one")


def find_artifact(folder: Path, told: dict) -> Path:
    """The artifact that the run wrote or read. What it read may have moved along with the folder of its maker."""
    given = Path(told["path"])
    places = (folder / ARTIFACT, given, folder.parent / given.parent.name / given.name)
    path = next((path for path in places if path.is_file()), None)
    require(path, f"{folder}: no artifact, neither {folder / ARTIFACT} nor {given} is there; put it back")
    return path


def open_run(folder: Path) -> Subject:
    """Find and check all that belongs to a run, but for its data."""
    summary = read_summary(folder)
    told = summary["artifact"]
    code, place = find_script(folder, told.get("bytes_source", told["bytes_code"]))
    script = load(code, place)
    check_names(folder, script)
    path = find_artifact(folder, summary["artifact"])
    blob = script.read_file(str(path))
    require(hashlib.sha256(blob).hexdigest() == summary["artifact"]["sha256"], f"{path}: not the artifact of "
            "summary.json, its sha256 is another; give the run as it was left")
    header, stored = script.unpack(blob, str(path))
    try:
        cfg = script.Config(**summary["config"])
    except TypeError as error:
        raise AuditError(f"{folder}: its settings are not those of its script ({error}); give the run as it was "
                         "left") from None
    odd = [name.upper() for name, value in header["config"].items() if getattr(cfg, name) != value]
    require(not odd, f"{folder}: {odd and odd[0]} is another in summary.json than in its artifact; one of them was "
            "edited: give the run as it was left")
    scored = [kind for kind in ("float", "int6", "sliding", "ttt") if summary["eval"].get(kind)]
    enabled = "sliding" if cfg.final_sliding_eval_enable and cfg.eval_stride else "int6"  # where nothing was scored
    kind = scored[-1] if scored else "ttt" if cfg.ttt_enabled else enabled
    weights = {name: s.tensor() for name, s in stored.items()}
    sums = read_array(folder / "sums.npy", np.float64) if scored else None
    losses = read_losses(folder, summary["eval"])
    return Subject(folder, summary, code, script, blob, weights, cfg, kind, losses, sums=sums)


def read_losses(folder: Path, scores: dict) -> np.ndarray | str:
    """The losses that a run leaves of its first windows, or why its own are not to be compared with."""
    if not any(scores.values()):
        return "no losses of the run to compare with, it had no final evaluation"
    if (scores.get("ttt") or {}).get("stopped_by_budget"):
        return "not compared with the run's own losses, EVAL_MAX_SECONDS stopped its adaptation"
    return read_array(folder / "excerpt.npy", np.float32)


def read_array(path: Path, kind: type) -> np.ndarray:
    """What a run leaves of its losses: a line of numbers."""
    require(path.is_file(), f"{path.parent}: no {path.name}, the losses that a run leaves behind; give the run as it "
            "was left, or run it again with this script")
    try:
        losses = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AuditError(f"{path}: cannot be read ({error}); give the run as it was left") from None
    whole = losses.dtype == kind and losses.ndim == 1 and len(losses)
    require(whole, f"{path}: holds no losses of a run; give the run as it was left")
    return losses


def open_data(subject: Subject):
    """Open tokenizer and data as the run did."""
    script, cfg, folder = subject.script, subject.cfg, subject.folder
    subject.process = script.Process(cfg.compute_dtype if subject.exact else "fp32")
    data = script.find_path(cfg.data_path)
    require(data.is_dir(), f"{folder}: its data, DATA_PATH={cfg.data_path}, is not there; audit it from the folder "
            "where it ran, or put the data back")
    log = folder / "train.log"
    said = re.findall(rb"^val_bpb:enabled .*tokenizer_path=(.+)$", log.read_bytes(), re.M) if log.is_file() else []
    tokenizer = script.find_path(said[-1].decode()) if said else Path(cfg.tokenizer_path or data / "tokenizer.model")
    subject.tokenizer = script.Tokenizer(tokenizer, cfg.vocab_size)
    tokens = script.Tokens(data, "val", cfg.vocab_size)
    subject.stream = script.open_stream(tokens, subject.tokenizer, cfg.val_token_limit, subject.process.device)


# ---- watching an evaluation ------------------------------------------------------------------------------------------


class Watch:
    """What is seen of an evaluation of `ids`, by books of our own: how often each target was scored and by what nats,
    what was learnt from, and when. At the targets in `probe` the whole distribution is asked for; with `peeks`, in each
    window, the losses up to a place when the inputs after it are others."""

    def __init__(self, subject: Subject, ids: np.ndarray, probe=(), peeks: bool = False):
        device = subject.process.device
        self.vocab, self.n, self.peeks = subject.cfg.vocab_size, len(ids) - 1, peeks
        self.tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
        self.probe = torch.tensor(list(probe), dtype=torch.int64, device=device)
        self.nats = torch.zeros(self.n, device=device)
        self.count = torch.zeros(self.n, dtype=torch.int64, device=device)
        self.learnt = torch.zeros(self.n + 1, dtype=torch.int64, device=device)
        self.early = self.foreign = 0  # steps that had seen a target before its score; scores of other tokens
        self.walks = []  # evaluators that were seen
        self.peek, self.distributions = 0.0, {}
        self.score = None  # what the evaluation itself says in the end

    @contextlib.contextmanager
    def over(self, script: ModuleType):
        """Watch every Evaluator of the script. Its own methods are called, with what they were given."""
        record, lesson = script.Evaluator.record, script.Evaluator.lesson

        def seen_record(evaluator, low: Tensor, high: Tensor, *given):
            if all(evaluator is not other for other in self.walks):
                self.walks.append(evaluator)
            own = evaluator.forward

            def forward(ids, targets=None, rows=None, *more, **named):
                nats = own(ids, targets, rows, *more, **named)
                self.note(lambda *asked: own(*asked, *more, **named), nats, (ids, targets, rows), low, high)
                return nats

            evaluator.forward = forward
            try:
                return record(evaluator, low, high, *given)
            finally:
                evaluator.forward = own

        def seen_lesson(evaluator, positions: Tensor, who: Tensor | None = None) -> Tensor:
            learns = torch.ones_like(positions[:, 0]) if who is None else who.long()
            marks = learns.long()[:, None].expand_as(positions)
            self.learnt.index_add_(0, positions.clamp(max=self.n).flatten(), marks.flatten())
            return lesson(evaluator, positions, who)

        script.Evaluator.record, script.Evaluator.lesson = seen_record, seen_lesson
        try:
            yield
        finally:
            script.Evaluator.record, script.Evaluator.lesson = record, lesson

    def note(self, ask, nats: Tensor, asked: tuple[Tensor, Tensor, Tensor], low: Tensor, high: Tensor):
        """Note a batch that is scored, targets [low, high) of each row, and ask more about it."""
        _, targets, rows = asked
        slots = torch.arange(rows.size(1), device=rows.device)
        places = low[:, None] + slots
        scored = places < high[:, None]
        places = places.clamp(max=self.n - 1)
        self.nats.index_add_(0, places.flatten(), torch.where(scored, nats.float(), 0.0).flatten())
        self.count.index_add_(0, places.flatten(), scored.long().flatten())
        self.early += int(torch.where(scored, self.learnt[places + 1], 0).sum())
        self.foreign += int((scored & (targets != self.tokens[places + 1])).sum())
        if self.peeks and bool(scored.any()):
            self.change_what_follows(ask, nats, asked, low, scored)
        probed = torch.isin(places, self.probe) & scored
        while bool(probed.any()):  # one place of each row at a time
            slot = probed.int().argmax(1, keepdim=True)
            self.ask_all(ask, asked, slot, places.gather(1, slot)[:, 0], probed.any(1))
            probed.scatter_(1, slot, False)

    def change_what_follows(self, ask, nats: Tensor, asked: tuple, low: Tensor, scored: Tensor):
        """In each row take one place that is scored, let all inputs after it be others, and ask again."""
        ids, targets, rows = asked
        slots = torch.arange(rows.size(1), device=rows.device)
        place = (low[:, None] // rows.size(1) * 7919) % scored.sum(1, keepdim=True).clamp(min=1)
        later = torch.arange(ids.size(1), device=ids.device) > rows.gather(1, place)
        other = torch.where(later, (ids * 31 + 17) % self.vocab, ids)
        change = (ask(other, targets, rows) - nats).abs()[scored & (slots <= place)]
        if change.numel():
            self.peek = max(self.peek, float(change.nan_to_num(torch.inf).max()))

    def ask_all(self, ask, asked: tuple, slot: Tensor, target: Tensor, wanted: Tensor):
        """Keep the nats of every vocabulary entry at the place of a `target` [rows] in each row where it is `wanted`:
        the same batch is asked again with each entry in turn as the target, so that a score which is no probability
        shows."""
        ids, _, rows = asked
        place, width = rows.gather(1, slot).expand_as(rows).contiguous(), rows.size(1)
        count = -(-self.vocab // width) * width  # whole batches, of one shape
        entries = torch.arange(count, device=ids.device).clamp(max=self.vocab - 1)
        parts = [ask(ids, part.expand_as(rows).contiguous(), place) for part in entries.split(width)]
        nats = torch.cat(parts, 1)[:, : self.vocab].float().cpu()
        self.distributions |= {int(target[row]): nats[row] for row in wanted.nonzero()[:, 0].tolist()}


def evaluate(subject: Subject, ids: np.ndarray, probe=(), peeks: bool = False, **changes) -> Watch:
    """Evaluate tokens of ours as the run evaluated its own, on its artifact; `changes` are settings to change."""
    script, process = subject.script, subject.process
    if not subject.exact:
        changes["use_compile"] = "0"
    cfg = dataclasses.replace(subject.cfg, eval_max_seconds=0.0, **changes)
    model, log = script.build_model(cfg, subject.weights, process), script.Log(process, subject.folder).silent()
    stream, watch = script.Stream(ids, subject.tokenizer, process.device), Watch(subject, ids, probe, peeks)
    with watch.over(script):
        if subject.kind == "ttt":
            evaluator, _ = script.test_time_train(cfg, process, log, model, stream)
        else:
            stride = cfg.eval_stride if subject.kind == "sliding" else cfg.eval_len
            forward = script.compiled(model, cfg, process)
            evaluator = script.evaluate(cfg, process, log, forward, stream, stride, "audit")
        watch.score = evaluator.result()
    return watch


# ---- the checks ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """An excerpt with its cuts, and the evaluation of it that the checks look at."""

    ids: np.ndarray
    cuts: list[int]
    settings: dict  # of chunks that leave room for updates
    rng: np.random.Generator
    honest: Watch | None = None  # of the excerpt as it is


def prepare(subject: Subject, tokens: int) -> Trial:
    """Evaluate the excerpt. The cuts hang on the artifact, so that nobody chooses them."""
    cfg, rng = subject.cfg, np.random.default_rng(int(hashlib.sha256(subject.blob).hexdigest()[:8], 16))
    ids = subject.stream.tokens[: tokens + 1].cpu().numpy().copy()
    n, bos = len(ids) - 1, subject.script.BOS_ID
    if n >= 16:  # several documents, to be kept apart
        ids[rng.integers(1, n, 4)] = bos
    starts = np.flatnonzero(ids[1:] == bos) + 1  # their ends are places worth cheating at
    cuts = sorted({*rng.integers(max(n // 3, 1), n + 1, 4).tolist(),
                   *rng.choice(starts, min(2, len(starts)), replace=False).tolist()})
    chunk = min(cfg.ttt_lora_chunk_tokens, max(tokens // 16, 2 * cfg.eval_stride))
    settings = {"ttt_chunk_tokens": max(tokens // 12, cfg.eval_stride, 1), "ttt_lora_chunk_tokens": max(chunk, 1)}
    if subject.kind == "ttt" and cfg.ttt_mode == "lora":  # two places, so that documents follow each other
        by_number = hasattr(cfg, "ttt_lora_documents")  # scripts before it go by the batch
        settings |= {"ttt_lora_documents": 2} if by_number else {"val_batch_size": 2 * cfg.eval_len}
    trial = Trial(ids, cuts, settings, rng)
    probe = sorted({cut - 1 for cut in cuts} | set(rng.integers(0, n, 4).tolist()))
    trial.honest = evaluate(subject, ids, probe, peeks=True, **settings)
    return trial


def causal(subject: Subject, trial: Trial) -> tuple[bool, str]:
    """Random tokens from a cut on must leave every loss before it as it was, and the distribution at it."""
    ids, honest, worst, noise, tolerance, learnt = trial.ids, trial.honest, 0.0, 0.0, 0.0, []
    if not subject.exact:  # how far honest evaluations differ whose batches have other shapes
        again = evaluate(subject, ids, **trial.settings | {"val_batch_size": subject.cfg.eval_len})
        noise = float(np.abs(again.score.nats - honest.score.nats).max())
        tolerance = min(1e-3, 1e-5 + 4 * noise)
    trials = [(cut, honest, trial.settings) for cut in trial.cuts]
    if "ttt_lora_documents" in trial.settings:  # as many side by side as in the run, too
        settings = trial.settings | {"ttt_lora_documents": subject.cfg.ttt_lora_documents}
        beside = evaluate(subject, ids, [cut - 1 for cut in trial.cuts], **settings)
        trials += [(cut, beside, settings) for cut in trial.cuts[::2]]
    for cut, honest, settings in trials:  # tokens before position `cut` stay: the losses of targets 0 to cut-2 must too
        after = trial.rng.integers(0, subject.cfg.vocab_size, len(ids) - cut).astype(ids.dtype)
        other = evaluate(subject, np.append(ids[:cut], after), [cut - 1], **settings)
        gaps = np.abs(other.score.nats - honest.score.nats)[: cut - 1]
        unknown = torch.full((subject.cfg.vocab_size,), torch.nan)  # where the place was not scored
        here, there = (watch.distributions.get(cut - 1, unknown).neg().exp() for watch in (honest, other))
        worst = max(worst, float(np.nan_to_num(np.append(gaps, (here - there).abs()), nan=np.inf).max()))
        learnt.append(int((other.learnt[:cut] > 0).sum()))
    peek = trial.honest.peek
    ok = worst <= tolerance and peek <= max(tolerance, 1e-5) and noise <= 1e-3
    return ok, (f"cuts at {trial.cuts} of {honest.n}: what comes before differs by {worst:.3g}, allowed "
                f"{tolerance:.3g} (a re-run: {noise:.3g}); other inputs after a place change its loss by "
                f"{peek:.3g}; tokens learnt from before the cuts: {learnt}")


def is_what_ran(subject: Subject, tokens: int) -> tuple[bool, str]:
    """With the run's own settings its own losses must be met, as far as the excerpt of the stream decides them: the
    mean, in which rounding cancels out."""
    cfg, left, ranks = subject.cfg, subject.losses, subject.summary["hardware"]["world_size"]
    if isinstance(left, str):
        return True, left
    ids = subject.stream.tokens[: tokens + 1].cpu().numpy()
    same = min(len(ids) - 1, len(left))
    if subject.kind == "ttt" and cfg.ttt_mode == "full" and cfg.ttt_lr_end != 1:  # the rate goes by the chunks to come
        same = min(same, cfg.ttt_chunk_tokens)
    nats = evaluate(subject, ids, ttt_batch_seqs=cfg.ttt_batch_seqs * ranks).score.nats  # it is a rank's share
    gap = abs(float(np.mean(nats[:same].astype(np.float64) - left[:same])))
    return gap <= 0.01, f"the mean of {same} losses differs by {gap:.3g} nats between the run and a trial, allowed 0.01"


def normalised(trial: Trial) -> tuple[bool, str]:
    """At the probed places the entries of the vocabulary must sum to 1, and every loss on record be the target's."""
    honest, ids = trial.honest, trial.ids
    sums = [abs(float(nats.double().neg().exp().sum()) - 1) for nats in honest.distributions.values()]
    gaps = [abs(float(nats[int(ids[at + 1])]) - float(honest.score.nats[at])) for at, nats in
            honest.distributions.items()]
    moved = float(np.nan_to_num(np.abs(honest.nats.cpu().numpy() - honest.score.nats), nan=np.inf).max())
    ok = len(sums) == len(honest.probe) > 0 and all(x <= 1e-4 for x in (*sums, *gaps, moved)) and not honest.foreign
    return ok, (f"at {len(sums)} of {len(honest.probe)} places the sum is off 1 by at most {max(sums, default=1):.2g}, "
                f"the loss off -log of its entry by at most {max(gaps, default=1):.2g}; what is on record is off what "
                f"the model gave by at most {moved:.2g}; {honest.foreign} scores are of other tokens than the stream's")


def one_pass(trial: Trial) -> tuple[bool, str]:
    """Every target must be scored once."""
    walks, least, most = len(trial.honest.walks), int(trial.honest.count.min()), int(trial.honest.count.max())
    return least == most == walks == 1, f"{trial.honest.n} targets, scored {least} to {most} times in {walks} walk(s)"


def score_before_update(trial: Trial) -> tuple[bool, str]:
    """No step may have learnt from a target that is yet to be scored."""
    early, learnt = trial.honest.early, int((trial.honest.learnt > 0).sum())
    return early == 0, (f"{early} optimizer steps had seen a target before its score; {learnt} tokens were learnt "
                        "from")


def canonical_bytes(subject: Subject) -> tuple[bool, str]:
    """The whole stream's bytes must be those of its text, and what the run divided by."""
    counted = decoded_bytes(subject.tokenizer.sp, subject.stream.tokens.cpu().numpy())
    used = {score["bytes"] for score in subject.summary["eval"].values() if score}
    ok = counted == subject.stream.bytes and used <= {counted}
    said = " and ".join(f"{n} by the run" for n in sorted(used - {subject.stream.bytes}))
    return ok, f"{subject.stream.bytes} by the table, {counted} by the decoded pieces" + (f", {said}" if said else "")


def figures(subject: Subject) -> tuple[bool, str]:
    """What the run says of its whole evaluation must follow from the sums of its losses, and these must begin as its
    excerpt does."""
    sums, window, told = subject.sums, subject.cfg.eval_len, subject.summary
    if sums is None:
        return True, "no losses of the run to compare with"
    first = subject.losses if isinstance(subject.losses, np.ndarray) else np.empty(0)
    first = first[: len(first) // window * window].reshape(-1, window).sum(1, dtype=np.float64)
    apart = float(np.abs(first - sums[: len(first)]).max(initial=0.0))
    loss = float(sums.sum()) / subject.stream.targets
    bpb = loss * subject.stream.targets / math.log(2) / subject.stream.bytes
    said = told["eval"][subject.kind]["val_loss"], told["eval"][subject.kind]["val_bpb"], told["val_bpb"]
    numbers = np.array(said, dtype=np.float64)  # null becomes nan
    gap = float(np.abs(numbers - (loss, bpb, bpb)).max())
    whole = len(sums) == math.ceil(subject.stream.targets / window)
    return whole and gap <= 1e-6 and apart <= 1e-3, (
        f"by the sums of its losses val_loss is {loss:.8f} and val_bpb {bpb:.8f}, off what it says by {gap:.3g}; the "
        f"first {len(first)} of {len(sums)} sums are off its excerpt by {apart:.3g}")


def decoded_bytes(sp, ids: np.ndarray) -> int:
    """Canonical bytes of the targets ids[1:], counted without the table: from the text that the tokens spell, in which
    a word mark is a space, however it is spelt, and a space at the start of a document does not count."""
    boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(len(sp))]
    spelt = [START if boundary[i] else bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.encode()
             for i, p in enumerate(map(sp.id_to_piece, range(len(sp))))]

    def count(tokens: np.ndarray) -> int:
        text = b"".join(map(spelt.__getitem__, tokens.tolist())).replace("\u2581".encode(), b" ")
        return len(text) - text.count(START + b" ") - len(START) * text.count(START)

    total = 0
    for begin in range(1, len(ids), DECODED):
        before = ids[max(begin - 3, 0) : begin]  # what the first target goes on from, a mark's first bytes or a start
        total += count(ids[max(begin - 3, 0) : begin + DECODED]) - count(before)
    return total


def audit(subject: Subject, tokens: int = 0) -> dict:
    """All checks of a run whose data is open, on so many targets, 0 for four windows: what audit.json says."""
    began, window = time.perf_counter(), subject.cfg.eval_len
    tokens = max(tokens, window) if tokens else WINDOWS * window
    trial = prepare(subject, tokens)
    checks = {"causal": causal(subject, trial), "normalised": normalised(trial), "one_pass": one_pass(trial),
              "score_before_update": score_before_update(trial), "bytes": canonical_bytes(subject),
              "figures": figures(subject)}
    met, said = is_what_ran(subject, tokens)
    checks["causal"] = checks["causal"][0] and met, f"{checks['causal'][1]}; {said}"
    return {"ok": all(ok for ok, _ in checks.values()), "seconds": time.perf_counter() - began,
            "artifact_sha256": hashlib.sha256(subject.blob).hexdigest(),
            "code_sha256": hashlib.sha256(subject.code).hexdigest(), "val_bpb": subject.summary["val_bpb"],
            "targets": len(trial.ids) - 1, "of": subject.stream.targets,
            **{name: {"ok": bool(checks[name][0]), "detail": checks[name][1]} for name in CHECKS}}


# ---- the command line ------------------------------------------------------------------------------------------------


def write(path: Path, result: dict):
    """Write audit.json whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}; mend its folder's permissions or make room") from None
    finally:
        partial.unlink(missing_ok=True)


def find(word: str) -> Path:
    """The folder of a run, by its path or by its RUN_ID."""
    places = Path(word), Path(os.environ.get("LOG_DIR") or "logs", word)
    folder = next((path for path in places if path.is_dir()), None)
    require(folder, f"{word}: no such folder; give a run's, LOG_DIR/RUN_ID")
    return folder


def audit_run(word: str, tokens: int) -> int:
    """Audit one run, say what was found, and keep it. Returns the exit code."""
    folder = find(word)
    subject = open_run(folder)
    open_data(subject)
    result = audit(subject, tokens)
    for name in CHECKS:
        print(f"audit {name}: {'ok' if result[name]['ok'] else 'FAILED'}, {result[name]['detail']}", flush=True)
    write(folder / "audit.json", result)
    print(f"written: {folder / 'audit.json'}, after {result['seconds']:.1f} s", flush=True)
    return 0 if result["ok"] else 1


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise AuditError(f"{message}; ./run.sh audit --help says how")


def main(argv: list[str]) -> int:
    parser = Parser(prog="./run.sh audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run: LOG_DIR/RUN_ID, or its RUN_ID")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="targets of the excerpt (four windows)")
    worst = 0
    try:
        options = parser.parse_args(argv)
        require(options.tokens >= 0, f"--tokens {options.tokens}: must be above 0, or 0 for four windows")
    except AuditError as problem:
        return complain(problem)
    for word in options.runs:
        if len(options.runs) > 1:
            print(f"---- {word}", flush=True)
        try:
            worst = max(worst, audit_run(word, options.tokens))
        except (AuditError, OSError) as problem:
            worst = complain(problem)
        except Exception as problem:
            if "UserError" not in [kind.__name__ for kind in type(problem).__mro__]:  # what a script says can be mended
                raise
            worst = complain(f"{word}: {problem}")
    return worst


def complain(problem) -> int:
    """Say in one line why a run cannot be audited. Returns the exit code."""
    sys.stderr.write(f"error: {' '.join(str(problem).splitlines())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
