"""Runs that survive: kills, signals, restarts, ranks and nodes, numbers that are not finite, full disks."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, clean_environment
from forks import Launched

import train_gpt as t

LONG = {"ITERATIONS": "240", "CKPT_EVERY_SECONDS": "0.1", "TRAIN_LOG_EVERY": "50", "FINAL_EVAL_ENABLE": "0"}


class Launch:
    """A launch that can be watched, signalled and killed while it runs."""

    def __init__(self, tmp_path, corpus, ranks=1, script=SCRIPT, torchrun=(), prefix=(), options=(), **variables):
        env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs")}
        env |= {"RUN_ID": "run"} | {k: str(v) for k, v in variables.items()}
        command, env = [str(script), *options], {k: v for k, v in env.items() if v != "UNSET"}
        if ranks > 1 or torchrun:
            command = ["-m", "torch.distributed.run", *(torchrun or ["--standalone"]), f"--nproc_per_node={ranks}",
                       *command]
        self.process = Launched(command, env, tmp_path) if not prefix else subprocess.Popen(
            [*prefix, sys.executable, *command], env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        self.lines = {"out": [], "err": []}
        self.readers = [threading.Thread(target=self._read, args=(name, pipe)) for name, pipe in
                        (("out", self.process.stdout), ("err", self.process.stderr))]
        for reader in self.readers:
            reader.start()
        self.folder = tmp_path / "logs" / env.get("RUN_ID", "")

    def _read(self, name, pipe):
        for line in pipe:
            self.lines[name].append(line)

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Wait for a line of stdout that matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := next((x for x in list(self.lines["out"]) if re.search(pattern, x)), None):
                return found
            if self.process.poll() is not None and not self.readers[0].is_alive():
                break
            time.sleep(0.005)
        raise AssertionError(f"no line like {pattern!r}: {self.lines}")

    def until_file(self, pattern: str, seconds: float = 120) -> Path:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := sorted(self.folder.glob(pattern)):
                return found[-1]
            time.sleep(0.005)
        raise AssertionError(f"no file like {pattern}: {self.lines}")

    def workers(self) -> list[int]:
        """Process numbers of torchrun's ranks."""
        done = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(x) for x in done.stdout.split()]

    def kill(self):
        """SIGKILL for the launcher and all its ranks."""
        for pid in [self.process.pid, *self.workers()]:
            with t.contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.end()

    def end(self, seconds: float = 200):
        self.process.wait(seconds)
        for reader in self.readers:
            reader.join(20)
        self.code, self.out, self.err = self.process.returncode, "".join(self.lines["out"]), "".join(self.lines["err"])
        return self

    def refused(self, *words: str):
        """One line, exit code 2."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (self.code, self.err)
        assert all(w in lines[0] for w in words), lines[0]

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def artifact(self) -> bytes:
        return (self.folder / "final_model.int6.ptz").read_bytes()


@pytest.fixture
def start(tmp_path, corpus):
    """start(ranks=1, **variables) -> Launch; whatever still runs at the end is killed."""
    launches = []

    def go(**options) -> Launch:
        launches.append(Launch(tmp_path, corpus, **options))
        return launches[-1]

    yield go
    for launch in launches:
        if launch.process.poll() is None:
            launch.kill()


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks,kills", [(1, 3), (2, 2)])
def test_killed_at_random_and_resumed_is_bit_for_bit_the_run_that_was_not(start, ranks, kills):
    """KILLS=100 tries harder."""
    kills = int(os.environ.get("KILLS", kills))
    variables = LONG | {"ITERATIONS": 120 * kills}
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
    assert cut.artifact() == whole.artifact()
    a, b = whole.summary, cut.summary
    assert a["eval"]["sliding"]["val_loss"] == b["eval"]["sliding"]["val_loss"] and b["train"]["steps"] == 120 * kills
    log = (cut.folder / "train.log").read_text()
    assert "nothing to resume, starting afresh" in log and "resumed from step" in log
    assert len(b["resumes"]) >= 1 and any("resumed" in c for c in b["caveats"])
    kept = sorted(p.name for p in (cut.folder / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[-1] == f"step_{120 * kills:07d}.npz", "KEEP_CKPTS stay, nothing else does"
    assert not (cut.folder / "lock").exists() and not (cut.folder / "progress.json").exists()


def test_a_checkpoint_holds_what_the_issue_lists_and_no_code(start):
    run = start(**LONG).end()
    path = run.folder / "checkpoints" / "step_0000240.npz"
    facts, tensors = t.read_state(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    total = tensors["weights"].numel()
    assert tensors["average"].numel() == total and 0 < tensors["momentum"].numel() < total
    assert {"optimizer.0.exp_avg", "optimizer.0.exp_avg_sq", "optimizer.0.step", "random"} <= tensors.keys()
    assert facts["step"] == 240 and facts["seconds"] > 0 and facts["settings"]["model_dim"] == 32
    assert float(tensors["optimizer.0.step"]) == 240 and float(tensors["momentum"].abs().sum()) > 0


def test_the_seconds_of_a_capped_run_go_on_where_they_stopped(start):
    variables = LONG | {"ITERATIONS": 100000, "MAX_WALLCLOCK_SECONDS": 4, "WARMDOWN_ITERS": 50}
    for _ in range(2):
        cut = start(RESUME=1, **variables)
        cut.until("world_size:")
        cut.until_file("checkpoints/step_*.npz")
        time.sleep(0.5)
        cut.kill()
    done = start(RESUME=1, **variables).end()
    assert done.code == 0, done.err
    train = done.summary["train"]
    at = [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:\S+ train_time:(\d+)ms", done.out)]
    assert train["stop"] == "wallclock_cap" and 3.0 <= train["seconds"] < 3.6 and min(at) > 300, (train, at)
    rates = [json.loads(x).get("rate_factor") for x in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= min(r for r in rates if r is not None) <= 1


@pytest.mark.parametrize("mode,ranks", [("lora", 2), ("full", 2)])
def test_killed_in_test_time_training_it_goes_on_with_the_same_losses(start, tmp_path, mode, ranks):
    variables = {"TTT_ENABLED": 1, "TTT_MODE": mode, "VAL_TOKEN_LIMIT": 12000, "FINAL_SLIDING_EVAL_ENABLE": 0}
    variables |= {"TTT_CHUNK_TOKENS": 500, "TTT_EPOCHS": 8} if mode == "full" else {}
    whole = start(ranks=ranks, RUN_ID="whole", NLL_DUMP=tmp_path / "whole.npy", **variables).end()
    assert whole.code == 0, whole.err
    variables |= {"CKPT_EVERY_SECONDS": 0.1, "NLL_DUMP": tmp_path / "cut.npy"}
    cut = start(ranks=ranks, RUN_ID="cut", **variables)
    cut.until_file(f"checkpoints/ttt_rank{ranks - 1 if mode == 'lora' else 0}.npz")
    time.sleep(0.3)
    cut.kill()
    assert (cut.folder / "final_model.int6.ptz").exists() and (cut.folder / "progress.json").exists()
    stages = t.read_progress(cut.folder)["summary"]
    assert stages["train"]["steps"] == 12 and stages["eval"]["float"] and stages["eval"]["int6"]
    # the settings come with the run, but for where to write
    again = start(ranks=ranks, RUN_ID="cut", RESUME=1, NLL_DUMP=tmp_path / "cut.npy",
                  **dict.fromkeys(TINY, "UNSET") | {"PRESET": "frontier"}).end()
    assert again.code == 0, again.err
    assert again.summary["preset"] == "demo" and "PRESET=frontier is not taken over" in again.out
    assert "ttt: goes on from" in again.out and "train_loss" not in again.out and "final_int6" not in again.out
    assert np.array_equal(np.load(tmp_path / "whole.npy"), np.load(tmp_path / "cut.npy"))
    a, b = whole.summary, again.summary
    assert a["val_bpb"] == b["val_bpb"] and a["eval"]["ttt"]["adapted_chunks"] == b["eval"]["ttt"]["adapted_chunks"]
    assert a["eval"]["ttt"]["chunks"] == b["eval"]["ttt"]["chunks"] and b["valid"] and b["seconds"]["total"] > 0
    assert not [p.name for p in (again.folder / "checkpoints").iterdir() if not p.name.startswith("step_")]


@pytest.mark.parametrize("mode", [{"TTT_MODE": "lora", "VAL_BATCH_SIZE": 64},
                                  {"TTT_MODE": "full", "TTT_EPOCHS": 2, "TTT_CHUNK_TOKENS": 24},
                                  {"TTT_MODE": "full", "TTT_CHUNK_TOKENS": 24, "TTT_OPTIMIZER": "sgd"}])
def test_stopped_after_any_chunk_the_walk_goes_on_with_the_same_losses(tiny, corpus, tmp_path, monkeypatch, mode):
    """Documents of all three lengths of window, several at a time, stopped in turn after each of the walk's chunks."""
    cfg = tiny(TTT_ENABLED=1, TTT_LORA_CHUNK_TOKENS=16, TTT_LORA_LR=0.05, TTT_LR=0.05, **mode)
    rng, lengths = np.random.default_rng(0), (70, 40, 33, 20, 9, 12, 5, 5, 3, 16, 8, 30)
    ids = np.concatenate([[t.BOS_ID, *rng.integers(2, 400, n - 1)] for n in lengths]).astype(np.uint16)
    process, tokenizer = t.Process("fp32"), t.Tokenizer(corpus / "tokenizer.model", 400)
    about = {"artifact": "a", "run_id": "r", "settings": cfg.settings(), "explicit": []}
    kept, keep = [0, None], t.Walk.keep  # how often, and after which a signal comes

    def counted(walk, *args, **facts):
        kept[0] += 1
        walk.process.signals.caught = signal.SIGTERM if kept[0] == kept[1] else 0
        keep(walk, *args, **facts)

    def walk():
        torch.manual_seed(0)
        model = t.GPT(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        log, process.signals.caught = t.Log(process, tmp_path), 0
        evaluator, details = t.test_time_train(cfg, process, log, model, t.Stream(ids, tokenizer, process.device),
                                               checkpoints=t.Checkpoints(log, 2, about, process.thread()))
        assert evaluator.result().faults == []
        return evaluator.nats.numpy(), details

    monkeypatch.setattr(t.Walk, "keep", counted)
    (honest, details), chunks = walk(), kept[0]
    assert chunks >= 8 and details["adapted_chunks"] > 5
    for stop in range(1, chunks + 1):
        kept[:] = 0, stop
        with pytest.raises(t.Interrupted):
            walk()
        kept[:] = 0, None
        nats, again = walk()
        assert kept[0] == chunks - stop and np.array_equal(nats, honest) and again == details, stop
        (tmp_path / "checkpoints" / "ttt_rank0.npz").unlink()


@pytest.mark.parametrize("where, hangs", [("a step", 1), ("the export", 0)])
def test_a_second_signal_ends_a_rank_whose_peer_hangs(start, where, hangs):
    """While it waits for what the other never sends: the wait is in short pieces, between which signals are handled."""
    run = start(ranks=2, TRAIN_LOG_EVERY=1, **{"ITERATIONS": 100000} if hangs else {"CALIBRATION_TOKENS": 10**7})
    run.until("^step:5/" if hangs else "^final_float_exact")
    ranks = {}
    for pid in run.workers():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        ranks[int(re.search(rb"\0RANK=(\d+)", environment)[1])] = pid

    def ended(pid):
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    other = ranks[1 - hangs]
    os.kill(ranks[hangs], signal.SIGSTOP)
    time.sleep(0.5)  # so that the other waits
    os.kill(other, signal.SIGTERM)
    time.sleep(2.2)  # under torchrun signals within 2 s are one
    if hangs:  # in a step the first waits
        os.kill(other, signal.SIGTERM)
    end = time.monotonic() + 10
    while not (gone := ended(other)) and time.monotonic() < end:
        time.sleep(0.05)
    run.kill()
    assert gone and ("a second one leaves at once" in run.err) == bool(hangs)


def test_both_clocks_of_test_time_training_outlive_a_kill_in_the_audit(start, tmp_path):
    variables = {"ITERATIONS": 4, "TTT_ENABLED": 1, "VAL_TOKEN_LIMIT": 200, "AUDIT": 1, "AUDIT_TOKENS": 64}
    killed = patched(tmp_path, "t.Run.audit = lambda self, weights: os.kill(os.getpid(), 9)\n")
    assert start(script=killed, **variables).end().code == -9
    again = start(RESUME=1, **variables).end()
    assert again.code == 0 and "legal_ttt" not in again.out, again.err
    seconds, clocks = again.summary["seconds"], again.summary["eval_clocks"]
    assert clocks["without_compilation"] == pytest.approx(seconds["ttt"] + seconds["read"], abs=0.5)


def test_killed_between_export_and_score_it_loses_no_training(start):
    cut = start(VAL_TOKEN_LIMIT=0, EVAL_STRIDE=1)
    cut.until("final_int6_roundtrip_exact")
    cut.kill()
    artifact = cut.artifact()
    again = start(RESUME=1, VAL_TOKEN_LIMIT=0, EVAL_STRIDE=1).end()
    assert again.code == 0 and again.artifact() == artifact and "train_loss" not in again.out, again.err
    assert again.summary["train"]["steps"] == 12 and again.summary["eval"]["sliding"]["tokens"] > 20000
    assert "final_int6_roundtrip" not in again.out and not (again.folder / "checkpoints").exists()
    assert start(RESUME=1).end().code == 0, "a finished run has nothing left to do"
    # an artifact that something has changed since is made again
    cut = start(RUN_ID="b", VAL_TOKEN_LIMIT=0, EVAL_STRIDE=1, SAVE_FLOAT=1)
    cut.until("final_int6_roundtrip_exact")
    cut.kill()
    other = start(RUN_ID="b", RESUME=1)  # with other settings of the evaluation everything is scored again
    other.until("resumed with VAL_TOKEN_LIMIT=1001, before 0")
    other.until("final_int6_roundtrip_exact")
    other.kill()
    path = cut.folder / "final_model.int6.ptz"
    path.write_bytes(artifact[:-100])
    again = start(RUN_ID="b", RESUME=1).end()
    assert again.code == 0 and "done again" in again.out and again.artifact() == artifact
    assert again.summary["eval"]["int6"] and again.summary["train"]["steps"] == 12


def checkpoints_of(start, **variables) -> tuple[Launch, list[Path]]:
    """A run that was stopped with two or more checkpoints, oldest first."""
    cut = start(**LONG | {"KEEP_CKPTS": 4, "ITERATIONS": 3000} | variables)
    while len(list((cut.folder / "checkpoints").glob("*.npz"))) < 3:
        cut.until_file("checkpoints/step_*.npz")
    cut.kill()
    return cut, t.step_files(cut.folder / "checkpoints")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(start):
    cut, states = checkpoints_of(start)
    data = bytearray(states[-1].read_bytes())
    data[len(data) // 2] ^= 1
    states[-1].write_bytes(data)
    states[-2].write_bytes(states[-2].read_bytes()[:-1000])
    done = start(**LONG, RESUME=1).end()
    assert done.code == 0, done.err
    assert done.out.count("not a whole checkpoint") == 2 and f"in {states[-3]}" in done.out, done.out


def test_resume_takes_a_checkpoint_a_folder_or_starts_a_new_run_from_one(start, tmp_path):
    cut, states = checkpoints_of(start)
    step = int(states[-2].stem[5:])
    checked = start(**LONG, RUN_ID="run", RESUME=states[-2], options=["--check"]).end()
    assert checked.code == 0, checked.err
    start(**LONG, RUN_ID="run", RESUME=states[-2], SEED=9).end().refused("SEED=9")
    start(**LONG, RUN_ID="run", RESUME=states[-2], MUON_BETA2=0.9).end().refused("MUON_BETA2=0.9")
    assert t.step_files(cut.folder / "checkpoints") == states, "neither has touched anything"
    branch = start(**LONG | {"ITERATIONS": 3000}, RUN_ID="branch", RESUME=states[-2], MATRIX_LR=0.01)
    branch.until(f"resumed from step {step} ")
    branch.process.send_signal(signal.SIGINT)
    assert branch.end().code == 130
    assert "resumed with MATRIX_LR=0.01, before 0.025" in branch.out
    assert len(t.step_files(cut.folder / "checkpoints")) == len(states), "the run it came from stays as it was"
    for source in (states[-2], cut.folder):
        again = start(**LONG | {"ITERATIONS": 3000}, RUN_ID="UNSET", RESUME=source)
        again.until(f"resumed from step {step if source == states[-2] else ''}")
        again.until("world_size:")
        again.process.send_signal(signal.SIGTERM)
        assert again.end().code == 143 and "RUN_ID=run RESUME=1 goes on" in again.err
    assert states[-1].with_suffix(".aside").exists(), "what came after it is set aside"
    start(RUN_ID="run", RESUME=1, SEED=8).end().refused("SEED=8", "has 1337")
    start(RUN_ID="run", RESUME=1, MODEL_DIM=64).end().refused("MODEL_DIM=64")
    start(RUN_ID="UNSET", RESUME=tmp_path / "nothing.npz").end().refused("nothing.npz", "No such file")
    start(RUN_ID="UNSET", RESUME=tmp_path).end().refused("no run's folder")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "pickle.pt")
    start(RUN_ID="UNSET", RESUME=tmp_path / "pickle.pt").end().refused("pickle.pt", "not a whole checkpoint")
    start(RUN_ID="run").end().refused("RUN_ID=run", "RESUME=1")


def test_one_run_one_writer(start):
    live = start(**LONG | {"ITERATIONS": 20000})
    live.until("world_size:")
    start(**LONG, RESUME=1).end().refused("RUN_ID=run", "live run")
    live.kill()
    taken = start(**LONG | {"ITERATIONS": 20000}, RESUME=1)
    taken.until("resumed from|starting afresh")


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(start, number):
    whole = start(RUN_ID="whole", **LONG).end()
    cut = start(**LONG | {"CKPT_EVERY_SECONDS": 0})
    cut.until("step:50/240 train_loss")
    cut.process.send_signal(number)
    assert cut.end(30).code == 128 + number
    assert "RUN_ID=run RESUME=1 goes on" in cut.err and "Traceback" not in cut.err
    assert len(list((cut.folder / "checkpoints").glob("step_*.npz"))) == 1
    done = start(RESUME=1, **LONG).end()
    assert done.code == 0 and done.artifact() == whole.artifact()


def test_a_signal_before_anything_is_saved_and_in_a_long_validation(start, tmp_path):
    cut = start(**LONG | {"WARMUP_STEPS": 5000})
    cut.until("world_size:")
    time.sleep(0.3)
    cut.process.send_signal(signal.SIGTERM)
    assert cut.end(20).code == 143 and "RUN_ID=run RESUME=1 starts again, nothing is saved yet" in cut.err
    script = patched(tmp_path, "record = t.Evaluator.record\n"
                               "t.Evaluator.record = lambda self, *a: (time.sleep(0.5), record(self, *a))\n")
    slow = {"VAL_LOSS_EVERY": 20, "VAL_TOKEN_LIMIT": 0, "EVAL_SEQ_LEN": 8, "VAL_BATCH_SIZE": 8, "FINAL_EVAL_ENABLE": 0}
    cut = start(script=script, RESUME=1, **LONG | slow | {"CKPT_EVERY_SECONDS": 0, "WARMUP_STEPS": 0})
    cut.until("world_size:")
    cut.process.send_signal(signal.SIGTERM)  # in the validation of step 0, which would take half an hour
    assert cut.end(20).code == 143 and "train_loss" not in cut.out and "nothing is saved yet" in cut.err
    assert "RESUME=1: nothing to resume in " in cut.out


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_interrupt_while_torch_is_imported_prints_no_traceback(start):
    cut = start(prefix=["env"])  # a start of its own, no fork
    while "libtorch" not in Path(f"/proc/{cut.process.pid}/maps").read_text():
        time.sleep(0.001)
    cut.process.send_signal(signal.SIGINT)
    assert cut.end(20).code == -signal.SIGINT and cut.err == ""


def test_what_no_memory_holds_is_refused_before_it_is_tried(start):
    start(MODEL_DIM=16384, NUM_LAYERS=256, TRAIN_BATCH_TOKENS=256).end().refused("MODEL_DIM=16384", "GiB")
    start(TRAIN_BATCH_TOKENS=32 * 10**12).end().refused("TRAIN_BATCH_TOKENS=", "GiB")


def test_a_run_goes_on_with_its_own_data_only(start, corpus, tmp_path):
    cut, _ = checkpoints_of(start)
    t.shutil.copytree(corpus, tmp_path / "other")
    t.shutil.copy(tmp_path / "other" / "fineweb_val_000000.bin", tmp_path / "other" / "fineweb_train_000001.bin")
    start(RESUME=1, DATA_PATH=tmp_path / "other").end().refused("DATA_PATH=", "training tokens")


def test_a_second_signal_leaves_at_once(start, tmp_path):
    """A step that never ends: the first signal waits for it, the second does not."""
    script = patched(tmp_path, "step = t.Trainer.step\n"
                               "t.Trainer.step = lambda self, *a: time.sleep(100) if a[1] == 5 else step(self, *a)\n")
    cut = start(script=script, **LONG)
    cut.until("step:5/240")
    cut.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert cut.process.poll() is None
    cut.process.send_signal(signal.SIGTERM)
    assert cut.end(5).code == 143


def test_a_signal_to_torchrun_saves_and_the_evaluation_ends_at_a_signal(start):
    whole = start(RUN_ID="whole", **LONG).end()
    cut = start(ranks=2, **LONG | {"CKPT_EVERY_SECONDS": 0})
    cut.until("step:50/240 train_loss")
    cut.process.send_signal(signal.SIGTERM)
    assert cut.end(40).code != 0 and "RUN_ID=run RESUME=1 goes on" in cut.err
    cut = start(RESUME=1, **LONG | {"EVAL_STRIDE": 1, "VAL_TOKEN_LIMIT": 0})
    cut.until("Total submission size")
    cut.process.send_signal(signal.SIGINT)
    assert cut.end(10).code == 130 and "RESUME=1 goes on" in cut.err
    done = start(RESUME=1, **LONG).end()
    assert done.code == 0 and "train_loss" not in done.out
    a, b = whole.summary["eval"]["sliding"], done.summary["eval"]["sliding"]
    assert a["tokens"] == b["tokens"] == 1001 and abs(a["val_loss"] - b["val_loss"]) < 0.05, "on two ranks, then on one"


# ---- torchrun, ranks and nodes ---------------------------------------------------------------------------------------


def patched(tmp_path, change: str) -> Path:
    """A script that runs the product with one thing changed."""
    path = tmp_path / "patched.py"
    path.write_text(f"import sys, os, time, runpy\nsys.path.insert(0, {str(ROOT)!r})\nimport builtins\n"
                    f"source = open({str(SCRIPT)!r}).read()\n"
                    f"head, tail = source.rsplit('if __name__ == \"__main__\":', 1)\n"
                    "class Names:\n    __getattr__ = lambda self, n: globals()[n]\n"
                    "    __setattr__ = lambda self, n, v: globals().__setitem__(n, v)\n"
                    f"__file__ = {str(SCRIPT)!r}\nexec(compile(head, __file__, 'exec'), globals())\nt = Names()\n"
                    f"{change}\nexec(compile('if True:' + tail, __file__, 'exec'), globals())\n")
    return path


DIE = """
step = t.Trainer.step
def dying(self, tokens, n, factor):
    if n == 120 and self.process.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {how}
    return step(self, tokens, n, factor)
t.Trainer.step = dying
"""


def test_a_killed_rank_is_restarted_and_goes_on_by_itself(start, tmp_path):
    whole = start(ranks=2, RUN_ID="whole", **LONG).end()
    script = patched(tmp_path, DIE.format(how="time.sleep(1); os.kill(os.getpid(), 9)"))
    run = start(ranks=2, torchrun=["--standalone", "--max-restarts=2"], script=script, RUN_ID="UNSET", **LONG).end()
    assert run.code == 0, run.err[-3000:]
    folders = [p for p in (tmp_path / "logs").iterdir() if p.name != "whole"]
    assert len(folders) == 1, "the RUN_ID that rank 0 chose survives the restart"
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert len(summary["resumes"]) == 1 and summary["train"]["steps"] == 240 and "resumed from step" in run.out
    assert (folders[0] / "final_model.int6.ptz").read_bytes() == whole.artifact()


def test_a_restart_without_a_checkpoint_starts_again_in_the_same_folder(start, tmp_path):
    script = patched(tmp_path, DIE.format(how="os.kill(os.getpid(), 9)"))
    run = start(ranks=2, torchrun=["--standalone", "--max-restarts=1"], script=script,
                **LONG | {"CKPT_EVERY_SECONDS": 0, "ITERATIONS": 130}).end()
    assert run.code == 0 and run.summary["train"]["steps"] == 130 and run.summary["resumes"] == [], run.err[-2000:]


def test_a_restart_does_not_take_over_a_run_that_was_there(start):
    cut, states = checkpoints_of(start)
    run = start(torchrun=["--standalone", "--max-restarts=1"], **LONG).end()
    assert run.code != 0 and run.err.count("no run is overwritten") == 2, run.err
    assert t.step_files(cut.folder / "checkpoints") == states


def test_a_file_does_not_choose_where_a_run_writes(start, tmp_path):
    """Stored settings are taken over, but for paths to write to; a damaged record is one that is not there."""
    (tmp_path / "mine.txt").write_text("mine")
    cut = start(NLL_DUMP=tmp_path / "mine.npy", **LONG | {"ITERATIONS": 3000})
    cut.until_file("checkpoints/step_*.npz")
    cut.kill()
    state = t.step_files(cut.folder / "checkpoints")[-1]
    facts, tensors = t.read_state(state)
    facts["settings"] |= {"nll_dump": str(tmp_path / "mine.txt"), "log_dir": str(tmp_path / "elsewhere")}
    with open(tmp_path / "evil.npz", "wb") as file:
        np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **{n: x for n, x in tensors.items()})
    evil = start(RUN_ID="evil", RESUME=tmp_path / "evil.npz", ITERATIONS=facts["step"] + 3).end()
    assert evil.code == 0 and "is not taken over" in evil.out, evil.err
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "elsewhere").exists()
    record = cut.folder / "progress.json"
    for text in (record.read_text().replace('"ema_decay": 0.5', '"ema_decay": 0.6'), '{"summary": 5}', "", "\n"):
        record.write_text(text)
        assert t.read_progress(cut.folder) == {}
    done = start(RESUME=1, **LONG | {"ITERATIONS": facts["step"] + 3}).end()
    assert done.code == 0 and "resumed from step" in done.out, done.err


def test_a_failing_rank_stops_all_with_its_message_on_top(start, tmp_path):
    script = patched(tmp_path, DIE.format(how="raise ValueError('the reason, from rank 1')"))
    run = start(ranks=4, script=script, **LONG)
    run.until("step:100/240")
    began = time.monotonic()
    assert run.end(60).code != 0 and time.monotonic() - began < 30
    errors = [x for x in run.err.splitlines() if re.match(r"\w*(Error|error)\b", x)]
    assert errors[0] == "ValueError: the reason, from rank 1" and "another rank is gone" not in run.err, run.err
    assert run.err.count("Traceback (most recent call last)") <= 2, "one, and torchrun's own"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses_of(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:(\S+)", text)]


def test_two_nodes_of_two_are_one_of_four_are_one(start, tmp_path):
    variables = {"TRAIN_LOG_EVERY": 1, "TTT_ENABLED": 1, "TTT_MODE": "full", "TTT_CHUNK_TOKENS": 300}
    found = []
    for name, ranks in (("one", 1), ("four", 4)):
        run = start(ranks=ranks, RUN_ID=name, NLL_DUMP=tmp_path / f"{name}.npy", **variables).end()
        assert run.code == 0, run.err
        found.append((losses_of(run.out), np.load(tmp_path / f"{name}.npy")))
    port, nodes = free_port(), []
    for node in (0, 1):
        nodes.append(start(ranks=2, torchrun=["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1",
                                              f"--master-port={port}"], RUN_ID="nodes",
                           LOG_DIR=tmp_path / f"node{node}", NLL_DUMP=tmp_path / "nodes.npy", **variables))
    for node in nodes:
        assert node.end().code == 0, node.err
    found.append((losses_of(nodes[0].out), np.load(tmp_path / "nodes.npy")))
    assert not (tmp_path / "node1").exists() and losses_of(nodes[1].out) == []
    for losses, nats in found[1:]:
        assert len(losses) == 12 and np.abs(np.subtract(losses, found[0][0])).max() <= 1e-4 + 1e-9
        assert abs(float(nats.mean() - found[0][1].mean())) < 1e-4


@pytest.mark.parametrize("ranks", [5, 6, 7, 8])
def test_world_sizes(start, ranks):
    """Those that divide the sequences of a step work, others get one line; 1 to 4 are in other tests."""
    batch = 32 * (6 if ranks == 6 else 8)
    run = start(ranks=ranks, ITERATIONS=3, FINAL_EVAL_ENABLE=0, TRAIN_LOG_EVERY=1, TRAIN_BATCH_TOKENS=batch).end()
    if ranks in (5, 7):
        assert run.code != 0 and [x for x in run.err.splitlines() if x.startswith("error: ")] == [
            f"error: WORLD_SIZE={ranks}: must divide the 8 sequences of a step (TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN); "
            "launch another number of ranks or change the batch"]
    else:
        assert run.code == 0 and run.summary["hardware"]["world_size"] == ranks, run.err
        assert len(losses_of(run.out)) == 3


# ---- numbers ---------------------------------------------------------------------------------------------------------


def bad_step(cfg, where) -> tuple[t.Trainer, dict, dict]:
    """A trainer after three steps, the last one spoilt; its state before and after that one."""
    torch.manual_seed(0)
    trainer, before = t.Trainer(cfg, t.Process("fp32"), t.GPT(cfg)), {}
    gather = trainer.flat.gather_gradients

    def spoilt(*args):
        gather(*args)
        if before:
            (trainer.flat.loss if where == "loss" else trainer.flat.grads[where]).fill_(
                float("inf") if where == "loss" else float("nan"))

    trainer.flat.gather_gradients = spoilt
    for step in range(3):
        tokens = torch.randint(2, cfg.vocab_size, (8, cfg.train_seq_len + 1), dtype=torch.int32)
        if step == 2:
            before = {name: x.clone() for name, x in trainer.state().items()}
        trainer.step(tokens, step, 1.0)
    return trainer, before, trainer.state()


@pytest.mark.parametrize("where", ["loss", 0, -1])
@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_a_step_that_is_not_finite_changes_nothing(tiny, where, clip):
    trainer, before, after = bad_step(tiny(GRAD_CLIP_NORM=clip), where)
    assert trainer.bad == trainer.dropped == 1 and "step 3:" in trainer.fault and "MATRIX_LR=0.025" in trainer.fault
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert float(after["optimizer.0.step"]) == 2


SPOIL = """
gather = t.FlatWeights.gather_gradients
def spoilt(self, forward, tokens, *rest):
    gather(self, forward, tokens, *rest)
    self.steps = getattr(self, "steps", 0) + 1
    if self.steps in {steps}:
        self.grads[7] = float("nan")
t.FlatWeights.gather_gradients = spoilt
"""


def test_a_number_that_is_not_finite_ends_the_run_before_it_reaches_anything(start, tmp_path):
    script = patched(tmp_path, SPOIL.format(steps="{8}"))
    run = start(script=script).end()
    run.refused("step 8:", "rate 1 x MATRIX_LR=0.025", "step_0000008.npz", "RUN_ID=run RESUME=1 goes on")
    assert not (run.folder / "final_model.int6.ptz").exists()
    _, tensors = t.read_state(run.folder / "checkpoints" / "step_0000008.npz")
    assert all(bool(torch.isfinite(x.float()).all()) for x in tensors.values())
    done = start(RESUME=1).end()
    assert done.code == 0 and done.summary["train"]["dropped_steps"] == 1 and "not finite were" in done.out


def test_a_few_in_a_row_are_skipped_and_no_more(start, tmp_path):
    run = start(script=patched(tmp_path, SPOIL.format(steps="{3, 5, 6, 7}")), NAN_POLICY="skip", SEED=5).end()
    assert run.code == 0 and run.summary["train"]["dropped_steps"] == 4 and run.summary["valid"], run.err
    assert "step 7:" in run.out and "3 in a row" in run.out and any("dropped" in c for c in run.summary["caveats"])
    run = start(script=patched(tmp_path, SPOIL.format(steps="{5, 6, 7, 8}")), NAN_POLICY="skip", RUN_ID="b").end()
    run.refused("step 8:")


# ---- disks -----------------------------------------------------------------------------------------------------------


def small_files(size: int):
    """A prefix that limits the size of files this launch may write, as a full disk would; others can lift it."""
    code = (f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1)); "
            "os.execvp(sys.argv[1], sys.argv[1:])")
    return [sys.executable, "-c", code]


def test_training_is_not_lost_to_a_log_line_and_the_lines_come_when_there_is_room(start):
    size = SCRIPT.stat().st_size + 3000  # the log begins with the script
    run = start(prefix=small_files(size), **LONG | {"CKPT_EVERY_SECONDS": 0, "TRAIN_LOG_EVERY": 2, "ITERATIONS": 600})
    warning = run.until("warning: .*train.log: [0-9]+ bytes cannot be written")
    assert "File too large" in warning and run.process.poll() is None
    run.until("step:100/600")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.end().code == 0, run.err
    printed = [x for x in run.out.splitlines() if x.startswith("step:") and "train_loss" in x]
    logged = (run.folder / "train.log").read_text().splitlines()
    assert [x for x in logged if x.startswith("step:") and "train_loss" in x] == printed and len(printed) > 290


def test_with_no_room_anywhere_the_training_waits_for_some(start):
    run = start(prefix=small_files(60000), MODEL_DIM=128, QUANT_MIN_NUMEL=10**9, ARTIFACT_LIMIT_BYTES=10**7)
    said = run.until("final_model.int6.ptz: its [0-9]+ bytes cannot be written .* tried again")
    assert run.process.poll() is None and "train.log: " in "".join(run.lines["out"])
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.end().code == 0, run.err
    assert len(run.artifact()) == int(re.search(r"its (\d+) bytes", said).group(1)) and run.summary["valid"]
    assert not list(run.folder.rglob("*.partial")) and "tried again" in (run.folder / "train.log").read_text()


def test_a_disk_that_is_really_full(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "ballast").write_bytes(bytes(500_000))
        run = start(LOG_DIR=disk, MODEL_DIM=128, QUANT_BITS_MLP=8, QUANT_BITS_ATTN=8)
        run.folder = disk / "run"
        run.until("checkpoint .*: its [0-9]+ bytes cannot be written .No space left on device.; make room")
        run.until("final_model.int6.ptz: its [0-9]+ bytes cannot be written .No space left on device.*tried again")
        (disk / "ballast").unlink()
        assert run.end().code == 0 and run.summary["valid"], run.err
        again = start(RUN_ID="again", LOG_DIR=disk, MODEL_DIM=128, SAVE_FLOAT=1).end()  # its weights find no room
        again.refused("final_model.float.ptz: its", "No space left on device", "nothing is saved yet")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_goes_away_and_output_that_nobody_takes(start, corpus, tmp_path):
    run = start(**LONG)
    run.until("step:50/240")
    while run.folder.exists():
        t.shutil.rmtree(run.folder, ignore_errors=True)
    assert run.end().code == 0 and run.summary["train"]["steps"] == 240
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs"), "RUN_ID": "head"}
    done = subprocess.run(f"{sys.executable} {SCRIPT} | head -1", shell=True, capture_output=True, text=True, env=env)
    assert done.stderr == "" and (tmp_path / "logs" / "head" / "summary.json").exists()
    done = subprocess.run(f"set -o pipefail; {sys.executable} {SCRIPT} --check | true", shell=True, capture_output=True,
                          text=True, env=env | {"RUN_ID": "x"}, executable="/bin/bash")
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(f"{sys.executable} {SCRIPT} --check >/dev/full", shell=True, capture_output=True, text=True,
                          env=env | {"RUN_ID": "x"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
