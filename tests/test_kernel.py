"""The MLP's own kernel, in Triton's interpreter, which runs it on a CPU as it is written, against the plain form."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train_gpt as t

pytest.importorskip("triton", reason="Triton is not installed; pip install -r tests/requirements.txt")

# fp32: the interpreter has no products in bf16. 11 tiles by 2: more than the 8 rows that share a column, and a rest.
PROBE = """
import json
import torch
import torch.nn.functional as F
import train_gpt as t

def apart(ours, plain):
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True)]

def with_gradients(f, inputs, g):
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]

found = {}
torch.manual_seed(1)
for slope in (0.0, 0.5):
    x, up, down = (torch.randn(shape) for shape in ((11, 128, 192), (256, 192), (192, 256)))
    inputs = [z.requires_grad_() for z in (x, up / 14, down / 16)]
    g = torch.randn(11, 128, 192)
    forms = (lambda *z: t.FusedMLP.apply(*z, slope),
             lambda x, up, down: F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down))
    found[f"kernel {slope}"] = apart(*(with_gradients(form, inputs, g) for form in forms))
    # Neither x nor its gradient is contiguous.
    turned = [x.detach().mT.contiguous().mT.requires_grad_(), *inputs[1:]]
    row = torch.randn(192).expand(11, 128, 192)
    found[f"turned {slope}"] = apart(*(with_gradients(form, turned, row) for form in forms))
    with torch.no_grad():
        found[f"no gradient {slope}"] = apart(*([form(*inputs)] for form in forms))

    cfg, problems, _ = t.load_config({"NUM_LAYERS": "2", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "MLP_MULT": "2", "VOCAB_SIZE": "256", "TRAIN_SEQ_LEN": "64", "BIGRAM_VOCAB_SIZE": "0",
        "SPARSE_HIDDEN_DIM": "0", "MLP_SLOPE": str(slope)})
    assert not problems, problems
    model = t.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    ids = torch.randint(0, 256, (2, 65))
    launches, plain_kernel = [], t.bent_product
    t.bent_product = lambda *given, **named: launches.append(len(given[0])) or plain_kernel(*given, **named)
    results = []
    for fused in (True, False):
        for block in model.blocks:
            block.mlp.fused = fused
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    found[f"model {slope}"], found[f"launches {slope}"] = apart(*results), list(launches)
    for block in model.blocks:
        block.mlp.fused = True
    model(ids[:1, :-1])  # 64 rows, of which no tile can be made
    model.blocks[0].mlp.fc.watch = lambda *seen: None
    model(ids[:, :-1])
    model.blocks[0].mlp.fc.watch = None
    model.blocks[1].mlp.proj.adapter = torch.zeros(4, 256), torch.zeros(2, 128, 4)
    model(ids[:, :-1])
    found[f"more {slope}"] = launches[4:]
    t.bent_product = plain_kernel
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    env = {"PATH": os.environ["PATH"], "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_kernel_equals_the_plain_form(found, slope):
    """Result and all three gradients; and where no gradient is wanted."""
    assert len(found[f"kernel {slope}"]) == 4 and max(found[f"kernel {slope}"]) < 2e-6
    assert max(found[f"no gradient {slope}"]) < 2e-6 and max(found[f"turned {slope}"]) < 2e-6


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_model_takes_the_kernel(found, slope):
    """A launch a layer each way, of all rows; none for rows that are no whole tiles, nor in a layer that calibration
    watches or that has adapters."""
    assert found[f"launches {slope}"][:4] == [128] * 4
    assert max(found[f"model {slope}"]) < 1e-4
    assert found[f"more {slope}"] == [128, 128]  # of the other layer, twice


def plain(x, up, down, slope):
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


class Backward:
    """The plain form, whose backward pass is given another gradient."""

    def __init__(self, change):
        self.change = change

    def __call__(self, *given):
        y = plain(*given)
        y.register_hook(self.change)
        return y


def test_a_trial_decides(monkeypatch):
    """Where it cannot run, fails or is off, the reason is said and the plain form goes on. The GPU is pretended."""
    cpu, cfg = t.Process("bf16"), t.load_config({"USE_COMPILE": "1"})[0]
    assert "compute capability 9.0" in t.why_not_fused(cfg, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "compile", lambda form, **how: form)
    works = types.SimpleNamespace(apply=plain)
    for changes, function, reason in (
        ({}, works, ""),
        ({}, types.SimpleNamespace(apply=lambda *given: 1.1 * plain(*given)), "in a trial it was off by 0.1"),
        ({}, types.SimpleNamespace(apply=Backward(lambda g: g * math.nan)), "in a trial it was off by nan"),
        ({}, types.SimpleNamespace(apply=Backward(lambda g: g.roll(1, 0).flip(1))), "in a trial it was off by 1."),
        ({}, t.FusedMLP, "a trial of it failed: "),  # this machine has no GPU for Triton
        ({"model_dim": 448}, works, "widths that 128 divides"),
        ({"use_compile": "0"}, works, "USE_COMPILE"),
    ):
        process = t.Process("bf16")
        process.cuda = True
        monkeypatch.setattr(t, "FusedMLP", function)
        with torch.no_grad():  # as where an artifact is scored
            found = t.why_not_fused(dataclasses.replace(cfg, **changes), process)
        assert (reason in found) if reason else found == "", found
    process = t.Process("fp32")
    process.cuda = True
    assert "bf16" in t.why_not_fused(cfg, process)
