"""Rounding rules at equal bytes: that they are equal, and that theirs is what their authors publish."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment
from tooling import call

pytest.importorskip("brotli")
sys.path.insert(0, str(ROOT / "tools"))
import equal_bytes  # noqa: E402

import train_gpt as t  # noqa: E402


def test_every_rule_has_the_bytes_asked_for(launch, corpus, tmp_path):
    """To 0.1% or as near as int8 values come; on the weights of a run of PRESET=frontier, and of no other."""
    own = {"PRESET": "frontier", "BIGRAM_VOCAB_SIZE": "0", "SPARSE_HIDDEN_DIM": "0", "CKPT_EVERY_SECONDS": "1e9"}
    run = launch(run_id="a", MODEL_DIM=64, MATRIX_LR=0.05, ITERATIONS=30, FINAL_SLIDING_EVAL_ENABLE=0, **own)
    env = clean_environment() | {"DATA_PATH": str(corpus), "QUANT_MIN_NUMEL": "100", "COMPUTE_DTYPE": "fp32"}
    words = [run.folder, "--bits", "5", "--tokens", "600", "--json", tmp_path / "found.json"]
    done = call(equal_bytes.main, words, env, tmp_path)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [(row["rule"], row["coder"]) for row in rows] == [
        ("balanced", "ours"), ("PR 1394", "brotli"), ("PR 1394", "ours"), ("PR 1855", "brotli"), ("PR 1855", "ours")]
    for row in rows:
        assert row["bits_a_parameter"] == pytest.approx(5, rel=0.01) and row["loss_float"] == rows[0]["loss_float"]
        assert row["groups"].keys() == {"attn", "embed", "mlp"} and 1 < row["groups"]["mlp"]["bits"] < 8
    assert len(done.out.splitlines()) == 5 and f"{rows[1]['bytes']:,} bytes" in done.out.splitlines()[1]
    seed = launch(run_id="b", CKPT_EVERY_SECONDS=1e9, FINAL_SLIDING_EVAL_ENABLE=0)
    call(equal_bytes.main, [seed.folder, "--tokens", "600"], env, tmp_path).refused("PR 1394 has no such tensors")
    call(equal_bytes.main, [tmp_path, "--tokens", "600"], env, tmp_path).refused("a folder without checkpoints")


def test_the_published_rule():
    """Steps of k deviations of the row over 31 for 6 bits, values within +-31, and a column's error is fed back."""
    torch.manual_seed(1)
    w, x = torch.randn(1, 8, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    cost = t.Sensitivity(*t.feedback_factors((x.T @ x / 200)[None]), torch.ones(1, 8))
    exporter = type("", (), {"stacks": [("mlp", ["a"], w, cost)], "rounded": lambda self, common: {}})()
    for factor in (1.0, 0.2):
        stored = equal_bytes.published(exporter, "PR 1855", factor)["a"]
        steps = (factor * 11.5 * w[0].std(1) / 31).half()
        assert np.array_equal(stored.rows, steps.numpy()) and np.abs(stored.values).max() <= 31
        plain = (w[0] / steps[:, None].float()).round().clamp(-31, 31) * steps[:, None].float()
        errors = [((q - w[0]) @ x.T).square().sum() for q in (stored.tensor(), plain)]
        assert errors[0] < errors[1]
