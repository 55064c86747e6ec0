"""Sweeps: shared stages give what whole runs give, and are run once; failures, signals and restarts; the results."""

import ast
import csv
import json
import os
import re
import shlex
import signal
import sys
import threading
import time

import pytest
from conftest import ROOT, SCRIPT, TINY, clean_environment
from tooling import Called, call, forked

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import sweep  # noqa: E402
import sweep_results as results  # noqa: E402

GRID = ("QUANT=balanced,rowmax", "TTT_LR=1e-4,1e-3")
FULL = {"TTT_ENABLED": "1", "TTT_MODE": "full", "TTT_CHUNK_TOKENS": "300"}


@pytest.fixture(scope="module", autouse=True)
def forks_for_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "subprocess", forked)
        yield


def run(corpus, folder, *arguments, **variables) -> Called:
    """A sweep on the tiny corpus, in this process."""
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(folder)} | variables
    return call(sweep.main, arguments, env, folder.parent)


def table(folder) -> list[dict]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(corpus, tmp_path_factory):
    """A finished sweep of two roundings and two rates of test-time training; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    done = run(corpus, folder, *GRID, "--jobs", "2", "--name", "both", **FULL)
    assert done.code == 0, done.err + done.out
    return folder / "both", done.out


def test_shared_stages_run_once_and_give_what_a_whole_run_gives(swept, launch):
    folder, said = swept
    rows = table(folder)
    summaries = [json.loads((folder / row["run"] / "summary.json").read_text()) for row in rows]
    assert [s["train"] is not None for s in summaries] == [True, False, False, False]
    assert [s["export"] is not None for s in summaries] == [True, False, True, False]
    assert [s["eval"]["sliding"] is not None for s in summaries] == [True, False, True, False]
    assert "1 whole, 1 from float weights of others, 2 from artifacts of others" in said
    whole = launch(QUANT="rowmax", TTT_LR="1e-3", **FULL)
    assert whole.code == 0, whole.err
    for key, column in (("float", "float_bpb"), ("int6", "int6_bpb"), ("sliding", "sliding_bpb"), ("ttt", "ttt_bpb")):
        assert float(rows[3][column]) == whole.summary["eval"][key]["val_bpb"]
    assert float(rows[3]["val_bpb"]) == whole.summary["val_bpb"] and rows[3]["valid"] == "yes"
    assert float(rows[3]["val_loss"]) == whole.summary["eval"]["ttt"]["val_loss"]
    assert int(rows[3]["bytes"]) == whole.summary["artifact"]["bytes_total"]
    exported = folder / rows[2]["run"] / t.ARTIFACT_NAME
    assert exported.read_bytes() == (whole.folder / t.ARTIFACT_NAME).read_bytes()
    assert len({row["ttt_bpb"] for row in rows}) == 4 and len({row["bytes"] for row in rows}) == 2
    assert float(rows[3]["train_seconds"]) >= summaries[0]["train"]["seconds"]


def test_results(swept):
    folder, said = swept
    rows, text = table(folder), (folder / "results.md").read_text()
    assert list(rows[0])[:3] == ["run", "QUANT", "TTT_LR"] and len(rows) == 4
    best = min(rows, key=lambda row: float(row["val_bpb"]))
    title = f"best {float(best['val_bpb']):.4f} BPB at QUANT={best['QUANT']}, TTT_LR={best['TTT_LR']}"
    assert text.startswith(f"# both: {title}\n") and title in said
    scores = [float(x) for x in re.findall(r"\*\*([\d.]+)\*\*", text)]
    assert len(scores) == 4 and scores == sorted(scores)
    base = json.loads((folder / "sweep.json").read_text())["base"]
    base |= {"LOG_DIR": str(folder.parent), "OMP_NUM_THREADS": "1"}
    made = shlex.split(text.split("```sh\n")[1].split("```")[0].replace("\\\n", ""))
    at = made.index("./run.sh")
    assert set(made[:at]) >= {f"{name}={value}" for name, value in base.items()} and made[at + 1] == "sweep"
    assert all("=" in word for word in made[:at]), "one command"
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert f"best {float(best['val_bpb']):.4f} BPB" in (folder / "results.svg").read_text()


def test_again_skips_all_and_does_without_matplotlib(swept, corpus, monkeypatch):
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(corpus, folder.parent, *GRID, "--name", "both", **FULL)
    assert done.code == 0 and "no plot: matplotlib is missing" in done.out and "| rowmax | 0.001 |" in done.out
    assert "started" not in done.out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    other = (GRID[0], "TTT_LR=1e-4,1e-3,1e-2")
    for arguments, variables, words in ((GRID, {"MATRIX_LR": "0.01"}, "another base (MATRIX_LR);"),
                                        (GRID, {"OMP_NUM_THREADS": "3"}, "another share (1 threads);"),
                                        (other, {}, "another runs (3_QUANT=balanced_TTT_LR=1e-2);")):
        run(corpus, folder.parent, *arguments, "--name", "both", **FULL | variables).refused(words)
    (folder / "sweep.json").rename(folder / "kept")
    run(corpus, folder.parent, *GRID, "--name", "both", **FULL).refused("exists and holds no sweep")
    (folder / "kept").rename(folder / "sweep.json")
    lock = t.lock(folder)
    run(corpus, folder.parent, *GRID, "--name", "both", **FULL).refused("still going")
    os.close(lock)


def interrupt(pattern: str, folder, text: str):
    """Send this process SIGTERM once a file of the pattern holds the text."""
    patience = time.monotonic() + 180
    while not any(text in path.read_text() for path in folder.glob(pattern)):
        if time.monotonic() > patience:
            return
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_failed_run_a_signal_and_going_on(corpus, tmp_path):
    """The list's first run diverges, which also fails the one that needs its weights; the third is stopped."""
    (tmp_path / "list").write_text("# rates\nMATRIX_LR=10 MUON_WD=10 ITERATIONS=40\n\n"
                                   "MATRIX_LR=10 MUON_WD=10 ITERATIONS=40 'QUANT=rowmax' # it\n"
                                   "ITERATIONS=150\n")
    arguments, folder = ("--list", tmp_path / "list", "SEED=7", "--name", "odd"), tmp_path / "logs" / "odd"
    stopper = threading.Thread(target=interrupt, args=("3_*/metrics.jsonl", folder, '"step": 10,'), daemon=True)
    stopper.start()
    done = run(corpus, folder.parent, *arguments)
    assert done.code == 128 + signal.SIGTERM, done.out + done.err
    hint = shlex.split(re.fullmatch("interrupted by SIGTERM; to go on: (.*)\n", done.err)[1])
    at = hint.index("./run.sh")
    assert hint[at + 1 :] == ["sweep", "SEED=7", "--list", str(tmp_path / "list"), "--jobs", "1", "--name", "odd"]
    assert {f"DATA_PATH={corpus}", f"LOG_DIR={folder.parent}", "OMP_NUM_THREADS=1", "NUM_LAYERS=3"} < set(hint[:at])
    (cut,) = folder.glob("3_*/checkpoints/*.npz")
    rows = table(folder)
    assert [row["valid"] for row in rows] == ["no"] * 3 and rows[2]["reason"] == "interrupted by SIGTERM"
    assert "| 0 of 1 | - |" in (folder / "results.md").read_text(), "what is there is written after a signal too"
    done = run(corpus, folder.parent, *arguments)
    assert done.code == 1 and "2 failed; what they printed" in done.out, done.out + done.err
    rows = table(folder)
    assert [row["valid"] for row in rows] == ["no", "no", "yes"] and "not finite" in rows[0]["reason"]
    assert "RUN_ID=" not in rows[0]["reason"], "how to go on without the sweep"
    assert rows[1]["reason"] == f"not started: {rows[0]['run']}, whose weights it needs, failed"
    resumed = json.loads((folder / rows[2]["run"] / "summary.json").read_text())["resumes"]
    assert resumed and resumed[0].startswith(f"resumed from step {int(cut.stem[5:])}")
    assert re.search(r"^finished 3_\S+: [\d.]+ BPB, \d+ s; 1 of 3 finished, 2 failed$", done.out, re.M), done.out


AUDIT = """import json, pathlib, sys
(folder,) = sys.argv[1:]
assert "SEED=3" not in folder, "odd seed"
causal = {"ok": "SEED=2" not in folder, "detail": "it peeks"}
pathlib.Path(folder, "audit.json").write_text(json.dumps({"ok": causal["ok"], "seconds": 1.0, "causal": causal}))
sys.exit(not causal["ok"])
"""


def test_each_run_is_audited_after_it_where_that_is_wanted(corpus, tmp_path, monkeypatch):
    (tmp_path / "audit.py").write_text(AUDIT)
    monkeypatch.setattr(sweep, "AUDIT", tmp_path / "audit.py")
    variables = {"AUDIT": "1", "ITERATIONS": "2", "FINAL_EVAL_ENABLE": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
    done = run(corpus, tmp_path, "SEED=1,2,3", "--name", "all", LAUNCHED_BY="../run.sh", **variables)
    assert done.code == 1 and len(re.findall(r"^ran      \S+: its audit is next; ", done.out, re.M)) == 3, done.out
    assert len(re.findall("^audits   ", done.out, re.M)) == 3
    assert not re.search("^started .* again", done.out, re.M)
    made = (tmp_path / "all" / "results.md").read_text()
    assert "\nAUDIT=1 \\\n" in made and "\n../run.sh sweep SEED=1,2,3 --jobs 1 --name all\n" in made
    assert "failed   3_SEED=3: AssertionError: odd seed" in done.out
    rows = table(tmp_path / "all")
    assert [row["reason"] for row in rows] == ["", "audit, causal: it peeks", "not audited: AssertionError: odd seed"]
    assert [row["valid"] for row in rows] == ["yes", "no", "no"]


def planned(monkeypatch, tmp_path, *grid, **variables):
    """The runs that a grid gives, with their shares of the work."""
    for name, value in (TINY | {"LOG_DIR": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    runs = sweep.configured(sweep.read_grid(grid), 1, tmp_path)
    sweep.share(runs)
    return runs


def test_the_time_left_counts_what_audits_take(monkeypatch, tmp_path):
    runs = planned(monkeypatch, tmp_path, "SEED=1,2,3", LAUNCHED_BY="../run.sh")
    assert "LAUNCHED_BY" not in sweep.base_environment(), "a run would name the sweep's launcher"
    going = sweep.Sweep(runs, [sweep.Slot([], 1)])
    monkeypatch.setattr(sweep.Run, "summary", lambda run: {"seconds": {"total": 60.0}})
    runs[0].state = "finished"
    assert going.minutes_left() == 2.0, "one that an earlier sweep has finished"
    runs[0].spent = 120.0
    assert going.minutes_left() == 4.0


def test_what_the_export_leaves_to_training_tells_trainings_apart(monkeypatch, tmp_path):
    """Without a cap EXPORT_MAX_SECONDS is the export's alone; with one, training ends that much sooner."""
    arguments = ("EXPORT_MAX_SECONDS=2,3", "SEED=1,2")
    assert [run.kind for run in planned(monkeypatch, tmp_path, *arguments)] == ["whole"] * 2 + ["export"] * 2
    runs = planned(monkeypatch, tmp_path, *arguments, MAX_WALLCLOCK_SECONDS="20")
    assert [run.kind for run in runs] == ["whole"] * 4
    runs = planned(monkeypatch, tmp_path, "QUANT=balanced,rowmax", MAX_WALLCLOCK_SECONDS="20")
    runs[0].folder.mkdir()
    checkpoint = runs[0].folder / "checkpoints" / "step_0000012.npz"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"")
    assert runs[1].source() is None, "training may still go on"
    (runs[0].folder / "summary.json").write_text('{"train": {"steps": 12}, "finished": false}')
    assert runs[1].source() == runs[0].folder
    job = sweep.Sweep(runs, sweep.slots_of(1, [], 2))
    assert job.environment(runs[1], job.slots[0])["EXPORT_MAX_SECONDS"] == "5.0", "a quarter of the cap, as in a run"
    assert job.environment(runs[0], job.slots[0])["CKPT_EVERY_SECONDS"] == "1e9"


def test_the_last_checkpoint_is_kept_where_others_start_from_them(monkeypatch, tmp_path):
    for grid, switch, kept in ("TTT_LR=1,2", "1", None), ("TTT_LR=1,2", "0", "1e9"), (
            "QUANT=balanced,rowmax", "1", "1e9"):
        runs = planned(monkeypatch, tmp_path, grid, EXPORT_ENABLED=switch)
        job = sweep.Sweep(runs, sweep.slots_of(1, [], 2))
        assert job.environment(runs[0], job.slots[0]).get("CKPT_EVERY_SECONDS") == kept
    for given, kept in ("0", "1e9"), ("60", "60"):
        runs = planned(monkeypatch, tmp_path, "QUANT=balanced,rowmax", CKPT_EVERY_SECONDS=given)
        job = sweep.Sweep(runs, sweep.slots_of(1, [], 2))
        assert job.environment(runs[0], job.slots[0])["CKPT_EVERY_SECONDS"] == kept


def scored(run, bpb: float | None, valid=True):
    """Let a planned run be finished, with a score and what else the tables read; failed, without."""
    run.state = "failed" if bpb is None else "finished"
    if bpb is not None:
        score = {"val_bpb": bpb, "val_loss": 2 * bpb, "seconds": 7.0}
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text(json.dumps({
            "finished": True, "eval": {"float": None, "int6": score, "sliding": None, "ttt": None},
            "seconds": {"read": 90.0, "total": 99.0},
            "reasons": [] if valid else ["a reason"], "val_bpb": bpb, "artifact": None, "valid": valid, "caveats": [],
            "train": {"seconds": 5.0}}))


def groups_of(monkeypatch, tmp_path, given: list[dict], scores, **variables) -> list:
    """The groups that a sweep of these runs with these scores ends in."""
    monkeypatch.setattr(sweep, "read_grid", lambda runs: list(runs))
    runs = planned(monkeypatch, tmp_path, *given, **variables)
    for run, bpb in zip(runs, scores, strict=True):
        scored(run, bpb)
    return results.grouped(results.collect(runs))


def test_only_seeds_of_the_same_configuration_are_averaged(monkeypatch, tmp_path):
    """TTT_LR chooses TTT_MODE, so these two differ although each gives the other's default."""
    default = {f.name: f.default for f in t.VARIABLES}
    given = [{"QUANT_BITS_MLP": str(default["quant_bits_mlp"])}, {"TTT_LR": str(default["ttt_lr"])}]
    groups = groups_of(monkeypatch, tmp_path, given, [2.0, 1.0], TTT_ENABLED="1")
    assert [g.title for g in groups] == ["TTT_MODE=lora", "TTT_MODE=full"] and [g.mean for g in groups] == [2.0, 1.0]
    given = [{"SEED": seed, "NLL_DUMP": str(tmp_path / f"{seed}.npy")} for seed in "12"]
    groups = groups_of(monkeypatch, tmp_path / "dumps", given, [1.0, 4.0])
    assert [g.bpb() for g in groups] == [[1.0, 4.0]]
    given = [{"PRESET": "seed"}, {"PRESET": "demo"}]
    (group, _) = groups_of(monkeypatch, tmp_path / "presets", given, [1.0, 2.0])
    assert list(group.settings) == ["PRESET"], "what a preset decides needs no columns"


def test_a_setting_that_lacks_a_seed_is_marked_and_ranks_after_the_others(monkeypatch, tmp_path):
    given = [{"MATRIX_LR": rate, "EMA_DECAY": "0.5", "SEED": seed} for rate in ("0.01", "0.02") for seed in "12"]
    groups = groups_of(monkeypatch, tmp_path, given, [1.0, None, 2.0, 4.0])
    assert results.headline(groups) == "best 3.0000 ± 1.4142 BPB (2 seeds) at MATRIX_LR=0.02", "EMA_DECAY has one value"
    rows = [line for line in results.markdown("x", groups, {}, "").splitlines() if line.startswith("| 0")]
    assert rows[0].startswith("| 0.02 | 0.5 | 2 | **3.0000") and rows[1].startswith("| 0.01 | 0.5 | 1 of 2 | **1.0000")
    assert rows[0].endswith("| 5.0 ± 0.0 | 97.0 ± 0.0 | yes |"), "evaluation with reading, which takes 90 s here"
    assert results.headline(groups[:1]) == ("lowest, of a setting that lacks a seed, 1.0000 BPB (1 of 2 seeds) at "
                                            "MATRIX_LR=0.01")
    assert results.choose_axis(groups) == "MATRIX_LR" and results.choose_axis([groups[0]]) is None


def test_lines_have_colours_and_their_seeds_too(monkeypatch, tmp_path):
    given = [{"MATRIX_LR": rate, "EMA_DECAY": decay, "SEED": seed} for decay in ("0.5", "0.6", "0.7")
             for rate in ("0.01", "0.02", "0.03", "0.04") for seed in "12"]
    groups = groups_of(monkeypatch, tmp_path, given, [float(i) for i in range(24)])
    plt = results.pyplot("x")
    figure, axis = plt.subplots()
    results.against_variable(axis, groups, "MATRIX_LR")
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert [line.get_color() for line in lines.values()] == list(results.COLOURS[:3])
    assert list(lines) == ["EMA_DECAY=0.5", "EMA_DECAY=0.6", "EMA_DECAY=0.7"]
    seeds = [line.get_markeredgecolor() for line in axis.lines if line.get_label() == "_seeds"]
    assert seeds == list(results.COLOURS[:3])
    plt.close(figure)


def test_a_legend_is_not_cut_off(monkeypatch, tmp_path):
    names = ("MATRIX_LR", "SCALAR_LR", "EMBED_LR", "TIED_EMBED_LR", "MUON_MOMENTUM", "MUON_WD", "ADAM_WD")
    given = [{name: f"0.0{i}5{'0' if name == 'MATRIX_LR' else ''}1" for name in names} for i in range(1, 5)]
    groups = groups_of(monkeypatch, tmp_path, given, [1.0, 2.0, 3.0, 4.0])
    kept, plt = [], results.pyplot("x")
    monkeypatch.setattr(results, "save", lambda plt, figure, path: kept.append(figure))
    assert results.plot(groups, "x", tmp_path / "x") == ""
    (figure,) = kept
    figure.canvas.draw()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1, "within the picture"
    assert figure.legends
    plt.close(figure)


def test_what_starts_from_a_file_or_exports_nothing(monkeypatch, tmp_path):
    """Each starts from MODEL_PATH, but the scores before test-time training are found once; without an export the
    others start from the float weights."""
    rates = "TTT_LR=1,2"
    runs = planned(monkeypatch, tmp_path, rates, TRAIN_ENABLED="0", MODEL_PATH="x.ptz", TTT_ENABLED="1")
    job = sweep.Sweep(runs, sweep.slots_of(1, [], 2))
    found = [job.environment(run, job.slots[0]) for run in runs]
    assert [run.kind for run in runs] == ["whole"] * 2 and {env["MODEL_PATH"] for env in found} == {"x.ptz"}
    assert [env.get("FINAL_EVAL_ENABLE") for env in found] == [None, "0"]
    monkeypatch.setenv("TRAIN_ENABLED", "1")
    runs = planned(monkeypatch, tmp_path, rates, EXPORT_ENABLED="0", TTT_ENABLED="1", MODEL_PATH="")
    assert [run.kind for run in runs] == ["whole", "export"] and runs[1].source() is None


def test_what_to_remove_where_shared_weights_are_gone(monkeypatch, tmp_path):
    first, second = planned(monkeypatch, tmp_path, "TTT_LR=1,2", TTT_ENABLED="1")
    scored(first, 1.0)
    with pytest.raises(FileNotFoundError, match=f"put it back, or remove {re.escape(str(first.folder))} to run"):
        second.source()


def test_each_job_has_its_own_gpus_or_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep.t, "SIGNALS", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    one, two = sweep.slots_of(2, ["0", "1", "2", "3", "6"], 32)
    assert [s.environment() for s in (one, two)] == [{"CUDA_VISIBLE_DEVICES": c} for c in ("0,1", "2,3")]
    assert one.command()[1:6] == ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                                  "--nproc_per_node=2"]
    assert [s.environment() for s in sweep.slots_of(3, [], 8)] == [{"OMP_NUM_THREADS": "2"}] * 3
    assert sweep.slots_of(4, [], 2)[3].command() == [sys.executable, str(SCRIPT)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweep.slots_of(3, [], 8)[0].environment() == {}
    monkeypatch.setattr(sweep.t, "SIGNALS", [signal.SIGINT, signal.SIGTERM])  # as under nohup
    assert sweep.slots_of(2, [], 8)[0].environment() == {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT"}


# What each part of train_gpt.py may not read, if the runs that differ in it are to share that part's work.
PARTS = {
    ("Loader", "GPT", "Trainer", "Muon", "Optimizers", "FlatWeights", "train", "rate_factor", "tokens_per_pass",
     "activation_bytes", "compiled", "train_and_average"): ("export", "score", "adapt"),
    ("Exporter", "Calibration", "balanced", "rowmax", "lay_out", "export", "pack", "calibration_text"):
        ("score", "adapt"),
    ("Evaluator", "evaluate"): ("adapt",),
}
# Validations in training are only logged. The seconds that an export leaves to training are compared as such.
READ_ALL_THE_SAME = {"eval_len", "final_eval_enable", "export_enabled", "export_seconds"}


def test_every_variable_has_the_stage_that_reads_it():
    assert set(t.STAGES.values()) == {"Run", "Data", "Model", "Training", "Optimizers", "Export", "Evaluation",
                                      "Test-time training"}, "say in AFTER_TRAINING whose the new one is"
    parts = {node.name: node for node in ast.walk(ast.parse(SCRIPT.read_text()))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    later = {"eval_len": "score", "export_seconds": "export"} | {n.lower(): s for n, s in sweep.STAGES.items()}
    for names, stages in PARTS.items():
        for name in names:
            read = {node.attr for node in ast.walk(parts[name]) if isinstance(node, ast.Attribute) and "cfg" in
                    ast.unparse(node.value)}
            wrong = {attr for attr in read - READ_ALL_THE_SAME if later.get(attr) in stages}
            assert not wrong, f"{name} reads {wrong}, which a sweep takes for a later stage's"


@pytest.mark.parametrize("arguments, variables, words", [
    ((), {}, "nothing to run"),
    (("TTT_RL=1",), {}, "TTT_RL: no such variable; did you mean TTT_LR?"),
    (("VE_ENABLED=1",), {}, "VE_ENABLED: not implemented in this script"),
    (("SHUFFLE=1",), {}, "SHUFFLE: sequences are taken in the order"),
    (("SEED",), {}, "'SEED': not of the form VAR=value"),
    (("SEED=1,,2",), {}, "SEED=1,,2: a value is missing"),
    (("SEED=1,2", "SEED=3"), {}, "SEED: given twice"),
    (("SEED=1,1",), {}, "SEED=1: the same run as SEED=1"),
    (("TTT_LR=1e-4,0.0001",), {}, "TTT_LR=0.0001: the same run as TTT_LR=1e-4"),
    (("RUN_ID=a,b",), {}, "RUN_ID: the sweep sets it"),
    (("SEED=1,x",), {}, "SEED='x': accepts int 0..4294967295 (run 2)"),
    (("MODEL_DIM=32,33",), {}, "MODEL_DIM=33: must be a multiple of NUM_HEADS=4 (run 2)"),
    (("SEED=1,2", "--name", "a/b"), {}, "--name 'a/b'"),
    (("SEED=1,2", "--name", ".."), {}, "--name '..'"),
    (("SEED=1,2", "--name", ""), {}, "--name ''"),
    (("SEED=1,2", "--name", "taken"), {}, "exists and holds no sweep"),
    (("SEED=1,2", "--jobs", "0"), {}, "--jobs: must be at least 1"),
    (("SEED=1,2", "--jobs", "x"), {}, "--jobs"),
    (("SEED=1,2", "--fast"), {}, "--fast"),
    (("--list", "nowhere"), {}, "--list nowhere: No such file"),
    (("--list", "bad"), {}, "bad:2: No closing quotation"),
    (("--list", "good", "SEED=1"), {}, "SEED: both in the list and in the grid"),
    (("--list", "empty"), {}, "--list empty: holds no run"),
    (("SEED=1,2",), {"NLL_DUMP": "x.npy"}, "NLL_DUMP=x.npy: more than one run"),
    (("SEED=1,2",), {"TRAIN_LERNING": "1"}, "TRAIN_LERNING: no such variable"),
    (("NLL_DUMP=a,b", "SEED=1"), {}, "the same run as NLL_DUMP=a"),
    (("SEED=1,2",), {"DATA_PATH": "/nowhere"}, "DATA_PATH=/nowhere: no such folder"),
    (("SEED=1,2",), {"TRAIN_ENABLED": "0", "MODEL_PATH": "nowhere"}, "MODEL_PATH='nowhere': no file"),
])
def test_bad_input_is_one_line_and_leaves_nothing(arguments, variables, words, corpus, tmp_path):
    logs = tmp_path / "logs"
    (logs / "taken").mkdir(parents=True)
    (tmp_path / "good").write_text("\ufeffSEED=3\n")  # as some editors begin a file
    (tmp_path / "bad").write_text("SEED=3\nSEED='4\n")
    (tmp_path / "empty").write_text("# nothing\n")
    run(corpus, logs, *arguments, **variables).refused(words)
    assert os.listdir(logs) == ["taken"]
