"""The benchmark: what it reads from a script's log, and that its parts run on a tiny model."""

import json
import sys

import pytest
from conftest import ROOT, TINY, clean_environment
from test_parts import model_of
from tooling import call, forked

sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402

PUBLISHED = """step:1/40 train_loss:6.93 train_time:1200ms step_avg:1200.00ms
step:10/40 train_loss:6.00 train_time:1800ms step_avg:180.00ms
step:40/40 train_loss:5.50 train_time:4800ms step_avg:120.00ms
step:40/40 val_loss:5.4000 val_bpb:3.2000 train_time:4800ms step_avg:120.00ms
final_int6_roundtrip val_loss:5.4100 val_bpb:3.2100 eval_time:900ms
final_int6_sliding_window val_loss:5.3000 val_bpb:3.1000 stride:64 eval_time:2500ms
final_int6_sliding_window_exact val_loss:5.30000000 val_bpb:3.10000000
"""
LEGAL = "legal_ttt val_loss:5.2000 val_bpb:3.0500 eval_time:7500ms\nlegal_ttt_exact val_loss:5.2 val_bpb:3.05\n"


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """run(*arguments, **variables): the tool on the tiny model."""
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs")}
    monkeypatch.setattr(bench, "subprocess", forked)
    return lambda *words, **more: call(bench.main, words, env | more, tmp_path)


def test_a_log_of_the_field_is_read_without_its_first_steps():
    found = {"step_ms": 100.0, "train_loss": 5.5, "sliding_loss": 5.3, "sliding_s": 2.5}
    assert bench.read_log(PUBLISHED) == found
    assert bench.read_log(PUBLISHED + LEGAL) == found | {"ttt_loss": 5.2, "ttt_s": 7.5}
    assert bench.read_log("ttt:elapsed=12.5s\n" + PUBLISHED) == found | {"ttt_s": 12.5}
    assert bench.read_log("") == {}


def test_layers_count_as_often_as_they_are_run(tiny):
    """6 operations a weight and, for attention, 6 T C; the embedding multiplies in the output where it is tied."""
    for variables, runs in ({}, 3 * [1]), ({"NUM_LOOPS": 2}, [1, 3, 3]), ({"TIE_EMBEDDINGS": 0}, 3 * [1]):
        model = model_of(cfg := tiny(BIGRAM_VOCAB_SIZE=0, **variables))
        each = sum(p.numel() for p in model.blocks[0].parameters())
        rest = sum(p.numel() for p in model.parameters()) - 3 * each
        rest -= 0 if cfg.tie_embeddings else model.tok_emb.weight.numel()
        assert bench.flops_per_token(model, cfg, 100) == 6 * (rest + sum(runs) * (each + 100 * 32))


def test_each_part_is_timed_and_recorded(run, tmp_path):
    done = run("--steps", "1", "--repeats", "2", "--windows", "4", "--ttt-tokens", "64")
    assert done.code == 0, done.err
    (record,) = (tmp_path / "logs").glob("bench_*.json")
    parts = json.loads(record.read_text())["parts"]
    for part in ("training step", "training", "share of the measured peak", "optimizers' share of a step", "load",
                 "loader's share of a step", "evaluation, stride 8", "export", "peak memory"):
        assert parts[part]["median"] > 0 and part in done.out
    assert any(part.startswith("test-time training") for part in parts)


def test_a_script_beside_ours(run, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(f"print('''{PUBLISHED}''')\n")
    done = run("--against", other, "--repeats", "1", "--ranks", "1", ITERATIONS="14", TRAIN_LOG_EVERY="2",
               TTT_ENABLED="0", EXPORT_FILL="0", SEED="7")
    assert done.code == 0, done.err + done.out
    (record,) = (tmp_path / "logs").glob("bench_*.json")
    rows = json.loads(record.read_text())["against"]["median"]
    assert rows["step_ms"]["other"] == 100.0 and rows["step_ms"]["ratio"] == 100.0 / rows["step_ms"]["ours"]
    assert rows["sliding_s"]["other"] == 2.5
    for who in ("ours", "other"):
        assert 0 < rows["start_s"][who] < rows["seconds"][who]


@pytest.mark.parametrize("arguments, variables, says", [
    (["--against", "missing.py"], {}, "missing.py: no such file"), (["--steps", "0"], {}, "at least 1"),
    (["--foo"], {}, "unrecognized arguments: --foo; ./run.sh bench --help says how"),
    ([], {"DATA_PATH": "/nowhere"}, "/nowhere"), ([], {"NUM_LAYERS": "x"}, "NUM_LAYERS"),
    ([], {"TRAIN_ENABLED": "0", "MODEL_PATH": "x"}, "TRAIN_ENABLED=0")])
def test_bad_input_is_one_line(run, arguments, variables, says):
    run(*arguments, **variables).refused(says)


def test_a_script_that_fails_is_named(tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit):
        bench.whole_run(other, 1, tmp_path / "folder")
    assert f"{other} ended with exit code 3" in capsys.readouterr().err
