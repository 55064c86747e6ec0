"""The trials of fast forms: each form tried is another than the step as it is, and the table has them all."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, clean_environment
from test_parts import Lone
from tooling import call

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import trials  # noqa: E402


def forms(cuda: bool, dtype=torch.bfloat16) -> dict:
    optimizers = SimpleNamespace(adam=None, muon=SimpleNamespace(orthogonalise=t.newton_schulz))
    trainer = SimpleNamespace(optimizers=optimizers, process=SimpleNamespace(cuda=cuda, dtype=dtype))
    return trials.trials(trainer, None, t.newton_schulz)


def test_no_form_is_the_step_itself():
    fused = "PyTorch's fused attention"
    assert fused in forms(False) and fused not in forms(False, torch.float32)
    gpu = forms(True)
    assert fused not in gpu and sum(name.startswith("attention by") for name in gpu) == 4
    assert len(gpu) == len(forms(False)) + 4
    mlp = t.MLP(t.Config())
    mlp.fused = True
    with gpu["the MLP without our kernel"]:
        assert mlp.fused is False
    assert mlp.fused is True


def test_attention_goes_through_the_backend_that_the_form_names():
    """The others are off while it runs, and one that cannot is left out and not an error."""
    q, kv = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
    plain, seen = t.attend(q, kv, kv), {}

    def step(*_):
        seen["math"], seen["flash"] = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        seen["result"] = t.attend(q, kv, kv)

    trainer = SimpleNamespace(step=step, synchronize=lambda: None)
    form = forms(True)["attention by plain products"]
    assert trials.take_step(trainer, form, None, lambda: 1.0) == 0.0
    assert seen["math"] and not seen["flash"] and torch.allclose(seen["result"], plain, atol=1e-5)
    assert t.attend is not trials.fused_attention, "put back"
    assert trials.take_step(trainer, forms(True)["attention by cuDNN"], None, lambda: 1.0) is None

    def broken(*_):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="memory"):
        trials.take_step(SimpleNamespace(step=broken), contextlib.nullcontext(), None, lambda: 1.0)


def test_the_plain_adamw_is_not_fused(tiny):
    """It takes the same step by another kernel."""
    cfg, ran = tiny(), []
    model = t.GPT(cfg)
    optimizers = t.Optimizers(cfg, t.FlatWeights(model, torch.device("cpu")), Lone())
    plain = trials.PlainAdamW(optimizers.adam)
    assert len(plain.param_groups) == len(optimizers.adam.param_groups)
    optimizers.flat.grads.normal_()
    before, results = optimizers.flat.weights.clone(), []
    for adam in (optimizers.adam, plain):
        with torch.no_grad():
            optimizers.flat.weights.copy_(before)
        with torch.profiler.profile() as profile:
            adam.step()
        ran.append(any("fused_adamw" in event.key for event in profile.key_averages()))
        results.append(optimizers.flat.weights.clone())
    assert ran == [True, False]
    assert not torch.equal(results[0], before) and torch.allclose(*results, atol=1e-5)


def test_a_table_of_all_forms(tmp_path):
    done = call(trials.main, ["--rounds", "1"], clean_environment() | TINY, tmp_path)
    assert done.code == 0, done.err
    rows = [line.split(" | ") for line in done.out.splitlines() if line.startswith("| ")][2:]
    assert [row[0][2:] for row in rows] == [name for name in forms(False, torch.float32) if name]
    assert all(abs(float(row[3].strip(" |"))) < 1e-3 and row[2] != "-" for row in rows)
    call(trials.main, ["--rounds", "0"], clean_environment() | TINY, tmp_path).refused("--rounds")
