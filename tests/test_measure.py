"""What a machine tells: every stage at tiny size, what is left of one that fails or is killed, and the report."""

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, clean_environment
from test_parts import Lone
from tooling import Called, call, forked

sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402
import measure  # noqa: E402
import measure_book  # noqa: E402
import measure_profile  # noqa: E402
import measure_report  # noqa: E402
import measure_stages  # noqa: E402
import record_text  # noqa: E402

import train_gpt as t  # noqa: E402


def run(corpus, tmp_path, *words, **variables) -> Called:
    """The tool, in this process."""
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs")}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")} | variables
    return call(measure.main, ["--steps", "3", "--seconds", "1", *words], env, tmp_path)


@pytest.fixture
def forks_for_stages(monkeypatch):
    monkeypatch.setattr(measure, "subprocess", forked)


def test_data_is_sought_as_a_run_seeks_it(tmp_path, monkeypatch):
    """Here, then in the project; FineWeb's shards first, with their tokenizer; made where there is nothing."""
    monkeypatch.chdir(tmp_path)
    project = tmp_path / "project"
    monkeypatch.setattr(measure, "ROOT", project)
    monkeypatch.setattr(measure.corpus, "make", lambda pieces: tmp_path / "made" / pieces)

    def found(**variables) -> tuple[str, str]:
        for name in ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        measure.find_data()
        paths = os.environ["DATA_PATH"], os.environ.get("TOKENIZER_PATH", "")
        return tuple(str(Path(path).relative_to(tmp_path)) if path else "" for path in paths)

    assert found(VOCAB_SIZE="77") == ("made/77", "")
    for place in (project, tmp_path):
        (place / "data/datasets/embedded_sp77").mkdir(parents=True)
        (place / "data/datasets/embedded_sp77/tokenizer.model").touch()
        assert found(VOCAB_SIZE="77") == (str((place / "data/datasets/embedded_sp77").relative_to(tmp_path)), "")
    (project / "data/datasets/fineweb10B_sp77").mkdir()
    (project / "data/tokenizers").mkdir()
    (project / "data/tokenizers/fineweb_77_bpe.model").touch()
    fineweb = "project/data/datasets/fineweb10B_sp77", "project/data/tokenizers/fineweb_77_bpe.model"
    assert found(VOCAB_SIZE="77") == fineweb and found()[0] == "made/1024"
    (project / "data/datasets/fineweb10B_sp77/tokenizer.model").touch()
    assert found(VOCAB_SIZE="77") == (fineweb[0], ""), "the one beside the shards"
    (tmp_path / "mine").mkdir()
    assert found(VOCAB_SIZE="77", DATA_PATH="mine", TOKENIZER_PATH="a.model") == ("mine", "a.model")


def stages_of(tmp_path) -> dict:
    return json.loads((tmp_path / "logs" / "measure" / "measure.json").read_text())["stages"]


@pytest.fixture
def options(tmp_path):
    """What stages are given, in this process."""
    (tmp_path / "out").mkdir()
    return SimpleNamespace(out=tmp_path / "out", script="0", tokens=None, steps=3, seconds=1.0, against=[], rounds=1)


# ---- every stage -----------------------------------------------------------------------------------------------------


def test_parts_are_measured_once_and_reported(corpus, tmp_path, forks_for_stages):
    words = "--stages", "step,export,ttt"
    first = run(corpus, tmp_path, *words, TTT_MODE="full")
    assert first.code == 1 and first.err == "not done: ttt; the same command again tries these only\n"
    before = stages_of(tmp_path)
    assert [entry["status"] for entry in before.values()] == ["done", "done", "failed"], first.out
    assert "measures lora" in before["ttt"]["why"]
    step, export = (before[name]["figures"] for name in ("step", "export"))
    for name in ("peak_tflops", "first_step_s", "tokens_per_s", "share_of_peak_percent", "peak_memory_gib"):
        assert step[name] > 0, name
    assert step["tokens"] == 256 and step["step_ms"]["n"] == 3 and step["copy_gb_per_s"]["median"] > 0
    assert abs(sum(step["classes_ms"].values()) - step["profiled_ms"]) < 0.01 * step["profiled_ms"]
    assert step["classes_ms"]["products"] > 0 and step["classes_ms"]["optimizer"] > 0 and len(step["kernels"]) == 25
    if before["step"]["machine"]["device"] == "cpu":
        assert step["mlp_ms, plain"]["n"] == 10 and step["mlp_ms, our kernel"] is None
        assert "capability 9.0" in before["step"]["missing"]["mlp_ms, our kernel"]
        assert step["attention_ms, cuDNN"] is None and before["step"]["missing"]["attention_ms, cuDNN"] == "no GPU"
    assert 0 < export["rounding_s"] < export["search_s"] and export["bytes"] < export["limit_bytes"]
    assert export["loss_float"] > 1 and abs(export["loss_added"]) < 0.1
    again = run(corpus, tmp_path, *words)
    assert again.code == 0, again.out + again.err
    assert again.out.count("done before, not repeated") == 2
    after = stages_of(tmp_path)
    assert after["step"] == before["step"] and after["export"] == before["export"]
    ttt = after["ttt"]["figures"]
    walk, times = ttt["eight"], ttt["iteration_ms"]["32"]
    assert times["iterations"] >= 2 and walk["together"] == 8 and walk["iterations"] > 1000
    assert walk["seconds"] == walk["iterations"] * times["whole"] / 1000
    assert ttt["classes_ms"]["products"] > 0 and ttt["profiled_ms"] > 0
    assert {path.name for path in (tmp_path / "logs" / "measure").iterdir()} == {"measure.json", "measure.log",
                                                                              "profile.json"}
    reported(tmp_path, after)


def reported(tmp_path, stages: dict):
    """The report of these stages, which the index of records does not take for one."""
    records = tmp_path / "records"
    words = ["--report", "--records", str(records), "--out", str(tmp_path / "logs" / "measure")]
    done = call(measure.main, words, {}, tmp_path)
    assert done.code == 0, done.err
    (folder,) = (records / "gpu").iterdir()
    assert folder.name.startswith(stages["step"]["began"][:10])
    assert {path.name for path in folder.iterdir()} == {"README.md", "measure.json", "profile.json", "step_time.png"}
    text = (folder / "README.md").read_text()
    for said in ("| share of peak |", "| class | ms an iteration | share |", "attention, cuDNN",
                 "## Eight GPUs\n\nNone: it needs", "- run: not asked for",
                 f"| products | {stages['step']['figures']['classes_ms']['products']:.3f} |"):
        assert said in text, said
    assert "gpu" not in record_text.index(records)


@pytest.fixture
def figures_of(corpus, tmp_path, options, monkeypatch):
    """figures_of(stage, **variables): what a stage of whole runs finds, in this process."""
    monkeypatch.setattr(bench, "subprocess", forked)
    monkeypatch.setattr(measure_stages, "BEGAN", time.perf_counter())  # a stage is a process, which begins now
    options.script, options.against = "0", []

    def go(name: str, **variables) -> dict:
        env = clean_environment() | TINY | {"DATA_PATH": str(corpus)} | variables
        order = {"out": options.out, "work": tmp_path / name, "tokens": None, "steps": 3, "train_seconds": 1.0,
                 "limit": 300.0, "against": options.against, "rounds": 1}
        done = call(lambda _: measure_stages.STAGES[name](measure_stages.Stage(name, order)), [], env, tmp_path)
        assert done.code == 0, done.out + done.err
        options.said = done.out
        return measure_book.read(options.out)["stages"][name]["figures"]

    return go


def test_whole_runs(figures_of, options):
    for name, preset in ("run", "demo"), ("frontier", "frontier"):
        figures = figures_of(name)
        assert measure_book.read(options.out)["stages"][name]["settings"]["PRESET"] == preset
        assert figures["train"]["steps"] == 12 and figures["eval"]["sliding"]["tokens"] == 1001 and figures["valid"]
        assert figures["artifact"]["bytes_model"] > 1000 and figures["step_ms"] > 0 and figures["eval"]["ttt"] is None
        assert "final_int6_sliding_window" in options.said


def test_the_schedule_keeps_a_presets_share_of_warmdown(tmp_path):
    """Steps of warmdown would win over it."""
    stage = SimpleNamespace(out=tmp_path, seconds=60.0)
    assert measure_stages.schedule(stage, "seed")["WARMDOWN_ITERS"] > 0
    assert "WARMDOWN_ITERS" not in measure_stages.schedule(stage, "frontier")


def test_an_audited_run(figures_of):
    figures = figures_of("audit")
    assert figures["audit_ok"] and figures["audit"]["causal"]["ok"] and figures["valid"]


def test_presets_and_peers(figures_of, options, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("print('step:10/15 train_loss:5 train_time:100ms')\n"
                     "print('step:15/15 train_loss:5 train_time:135ms', flush=True)\nimport time\ntime.sleep(99)\n")
    found = figures_of("presets", ITERATIONS="15")
    assert [(run["preset"], run["seed"]) for run in found["runs"]] == [("seed", 1337), ("frontier", 1337)]
    assert found["mean_bpb"] == {run["preset"]: run["val_bpb"] for run in found["runs"]}
    assert len(set(found["mean_bpb"].values())) == 2
    options.against = [str(other)]
    steps = figures_of("peers", ITERATIONS="15")["steps"]
    assert steps["ours"]["step_ms"] > 0
    (row,) = [row for name, row in steps.items() if name != "ours"]
    assert row["step_ms"] == 7.0 and row["seconds"] < 60


def test_gpu_tests_are_entered(options, tmp_path, monkeypatch):
    tests = tmp_path / "tests" / "test_it.py"
    tests.parent.mkdir()
    tests.write_text("import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2, 'odd'\n\n"
                     "@pytest.mark.skip(reason='no GPU')\ndef test_left():\n    pass\n")
    monkeypatch.setattr(measure, "TESTS", tests)
    measure.stage("tests", 60, options, tmp_path)
    entry = measure_book.read(options.out)["stages"]["tests"]
    assert entry["status"] == "done"
    assert entry["figures"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "not finished": 0}
    found = {name.removeprefix("tests/test_it.py::"): test for name, test in entry["figures"]["tests"].items()}
    assert "odd" in found["test_bad"]["message"] and "no GPU" in found["test_left"]["message"]
    assert found["test_good"] == {"outcome": "passed", "seconds": found["test_good"]["seconds"]}
    monkeypatch.setattr(measure, "TESTS", tmp_path / "none.py")
    measure.stage("tests", 60, options, tmp_path)
    entry = measure_book.read(options.out)["stages"]["tests"]
    assert entry["status"] == "failed" and entry["why"].startswith("no ") and entry["earlier"][0]["status"] == "done"


def test_a_gpu_test_that_is_killed_has_not_passed(options, tmp_path, monkeypatch):
    tests = tmp_path / "tests" / "test_it.py"
    tests.parent.mkdir()
    tests.write_text("import os, signal\n\ndef test_cut():\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(measure, "TESTS", tests)
    measure.stage("tests", 60, options, tmp_path)
    entry = measure_book.read(options.out)["stages"]["tests"]
    assert entry["status"] == "failed" and entry["figures"]["counts"]["passed"] == 0
    assert entry["figures"]["tests"]["tests/test_it.py::test_cut"]["outcome"] == "not finished"


# ---- what is left of a stage that does not finish --------------------------------------------------------------------


KILLED = """
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import measure_book
measure_book.Figures(Path(sys.argv[2]), "step")(known=7)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
measure_book.Figures(Path(sys.argv[2]), "step")(child=other.pid)
time.sleep(99)
"""


def test_a_stage_at_its_limit_leaves_its_figures_and_no_process(options, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(ROOT / "tools"), str(options.out)]
    monkeypatch.setattr(measure, "command_of", lambda *_: command)
    measure_book.write(options.out, {"stages": {"export": {"status": "done", "figures": {"search_s": 1.5}}}})
    measure.stage("step", 3, options, tmp_path)
    stages = measure_book.read(options.out)["stages"]
    assert stages["export"] == {"status": "done", "figures": {"search_s": 1.5}}
    assert stages["step"]["status"] == "killed" and stages["step"]["why"] == "at its limit of 3 s"
    assert stages["step"]["figures"]["known"] == 7
    stat = Path("/proc", str(stages["step"]["figures"]["child"]), "stat")
    patience = time.monotonic() + 10
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":  # until its new parent has heard
        assert time.monotonic() < patience, "what the stage started still runs"
        time.sleep(0.05)


def test_what_no_longer_fits_is_skipped(corpus, tmp_path, forks_for_stages):
    done = run(corpus, tmp_path, "--stages", "step,export", "--limit", "60", "--budget", "export=80")
    assert done.code == 1 and done.err.startswith("not done: step, export;")
    stages = stages_of(tmp_path)
    assert [entry["status"] for entry in stages.values()] == ["skipped", "skipped"]
    assert stages["step"]["why"].startswith("needs 90 s where ") and "--limit 60 are left" in stages["step"]["why"]
    run(corpus, tmp_path, "--report").refused("nothing was measured yet")
    with open(tmp_path / "logs" / "measure" / "measure.log") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        run(corpus, tmp_path, "--stages", "step").refused("another call measures into it")


def test_spare_seconds_go_to_the_stage_that_runs(options):
    options.stages, options.budget, options.began = ["tests", "step"], {"tests": 40.0, "step": 150.0}, time.monotonic()
    options.limit = 300.0
    assert 144 < measure.allowance("tests", options) <= 145  # its 40, and 300 - 5 - 190 to spare
    assert 294 < measure.allowance("step", options) <= 295
    options.limit = 150.0
    assert measure.allowance("step", options) == 0.0 and 39 < measure.allowance("tests", options) <= 40
    options.limit = 0.0
    assert measure.allowance("step", options) == 150.0


def test_the_cache_is_kept_in_parts_and_taken_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "PART_BYTES", 2**17)
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    (cache / "triton" / "a").mkdir(parents=True)
    sizes = {"one.py": 150_000, "triton/a/k.cubin": 90_000, "triton/a/k.ttir": 99_000}
    files = {name: os.urandom(size) for name, size in sizes.items()}
    for name, data in files.items():
        (cache / name).write_bytes(data)
    state = {}
    measure.keep_cache(cache, out, state)
    sizes = [path.stat().st_size for path in sorted(out.iterdir())]
    assert len(sizes) == 2 and max(sizes) <= 2**17 and "1 of 3 files do not fit" in capsys.readouterr().out
    measure.take_cache(out, tmp_path / "other")
    other = tmp_path / "other"
    found = {str(path.relative_to(other)): path.read_bytes() for path in measure.cached(other)}
    assert found == {name: files[name] for name in ("one.py", "triton/a/k.cubin")}
    for path in out.iterdir():
        path.write_bytes(b"broken")
    measure.take_cache(out, tmp_path / "third")
    assert "cannot be taken up" in capsys.readouterr().out
    measure.keep_cache(cache, out, state)  # unchanged since
    assert all(path.read_bytes() == b"broken" for path in out.iterdir())


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_kernels_are_put_down_to_their_class(tmp_path):
    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 0, "args": args}

    kernels = [("nvjet_tst_128x128", 0, 2000), ("pytorch_flash::flash_fwd_kernel<x>", 2000, 1000),
               ("triton_poi_fused_flash_attention_0", 3000, 500),
               ("nvjet_tst_64x64", 4500, 400), ("at::native::reduce", 4900, 100)]
    events = [event("kernel", name, at, dur, correlation=i) for i, (name, at, dur) in enumerate(kernels)]
    events += [event("cuda_runtime", "cudaLaunchKernel", 10 * i, 5, correlation=i) for i in range(3)]
    events += [event("cuda_driver", "cuLaunchKernelEx", 120, 5, correlation=3),
               event("cuda_runtime", "cudaLaunchKernel", 300, 5, correlation=4)]
    events += [event("user_annotation", "optimizers", 100, 50), event("gpu_memset", "Memset (Device)", 5000, 1000),
               event("gpu_user_annotation", "optimizers", 0, 6000), event("cpu_op", "aten::mm", 0, 9000)]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = measure_profile.summed(tmp_path / "trace.json", 2)
    assert found["classes"] == {"attention": 0.5, "products": 1.0, "fused": 0.25, "optimizer": 0.2, "other": 0.05,
                                "copies": 0.5, "idle": 0.5}
    assert found["ms_a_step"] == 3.0 and found["attention"] == "flash" and found["kernels_seen"]
    assert found["kernels"][0] == {"ms": 1.0, "calls": 0.5, "class": "products", "name": "nvjet_tst_128x128"}


def test_iterations_are_those_of_the_walk(tiny, corpus):
    cfg = tiny(NUM_LAYERS=1, TTT_ENABLED=1, TTT_LORA_CHUNK_TOKENS=16, EVAL_STRIDE=8, TTT_LORA_DOCUMENTS=3)
    process = t.Process(cfg.compute_dtype)
    model = t.GPT(cfg, process.dtype).to(process.device)
    tokens = t.Tokens(corpus, "val", cfg.vocab_size)
    stream = t.open_stream(tokens, t.Tokenizer(corpus / "tokenizer.model", cfg.vocab_size), 1500, process.device)
    walk = measure_stages.Walk(t.split_documents(stream), 3, cfg.eval_len, 16)
    log = t.Log(process, Path(os.devnull)).silent()
    found = measure_stages.iterations(process, lambda: t.test_time_train(cfg, process, log, model, stream))
    assert 10 < walk.iterations() == found["iterations"] == found["score"]["n"]
    assert found["score"]["median"] < 2 * found["whole"]


def test_graphs_are_entered_with_shape_and_seconds(tiny, options, monkeypatch):
    """By the eager backend, which takes no time; what is not compiled is left as it is."""
    torch._dynamo.reset()
    cfg, compile_ = tiny(NUM_LAYERS=1), torch.compile
    model, ids = t.GPT(cfg), torch.randint(2, 400, (2, 33), dtype=torch.int32)
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_(model, backend="eager", **how))
    figures = measure_book.Figures(options.out, "step")
    with measure_stages.Graphs(figures).watching():
        assert t.compiled(model, cfg, Lone()) is model
        monkeypatch.setattr(t, "compiles", lambda cfg, process: True)
        forward = t.compiled(model, cfg, Lone())
        for part in (ids, ids[:1], ids):
            with torch.no_grad():
                forward(part[:, :-1], part[:, 1:])
        forward(ids[:, :-1], ids[:, 1:])
    graphs = figures.known()["graphs"]
    assert [graph["graph"] for graph in graphs] == ["forward"] * 3 and all(graph["seconds"] > 0 for graph in graphs)
    assert [graph["shape"] for graph in graphs] == ["[2, 32] -> [2, 32]", "[1, 32] -> [1, 32]",
                                                    "[2, 32] -> [2, 32], to learn from"]


def test_the_estimate_shows_its_arithmetic(tmp_path):
    step = {"step_ms": {"median": 80.0, "spread_percent": 1.0, "n": 20}, "tokens": 98304, "parameters": 26_823_545,
            "muon_parameters": 26_000_000}
    stages = {"step": {"status": "done", "began": "2026-01-02 03:04:05", "settings": {"PRESET": "seed"},
                       "data": "fineweb", "machine": {"device": "cuda", "name": "Card X/1"}, "figures": step},
              "ttt": {"status": "killed", "why": "at its limit of 9 s", "figures": {
                  "prime_s": 30.0, "eight": {"seconds": 400.0, "arithmetic": "4000 x 100.00 ms = 400.0 s"}}}}
    (tmp_path / "out").mkdir()
    measure_book.write(tmp_path / "out", {"stages": stages})
    assert measure_report.make(tmp_path / "out", tmp_path / "records") == 0
    text = (tmp_path / "records" / "gpu" / "2026-01-02_Card_X_1" / "README.md").read_text()
    sent = 7 / 8 * (4 * 26_000_000 + 8 * 823_546 + 2 * 26_000_000) / 450e9
    assert f"450 GB/s = {1000 * sent:.2f} ms" in text and f"= {int(584.08 / (0.08 + sent)):,}, without" in text
    assert "4000 x 100.00 ms = 400.0 s" in text and "430.0 s of the 600 s" in text
    assert "- ttt: killed, at its limit of 9 s" in text and "Estimates, not measurements" in text
    with pytest.raises(SystemExit):
        measure_report.make(tmp_path / "out", tmp_path / "records")


def test_the_report_sets_the_time_beside_the_counts(tmp_path):
    """Each class at the rates that were measured, the largest gap first, in the classes that kernels have by now."""
    kernels = [("x", "optimizer", 1.0), ("void cudnn::fusion::dot<true>", "other", 2.0), ("nvjet_a", "products", 10.0),
               ("cudnn_generated_fort_native_sdpa", "attention", 5.0), ("triton_poi_fused_add", "fused", 4.0)]
    rows = [{"name": name, "class": kind, "ms": ms, "calls": 1.0} for name, kind, ms in kernels]
    classes = {row["class"]: row["ms"] for row in rows} | {"copies": 0.0, "idle": 0.5}
    step = {"peak_tflops": 500.0, "copy_gb_per_s": {"median": 2000.0, "spread_percent": 1.0, "n": 10}, "tokens": 2048,
            "classes_ms": classes, "profiled": "kernels", "profiled_ms": 22.5, "kernels": rows}
    counts = {"tokens": 2048, "forward": {"attention": {"bytes": 9, "operations": 1e12},
                                          "products": {"bytes": 9, "operations": 2e12},
                                          "fused": {"bytes": 2e9, "operations": 0}},
              "backward": {"products": {"bytes": 9, "operations": 2e12}, "fused": {"bytes": 5e9, "operations": 0}}}
    out = tmp_path / "out"
    out.mkdir()
    entry = {"status": "done", "began": "2026-01-02 03:04:05", "figures": step}
    measure_book.write(out, {"stages": {"step": entry}})
    for name, value in ("profile", {"classes": classes, "kernels": rows}), ("counts", counts):
        (out / f"{name}.json").write_text(json.dumps(value))
    (out / "notes.md").write_text("## Notes\n\nOur words.\n")
    assert measure_report.make(out, tmp_path / "records") == 0
    (folder,) = (tmp_path / "records" / "gpu").iterdir()
    text = (folder / "README.md").read_text()
    assert "Our words." in text and {"counts.json", "profile.json"} <= {path.name for path in folder.iterdir()}
    gaps = [line for line in text[text.index("| class | counted") :].splitlines() if line.startswith("| ")][2:]
    assert gaps[:4] == ["| attention | 1.00 TF | 2.00 | 7.00 | 5.00 |", "| products | 4.00 TF | 8.00 | 10.00 | 2.00 |",
                        "| optimizer | - | 0.00 | 1.00 | 1.00 |", "| fused | 7.0 GB | 3.50 | 4.00 | 0.50 |"]


def test_a_stage_is_measured_again_with_another_script(options, tmp_path):
    options.stages = ["step"]
    measure_book.write(options.out, {"stages": {"step": {"status": "done", "script": "0"}}})
    assert measure.undone(options, ["step", "run"]) == ["run"]
    options.script = "1"
    assert measure.undone(options, ["step", "run"]) == ["step", "run"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, variables, says", [
    (["--stages", "stepp"], {}, "stepp: no such stage"), (["--stages", ","], {}, "name at least one"),
    (["--tokens", "x"], {}, "--tokens"), (["--tokens", "0"], {}, "--tokens"), (["--steps", "1"], {}, "--steps"),
    (["--seconds", "nan"], {}, "--seconds"), (["--limit", "-1"], {}, "--limit"), (["--rounds", "0"], {}, "--rounds"),
    (["--budget", "step"], {}, "STAGE=SECONDS"), (["--budget", "step=-1"], {}, "STAGE=SECONDS"),
    (["--stages", "peers"], {}, "--against"), (["--against", "x.py"], {}, "peers"),
    (["--stages", "peers", "--against", "x.py"], {}, "x.py: no such file"),
    (["--report", "--out", "nowhere"], {}, "measure.json: no such file"),
    (["--report", "--out", "broken"], {}, "not a book"),
    (["--report", "--out", "odd"], {}, "do not agree"), (["--out", "broken"], {}, "not a book"),
    ([], {"DATA_PATH": "/nowhere"}, "/nowhere"), ([], {"NUM_LAYERS": "x"}, "NUM_LAYERS"), (["more"], {}, "more")])
def test_bad_input_is_one_line(corpus, tmp_path, forks_for_stages, words, variables, says):
    for name, text in (("broken", '{"stages": {"step": 3}}'),
                       ("odd", '{"stages": {"step": {"status": "done", "began": "2026", "figures": {"kernels": 3, '
                               '"classes_ms": {"idle": "x"}}}}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measure.json").write_text(text)
    run(corpus, tmp_path, *words, **variables).refused(says)


def test_without_a_gpu_or_a_size_a_full_preset_is_refused(corpus, tmp_path):
    if measure.has_gpu():
        pytest.skip("measures here")
    env = clean_environment() | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "x")}
    call(measure.main, ["--stages", "frontier"], env, tmp_path).refused("no GPU here; set MODEL_DIM")
    assert not (tmp_path / "x").exists()
