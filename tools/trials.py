#!/usr/bin/env python3
"""What the fast forms in train_gpt.py are worth here: a training step with each put back to its plain form, in
turn with the step as it is.

    PRESET=demo python tools/trials.py [--rounds N]

Times are those of the processor on a CPU, so that other work on the machine changes them little, and of the clock on
a GPU; medians over the rounds but the first, which compiles. Results must agree: the difference in loss that a plain
form makes is printed too. On a GPU attention is tried by each of PyTorch's backends ("-" where one refuses),
on a CPU in bf16 by PyTorch's fused kernel.
"""

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train_gpt.py does

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import train_gpt as t  # noqa: E402

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
            "the memory-efficient kernel": SDPBackend.EFFICIENT_ATTENTION, "plain products": SDPBackend.MATH}


def fused_attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


@contextlib.contextmanager
def attention_by(backend: SDPBackend):
    """PyTorch's attention by one of its backends, which raises RuntimeError for what that cannot do."""
    with mock.patch.object(t, "attend", fused_attention), sdpa_kernel(backend):
        yield


class PlainAdamW(torch.optim.AdamW):
    """AdamW a tensor at a time over the groups of a fused one, each of which says that it is fused and must not."""

    def __init__(self, fused: torch.optim.AdamW):
        super().__init__([group | {"fused": False, "foreach": False} for group in fused.param_groups])


def fused_norm(x, gain=1.0):
    return (F.rms_norm(x, (x.size(-1),)) * gain).to(x.dtype)


def one_by_one(x, layers, gain=1.0, side_by_side=t.side_by_side):
    return torch.cat([side_by_side(x, (layer,), gain) for layer in layers], -1)


def gain_on_activations(x, layers, gain=1.0):
    y = F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))
    return y * (gain.flatten().to(y.dtype) if isinstance(gain, torch.Tensor) else gain)


class StreamWritten:
    """`StreamNorm` by its formula and autograd: the stream is written and kept."""

    @staticmethod
    def apply(x):
        return t.norm(x), x


class SmearKept:
    """`Smear` by its formula and autograd: what is mixed in is kept."""

    @staticmethod
    def apply(x, gate, keep):
        return torch.lerp(x, t.shift(x, keep), gate)


def loss_with_maximum(self, ids, targets=None, rows=None, window=0, factors=None, forward=t.GPT.forward):
    logits = forward(self, ids, None, rows, window, factors)
    if targets is None:
        return logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none").view(targets.shape)


@contextlib.contextmanager
def memory_given_back():
    """glibc's own thresholds, under which each large block is mapped anew and zeroed by the kernel."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 128 << 10)
    mallopt(-1, 128 << 10)
    yield
    t.keep_freed_memory()  # the next step pays for the memory that is fetched back, and is not counted


def trials(trainer: t.Trainer, plain_adam: torch.optim.Optimizer, batched) -> dict:
    """For each plain form a context in which it is used; `batched`: Newton-Schulz as the trainer has it."""
    optimizers, process = trainer.optimizers, trainer.process

    def each_matrix_alone(g, *more):
        return torch.stack([batched(matrix[None], *more)[0] for matrix in g])

    forms = {"as it is": contextlib.nullcontext()}
    if process.cuda:
        forms |= {f"attention by {name}": attention_by(backend) for name, backend in BACKENDS.items()}
        forms["the MLP without our kernel"] = mock.patch.object(t.MLP, "fused", property(lambda mlp: False))
    if not process.cuda and process.dtype == torch.bfloat16:  # in fp32 it is the step's own
        forms["PyTorch's fused attention"] = mock.patch.object(t, "attend", fused_attention)
    return forms | {
        "F.rms_norm": mock.patch.object(t, "norm", fused_norm),
        "the residual stream kept, not made from its norm": mock.patch.object(t, "StreamNorm", StreamWritten),
        "SmearGate by autograd": mock.patch.object(t, "Smear", SmearKept),
        "q, k and v by products of their own": mock.patch.object(t, "side_by_side", one_by_one),
        "gains on activations, not in the matrices": mock.patch.object(t, "side_by_side", gain_on_activations),
        "cross-entropy with its maximum and log-softmax": mock.patch.object(t.GPT, "forward", loss_with_maximum),
        "Newton-Schulz a matrix at a time": mock.patch.object(optimizers.muon, "orthogonalise", each_matrix_alone),
        "AdamW not fused": mock.patch.object(optimizers, "adam", plain_adam),
        "memory given back to the system": memory_given_back(),
        "": contextlib.nullcontext(),
    }


def take_step(trainer: t.Trainer, form, tokens, clock) -> float | None:
    """Seconds of a step in a form; None where PyTorch has no kernel for it."""
    try:
        with form:
            began = clock()
            trainer.step(tokens, 0, 0.0)
            trainer.synchronize()
            return clock() - began
    except RuntimeError as error:
        if "kernel" not in str(error):
            raise
        return None


def launched(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="times that each step is taken (%(default)s)")
    options = parser.parse_args(argv)
    t.require(options.rounds >= 1, "--rounds must be at least 1")
    cfg, _ = t.read_launch([])
    process = t.Process(cfg.compute_dtype)
    torch.manual_seed(cfg.seed)
    model = t.GPT(cfg, process.dtype).to(process.device)
    trainer = t.Trainer(cfg, process, model)
    clock = time.perf_counter if process.cuda else time.process_time
    with torch.no_grad():  # nothing is zero, so that every part has something to say
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    shape = trainer.share, cfg.train_seq_len + 1
    tokens = torch.randint(2, cfg.vocab_size, shape, dtype=torch.int32).to(process.device)
    more = PlainAdamW(trainer.optimizers.adam), trainer.optimizers.muon.orthogonalise
    forms, seconds, losses = list(trials(trainer, *more)), {}, {}
    turns = [name for _ in range(options.rounds + 1) for name in forms]
    if trainer.forward is not model:  # compiled: one form after another, each traced anew
        turns = [name for name in forms for _ in range(options.rounds + 1)]
    for name, before in zip(turns, [None, *turns], strict=False):
        if trainer.forward is not model and name != before:
            torch._dynamo.reset()
        if (took := take_step(trainer, trials(trainer, *more)[name], tokens, clock)) is not None:
            seconds.setdefault(name, []).append(took)
            losses[name] = float(trainer.flat.loss)
    base = statistics.median(seconds[forms[0]][1:])
    print(f"{process.hardware()['name']}, {torch.get_num_threads()} threads, {str(process.dtype)[6:]}, a step of "
          f"{cfg.train_batch_tokens:,} tokens\n\n| form | ms a step | of the step as it is | loss differs by |\n"
          "| --- | --- | --- | --- |")
    for name in filter(None, forms):
        if name not in losses:
            print(f"| {name} | - | - | - |")
            continue
        middle = statistics.median(seconds[name][1:])
        gap = losses[name] - losses[forms[0]]
        print(f"| {name} | {1000 * middle:.0f} | {middle / base:.2f} | {gap:+.1e} |")


def main(argv: list[str]) -> int:
    try:
        launched(argv)
    except t.UserError as problem:
        sys.stderr.write(f"error: {t.one_line(problem)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
