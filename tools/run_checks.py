"""Hold the files of a run against each other: log, metrics.jsonl, summary.json, artifact. A figure that differs is an
error that names it. Used by tools/runs.py.
"""

import hashlib
import json
import math
from pathlib import Path

from run_log import SCORES, Chunk, Point, Run, artifact, read_text, redo, t


def read_metrics(path: Path, run: Run):
    """Hold metrics.jsonl against the log, and take from it what the log rounds."""
    train, val, chunks = [], [], []
    lines = read_text(path).split("\n")
    if tail := lines.pop():
        run.wrong(f"{path.name} is cut in its last line, {tail[:60]!r}; give it whole")
    for number, line in enumerate(lines, 1):
        try:
            m = json.loads(line)
            if "ttt_chunk" in m:
                redo(chunks, Chunk(m["ttt_chunk"], m["ttt_seconds"], m["running_bpb"], m["chunks"]))
            else:
                kind = "val" if "val_loss" in m else "train"
                loss = m[f"{kind}_loss"]
                point = Point(m["step"], m["train_seconds"], math.nan if loss is None else loss, m.get("val_bpb"),
                              m.get("rate_factor"))
                redo(val if kind == "val" else train, point)
        except (ValueError, KeyError, TypeError, AttributeError):
            run.wrong(f"{path.name}:{number}: not a line of a run, {line[:60]!r}; give it as the run left it")
    if run.resumed:  # only the log says where
        train, val = ([p for p in points if p.step <= (run.steps or 0)] for points in (train, val))
    for name, ours, exact in (("train_loss", run.train, train), ("val_loss", run.val, val), ("ttt_chunk", run.chunks,
                                                                                           chunks)):
        compare_points(run, name, ours, exact)
    run.train, run.val, run.chunks = train, val, chunks


def compare_points(run: Run, name: str, logged: list, exact: list):
    """Each line of the log beside its line of metrics.jsonl. A run that goes on may have one more of either."""
    if len(logged) != len(exact) and (run.finished or abs(len(logged) - len(exact)) > 1):
        run.wrong(f"train.log has {len(logged)} lines of {name}, metrics.jsonl {len(exact)}; one of them was edited")
    for a, b in zip(logged, exact, strict=False):
        where = f"{name} of step {a.step}" if name != "ttt_chunk" else f"bpb of chunk {a.step}"
        agree(run, f"the number of a {name} line", a.step, b.step, 0, "train.log", "metrics.jsonl")
        agree(run, f"seconds at {where}", a.seconds, b.seconds, 0.0501 if name == "ttt_chunk" else 0.000501,
              "train.log", "metrics.jsonl")
        for figure, near in (("loss", 0.0000501), ("bpb", 0.0000501 if name == "val_loss" else 0.000000501)):
            if hasattr(a, figure):
                agree(run, where if figure == "loss" or name == "ttt_chunk" else where.replace("loss", "bpb"),
                      getattr(a, figure), getattr(b, figure), near, "train.log", "metrics.jsonl")


def agree(run: Run, figure: str, here, there, near: float = 0.0, one: str = "train.log", other: str = "summary.json"):
    """UserError where two files give a figure differently, by more than rounding."""
    if isinstance(here, float | int) and isinstance(there, float | int) and not isinstance(here, bool):
        same = abs(here - there) <= near * (1 + 1e-9) or (here != here and there != there)
    else:
        same = here == there or (there is None and isinstance(here, float) and not math.isfinite(here))
    if not same:
        here, there = (f"{x:.8g}" if isinstance(x, float) else str(x)[:80] for x in (here, there))
        run.wrong(f"{figure} is {here} in {one} and {there} in {other}; one of them was edited: give the run as it "
                  "was left")


def check_log(run: Run):
    """Hold the figures of our own log against each other."""
    for key, score in run.own.items():
        if score.val_loss is None or score.rough is None:
            if run.finished:
                run.wrong(f"the log gives the {key} score only once; give it as the run left it")
            continue
        for figure, rough, exact in (("val_loss", score.rough[0], score.val_loss), ("val_bpb", score.rough[1],
                                                                                   score.val_bpb)):
            agree(run, f"{figure} of {key}", rough, exact, 0.00005001, "its line", "its exact line")
        if run.bytes and math.isfinite(score.val_loss):
            bpb = score.val_loss * run.targets / math.log(2) / run.bytes
            agree(run, f"val_bpb of {key}", score.val_bpb, bpb, 3e-8, "its line", "what val_loss comes to in bits by "
                  f"{run.targets} targets and {run.bytes} bytes")
    if run.total_bytes is not None:
        agree(run, "the size", run.total_bytes, run.code_bytes + run.model_bytes, 0, "its total", "code and model")
    if run.code and run.code_bytes is not None:
        agree(run, "the size of the script", len(run.code), run.code_bytes, 0, "the copy in train.log", "its line")
    if run.end:
        agree(run, "the last step", run.end[0], run.steps, 0, "its table", "the lines of training")
    if run.stop:
        agree(run, "the last step", run.stop[0], run.steps, 0, "the line of the cap", "the lines of training")
    alone = run.hardware.get("world_size", run.ranks) == 1  # else the lines may be of rank 0's share
    if alone and "ttt" in run.own and run.chunks and run.chunks[-1].step == run.chunks[-1].count:
        agree(run, "val_bpb of ttt", run.chunks[-1].bpb, run.own["ttt"].val_bpb, 1e-5, "its last chunk", "its score")


def check_summary(run: Run):
    """Hold summary.json against the log."""
    s, pairs = run.summary, []
    pairs += [("seed", run.seed, s["seed"], 0), ("valid", run.valid, s["valid"], 0), ("the caveats", run.caveats,
                                                                                    s["caveats"], 0)]
    pairs += [("the reasons", "; ".join(run.reasons), "; ".join(s["reasons"]), 0)]
    differ = [n for n in sorted(run.config.keys() | s["config"].keys()) if run.config.get(n) != s["config"].get(n)]
    pairs += [(name.upper(), run.config.get(name), s["config"].get(name), 0) for name in differ if run.config]
    for key in SCORES:
        ours, theirs = run.own.get(key), s["eval"].get(key)
        agree(run, f"the {key} score", "there" if ours else "none", "there" if theirs else "none")
        if ours:
            pairs += [(f"val_loss of {key}", ours.val_loss, theirs["val_loss"], 5.01e-9),
                      (f"val_bpb of {key}", ours.val_bpb, theirs["val_bpb"], 5.01e-9),
                      (f"seconds of {key}", ours.seconds, theirs["seconds"], 0.000501),
                      (f"targets of {key}", run.targets, theirs["tokens"], 0),
                      (f"bytes of {key}", run.bytes, theirs["bytes"], 0)]
    if run.score:
        pairs.append(("val_bpb", run.score.val_bpb, s["val_bpb"], 5.01e-9))
    for name in ("code", "model", "total"):
        pairs.append((f"bytes_{name}", getattr(run, f"{name}_bytes"), (s["artifact"] or {}).get(f"bytes_{name}"), 0))
    if s["train"]:
        batch = s["config"]["train_batch_tokens"]
        near = 0.000501 if run.train or run.val else 0.0000501 * (run.steps or 0) + 0.001
        pairs += [("steps", run.steps, s["train"]["steps"], 0),
                  ("training seconds", run.train_seconds, s["train"]["seconds"], near),
                  ("training tokens", (run.steps or 0) * batch, s["train"]["tokens"], 0)]
    elif run.steps is not None:
        run.wrong("train.log has lines of training, summary.json none; one of them was edited")
    pairs += [(f"seconds of {name}", run.spent.get(name), value, 0.0501) for name, value in s["seconds"].items()]
    audit = {name: check["ok"] for name, check in (s.get("audit") or {}).items() if isinstance(check, dict)}
    pairs += [(f"audit {name}", run.audits.get(name), audit.get(name), 0) for name in {**run.audits, **audit}]
    pairs += [("hardware", run.hardware, s["hardware"], 0)] if run.hardware else []
    for pair in pairs:
        agree(run, *pair)
    run.reasons = s["reasons"]  # as they were told apart


def check_artifact(run: Run):
    """Hold the artifact, where it is still there, against the log and the summary."""
    path = run.path / t.ARTIFACT_NAME
    if run.finished and path.exists() and run.exporter is run:
        blob = t.read_file(str(path))
        agree(run, "the artifact's bytes", len(blob), run.model_bytes, 0, path.name, "train.log")
        agree(run, "the artifact's sha256", hashlib.sha256(blob).hexdigest(), artifact(run), 0, path.name)
