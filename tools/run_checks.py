"""Hold the files of a run against each other: log, metrics.jsonl, summary.json, artifact. A figure that differs is an
error that names it. Used by tools/runs.py.
"""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

from run_log import SCORES, Chunk, Point, Run, artifact, read_text, redo, t


def is_number(value, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def point_of(m: dict) -> tuple[str, Point | Chunk]:
    """Kind and figures of a line of metrics.jsonl. ValueError, KeyError or TypeError for one that no run writes; null
    stands for what is not finite."""
    if "ttt_chunk" in m:
        bpb = math.nan if m["running_bpb"] is None else m["running_bpb"]
        point = Chunk(m["ttt_chunk"], m["ttt_seconds"], bpb, m["chunks"])
        whole = type(point.step) is type(point.count) is int and 1 <= point.step <= point.count
        if not whole or not is_number(point.seconds, 0) or not isinstance(bpb, int | float):
            raise ValueError(m)
        return "chunk", point
    kind = "val" if "val_loss" in m else "train"
    figures = [math.nan if x is None else x for x in (m[f"{kind}_loss"], m["val_bpb"] if kind == "val" else math.nan)]
    rate = m.get("rate_factor")
    if type(m["step"]) is not int or m["step"] < 0 or not is_number(m["train_seconds"], 0) or not all(
            isinstance(x, int | float) for x in figures) or (rate is not None and not is_number(rate, 0, 1)):
        raise ValueError(m)
    return kind, Point(m["step"], m["train_seconds"], figures[0], figures[1] if kind == "val" else None, rate)


def read_metrics(path: Path, run: Run):
    """Hold metrics.jsonl against the log, and take from it what the log rounds."""
    found = {"train": [], "val": [], "chunk": []}
    lines = read_text(path).split("\n")
    if tail := lines.pop():
        run.wrong(f"{path.name} is cut in its last line, {tail[:60]!r}; give it whole")
    for number, line in enumerate(lines, 1):
        try:
            kind, point = point_of(json.loads(line))
            redo(found[kind], point)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            run.wrong(f"{path.name}:{number}: not a line of a run, {line[:60]!r}; give it as the run left it")
    train, val, chunks = found.values()
    if run.resumed:  # only the log says where
        train, val = ([p for p in points if p.step <= (run.steps or 0)] for points in (train, val))
    for name, ours, exact in (("train_loss", run.train, train), ("val_loss", run.val, val), ("ttt_chunk", run.chunks,
                                                                                           chunks)):
        compare_points(run, name, ours, exact)
    run.train, run.val, run.chunks = train, val, chunks


def compare_points(run: Run, name: str, logged: list, exact: list):
    """Each line of the log beside its line of metrics.jsonl. A run that goes on may have one more of either."""
    if len(logged) != len(exact) and (run.finished or abs(len(logged) - len(exact)) > 1):
        run.wrong(f"train.log has {len(logged)} lines of {name}, metrics.jsonl {len(exact)}; one of them was edited: "
                  "give the run as it was left")
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


def check_scores(run: Run):
    """Hold the two lines of each score against each other, and bits a byte against nats a token."""
    for key, score in run.own.items():
        if score.val_loss is None or score.rough is None:
            if run.ours and run.finished:
                run.wrong(f"the log gives the {key} score only once; give it as the run left it")
            continue
        for figure, rough, exact in (("val_loss", score.rough[0], score.val_loss), ("val_bpb", score.rough[1],
                                                                                   score.val_bpb)):
            agree(run, f"{figure} of {key}", rough, exact, 0.00005001, "its line", "its exact line")
        for figure, value, exact in zip(("val_loss", "val_bpb", "targets"), run.rows.get(key, ()),
                                        (*score.rough, run.targets), strict=False):
            agree(run, f"{figure} of {key}", value, exact, 0.00000001, "its table", "its line")
        if run.bytes and math.isfinite(score.val_loss):
            bpb = score.val_loss * run.targets / math.log(2) / run.bytes
            agree(run, f"val_bpb of {key}", score.val_bpb, bpb, 3e-8, "its line", "what val_loss comes to in bits by "
                  f"{run.targets} targets and {run.bytes} bytes")


def check_settings(run: Run):
    """Hold the lines that say what was run, on what, against the config line."""
    if run.config:
        where, other = "its own line", "the config line"
        if run.preset:
            agree(run, "the preset", run.preset, run.config.get("preset"), 0, where, other)
            agree(run, "the seed", run.seed, run.config.get("seed"), 0, where, other)
        for name, value in run.overrides.items():
            agree(run, name, value, run.config.get(name.lower()), 0, "the preset line", other)
        if run.data:
            agree(run, "the data", run.data, Path(run.config.get("data_path", "")).name, 0, where, other)
        if run.iterations is not None and not run.again:
            agree(run, "the number of steps to go", run.iterations, run.config.get("iterations"), 0,
                  "the lines of training", other)
    if run.ranks is not None and run.hardware and not run.again:
        agree(run, "world_size", run.ranks, run.hardware["world_size"], 0, "its own line", "the hardware line")


def check_log(run: Run):
    """Hold the figures of our own log against each other."""
    check_scores(run)
    check_settings(run)
    sizes = {"Code size": run.code_bytes, "Serialized model int6": run.model_bytes,
             "Total submission size int6": run.total_bytes}
    gone = [name for name, size in sizes.items() if size is None]
    if gone and len(gone) < 3 and (run.finished or run.total_bytes is not None):
        run.wrong(f"the log has no line {gone[0]!r} beside the other sizes; give it as the run left it")
    if not gone:
        agree(run, "the size", run.total_bytes, run.code_bytes + run.model_bytes, 0, "its total", "code and model")
    if run.code and run.code_bytes is not None:
        agree(run, "the size of the script", len(run.code), run.source_bytes or run.code_bytes, 0,
              "the copy in train.log", "its line")
    if run.code_file and run.code_bytes is not None:
        agree(run, "the size of the code that counts", run.code_file[0], run.code_bytes, 0, "its own line",
              "the line 'Code size'")
    if run.end:
        agree(run, "the last step", run.end[0], run.steps, 0, "its table", "the lines of training")
    if run.stop:
        agree(run, "the last step", run.stop[0], run.steps, 0, "the line of the cap", "the lines of training")
    alone = run.hardware.get("world_size", run.ranks) == 1  # else the lines may be of rank 0's share
    if alone and "ttt" in run.own and run.chunks and run.chunks[-1].step == run.chunks[-1].count:
        agree(run, "val_bpb of ttt", run.chunks[-1].bpb, run.own["ttt"].val_bpb, 1e-5, "its last chunk", "its score")
    if run.finished:
        check_notes(run)
    beside = run.path.with_name(f"audit_seed{run.seed}.json")
    if run.path.is_file() and beside.exists():  # in a record
        read_audit(run, beside)


def check_notes(run: Run):
    """That a finished run says what its own lines show against it: no caveat is taken on trust, or left out."""
    config, machine, shown = run.config, run.hardware, []
    if config and run.targets and 0 < config.get("val_token_limit", 0) < run.targets:
        run.wrong(f"{run.targets} targets in train.log and VAL_TOKEN_LIMIT={config['val_token_limit']}; one of them "
                  "was edited: give the run as it was left")
    name = Path(config.get("data_path", "fineweb10B")).name
    shown += [] if name.startswith("fineweb10B") else [f"not the challenge's data: {name}"]
    if run.targets is not None and not config.get("val_token_limit"):
        data = SimpleNamespace(data_path=name, vocab_size=config.get("vocab_size"))
        whole = SimpleNamespace(targets=run.targets, complete=True)
        shown += [text for holds, text in t.split_caveats(data, whole) if holds]
    if machine and (machine["world_size"] != 8 or "H100" not in machine["name"]):
        shown.append(f"not 8 x H100: {machine['world_size']} x {machine['name']}")
    shown += ["resumed "] * run.again + ["steps that were not finite were dropped"] * (run.dropped and not run.again)
    shown += [] if run.score else ["no final evaluation ran"]
    cap, seconds = config.get("max_wallclock_seconds"), run.train_seconds
    if cap and seconds is not None and seconds + run.spent.get("search", 0.0) > 1.01 * cap + 0.2:
        shown.append("training and export took ")
    for caveat in shown:
        if not any(line.startswith(caveat) for line in run.caveats):
            run.wrong(f"its lines show {caveat.strip()!r}, its notes do not say so; one of them was edited: give the "
                      "run as it was left")
    for line in run.caveats:
        if line.startswith("partial split: ") and run.targets is not None:
            agree(run, "what was scored", line.startswith(f"partial split: its first {run.targets} targets"), True, 0,
                  f"its note, {line[:60]!r},", f"{run.targets} targets")


def check_summary(run: Run):
    """Hold summary.json against the log."""
    s, pairs = run.summary, []
    pairs += [("the preset", run.preset, s["preset"], 0)]
    pairs += [(name, run.overrides.get(name), s["overrides"].get(name), 0) for name in
              sorted(run.overrides.keys() | s["overrides"].keys())]
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
    for name in ("code", "source", "model", "total") if run.source_bytes else ("code", "model", "total"):
        pairs.append((f"bytes_{name}", getattr(run, f"{name}_bytes"), (s["artifact"] or {}).get(f"bytes_{name}"), 0))
    if s["train"]:
        batch = s["config"]["train_batch_tokens"]
        near = 0.000501 if run.train or run.val else 0.0000501 * (run.steps or 0) + 0.001
        pairs += [("steps", run.steps, s["train"]["steps"], 0),
                  ("training seconds", run.train_seconds, s["train"]["seconds"], near),
                  ("training tokens", (run.steps or 0) * batch, s["train"]["tokens"], 0)]
    elif run.steps is not None:
        run.wrong("train.log has lines of training, summary.json none; one of them was edited")
    pairs += [("hardware", run.hardware, s["hardware"], 0)]
    if "finished" in s:  # of this script; those before told all seconds and their audit in the log
        pairs += [(f"seconds of {name}", value, s["seconds"].get(name), 0.0501) for name, value in run.spent.items()]
    else:
        audit = {name: check["ok"] for name, check in (s.get("audit") or {}).items() if isinstance(check, dict)}
        pairs += [(f"seconds of {name}", run.spent.get(name), value, 0.0501) for name, value in s["seconds"].items()]
        pairs += [(f"audit {name}", run.audits.get(name), audit.get(name), 0) for name in {**run.audits, **audit}]
    if "data" in s:
        pairs += [(f"{name} of its data", run.about_data.get(name), s["data"].get(name), 0) for name in
                  sorted(run.about_data.keys() | s["data"].keys())]
    for pair in pairs:
        agree(run, *pair)
    run.reasons, run.spent = s["reasons"], s["seconds"]  # as they were told apart, and exactly
    if "finished" in s:
        read_audit(run, run.path / "audit.json")


def read_audit(run: Run, path: Path):
    """Take the checks of an audit, which must be of this script, and of this artifact where one is named."""
    run.audits, script = {}, hashlib.sha256(run.code).hexdigest() if run.code else (run.script or (0, ""))[1]
    if not path.exists():
        return
    try:
        found = json.loads(read_text(path))
        checks = {name: bool(check["ok"]) for name, check in found.items() if isinstance(check, dict)}
        if found["code_sha256"] != script:
            run.audited = "its audit is of another train_gpt.py"
        elif artifact(run) and found["artifact_sha256"] != artifact(run):
            run.audited = "its audit is of another artifact"
        elif abs((found["val_bpb"] or 0.0) - (run.score.val_bpb if run.score else 0.0)) > 5.01e-9:
            run.audited = "its audit is of another score"
        else:
            run.audits = checks if found["ok"] == all(checks.values()) else dict.fromkeys(checks, False)
            run.audit_saw = (int(found["targets"]), int(found["of"])) if "targets" in found else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        run.wrong(f"{path.name} is not that of an audit; audit the run again with ./run.sh audit {run.path}")


def check_artifact(run: Run):
    """Hold the artifact, where it is still there, against the log and the summary."""
    path = run.path / t.ARTIFACT_NAME
    if run.finished and path.exists() and run.exporter is run:
        blob = t.read_file(str(path))
        agree(run, "the artifact's bytes", len(blob), run.model_bytes, 0, path.name, "train.log")
        agree(run, "the artifact's sha256", hashlib.sha256(blob).hexdigest(), artifact(run), 0, path.name)
        try:
            count = sum(stored.values.size for stored in t.unpack(blob, path.name)[1].values())
        except t.UserError:  # of another version of the script
            return
        if run.parameters is not None:
            agree(run, "model_params", run.parameters, count, 0, "train.log", path.name)
            run.counted = True
