"""Runs that survive: kills, signals, restarts, failing ranks, numbers that are not finite, full disks."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, Launch, patched, start  # noqa: F401  (test_cuda.py and test_ttt.py take them from here)

import train_gpt as t

LONG = {"ITERATIONS": "60", "CKPT_EVERY_SECONDS": "0.05", "TRAIN_LOG_EVERY": "20", "FINAL_EVAL_ENABLE": "0"}
SHORT = {"FINAL_EVAL_ENABLE": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}  # a run that ends with its artifact
LOOPED = {"NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2", "ENABLE_LOOPING_AT": "0.4", "MUON_ROW_NORMALIZE": "1"}
DIE = "os.kill(os.getpid(), 9)"


def rewrite_checkpoint(path: Path, settings=None, **changes):
    """Change some facts and settings of a checkpoint."""
    facts, tensors = t.read_checkpoint(path)
    facts |= changes
    facts["settings"] |= settings or {}
    with open(path, "wb") as file:
        np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **{n: x for n, x in tensors.items()})


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, kills", [(1, 2), (2, 2)])
def test_killed_at_random_and_resumed_is_bit_for_bit_the_run_that_was_not(start, ranks, kills):  # noqa: F811
    """KILLS=100 tries harder."""
    kills = int(os.environ.get("KILLS", kills))
    variables = LONG | LOOPED | {"ITERATIONS": 30 * kills, "VAL_TOKEN_LIMIT": 300}
    whole = start(ranks=ranks, RUN_ID="whole", **variables | {"CKPT_EVERY_SECONDS": 0}).end()
    assert whole.code == 0, whole.err
    rng, seconds = random.Random(ranks), whole.summary["train"]["seconds"] / kills
    for _ in range(kills):
        cut = start(ranks=ranks, RUN_ID="cut", RESUME=1, **variables)
        cut.until("world_size:")
        time.sleep(rng.uniform(0.05, seconds))
        cut.kill()
    cut = start(ranks=ranks, RUN_ID="cut", RESUME=1, **variables).end()
    assert cut.code == 0, cut.err
    assert cut.artifact == whole.artifact
    a, b = whole.summary, cut.summary
    assert a["eval"]["sliding"]["val_loss"] == b["eval"]["sliding"]["val_loss"] and b["train"]["steps"] == 30 * kills
    log = (cut.folder / "train.log").read_text()
    assert "resumed from" in log and (b["resumes"] and any("resumed" in c for c in b["caveats"]))
    kept = sorted(p.name for p in (cut.folder / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[-1] == f"step_{30 * kills:07d}.npz", "KEEP_CKPTS stay, nothing else does"
    assert sorted(p.name for p in cut.folder.iterdir()) == [
        "checkpoints", "excerpt.npy", "final_model.int6.ptz", "metrics.jsonl", "summary.json", "sums.npy",
        "train.log"]
    # what a checkpoint holds, and no code
    path = cut.folder / "checkpoints" / kept[-1]
    facts, tensors = t.read_checkpoint(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    total = tensors["weights"].numel()
    assert tensors["average"].numel() == total and 0 < tensors["momentum"].numel() < total
    assert {"adam.0.exp_avg", "adam.0.exp_avg_sq", "adam.0.step", "random"} <= tensors.keys()
    assert facts["step"] == 30 * kills and facts["seconds"] > 0 and facts["settings"]["model_dim"] == 32
    assert float(tensors["adam.0.step"]) == 30 * kills and float(tensors["momentum"].abs().sum()) > 0


def test_a_run_goes_on_on_another_number_of_ranks(start, tmp_path):  # noqa: F811
    """Its steps are those of one rank that never stopped, and so is what the last checkpoint holds."""
    variables = LONG | SHORT | LOOPED | {"ITERATIONS": 12, "TRAIN_LOG_EVERY": 1, "EXPORT_ENABLED": 0}

    def last_steps(run) -> np.ndarray:
        return np.array(re.findall(r"^step:\d+/12 train_loss:(\S+)", run.out, re.M)[-7:], float)

    whole = start(RUN_ID="whole", **variables).end()
    wanted = t.read_checkpoint(t.checkpoints(whole.folder)[-1])[1]
    script = patched(tmp_path, SIGNALLED + "signalled(t.Trainer, 'step', lambda self, x, step, factor: step == 4)")
    for name, before, after in (("a", 2, 1), ("b", 2, 4), ("c", 1, 2), ("d", 4, 1)):
        cut = start(ranks=before, script=script, RUN_ID=name, **variables).end()
        assert t.checkpoints(cut.folder)[-1].stem == "step_0000005", cut.err
        done = start(ranks=after, RUN_ID=name, RESUME=1, **variables).end()
        assert done.code == 0 and len(last_steps(done)) == 7, done.err
        assert np.abs(last_steps(done) - last_steps(whole)).max() <= 1e-4 + 1e-9, name
        found = t.read_checkpoint(t.checkpoints(done.folder)[-1])[1]
        assert found.keys() == wanted.keys() and "momentum" in found
        for key, x in wanted.items():
            assert torch.allclose(found[key].float(), x.float(), rtol=1e-2, atol=1e-3 * float(x.abs().max())), key


def test_the_seconds_of_a_capped_run_go_on_where_they_stopped(start):  # noqa: F811
    variables = LONG | SHORT | {"ITERATIONS": 100000, "MAX_WALLCLOCK_SECONDS": 3, "WARMDOWN_ITERS": 50}
    cut = start(**variables)
    cut.until_files("checkpoints/step_*.npz", 2)
    time.sleep(0.5)
    cut.kill()
    before = t.read_checkpoint(t.checkpoints(cut.folder)[-1])[0]
    time.sleep(1)
    done = start(RESUME=1, **variables).end()
    assert done.code == 0, done.err
    train = done.summary["train"]
    at = [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:\S+ train_time:(\d+)ms", done.out)]
    assert train["stop"] == "wallclock_cap" and 2.25 <= train["seconds"] < 3.5, train
    assert 1000 * before["seconds"] <= min(at) < 1000 * before["seconds"] + 1500 and train["steps"] > before["step"]
    seconds = done.summary["seconds"]  # the launch that was killed left no total, but its checkpoint's clock
    assert seconds["earlier"] >= before["seconds"] and seconds["total"] > train["seconds"] + seconds.get("search", 0)


STAGES = """
written, honest_write = [], t.write_summary
def copied(process, folder, summary):
    honest_write(process, folder, summary)
    if process.main:
        written.append(folder)
        t.shutil.copy(folder / "summary.json", folder.parent / f"{folder.name}-{len(written):02d}.json")
t.write_summary = copied
"""
IN_THE_WALK = """
line = t.Walk.line
t.Walk.line = lambda self, i, *rest: os.kill(os.getpid(), 9) if i >= 2 else line(self, i, *rest)
"""


@pytest.mark.parametrize("mode, ranks", [("lora", 2), ("full", 1)])
def test_killed_in_evaluation_it_evaluates_anew_and_trains_nothing(start, tmp_path, mode, ranks):  # noqa: F811
    variables = {"TTT_ENABLED": 1, "TTT_MODE": mode, "EVAL_STRIDE": 16}
    variables |= {"TTT_CHUNK_TOKENS": 250, "TTT_LR": 0.01} if mode == "full" else {}
    whole = start(ranks=ranks, RUN_ID="whole", script=patched(tmp_path, STAGES), NLL_DUMP=tmp_path / "whole.npy",
                  **variables).end()
    assert whole.code == 0, whole.err
    stages = [json.loads(p.read_text()) for p in sorted((tmp_path / "logs").glob("whole-*.json"))]
    assert [x["finished"] for x in stages] == [x["valid"] for x in stages] == [False] * (len(stages) - 1) + [True]
    known = [[k for k in ("train", "artifact") if x[k]] + [k for k in x["eval"] if x["eval"][k]] for x in stages]
    assert [len(x) for x in known] == [0, 1, 2, 3, 4, 5, 6, 6] and known[1:3] == [["train"], ["train", "float"]], known
    assert whole.summary == stages[-1] and stages[-2]["val_bpb"] is None

    variables |= {"NLL_DUMP": tmp_path / "cut.npy"}
    cut = start(ranks=ranks, RUN_ID="cut", script=patched(tmp_path, IN_THE_WALK), **variables).end()
    assert cut.code != 0 and "ttt_chunk [1/" in cut.out and not (tmp_path / "cut.npy").exists()
    stage = cut.summary
    assert stage["train"]["steps"] == 12 and stage["eval"]["float"] and stage["eval"]["sliding"]
    assert stage["finished"] is stage["valid"] is False and cut.artifact == whole.artifact
    # the settings come with the run, but for where to write
    unset = dict.fromkeys([*TINY_BUT_DATA, *variables], "UNSET")
    if ranks == 1:
        late = {"RUN_ID": "cut", "RESUME": 1} | unset
        start(**late | {"QUANT": "rowmax"}).end().refused("QUANT=rowmax: the run to go on with has balanced")
    again = start(ranks=ranks, RUN_ID="cut", RESUME=1, **unset | {"NLL_DUMP": tmp_path / "cut.npy"}).end()
    assert again.code == 0, again.err
    assert "resumed from its artifact" in again.out and "train_loss" not in again.out and "final_int6" in again.out
    assert np.array_equal(np.load(tmp_path / "whole.npy"), np.load(tmp_path / "cut.npy"))
    a, b = whole.summary, again.summary
    assert a["val_bpb"] == b["val_bpb"] and b["valid"] and b["preset"] == "demo" and b["resumes"]
    for key in ("float", "int6", "sliding", "ttt"):
        assert a["eval"][key]["val_loss"] == b["eval"][key]["val_loss"], key
    where = {"RUN_ID", "NLL_DUMP", "RESUME"}
    assert {k: v for k, v in a["overrides"].items() if k not in where} == {
        k: v for k, v in b["overrides"].items() if k not in where}
    assert a["train"]["steps"] == b["train"]["steps"] == 12
    seconds, before = b["seconds"], stage["seconds"]
    assert a["seconds"]["earlier"] == before["earlier"] == 0
    assert seconds["earlier"] == before["total"] < seconds["total"]
    assert {name: seconds[name] for name in ("train", "search", "export")} == {
        name: before[name] for name in ("train", "search", "export")}, "of the launch that did these stages"
    assert np.array_equal(np.load(again.folder / "excerpt.npy"), np.load(whole.folder / "excerpt.npy"))


TINY_BUT_DATA = ("PRESET", "NUM_LAYERS", "MODEL_DIM", "EVAL_STRIDE", "EMA_DECAY", "ITERATIONS", "COMPUTE_DTYPE")


def test_an_artifact_that_changed_is_not_gone_on_with(start, tmp_path):  # noqa: F811
    """What was bound to it is trained anew; while it is whole, what does not contradict the run may change."""
    script = patched(tmp_path, f"t.keep_losses = lambda *args: {DIE}")
    cut = start(script=script).end()
    artifact = cut.artifact
    assert cut.code == -9 and not (cut.folder / "checkpoints").exists() and not cut.summary["finished"]
    start(RESUME=1, VAL_TOKEN_LIMIT=900).end().refused("VAL_TOKEN_LIMIT=900", "has 1001")
    again = start(RESUME=1, script=script, EVAL_STRIDE=16).end()
    assert again.code == -9 and "resumed with EVAL_STRIDE=16, before 8" in again.out and "stride:16" in again.out
    path = cut.folder / "final_model.int6.ptz"
    path.write_bytes(artifact[:-100] + bytes(100))
    done = start(RESUME=1).end()
    assert done.code == 0 and "nothing to resume" in done.out and done.artifact == artifact, done.err
    assert "train_loss" in done.out and done.summary["train"]["steps"] == 12
    done = start(RESUME=1).end()
    assert done.code == 0 and done.out.startswith("nothing to do: the run is finished") and done.err == ""


@pytest.fixture(scope="module")
def cut_once(corpus, tmp_path_factory) -> Launch:
    """A run that was killed with three or more checkpoints; its data are its own."""
    home = tmp_path_factory.mktemp("cut")
    data = shutil.copytree(corpus, home / "data")
    run = Launch(home, data, **LONG | {"KEEP_CKPTS": 4, "ITERATIONS": 3000, "CKPT_EVERY_SECONDS": 0.05})
    run.until_files("checkpoints/step_*.npz", 3)
    run.data = data
    return run.kill()


@pytest.fixture
def stopped(cut_once, start):  # noqa: F811
    """stopped(**variables) -> the launch that goes on with a copy of that run; its checkpoints, oldest first."""
    def go(**variables) -> Launch:
        return start(**{"DATA_PATH": cut_once.data, "RESUME": 1} | variables)

    home = Path(start.home, "logs", "run")
    shutil.copytree(cut_once.folder, home)
    go.states = t.checkpoints(home)
    go.step = int(go.states[-1].stem[5:])
    return go


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped):
    states = stopped.states
    data = bytearray(states[-1].read_bytes())
    data[len(data) // 2] ^= 1
    states[-1].write_bytes(data)
    states[-2].write_bytes(states[-2].read_bytes()[:-1000])
    partial = states[-3].parent / "step_99999999.npz.partial"  # as a kill leaves it
    partial.write_bytes(b"")
    done = stopped(ITERATIONS=stopped.step + 3, **SHORT).end()
    assert done.code == 0, done.err
    assert done.out.count("not a whole checkpoint") == 2 and f"in {states[-3]}" in done.out, done.out
    assert done.summary["resumes"] == [f"resumed from step {int(states[-3].stem[5:])} in {states[-3]}"]
    assert not partial.exists()


def test_what_contradicts_the_run_is_refused_and_the_rest_is_noted(stopped, corpus, tmp_path):
    for name, value, before in (("MODEL_DIM", 64, 32), ("MUON_WD", 0.9, 0.04), ("SEED", 8, 1337),
                                ("TRAIN_BATCH_TOKENS", 512, 256), ("VAL_TOKEN_LIMIT", 5, 1001)):
        stopped(**{name: value}).end().refused(f"{name}={value}: the run to go on with has {before}", "unset it")
    stopped(options=["--check"], MATRIX_LR=0.01).end().refused("MATRIX_LR=0.01", "has 0.025")
    stopped(DATA_PATH=corpus).end().refused("DATA_PATH=", "the run to go on with has")
    stopped(EVAL_STRIDE=33).end().refused("EVAL_STRIDE=33: must not exceed the window's 32")
    stopped(RUN_ID="new", NUM_KV_HEADS=3).end().refused("NUM_KV_HEADS=3: must divide NUM_HEADS=4")
    stopped(RESUME=0).end().refused("RUN_ID=run", "choose another RUN_ID, or RESUME=1")
    other = stopped(KEEP_CKPTS=1, ITERATIONS=stopped.step + 3, WARMDOWN_ITERS=2, PRESET="frontier", MODEL_DIM="UNSET",
                    LOG_DIR="logs", **SHORT).end()
    assert other.code == 0, other.err
    for note in (f"ITERATIONS={stopped.step + 3}, before 3000", "WARMDOWN_ITERS=2, before 4", "KEEP_CKPTS=1, before 4"):
        assert f"resumed with {note}" in other.out and any(note in c for c in other.summary["caveats"]), other.out
    s = other.summary
    assert s["preset"] == "demo" and s["config"]["model_dim"] == 32 and s["config"]["nll_dump"] == ""
    assert {"MODEL_DIM", "KEEP_CKPTS", "TRAIN_SEQ_LEN"} <= s["overrides"].keys(), "what its first launch was given"
    assert s["valid"] and len(t.checkpoints(other.folder)) == 1


def test_a_run_goes_on_with_its_own_data_only(stopped, cut_once, finished):
    more = cut_once.data / "fineweb_train_000001.bin"
    shutil.copy(cut_once.data / "fineweb_val_000000.bin", more)
    try:
        stopped().end().refused("DATA_PATH=", "training tokens where the run to go on with had")
    finally:
        more.unlink()
    rewrite_checkpoint(stopped.states[-1], {"train_enabled": False,
                                            "model_path": str(finished.folder / "final_model.int6.ptz")})
    stopped().end().refused("DATA_PATH=", " 0 training tokens where")


def test_a_file_does_not_choose_where_a_run_writes(stopped, tmp_path):
    """Stored settings are taken over, but for paths to write to."""
    (tmp_path / "mine.txt").write_text("mine")
    rewrite_checkpoint(stopped.states[-1], {"nll_dump": str(tmp_path / "mine.txt"), "log_dir": str(tmp_path / "off"),
                                            "run_id": "other", "final_sliding_eval_enable": True})
    done = stopped(ITERATIONS=stopped.step + 1).end()
    assert done.code == 0 and done.summary["train"]["steps"] == stopped.step + 1, done.err
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "off").exists()
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["run"]


def test_one_run_one_writer(stopped):
    live = stopped(ITERATIONS=10**6)
    live.until("world_size:")
    stopped().end().refused("RUN_ID=run", "live run")
    live.kill()
    taken = stopped(ITERATIONS=10**6)
    assert "resumed from step" in taken.until("resumed from|starting afresh")


# ---- hostile summaries -----------------------------------------------------------------------------------------------


def test_a_hostile_summary_is_survived_or_refused_in_one_line(start, finished, tmp_path, monkeypatch):  # noqa: F811
    """Each launch may take what it says, or say that there is nothing to go on with. Only the checks are made."""
    honest = finished.summary | {"finished": False}
    odd = (None, 5, -1, "x", [], {}, [1], [{}], {"x": 1}, "../..", True, 10**30)
    texts = ["", "\n", "{}", "[]", "null", "5", '"x"', "[" * 100000, '{"a":' * 100000, "\0" * 9, "\udcff"]
    for name in ("config", "overrides", "resumes", "artifact", "train", "export", "eval", "finished"):
        texts += [json.dumps({k: v for k, v in honest.items() if k != name})]
        texts += [json.dumps(honest | {name: value}) for value in odd]
    for name in ("model_dim", "log_dir", "preset", "iterations", "explicit"):
        texts += [json.dumps(honest | {"config": honest["config"] | {name: value}}) for value in odd]
    texts += [json.dumps(honest | {"overrides": {"NO_SUCH": 1, "RESUME": 1}})]
    texts += [json.dumps(honest | {"finished": False, "seconds": {name: value}})
              for name in ("total", "train", "search") for value in (math.nan, math.inf, -1, "1", None, [], 10**400)]
    folder = tmp_path / "logs" / "run"
    shutil.copytree(finished.folder, folder)
    process, ends = t.Process("fp32"), {"went on": 0, "finished": 0, "afresh": 0, "refused": 0}
    cfg, problems, _ = t.load_config({"PRESET": "demo", "RUN_ID": "run", "LOG_DIR": str(tmp_path / "logs"),
                                      "RESUME": "1"})
    assert not problems
    monkeypatch.setattr(t, "lock", lambda folder: None)  # of which this process would keep each
    for text in texts:
        (folder / "summary.json").write_text(text, errors="surrogateescape")
        past = t.find_past(cfg)
        assert all(0 <= seconds < 1e16 for seconds in past.seconds.values()) and "earlier" in past.seconds, text[:200]
        if past.done is None:
            ends["afresh"] += past.facts is None and past.settings is None and "afresh" in past.notes[-1]
        elif past.finished:
            ends["finished"] += 1
        else:
            try:
                new = t.continued(cfg, past, 1)
                summary = t.new_summary(new, process, "run")
                json.dumps(summary | past.done)
                assert new.log_dir == cfg.log_dir
                ends["went on"] += 1
            except t.UserError:
                ends["refused"] += 1
    assert sum(ends.values()) == len(texts), ends
    for text in ("[" * 100000, json.dumps(honest | {"overrides": [1], "eval": 5})):
        (folder / "summary.json").write_text(text)
        done = start(RESUME=1, ITERATIONS=2, **SHORT).end()
        assert done.code == 0 and "starting afresh" in done.out, done.err


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_saves_and_says_how_to_go_on(start):  # noqa: F811
    variables = LONG | SHORT | {"CKPT_EVERY_SECONDS": 0, "ITERATIONS": 60}
    whole = start(RUN_ID="whole", **variables).end()
    cut = start(**variables)
    cut.until("step:20/60 train_loss")
    cut.process.send_signal(signal.SIGINT)
    assert cut.end(30).code == 128 + signal.SIGINT
    assert "SIGINT: finishing the step and saving" in cut.err and "Traceback" not in cut.err
    assert re.search(r"^interrupted by SIGINT; to go on: .*LOG_DIR=\S+ .*RUN_ID=run RESUME=1 \S+ \S+$", cut.err, re.M)
    assert len(t.checkpoints(cut.folder)) == 1
    done = start(RESUME=1, **variables).end()
    assert done.code == 0 and done.artifact == whole.artifact


SIGNALLED = """
def signalled(owner, name, when=lambda *args: True):
    honest = getattr(owner, name)
    def first(*args, **more):
        if when(*args):
            os.kill(os.getpid(), 15)
        return honest(*args, **more)
    setattr(owner, name, first)
"""
PLACES = (  # where a SIGTERM comes, in the order of a run, and what is said of what is saved
    ("warm-up", "signalled(t.FlatWeights, 'gather_gradients')", "nothing is saved yet, to start again"),
    ("validation", "signalled(t.Evaluator, 'record', lambda self, *a: self.stride == 32)", "to start again"),
    ("training", "signalled(t.Trainer, 'step', lambda self, x, step, factor: factor and step == 4)", "to go on"),
    ("validation later", "signalled(t.Evaluator, 'record', lambda self, *a: self.stride == 32)", "to go on"),
    ("calibration", "signalled(t.Calibration, 'run')", "to go on"),
    ("export", "signalled(t, 'pack')", "to go on"),
    ("evaluation", "signalled(t.Evaluator, 'record', lambda self, *a: self.stride == 8)", "to go on"),
    ("test-time training", "signalled(t.Walk, 'line')", "to go on"),
)


def test_a_signal_at_any_stage_of_one_run(start, finished, tmp_path):  # noqa: F811
    variables = {"WARMUP_STEPS": 2, "VAL_LOSS_EVERY": 20, "ITERATIONS": 40, "TTT_ENABLED": 1, "RESUME": 1}
    steps = []
    for place, change, said in PLACES:
        cut = start(script=patched(tmp_path, SIGNALLED + change), **variables).end()
        assert cut.code == 143 and "Traceback" not in cut.err, (place, cut.err)
        last = cut.err.splitlines()[-1]
        assert re.match(f"interrupted by SIGTERM; .*{said}: .*RUN_ID=run RESUME=1 ", last), (place, last)
        steps.append([int(p.stem[5:]) for p in t.checkpoints(cut.folder)])
        total = cut.summary["seconds"]["total"]
        assert not cut.summary["finished"] and not list(cut.folder.rglob("*.partial"))
    assert steps == [[], [], [5], [5, 20], [20, 40], [20, 40], [], []]
    done = start(**variables).end()
    assert done.code == 0 and done.artifact == finished.artifact and "train_loss" not in done.out, done.err
    assert done.summary["val_bpb"] == finished.summary["val_bpb"]
    assert done.summary["seconds"]["earlier"] == total, "of all eight"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_interrupt_while_torch_is_imported_prints_no_traceback(start):  # noqa: F811
    cut = start(prefix=["env"])  # a start of its own, no fork
    while "libtorch" not in Path(f"/proc/{cut.process.pid}/maps").read_text():
        time.sleep(0.001)
    cut.process.send_signal(signal.SIGINT)
    assert cut.end(20).code == -signal.SIGINT and cut.err == ""


def test_a_second_signal_leaves_at_once(start, tmp_path):  # noqa: F811
    """A step that never ends: the first signal waits for it, the second does not."""
    script = patched(tmp_path, "step = t.Trainer.step\n"
                               "t.Trainer.step = lambda self, *a: time.sleep(100) if a[1] == 5 else step(self, *a)\n")
    cut = start(script=script)
    cut.until("step:5/12")
    cut.process.send_signal(signal.SIGTERM)
    for pause in (0.3, 2):  # what comes within 2 s is the same
        time.sleep(pause)
        assert cut.process.poll() is None
        cut.process.send_signal(signal.SIGTERM)
    assert cut.end(5).code == 143 and "a second one, after 2 s, leaves at once" in cut.err


# ---- restarts and failing ranks --------------------------------------------------------------------------------------

AT_STEP = """
step = t.Trainer.step
def dying(self, tokens, n, factor):
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if n == {step} and self.process.rank == self.process.world - 1 and not again:
        {how}
    time.sleep(0.05 * again)
    return step(self, tokens, n, factor)
t.Trainer.step = dying
"""


def test_torchrun_restarts_a_killed_rank_and_saves_at_a_signal(start, tmp_path):  # noqa: F811
    """The one launch by torchrun itself. With RESUME=1 the restarted ranks go on from the newest checkpoint; a signal
    is passed on to them, with another of torchrun's own; two ranks then end the run bit for bit, and one well."""
    variables = LONG | {"ITERATIONS": 60, "TRAIN_LOG_EVERY": 1, "VAL_TOKEN_LIMIT": 300}
    whole = start(ranks=2, RUN_ID="whole", **variables).end()
    script = patched(tmp_path, AT_STEP.format(step=30, how="time.sleep(0.2); os.kill(os.getpid(), 9)"))
    run = start(ranks=2, torchrun=["--standalone", "--max-restarts=1"], script=script, RESUME=1, **variables)
    run.until("^step:40/60")
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60).code != 0 and re.search("; to go on: .*RUN_ID=run RESUME=1 ", run.err), run.err[-3000:]
    step = int(t.checkpoints(run.folder)[-1].stem[5:])
    assert len(run.summary["resumes"]) == 1 and "resumed from step" in run.out and 40 <= step < 60
    shutil.copytree(run.folder, run.folder.with_name("one"))
    done = start(ranks=2, RESUME=1, **variables).end()
    assert done.code == 0 and f"resumed from step {step}" in done.out and len(done.summary["resumes"]) == 2, done.err
    assert done.artifact == whole.artifact
    one = start(RUN_ID="one", RESUME=1, **variables).end()
    a, b = (x.summary["eval"]["sliding"]["val_loss"] for x in (one, whole))
    assert one.code == 0 and one.summary["train"]["steps"] == 60 and abs(a - b) < 1e-3, one.err


def test_without_resume_a_restart_overwrites_nothing(start, tmp_path):  # noqa: F811
    script = patched(tmp_path, AT_STEP.format(step=30, how=DIE))
    run = start(restarts=1, script=script, **LONG | {"CKPT_EVERY_SECONDS": 0.02}).end()
    assert run.code == 1 and "RUN_ID=run: " in run.error_lines()[0] and "RESUME=1" in run.err, run.err
    assert len(run.err.splitlines()) == 1 and t.checkpoints(run.folder)
    assert run.out.count("world_size:") == 1


def test_a_failing_rank_stops_all_with_its_message_on_top(start, tmp_path):  # noqa: F811
    script = patched(tmp_path, AT_STEP.format(step=5, how="raise ValueError('the reason, from the last rank')"))
    began = time.monotonic()
    run = start(ranks=4, script=script, **LONG).end(100)
    assert run.code == 1 and time.monotonic() - began < 60
    errors = [x for x in run.err.splitlines() if re.match(r"\w*(Error|error)\b", x)]
    assert errors[0] == "ValueError: the reason, from the last rank", run.err
    assert run.err.count("Traceback (most recent call last)") == 1 and len(errors) <= 4, run.err
    assert all("another rank is gone" in x for x in errors[1:]), errors


def test_what_all_ranks_meet_is_said_once(start, tmp_path, corpus):  # noqa: F811
    """Before the run, where one rank alone has met it, and within, with how to go on."""
    start(ranks=2, DATA_PATH=tmp_path / "nowhere").end()
    for script, word in (
        (SCRIPT, "nowhere: no such folder"),
        (patched(tmp_path, "inputs = t.open_inputs\ndef one(*args):\n    if os.environ['RANK'] == '1':\n"
                           "        raise t.UserError('rank 1 alone has met it')\n    return inputs(*args)\n"
                           "t.open_inputs = one"), "rank 1 alone has met it"),
        (patched(tmp_path, "def none(*args): raise t.UserError('no export; RUN_ID')\nt.Exporter = none"), "no export"),
    ):
        data = tmp_path / "nowhere" if script == SCRIPT else corpus
        run = start(ranks=2, RUN_ID=word[:4].strip(), script=script, DATA_PATH=data, ITERATIONS=2, **SHORT).end()
        assert run.code == 1 and len(run.err.splitlines()) == 1 and word in run.err, run.err
    assert "; to go on: " in run.err


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", 0, -1])
@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_a_step_that_is_not_finite_is_noticed(tiny, where, clip):
    cfg = tiny(GRAD_CLIP_NORM=clip)
    trainer = t.Trainer(cfg, t.Process("fp32"), t.GPT(cfg))
    gather = trainer.flat.gather_gradients

    def spoilt(*args):
        gather(*args)
        (trainer.flat.loss if where == "loss" else trainer.flat.grads[where]).fill_(
            float("inf") if where == "loss" else float("nan"))

    tokens = torch.randint(2, cfg.vocab_size, (8, cfg.train_seq_len + 1), dtype=torch.int32)
    trainer.step(tokens, 0, 1.0)
    assert trainer.fault == ""
    trainer.flat.gather_gradients = spoilt
    trainer.step(tokens, 1, 0.5)
    assert "step 2: " in trainer.fault and "at rate 0.5 x MATRIX_LR=0.025" in trainer.fault


SPOIL = """
gather = t.FlatWeights.gather_gradients
def spoilt(self, forward, tokens, *rest):
    gather(self, forward, tokens, *rest)
    self.steps = getattr(self, "steps", 0) + 1
    if self.steps == 30:
        self.grads[7] = float("nan")
t.FlatWeights.gather_gradients = spoilt
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_number_that_is_not_finite_ends_the_run_before_it_reaches_anything(start, tmp_path, ranks):  # noqa: F811
    script = patched(tmp_path, SPOIL)
    run = start(ranks=ranks, script=script, **LONG | SHORT | {"ITERATIONS": 34, "CKPT_EVERY_SECONDS": 0.02}).end()
    assert run.code == (2 if ranks == 1 else 1)
    (line,) = run.err.splitlines()
    newest = t.checkpoints(run.folder)[-1]
    assert line.startswith("error: step 30: the loss or a gradient is not finite, at rate 1 x MATRIX_LR=0.025"), line
    assert line.endswith(f"start another run with lower rates; last good checkpoint: {newest}"), line
    assert not (run.folder / "final_model.int6.ptz").exists() and not run.summary["finished"]
    facts, tensors = t.read_checkpoint(newest)
    assert facts["step"] < 30 and all(bool(torch.isfinite(x.float()).all()) for x in tensors.values())
    if ranks == 1:
        done = start(RESUME=1, ITERATIONS=34).end()
        assert done.code == 0 and done.summary["train"]["steps"] == 34 and done.summary["valid"], done.err
        early = start(script=script, RUN_ID="b", ITERATIONS=34).end()
        early.refused("step 30: ", "last good checkpoint: none")


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_log_and_a_checkpoint_that_cannot_be_written_are_a_warning_each(start):  # noqa: F811
    """A limit on the size of files takes the place of a full disk."""
    run = start(limits={resource.RLIMIT_FSIZE: SCRIPT.stat().st_size + 3000}, TRAIN_LOG_EVERY=1, ITERATIONS=40).end()
    assert run.code == 0 and run.summary["valid"] and run.err == "", run.err
    assert run.out.count("train.log: File too large; the run goes on without its lines") == 1
    assert "warning: checkpoint " in run.out and run.out.count("warning: ") == 2
    assert len(re.findall(r"^step:\d+/40 train_loss", run.out, re.M)) == 40


def test_where_nothing_can_be_written_one_line_says_how_to_go_on(start):  # noqa: F811
    """An artifact that cannot be written ends the run; where another launch begins depends on what was saved."""
    variables = {"MODEL_DIM": 128, "QUANT_MIN_NUMEL": 10**9, "FINAL_EVAL_ENABLE": 0, "ARTIFACT_LIMIT_BYTES": 10**7}
    run = start(limits={resource.RLIMIT_FSIZE: 60000}, **variables).end()
    run.refused("final_model.int6.ptz: its", "bytes cannot be written (File too large); make room",
                "; nothing is saved yet, to start again: ", " RUN_ID=run RESUME=1 ")
    assert "warning: checkpoint " in run.out and "step_0000012.npz: its " in run.out and "the run goes on" in run.out
    assert run.out.count("warning: ") == 2 and "train.log: File too large" in run.out
    assert run.summary["train"]["steps"] == 12 and not list(run.folder.rglob("*.partial"))
    (run.folder / "final_model.int6.ptz").mkdir()  # in the way
    run = start(RESUME=1, **variables).end()
    run.refused("final_model.int6.ptz: its", "; to go on: ", " RUN_ID=run RESUME=1 ")
    (run.folder / "final_model.int6.ptz").rmdir()
    done = start(RESUME=1, **variables).end()
    assert done.code == 0 and "resumed from step 12" in done.out and "train_loss" not in done.out, done.err
    assert done.summary["valid"] and done.summary["train"]["steps"] == 12


FILL = """
warm_up = t.Trainer.warm_up
def filling(self):
    warm_up(self)
    disk = t.Path(os.environ["LOG_DIR"])
    (disk / "ballast").write_bytes(bytes(t.shutil.disk_usage(disk).free - 40000))
t.Trainer.warm_up = filling
"""


def test_a_small_disk_is_refused_before_training_and_one_that_fills_up_ends_in_one_line(start, tmp_path):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        variables = {"LOG_DIR": disk, "MODEL_DIM": 128, "FINAL_EVAL_ENABLE": 0}
        start(CKPT_EVERY_SECONDS=1, KEEP_CKPTS=3, **variables).end().refused(
            "LOG_DIR=", "log, checkpoints and artifact need about", "MB", "make room, or set LOG_DIR to another disk")
        assert list(disk.iterdir()) == []
        run = start(script=patched(tmp_path, FILL), **variables).end()
        run.refused("bytes cannot be written (No space left on device); make room", "to start again: ", " RESUME=1 ")
        assert "warning: checkpoint " in run.out and run.summary["train"]["steps"] == 12
        (disk / "ballast").unlink()
        done = start(RESUME=1, **variables).end()
        assert done.code == 0 and done.summary["valid"], done.err
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_goes_away_and_output_that_nobody_takes(start):  # noqa: F811
    run = start(**LONG)
    run.until("step:20/60")
    while run.folder.exists():
        shutil.rmtree(run.folder, ignore_errors=True)
    assert run.end().code == 0 and run.summary["train"]["steps"] == 60, run.err
    run = start(RUN_ID="full", stdout="/dev/full", ITERATIONS=2, **SHORT).end()
    assert run.code == 0 and run.err == "" and run.summary["finished"], run.err
    start(RUN_ID="x", stdout="/dev/full", options=["--check"]).end().refused("output: No space left on device")
    pipe = start.home / "pipe"
    os.mkfifo(pipe)
    for name, options in (("head", []), ("x", ["--check"])):  # a reader that leaves, as `head -1` does
        run = start(RUN_ID=name, stdout=str(pipe), options=options, ITERATIONS=2, **SHORT)
        with open(pipe) as reader:
            assert name == "x" or reader.readline()
        assert run.end().code == 0 and run.err == "" and (name == "x" or run.summary["finished"]), run.err
