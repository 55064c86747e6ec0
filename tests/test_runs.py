"""Whole runs through the command line: stages, records, ranks, bad input."""

import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SCRIPT, TINY, Launch, clean_environment, patched
from forks import free_port

import train_gpt as t

UNSCORED = {"FINAL_EVAL_ENABLE": 0, "FINAL_SLIDING_EVAL_ENABLE": 0}


def train_losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"step:\d+/\d+ train_loss:(\S+)", text)]


def test_a_run_and_its_record(finished):
    s, log = finished.summary, (finished.folder / "train.log").read_text()
    assert sorted(p.name for p in finished.folder.iterdir()) == [
        "excerpt.npy", "final_model.int6.ptz", "metrics.jsonl", "summary.json", "sums.npy",
        "train.log", "train_gpt.packed.py"]
    losses = train_losses(finished.out)
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 0.5, "the loss must fall"
    for pattern in (
        r"model_params:\d+", r"step:10/40 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"step:40/40 val_loss:\d\.\d{4} val_bpb:\d\.\d{4} train_time", r"Code size \(compressed\): \d+ bytes",
        r"Total submission size int6\+zstd: \d+ bytes", r"final_int6_roundtrip val_loss:\d\.\d{4} val_bpb:\d\.\d{4}",
        r"final_int6_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}", r"final_float_exact val_loss",
        r"final_int6_sliding_window val_loss:.* stride:8 eval_time:\d+ms", r"final_int6_sliding_window_exact val_loss",
        r"legal_ttt val_loss:.* mode:lora .*eval_time:\d+ms", r"legal_ttt_exact val_loss", r"valid: yes",
        r"note: not audited; \./run\.sh audit .*/finished",
    ):
        assert re.search("^" + pattern, log, re.M), pattern
    assert SCRIPT.read_text() in log and "torch" in log and '"num_layers": 3' in log
    artifact, packed = finished.folder / "final_model.int6.ptz", finished.folder / "train_gpt.packed.py"
    assert s["artifact"] == {
        "path": str(artifact), "bytes_model": artifact.stat().st_size, "bytes_code": packed.stat().st_size,
        "bytes_source": SCRIPT.stat().st_size,
        "bytes_total": artifact.stat().st_size + packed.stat().st_size, "limit": 750_000,
        "sha256": hashlib.sha256(artifact.read_bytes()).hexdigest()}
    assert s["finished"] is s["valid"] is True and s["reasons"] == [] == s["resumes"]
    caveats = [c.split(":")[0].split(";")[0] for c in s["caveats"]]
    assert caveats == ["partial split", "not the challenge's data", "not 8 x H100", "not audited"], s["caveats"]
    assert s["train"]["steps"] == 40 and s["train"]["tokens"] == 40 * 256 and s["train"]["stop"] == "iterations"
    assert s["val_bpb"] == s["eval"]["ttt"]["val_bpb"] and s["eval"]["ttt"]["adapted_chunks"] > 0
    assert s["preset"] == "demo" and s["config"]["model_dim"] == 32 and s["overrides"]["MODEL_DIM"] == 32
    for key in ("float", "int6", "sliding", "ttt"):
        assert s["eval"][key]["tokens"] == 1001 and s["eval"][key]["bytes"] == s["eval"]["int6"]["bytes"]
    assert s["eval"]["sliding"]["val_loss"] < s["eval"]["int6"]["val_loss"], "more context must help"
    clocks, seconds = s["eval_clocks"], s["seconds"]
    assert clocks["without_compilation"] == pytest.approx(seconds["ttt"] + seconds["read"])
    assert clocks["all"] == pytest.approx(clocks["without_compilation"] + seconds["compile"])
    assert 0 < seconds["train"] + seconds["float"] + seconds["int6"] < seconds["total"] < 300
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val_loss" in x] == [0, 20, 40]


def test_the_losses_behind_val_bpb_and_the_excerpt_of_its_first_windows(finished):
    nats, excerpt = np.load(finished.nats), np.load(finished.folder / "excerpt.npy")
    assert nats.dtype == excerpt.dtype == np.float32 and nats.shape == (1001,)
    ttt = finished.summary["eval"]["ttt"]
    assert nats.astype(np.float64).sum() / np.log(2) / ttt["bytes"] == pytest.approx(ttt["val_bpb"], rel=1e-9)
    assert np.array_equal(excerpt, nats[: 4 * 32]), "four windows of TRAIN_SEQ_LEN"
    sums = np.load(finished.folder / "sums.npy")
    assert sums.tolist() == pytest.approx([nats[i : i + 32].astype(np.float64).sum() for i in range(0, 1001, 32)])


MODEL = ("NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "ROPE_DIMS", "BIGRAM_VOCAB_SIZE",
         "BIGRAM_DIM", "SPARSE_START_LAYER", "SPARSE_HIDDEN_DIM", "VOCAB_SIZE", "TRAIN_SEQ_LEN")


def test_an_artifact_scores_the_same_in_a_fresh_process_and_on_two_ranks(launch, finished, tmp_path):
    """What the artifact brings is not given; what contradicts it is refused."""
    fresh = dict.fromkeys(MODEL, "UNSET") | {"TRAIN_ENABLED": 0, "PRESET": "seed", "TTT_LORA_CHUNK_TOKENS": 64,
                                             "MODEL_PATH": finished.folder / "final_model.int6.ptz"}
    again = launch(run_id="again", **fresh, TTT_ENABLED=1, NLL_DUMP=tmp_path / "1.npy")
    assert again.code == 0, again.err
    a, b = finished.summary, again.summary
    for key in ("int6", "sliding", "ttt"):
        assert a["eval"][key]["val_bpb"] == b["eval"][key]["val_bpb"]
        assert a["eval"][key]["val_loss"] == b["eval"][key]["val_loss"]
    assert np.array_equal(np.load(tmp_path / "1.npy"), np.load(finished.nats))
    assert a["val_bpb"] == b["val_bpb"] and b["train"] is None and a["artifact"]["sha256"] == b["artifact"]["sha256"]
    assert b["artifact"]["limit"] == 16_000_000
    two = launch(ranks=2, run_id="two", **fresh, TTT_ENABLED=1, NLL_DUMP=tmp_path / "2.npy")
    assert two.code == 0, two.err
    assert np.abs(np.load(tmp_path / "2.npy") - np.load(finished.nats)).max() < 1e-4
    assert two.summary["hardware"]["world_size"] == 2
    launch(run_id="other", **fresh | {"MODEL_DIM": 64}).refused("MODEL_DIM=64", "has 32")
    launch(run_id="other", **fresh | {"EVAL_STRIDE": 33}).refused("EVAL_STRIDE=33: must not exceed the window's 32")
    other = launch(run_id="other", **fresh | {"PRESET": "demo", "FINAL_SLIDING_EVAL_ENABLE": 0})
    assert other.code == 0 and other.summary["artifact"]["limit"] == 16_000_000, "the demo's limit is not the file's"


def test_same_seed_same_run_and_other_seed_other_run(launch):
    a, b, c = (launch(run_id=r, SEED=s, ITERATIONS=4, FINAL_EVAL_ENABLE=0, FINAL_SLIDING_EVAL_ENABLE=0) for r, s in
               (("a", 7), ("b", 7), ("c", 8)))
    hashes = [x.summary["artifact"]["sha256"] for x in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_ranks_and_machines_equal_one(launch, start, tmp_path):
    """Two ranks, and two machines of two, of which the second writes nothing."""
    variables = {"TRAIN_LOG_EVERY": 1, "MUON_ROW_NORMALIZE": 1, "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1,
                 "TTT_ENABLED": 1, "TTT_MODE": "full", "TTT_CHUNK_TOKENS": 300, "MICRO_BATCH_SEQS": 2,
                 "FINAL_SLIDING_EVAL_ENABLE": 0}
    runs = []
    for ranks in (1, 2):
        runs.append(launch(ranks, run_id=f"r{ranks}", NLL_DUMP=tmp_path / f"r{ranks}.npy", **variables))
    port = free_port()
    nodes = [start(ranks=2, node=(index, 2, port), RUN_ID="nodes", LOG_DIR=tmp_path / f"node{index}",
                   NLL_DUMP=tmp_path / "nodes.npy", **variables) for index in (0, 1)]
    assert nodes[1].end().code == 0 and nodes[1].out == "" and not (tmp_path / "node1").exists(), nodes[1].err
    runs.append(nodes[0].end())
    for run, world in zip(runs, (1, 2, 4), strict=True):
        assert run.code == 0, run.err
        assert run.summary["hardware"]["world_size"] == world and run.summary["eval"]["ttt"]["tokens"] == 1001
    losses = [train_losses(run.out) for run in runs]
    nats = [np.load(tmp_path / f"{name}.npy") for name in ("r1", "r2", "nodes")]
    for i in (1, 2):
        assert len(losses[i]) == 12 and np.abs(np.subtract(losses[i], losses[0])).max() <= 1e-4 + 1e-9
        assert nats[i].shape == (1001,) and abs(float(nats[i].mean() - nats[0].mean())) < 1e-4


WATCH = """
from torch.utils._python_dispatch import TorchDispatchMode
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
            self.seen.append([op._schema.name[6:], max(x.numel() for x in tensors), str(tensors[0].dtype)[6:]])
        return op(*args, **(kwargs or {}))
honest = t.Trainer.step, t.Trainer.heard
def step(self, *args):
    with Watch() as self.watch:
        self.watch.seen = []
        honest[0](self, *args)
def heard(self):
    with self.watch:
        both = honest[1](self)
    if self.process.main:
        print("sent", json.dumps(self.watch.seen), flush=True)
    return both
t.Trainer.step, t.Trainer.heard = step, heard
"""


def test_what_ranks_exchange_in_a_step(launch, tmp_path, tiny):
    """Gradients of matrices go to the rank that treats them, all others to everyone, with the loss; the updates go
    from each to all, in the compute dtype; then a clock and a signal."""
    run = launch(2, script=patched(tmp_path, WATCH), ITERATIONS=3, COMPUTE_DTYPE="bf16", EXPORT_ENABLED=0, **UNSCORED)
    assert run.code == 0, run.err
    steps = [json.loads(line[5:]) for line in run.out.splitlines() if line.startswith("sent ")]
    assert len(steps) == 3 and steps[0] == steps[1] == steps[2]
    scattered, summed, squared, gathered, heard = steps[0]
    sizes = {name: math.prod(shape) for name, shape in t.shapes_of(tiny()).items()}
    with torch.device("meta"):
        matrices = [sizes[name] for name in sizes if t.GPT(tiny()).role(name) == "matrix"]
    padded = scattered[1]
    assert sum(matrices) <= padded <= sum(matrices) + max(matrices)
    assert scattered == ["_reduce_scatter_base_", padded, "float32"]
    assert gathered == ["_allgather_base_", padded, "bfloat16"]
    assert summed == ["allreduce_", sum(sizes.values()) - sum(matrices) + 1, "float32"]
    assert squared == ["allreduce_", 1, "float32"] and heard == ["allreduce_", 2, "float64"]


@pytest.mark.parametrize("ranks", [3, 6, 8])
def test_world_sizes(launch, ranks):
    """Those that divide the sequences of a step work, others get one line; 1, 2 and 4 are in other tests."""
    run = launch(ranks, ITERATIONS=3, FINAL_EVAL_ENABLE=0, TRAIN_LOG_EVERY=1, FINAL_SLIDING_EVAL_ENABLE=0,
                 TRAIN_BATCH_TOKENS=32 * (6 if ranks == 6 else 8))
    if ranks == 3:
        assert run.code != 0 and run.err.splitlines() == [
            "error: WORLD_SIZE=3: must divide the 8 sequences of a step (TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN); "
            "launch another number of ranks or change the batch"]
    else:
        assert run.code == 0 and run.summary["hardware"]["world_size"] == ranks, run.err
        assert len(train_losses(run.out)) == 3


def test_switches(launch, finished, tmp_path):
    run = launch(EXPORT_ENABLED=0, EMA_ENABLED=0, ITERATIONS=3)
    s = run.summary
    assert run.code == 0 and s["artifact"] is None and s["valid"] is False and s["eval"]["int6"] is None
    assert s["finished"] and s["reasons"] == ["EXPORT_ENABLED=0: no artifact, the scores are of float weights"]
    assert not (run.folder / "final_model.int6.ptz").exists() and s["eval"]["float"] is not None
    assert "final_float_sliding_window" in run.out and "final_int6" not in run.out
    score = {"TRAIN_ENABLED": 0, "MODEL_PATH": finished.folder / "final_model.int6.ptz"}
    run = launch(run_id="two", FINAL_EVAL_ENABLE=0, **score)
    assert run.summary["eval"]["int6"] is None and run.summary["val_bpb"] == run.summary["eval"]["sliding"]["val_bpb"]
    run = launch(run_id="three", EVAL_STRIDE=0, VAL_TOKEN_LIMIT=0, **score)
    assert run.summary["eval"]["sliding"] is None and run.summary["val_bpb"] == run.summary["eval"]["int6"]["val_bpb"]
    assert not any("partial split" in c for c in run.summary["caveats"])
    assert np.load(run.folder / "excerpt.npy").shape == (128,)
    run = launch(run_id="four", FINAL_EVAL_ENABLE=0, FINAL_SLIDING_EVAL_ENABLE=0, NLL_DUMP=tmp_path / "nats.npy",
                 **score)
    assert run.code == 0 and "nats.npy is not written" in run.out and not (tmp_path / "nats.npy").exists()
    assert "no final evaluation ran" in run.summary["caveats"] and run.summary["val_bpb"] is None


def test_a_check_that_failed_is_a_reason_and_exit_code_1(launch, finished):
    score = {"TRAIN_ENABLED": 0, "MODEL_PATH": finished.folder / "final_model.int6.ptz"}
    run = launch(run_id="large", ARTIFACT_LIMIT_BYTES=1000, FINAL_EVAL_ENABLE=0, **score)
    total = finished.summary["artifact"]["bytes_model"] + SCRIPT.stat().st_size
    assert run.code == 1 and run.summary["reasons"] == [f"artifact over the limit: {total} > 1000 bytes"]
    assert run.summary["valid"] is False and run.summary["finished"] and "valid: NO, artifact over" in run.out
    run = launch(run_id="late", EVAL_MAX_SECONDS=0.001, FINAL_EVAL_ENABLE=0, **score)
    assert run.code == 1 and "EVAL_MAX_SECONDS=0.001" in run.summary["reasons"][0], run.summary["reasons"]
    limit = SCRIPT.stat().st_size + 1000
    run = launch(run_id="none", ARTIFACT_LIMIT_BYTES=limit, ITERATIONS=2, FINAL_EVAL_ENABLE=0)
    assert run.code == 1 and run.summary["artifact"] is None and "no setting fits" in run.summary["reasons"][0]


UNCOMPILED = """
import runpy, sys
for options in ["--check"], []:
    sys.argv = [{script!r}, *options]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as end:
        print("compiler imported:", "torch._dynamo" in sys.modules, end.code)
"""


def test_what_neither_trains_nor_compiles_does_not_import_the_compiler(finished, corpus, tmp_path):
    """It takes as long to import as the rest of torch."""
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path), "RUN_ID": "score"}
    env |= {"TRAIN_ENABLED": "0", "MODEL_PATH": str(finished.folder / "final_model.int6.ptz")}
    code = UNCOMPILED.format(script=str(SCRIPT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.count("compiler imported: False 0\n") == 2, (done.stdout, done.stderr)


def test_wallclock_cap(launch):
    run = launch(ITERATIONS=100000, MAX_WALLCLOCK_SECONDS=2, WARMDOWN_ITERS=20, FINAL_EVAL_ENABLE=0,
                 FINAL_SLIDING_EVAL_ENABLE=0)
    train = run.summary["train"]
    assert train["stop"] == "wallclock_cap" and 1.5 <= train["seconds"] < 3.5, "a quarter is the export's"
    assert "stopping_early: wallclock_cap train_time:" in run.out
    rates = rates_of(run)
    assert rates[0] == 1.0 and rates[-1] < 0.5


def rates_of(run: Launch) -> list[float]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["rate_factor"] for line in lines if "rate" in line]


def test_the_rates_fall_before_iterations_end_under_a_cap(launch):
    """And there the seconds decide once they are the nearer end."""
    many = {"FINAL_EVAL_ENABLE": 0, "FINAL_SLIDING_EVAL_ENABLE": 0, "EXPORT_ENABLED": 0, "TRAIN_LOG_EVERY": 1}
    for cap in (0, 600):
        run = launch(run_id=f"cap{cap}", MAX_WALLCLOCK_SECONDS=cap, **many)
        assert run.summary["train"]["stop"] == "iterations"
        assert rates_of(run) == [1.0] * 8 + [1.0, 0.75, 0.5, 0.25]
    run = launch(MAX_WALLCLOCK_SECONDS=1.5, ITERATIONS=100000, WARMDOWN_ITERS=90000, **many)
    assert run.summary["train"]["stop"] == "wallclock_cap" and 0 < rates_of(run)[-1] < 0.01


def steps_of(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"^step:(\d+)/\d+ train_loss:", text, re.M)]


def test_a_short_run_logs_every_step_and_none_where_lines_are_off(launch):
    variables = {"ITERATIONS": 20, "TRAIN_LOG_EVERY": 15, "EXPORT_ENABLED": 0, "FINAL_EVAL_ENABLE": 0,
                 "FINAL_SLIDING_EVAL_ENABLE": 0}
    run = launch(**variables)
    assert steps_of((run.folder / "train.log").read_text()) == list(range(1, 21)) and len(rates_of(run)) == 20
    assert steps_of(run.out) == [*range(1, 11), 15, 20], "the console has those that are due"
    run = launch(run_id="off", **variables | {"TRAIN_LOG_EVERY": 0})
    assert not steps_of((run.folder / "train.log").read_text() + run.out)
    assert not (run.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("variables, end, seconds_a_step", [
    ({"ITERATIONS": 200}, 200, 1.0),
    ({"ITERATIONS": 7000}, 7000, 1.0),
    ({"ITERATIONS": 100000, "MAX_WALLCLOCK_SECONDS": 600, "EXPORT_ENABLED": 0}, 2400, 0.25),
])
def test_a_run_of_any_length_logs_about_200_steps(tiny, variables, end, seconds_a_step):
    """Evenly; each line is in both files, and the console has only those that are due."""
    said = {"train.log": [], "metrics.jsonl": [], "console": []}

    def log(text, console=True):
        said["train.log"] += steps_of(text)
        said["console"] += steps_of(text) if console else []

    log.metric = lambda **values: said["metrics.jsonl"].append(values["step"])
    log.progress = lambda *_: None
    trainer = SimpleNamespace(cfg=tiny(TRAIN_LOG_EVERY=1000, **variables), told=0, flat=SimpleNamespace(
        loss=torch.tensor(2.0)), process=SimpleNamespace(synchronize=lambda: None))
    for step in range(1, end + 1):
        t.report_step(trainer, log, step, step, seconds_a_step * step, 1.0)
    logged = said["train.log"]
    assert 200 <= len(logged) <= 220 and logged == said["metrics.jsonl"]
    assert said["console"] == [*range(1, 11), *range(1000, end, 1000), end]
    assert max(b - a for a, b in zip(logged, logged[1:], strict=False)) <= max(end / 200, 1) + 1


def test_an_average_that_lags_is_said(launch):
    """Over 30 steps 0.997 exports nearly the initial weights."""
    variables = {"ITERATIONS": 30, "FINAL_SLIDING_EVAL_ENABLE": 0, "EXPORT_ENABLED": 0}
    run = launch(EMA_DECAY=0.997, **variables)
    raw, averaged = run.summary["train"]["raw_bpb"], run.summary["eval"]["float"]["val_bpb"]
    assert averaged > 1.2 * raw and f"step:30/30 val_loss:{run.summary['eval']['float']['val_loss']:.4f}" not in run.out
    note = f"the averaged weights score {averaged:.4f} BPB, the last ones {raw:.4f}: EMA_DECAY=0.997 remembers too " \
           "much for 30 steps, 0.33 suits them"
    assert note in run.summary["caveats"] and f"note: {note}\n" in run.out
    short = {"train": {"raw_bpb": 1.0, "steps": 20}, "eval": {"float": {"val_bpb": 2.0}}}
    assert t.lag_of_average(t.Config(), short).endswith("too much for 20 steps, EMA_ENABLED=0 suits them")
    run = launch(run_id="suits", EMA_DECAY=0.33, **variables)
    assert run.summary["eval"]["float"]["val_bpb"] < 1.005 * raw and "remembers" not in run.out


@pytest.mark.parametrize("words, figures", [
    ("BPB is too low: the tokenizer's normalisation makes 1006 bytes of the text's 1000", (1000, 1006, 5)),
    ("BPB leaves out 6 of the text's 1000 bytes, which the tokenizer does not know", (1000, 1004, 6)),
    (None, (1000, 1004, 5)), (None, (1000, 900, 0)), (None, ("many", 1, 1)), (None, (1, float("nan"), [])),
])
def test_what_a_tokenizer_makes_or_loses_is_a_caveat(launch, corpus, tmp_path, words, figures):
    shutil.copytree(corpus, tmp_path / "data")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["val"] |= dict(zip(("raw_bytes", "counted_bytes", "lost_bytes"), figures, strict=True))
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    run = launch(DATA_PATH=tmp_path / "data", ITERATIONS=1, FINAL_SLIDING_EVAL_ENABLE=0, EXPORT_ENABLED=0)
    assert run.code == 0 and [x for x in run.summary["caveats"] if x.startswith("BPB")] == [words] * bool(words)
    over_raw, line = run.summary["val_bpb_raw_bytes"], re.findall(r"^val_bpb over the bytes .*: (\S+)$", run.out, re.M)
    if figures[0] == 1000:
        assert over_raw == pytest.approx(run.summary["val_bpb"] * figures[1] / 1000) and line == [f"{over_raw:.4f}"]
    else:
        assert over_raw is None and line == []


@pytest.mark.parametrize("text", [
    "", "[]", "[" * 100000, '{"origin": 3, "tokenizer": 5}', '{"tokenizer": {"sha256": null}}'])
def test_a_manifest_that_says_nothing_is_passed_over(launch, corpus, tmp_path, text):
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(text)
    run = launch(options=["--check"], DATA_PATH=tmp_path / "data")
    assert run.code == 0 and run.err == ""


def test_more_shards_than_open_files(launch, corpus, tmp_path):
    """A shard does not keep a file open: 200 where 64 may be."""
    shutil.copytree(corpus, tmp_path / "data")
    shard = tmp_path / "data" / "fineweb_train_000000.bin"
    tokens = np.fromfile(shard, dtype="<u2")[512:]
    for number, part in enumerate(np.array_split(tokens, 200)):
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        shard.with_name(f"fineweb_train_{number:06d}.bin").write_bytes(header + part.tobytes())
    variables = {"ITERATIONS": 3, "FINAL_SLIDING_EVAL_ENABLE": 0, "EXPORT_ENABLED": 0}
    run = launch(DATA_PATH=tmp_path / "data", limits={resource.RLIMIT_NOFILE: 64}, **variables)
    assert run.code == 0 and "train_shards:200" in run.out, run.err
    assert train_losses(run.out) == train_losses(launch(run_id="one", **variables).out)


@pytest.mark.parametrize("file, limit, seen, micro", [
    (None, "", None, 8), ("memory.max", "max", None, 8), ("memory.max", "1500000000", "1.4 GiB", 8),
    ("memory.max", "539859752", "0.5 GiB", 1), ("memory.max", "1000000", "0.0 GiB", 1),
    ("memory/memory.limit_in_bytes", "1000000", "0.0 GiB", 1),
    ("memory/memory.limit_in_bytes", str(2**63 - 4096), None, 8)])
def test_the_memory_of_a_container_is_its_limit(launch, tmp_path, file, limit, seen, micro):
    """In --check, and in what a forward pass takes."""
    groups = tmp_path / "groups"
    (groups / "memory").mkdir(parents=True)
    if file:
        (groups / file).write_text(limit + "\n")
    script = patched(tmp_path, f"t.CGROUPS = t.Path({str(groups)!r})")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert f", {seen or f'{whole:.1f} GiB'}, float32" in launch(script=script, options=["--check"]).out
    run = launch(script=script, ITERATIONS=1, EXPORT_ENABLED=0, FINAL_SLIDING_EVAL_ENABLE=0)
    assert f"micro_batch_seqs:{micro} " in run.out, run.err
    assert ("warning: 0.0 GiB of memory are little for a sequence" in run.out) == (limit == "1000000")


def test_a_compiler_that_is_missing_is_one_line(launch, tmp_path):
    run = launch(prefix=["env"], USE_COMPILE=1, CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    run.refused("USE_COMPILE: PyTorch's compiler fails here", "/bin/false", "or set USE_COMPILE=0")


def test_run_id_is_never_overwritten(launch, finished):
    there = {"run_id": "finished", "LOG_DIR": finished.folder.parent}
    before = {p: p.read_bytes() for p in finished.folder.iterdir()}
    launch(**there).refused("RUN_ID=finished", "choose another")
    launch(**there, options=["--check"]).refused("RUN_ID=finished")
    done = launch(**there, RESUME=1)
    assert done.code == 0 and done.err == "" and done.out.startswith("nothing to do: the run is finished"), done.out
    assert before == {p: p.read_bytes() for p in finished.folder.iterdir()}


def test_two_runs_of_one_second_have_two_folders(launch, tmp_path):
    (tmp_path / "logs" / "now_seed1337").mkdir(parents=True)
    run = launch(script=patched(tmp_path, "t.time.strftime = lambda form: 'now'"), run_id="UNSET", ITERATIONS=1)
    assert run.code == 0, run.err
    names = sorted(p.name for p in (tmp_path / "logs").iterdir())
    assert len(names) == 2 and re.fullmatch(r"now_seed1337_\d+", names[1])


def test_runs_from_a_copy_in_a_records_folder(launch, tmp_path, corpus):
    """The data is found above the script, from any working directory: FineWeb's, else the embedded corpus, each of
    the run's vocabulary."""
    home = tmp_path / "project"
    record = home / "records" / "track" / "2026-01-01_x"
    record.mkdir(parents=True)
    (home / "data" / "datasets").mkdir(parents=True)
    shutil.copy(SCRIPT, record)
    away = {"script": record / "train_gpt.py", "cwd": record, "DATA_PATH": "UNSET"}
    launch(**away).refused("DATA_PATH is not set", "fineweb10B_sp400 (./run.sh data --variant sp400 fetches it, ",
                           "embedded_sp400 (python data/prepare.py embedded --vocab-size 400 makes it)")
    shutil.copytree(corpus, home / "data" / "datasets" / "embedded_sp400")
    run = launch(run_id="other", ITERATIONS=3, **away)
    assert run.code == 0 and "not the challenge's data: embedded_sp400" in run.summary["caveats"], run.err
    assert run.summary["config"]["data_path"] == str(home / "data" / "datasets" / "embedded_sp400")
    shutil.move(home / "data" / "datasets" / "embedded_sp400", home / "data" / "datasets" / "fineweb10B_sp400")
    (home / "data" / "tokenizers").mkdir()
    shutil.move(home / "data/datasets/fineweb10B_sp400/tokenizer.model", home / "data/tokenizers/fineweb_400_bpe.model")
    shutil.copytree(corpus, home / "data" / "datasets" / "embedded_sp400")
    run = launch(ITERATIONS=3, **away)
    assert run.code == 0 and "not the challenge's data" not in run.out, run.err


@pytest.mark.parametrize("ranks, variables, count, says", [
    (1, {}, 12, "26,000.0 ms each"), (2, {}, 12, "14,000.0 ms each"),
    (1, {"MAX_WALLCLOCK_SECONDS": 100}, 4, "26,000.0 ms each"),
    (2, {"NUM_LOOPS": 1}, 12, "22,000.0 ms each, before the loops 14,000.0"),
    (2, {"NUM_LOOPS": 1, "ENABLE_LOOPING_AT": 0}, 12, "22,000.0 ms each, timed"),
    # half of 1,000 s at 14 s a step, and half at 22
    (2, {"NUM_LOOPS": 1, "ENABLE_LOOPING_AT": 0.5, "MAX_WALLCLOCK_SECONDS": 1000, "ITERATIONS": 1000}, 59, "14,000.0"),
])
def test_a_share_of_a_step_is_timed_and_scaled(tiny, corpus, monkeypatch, ranks, variables, count, says):
    """By a clock on which a layer of a sequence takes 1 s, and an update 2 s, but 9 s at first."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(t.time, "perf_counter", lambda: clock.now)

    def learn(flat, forward, tokens, size, total):
        assert (len(tokens), size, total) == (2, 2, 8 // ranks)
        clock.now += len(forward.order) * len(tokens)

    def update(optimizers, step, factor):
        clock.now += 2.0 if step else 9.0

    monkeypatch.setattr(t.FlatWeights, "gather_gradients", learn)
    monkeypatch.setattr(t.Optimizers, "step", update)
    cfg = tiny(MICRO_BATCH_SEQS=2, EXPORT_ENABLED=0, **variables)
    found, said = t.time_steps(cfg, t.Process("fp32"), t.Tokens(corpus, "train", 400), ranks)
    assert found == count and says in said and said.endswith(f"timed on 2 of a rank's {8 // ranks} sequences")


def test_a_run_of_the_frontier(launch):
    """From half of training on its layers are looped, as the log says; the artifact tells it to who scores it again."""
    variables = {"PRESET": "frontier", "ENABLE_LOOPING_AT": 0.5, "TTT_ENABLED": 1, "TRAIN_LOG_EVERY": 1}
    run = launch(run_id="a", **variables)
    assert run.code == 0, run.err
    order = run.out.split("layer_loop:enabled step:6 frac:0.500 order:")[1].splitlines()[0]
    assert order == "0 1 2 1 2 1 2" and run.out.count("layer_loop") == 1
    assert run.err == ("warning: VOCAB_SIZE=400: good for trying PRESET=frontier on the shards at hand, not for a "
                       "score; its values were published with 8192 pieces, which won about 0.02 BPB over 1024\n")
    again = launch(run_id="b", TRAIN_ENABLED=0, MODEL_PATH=run.folder / "final_model.int6.ptz", TTT_ENABLED=1)
    assert again.code == 0 and again.summary["config"]["num_loops"] == 2, again.err
    for key in ("sliding", "ttt"):
        assert again.summary["eval"][key]["val_loss"] == run.summary["eval"][key]["val_loss"]
    one = launch(run_id="c", **variables | {"ITERATIONS": 1})
    assert one.code == 2 and one.err.startswith("error: ENABLE_LOOPING_AT=0.5: leaves none of ITERATIONS=1 steps")


def test_wrong_shards_say_which_command_fetches_the_right_ones(launch, corpus, tmp_path):
    """Shards of another tokenizer, though each of their ids is below VOCAB_SIZE; another tokenizer; nothing at all."""
    fetch, longer = "./run.sh data --variant sp8192", tmp_path / "longer"
    longer.mkdir()
    for split in ("train", "val"):
        tokens = np.fromfile(corpus / f"fineweb_{split}_000000.bin", dtype="<u2")[512:]
        tokens = np.tile(tokens, 2**16 // len(tokens) + 1)
        header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
        (longer / f"fineweb_{split}_000000.bin").write_bytes(header + tokens.tobytes())
    t.Tokens(longer, "train", 798)
    with pytest.raises(t.UserError, match=f"no token id above 399.*VOCAB_SIZE=8192.*{fetch}"):
        t.Tokens(longer, "train", 8192)
    given = {"PRESET": "frontier", "VOCAB_SIZE": 8192}
    launch(run_id="a", **given).refused("it has 400 pieces where VOCAB_SIZE=8192", fetch)
    launch(run_id="b", **given | {"DATA_PATH": longer}).refused("fineweb_8192_bpe.model: no such file", fetch)
    nothing = launch(run_id="c", **given | {"DATA_PATH": "UNSET"})
    nothing.refused("DATA_PATH is not set", fetch)
    assert "embedded" not in nothing.err, "which ./run.sh would make, and train eight GPUs on it"


def test_check_predicts_and_leaves_nothing(launch, finished, tmp_path):
    run = launch(options=["--check", "--ranks", "4"], MAX_WALLCLOCK_SECONDS=1, ITERATIONS=1000, CODE_BYTES="packed")
    assert run.code == 0, run.err
    assert "steps:      at most 1,000 of 256 tokens; how many 0.75 s allow is unknown, --check --time" in run.out
    timed = launch(options=["--check", "--ranks", "2", "--time"], MAX_WALLCLOCK_SECONDS=1000, MICRO_BATCH_SEQS=1).out
    steps = r"^steps: +about 12 of at most 12 of 256 tokens: [\d.]+ ms each, timed on 1 of a rank's 4 sequences$"
    assert re.search(steps, timed, re.M), timed
    few = launch(options=["--check", "--time"], MAX_WALLCLOCK_SECONDS=1, ITERATIONS=10**9).out
    found = re.search(r"about ([\d,]+) of at most 1,000,000,000 .*: ([\d,.]+) ms each, timed on 8 of .* 8 ", few)
    count, each = (float(word.replace(",", "")) for word in found.groups())
    assert count == pytest.approx(750 / each, rel=0.01, abs=1)
    launch(options=["--time"]).refused("--time: goes with --check")
    assert not (tmp_path / "logs").exists()
    predicted = int(re.search(r"about ([\d,]+) bytes", run.out).group(1).replace(",", ""))
    launch(options=["--check", "--ranks", "3"]).refused("WORLD_SIZE=3")
    assert int(re.search(r"model_params:(\d+)", finished.out).group(1)) == int(
        re.search(r"parameters: ([\d,]+)", run.out).group(1).replace(",", ""))
    limit, code, model = (finished.summary["artifact"][key] for key in ("limit", "bytes_code", "bytes_model"))
    assert predicted == pytest.approx(code + model, abs=0.5 * model) and f" bytes, {code:,} of them code" in run.out
    count = int(re.search(r"model_params:(\d+)", finished.out).group(1))
    assert f"{limit:,}: that leaves {8 * (limit - code) / count:.2f} bits a parameter" in run.out
    memory = r"^memory: +about 0.0 GiB for weights and optimizers, 0.0 for 2 of a rank's 2 sequences"
    assert re.search(memory, run.out, re.M)


def test_two_tokens_are_enough_and_one_is_not(launch, tmp_path, corpus):
    shutil.copytree(corpus, tmp_path / "short")
    tokens = np.fromfile(corpus / "fineweb_val_000000.bin", dtype="<u2")[514:]
    shard = tmp_path / "short" / "fineweb_val_000000.bin"
    for count in (2, 1):
        shard.write_bytes(struct.pack("<256i", 20240520, 1, count, *[0] * 253) + tokens[:count].tobytes())
        run = launch(run_id=f"n{count}", DATA_PATH=tmp_path / "short", ITERATIONS=2)
        if count == 2:
            assert run.code == 0 and run.summary["eval"]["sliding"]["tokens"] == 1, run.err
        else:
            run.refused(str(shard), "at least 2 tokens")


def damage(name: str, folder):
    """Break a copy of the corpus in one way; returns variables to launch with and words the error must hold."""
    val, train = folder / "fineweb_val_000000.bin", folder / "fineweb_train_000000.bin"
    model = folder / "tokenizer.model"
    if name == "missing shards":
        train.unlink()
        return {}, ("fineweb_train_",)
    if name == "missing folder":
        return {"DATA_PATH": folder / "nowhere"}, ("DATA_PATH=", "nowhere")
    if name == "empty":
        val.write_bytes(b"")
    if name == "truncated":
        train.write_bytes(train.read_bytes()[:-1000])
        return {}, (str(train), "promises")
    if name == "foreign":
        val.write_bytes(b"\x89PNG" * 2000)
    if name == "lying header":
        data = val.read_bytes()
        val.write_bytes(data[:8] + struct.pack("<i", -5) + data[12:])
        return {}, (str(val), "promises")
    if name == "ids beyond the vocabulary":
        data = train.read_bytes()
        train.write_bytes(data[:-2] + struct.pack("<H", 400))
        return {}, (str(train), "400", "VOCAB_SIZE=400")
    if name == "tokenizer of another size":
        return {"VOCAB_SIZE": 512}, ("VOCAB_SIZE=512", "has 400")
    if name == "tokenizer of another kind":
        model.write_text('{"model": {"type": "BPE"}}')
        return {}, (str(model), "SentencePiece")
    if name == "missing tokenizer":
        return {"TOKENIZER_PATH": folder / "no.model"}, ("TOKENIZER_PATH=", "no.model")
    if name == "LOG_DIR is a file":
        return {"LOG_DIR": train}, ("LOG_DIR=", "not a folder")
    if name == "NLL_DUMP is a device":
        return {"NLL_DUMP": "/dev/null"}, ("NLL_DUMP=/dev/null",)
    if name == "NLL_DUMP is a folder":
        return {"NLL_DUMP": folder}, ("NLL_DUMP=",)
    if name == "tokenizer that spells spaces in bytes":
        words = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(f"w{n}" for n in range(140))] * 2), model_writer=words, minloglevel=2,
            model_type="word", vocab_size=400, pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True)
        model.write_bytes(words.getvalue())
        return {}, (str(model), "spells a space as the three bytes")
    if name == "training split of one token":
        train.write_bytes(struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + b"\1\0")
        return {}, (str(train), "has 1 tokens, a sequence takes 33")
    if name == "LOG_DIR is a link to nowhere":
        folder.with_name("link").symlink_to("nowhere")
        return {"LOG_DIR": folder.with_name("link")}, ("LOG_DIR=", "link is not a folder")
    if name == "too few open files":
        script = patched(folder.parent, "import resource\nhonest = t.open_shard\n"
                         "def short(path):\n    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
                         "    return honest(path)\nt.open_shard = short")
        return {"script": script}, (str(train), "Too many open files", "ulimit -n")
    if name == "tokenizer of other data":
        data = bytearray(model.read_bytes())
        at = data.index("\u2581the".encode())  # same size, same kind, another piece
        data[at : at + 6] = "\u2581xqz".encode()
        model.write_bytes(data)
        return {}, (str(model), "not the tokenizer that cut the data")
    if name == "path too long":
        return {"DATA_PATH": "x" * 300}, ("x" * 300,)
    if name == "NLL_DUMP nowhere":
        return {"NLL_DUMP": folder / "a" / "b.npy"}, ("NLL_DUMP=",)
    if name == "MODEL_PATH nowhere":
        return {"TRAIN_ENABLED": 0, "MODEL_PATH": folder / "x.ptz"}, ("MODEL_PATH=", "x.ptz")
    if name == "MODEL_PATH foreign":
        return {"TRAIN_ENABLED": 0, "MODEL_PATH": model}, (str(model), "not an artifact")
    return {}, (str(val), "not a token shard")


@pytest.mark.parametrize("name", [
    "missing shards", "missing folder", "empty", "truncated", "foreign", "lying header", "ids beyond the vocabulary",
    "tokenizer of another size", "tokenizer of another kind", "missing tokenizer", "LOG_DIR is a file",
    "NLL_DUMP is a device", "NLL_DUMP is a folder", "tokenizer of other data", "path too long", "NLL_DUMP nowhere",
    "MODEL_PATH nowhere", "MODEL_PATH foreign", "tokenizer that spells spaces in bytes", "training split of one token",
    "LOG_DIR is a link to nowhere", "too few open files",
])
def test_bad_input_is_one_line(launch, corpus, tmp_path, name):
    shutil.copytree(corpus, tmp_path / "data")
    variables, words = damage(name, tmp_path / "data")
    launch(**{"DATA_PATH": tmp_path / "data"} | variables).refused(*words)
    assert not (tmp_path / "logs").exists(), "nothing may be left of a run that could not start"


def test_a_score_that_is_no_number_is_not_valid(launch):
    # each step makes the weights 99 times as large, and the tenth too large
    wild = {"MATRIX_LR": 10, "MUON_WD": 10, "WARMDOWN_ITERS": 0, "EMA_ENABLED": 0, "ITERATIONS": 10, "EXPORT_FILL": 1}
    launch(run_id="other", **wild).refused("gradients on training text are not finite; lower the rates", "QUANT=rowmax")
    run = launch(QUANT="rowmax", **wild)
    assert run.code == 1 and run.summary["valid"] is False and run.summary["eval"]["float"]["val_bpb"] is None
    assert any("not a finite number" in reason for reason in run.summary["reasons"])


def test_a_diverging_run_says_so(launch):
    run = launch(MATRIX_LR=10, MUON_WD=10, ITERATIONS=40)
    run.refused("lower")
    assert not (run.folder / "final_model.int6.ptz").exists()


def shell(command: str, cwd, **variables) -> subprocess.CompletedProcess:
    env = {k: v for k, v in clean_environment().items()} | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, shell=True, env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_run_sh_refuses_a_missing_data_path(tmp_path):
    done = shell(f"{ROOT}/run.sh", tmp_path, DATA_PATH="nowhere")
    assert done.returncode == 2 and done.stderr.strip().startswith("error: DATA_PATH=nowhere")
    done = shell(f"{ROOT}/run.sh dance", tmp_path)
    assert done.returncode == 2 and "no job named dance" in done.stderr
    done = shell(f"{ROOT}/run.sh SEED=7", tmp_path)
    assert done.returncode == 2 and "variables come before the command, as in SEED=7 ./run.sh" in done.stderr


def test_the_demo_runs_end_to_end(tmp_path, embedded):
    """./run.sh with the demo's model and limit on the embedded corpus, cut short."""
    done = shell(f"{ROOT}/run.sh", tmp_path, ITERATIONS="4", VAL_TOKEN_LIMIT="2048", MAX_WALLCLOCK_SECONDS="20",
                 RUN_ID="demo", DATA_PATH=str(embedded), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "logs" / "demo" / "summary.json").read_text())
    assert summary["valid"] and summary["preset"] == "demo" and summary["eval"]["sliding"]["tokens"] == 2048
    assert summary["val_bpb"] == summary["eval"]["ttt"]["val_bpb"] and summary["eval"]["ttt"]["adapted_chunks"] > 0
    for word in (" bytes of ", "final_float val_loss:", "final_int6_roundtrip", "sliding_window", "legal_ttt",
                 "Total submission size", "valid: yes", "note: not audited"):
        assert word in done.stdout, word


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_run_on_a_gpu(launch):
    run = launch(COMPUTE_DTYPE="auto", USE_COMPILE="auto", WARMUP_STEPS=2, TTT_ENABLED=1, ITERATIONS=40)
    assert run.code == 0, run.err
    s = run.summary
    assert s["valid"] and s["seconds"]["compile"] > 0 and s["eval"]["ttt"]["adapted_chunks"] > 0
    assert s["hardware"]["device"] == "cuda" and s["eval"]["sliding"]["val_loss"] < 5.5
    assert abs(s["eval"]["float"]["val_loss"] - s["eval"]["int6"]["val_loss"]) < 0.3


def test_a_run_says_what_verification_has_found_in_its_data(launch, tmp_path, corpus):
    """As notes, for as long as the shards are those that were seen."""
    data = tmp_path / "shards"
    shutil.copytree(corpus, data)
    files = [{"name": p.name, "bytes": p.stat().st_size, "mtime": int(p.stat().st_mtime), "sha256": "ab"}
             for p in data.glob("fineweb_*.bin")]
    found = {"date": "2026-01-02", "files": files, "faults": ["two documents are in both splits; take them out"],
             "equal_documents": 2, "shared_documents": 3, "shared_tokens": 200}
    (data / "verified.json").write_text(json.dumps(found))
    run = launch(DATA_PATH=data, ITERATIONS=2)
    assert run.code == 0 and "\nnote: data, as verified: two documents are in both splits; take them out\n" in run.out
    verified = run.summary["data"]["verified"]
    assert verified.pop("sha256") and verified == {"date": "2026-01-02", "equal_documents": 2, "shared_documents": 3,
                                                   "shared_tokens": 200, "faults": 1}
    model = hashlib.sha256((corpus / "tokenizer.model").read_bytes()).hexdigest()
    assert run.summary["data"]["tokenizer_sha256"] == model
    (data / "fineweb_val_000001.bin").write_bytes((data / "fineweb_val_000000.bin").read_bytes())
    run = launch(run_id="more", DATA_PATH=data, ITERATIONS=2)
    assert run.code == 0 and "as verified" not in run.out and run.summary["data"]["verified"] is None


@pytest.mark.parametrize("name, pieces, targets, complete, said", [
    ("fineweb10B_sp1024", 1024, 62_021_632, True, []), ("fineweb10B_sp1024", 1024, 62_021_632 + 2047, True, []),
    ("fineweb10B_sp1024", 1024, 62_021_631, True, ["not the published split: 62021631 targets, there about 62021632"]),
    ("fineweb10B_sp1024", 1024, 62_021_632 + 2048, True, ["not the published split: 62023680 targets"]),
    ("fineweb10B_sp1024", 1024, 1000, False, ["partial split: its first 1000 targets"]),
    ("fineweb10B_sp8192", 8192, 62_021_632, True, ["not the published split: 62021632 targets, there about 40540160"]),
    ("fineweb10B_sp4096", 4096, 1000, True, []), ("mine_sp1024", 1024, 1000, True, []),
])
def test_a_cut_split_of_published_data_is_said(tiny, name, pieces, targets, complete, said):
    cfg = tiny(DATA_PATH=f"/data/{name}", VOCAB_SIZE=pieces)
    found = [text for holds, text in t.split_caveats(cfg, SimpleNamespace(targets=targets, complete=complete)) if holds]
    assert len(found) == len(said) and all(text.startswith(words) for text, words in zip(found, said, strict=True))


def test_a_run_that_goes_on_keeps_the_seconds_of_its_warm_up(finished):
    summary = finished.summary | {"seconds": {"warm_up": 61.5, "train": 9.0, "total": 80.0}}
    assert t.past_of_summary(finished.folder, summary, []).seconds == {"warm_up": 61.5, "train": 9.0}
