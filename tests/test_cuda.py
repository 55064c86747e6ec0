"""What a GPU must do: kernels, waits, memory, NCCL, signals there. Without a GPU those tests that need nothing of it
run on the CPU all the same, at a smaller size, so that they are known to work before one is at hand; the others are
skipped with the reason."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_parts import OneByte, Quiet
from test_survive import LONG, start  # noqa: F401  (a fixture)

import train_gpt as t

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TWO_LAYERS = {"PRESET": "seed", "NUM_LAYERS": "2", "SPARSE_START_LAYER": "1", "BIGRAM_VOCAB_SIZE": "64",
              "TRAIN_BATCH_TOKENS": "4096", "WARMUP_STEPS": "0"}  # heads and widths of the full model
SMALLER = {"MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "TRAIN_SEQ_LEN": "64",
           "TRAIN_BATCH_TOKENS": "128", "QUANT_MIN_NUMEL": "4096"}


def two_layers(**variables) -> t.Config:
    cfg, problems, _ = t.load_config(TWO_LAYERS | (SMALLER if not torch.cuda.is_available() else {}) | variables)
    assert not problems, problems
    return cfg


def model_on(process: t.Process, cfg: t.Config, noise: float = 0.02) -> t.GPT:
    """A model whose every part does something, the same on every device."""
    torch.manual_seed(0)
    model = t.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    model.dtype = process.dtype
    return model.to(process.device)


def tokens_for(cfg: t.Config, process: t.Process, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, cfg.vocab_size, (rows, cfg.train_seq_len + 1), generator=generator, dtype=torch.int32)
    return ids.to(process.device)


def stepping(cfg: t.Config, **more) -> tuple[t.Trainer, torch.Tensor]:
    """A trainer that has taken two steps, and a step's tokens."""
    process = t.Process(more.get("dtype", "auto"))
    trainer = t.Trainer(cfg, process, model_on(process, cfg))
    tokens = tokens_for(cfg, process, trainer.share)
    for step in range(2):
        trainer.step(tokens, step, 1.0)
    trainer.synchronize()
    return trainer, tokens


# ---- attention and the forward pass ----


def test_fp32_attention_at_the_full_head_shape():
    """Grouped keys in fp32, forward and backward; on a GPU without the scores of all heads in memory."""
    process, heads, shared, dim = t.Process("fp32"), 8, 4, 64
    length = 2048 if process.cuda else 256
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, h, dim, generator=generator) for h in (heads, shared, shared))
    groups = [x.repeat_interleave(heads // shared, 2) for x in (k, v)]
    reference = [x.double().transpose(1, 2).requires_grad_() for x in (q, *groups)]
    expected = F.scaled_dot_product_attention(*reference, is_causal=True).transpose(1, 2)
    expected.square().sum().backward()
    own = [x.to(process.device).requires_grad_() for x in (q, k, v)]
    before = process.memory()[1] if process.cuda else 0
    if process.cuda:
        torch.cuda.reset_peak_memory_stats()
    y = t.attend(*own)
    y.square().sum().backward()
    assert torch.allclose(y.double().cpu(), expected.detach(), atol=1e-4)
    assert torch.allclose(own[0].grad.double().cpu(), reference[0].grad.transpose(1, 2), atol=1e-3)
    summed = reference[1].grad.transpose(1, 2).unflatten(2, (shared, -1)).sum(3)
    assert torch.allclose(own[1].grad.double().cpu(), summed, atol=1e-3)
    scores = 4 * 2 * heads * length**2
    assert not process.cuda or process.memory()[1] - before < scores


@pytest.mark.parametrize("variables", [{}, {"XSA_LAST_N": "2"}])
def test_fp32_forward_and_backward_whatever_the_layout_of_attention(variables):
    """The plain kernel, which PyTorch takes where no other fits, lays its result out as [B, H, T, D]."""
    cfg, process = two_layers(**variables), t.Process("fp32")
    model, ids = model_on(process, cfg), tokens_for(cfg, process, 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = model(ids[:, :-1], ids[:, 1:]).mean()
        plain.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    assert torch.allclose(loss, plain, atol=1e-4)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4 + 1e-2 * float(grad.abs().max()))


# ---- a step of training ----


@on_a_gpu
def test_a_step_waits_for_nothing():
    """But for the step before, whose end an event tells."""
    trainer, tokens = stepping(two_layers(USE_COMPILE="0"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            trainer.step(tokens, step, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.synchronize()
    assert not trainer.fault and bool(torch.isfinite(trainer.flat.loss))


def test_a_gradient_that_is_not_finite_is_known_without_a_wait():
    """On a GPU by the end of the next step, which is when a run asks."""
    trainer, tokens = stepping(two_layers(USE_COMPILE="0"))
    gather = trainer.flat.gather_gradients

    def poisoned(*arguments):
        gather(*arguments)
        trainer.flat.grads[17] = float("nan")

    trainer.flat.gather_gradients = poisoned
    trainer.step(tokens, 2, 0.5)
    trainer.flat.gather_gradients = gather
    trainer.step(tokens, 3, 1.0)
    assert trainer.fault.startswith("step 3: ") and "rate 0.5" in trainer.fault, trainer.fault


def test_a_checkpoint_is_of_its_step_and_is_put_back(tmp_path):
    cfg = two_layers(USE_COMPILE="0")
    trainer, tokens = stepping(cfg)
    wanted = {name: x.cpu().clone() for name, x in trainer.tensors().items()}
    settings = {f.name: f.default for f in t.VARIABLES}
    trainer.save(tmp_path, Quiet(), {"step": 2, "seconds": 1.0, "settings": settings, "explicit": [],
                                     "train_tokens": 1})
    for step in range(2, 6):
        trainer.step(tokens, step, 1.0)
    trainer.synchronize()
    facts, found = t.read_checkpoint(t.checkpoints(tmp_path)[-1])
    assert facts["step"] == 2 and wanted.keys() == found.keys()
    for name, x in wanted.items():
        assert torch.equal(x, found[name]), name
    assert not torch.equal(trainer.flat.weights.cpu(), found["weights"])
    trainer.restore(facts, found)
    for name, x in trainer.tensors().items():
        assert torch.equal(x.cpu(), wanted[name]), name


# ---- export ----


def test_rounding_is_that_of_a_cpu():
    """Values, and the loss with them. On a GPU sums are in another order, so a few values in a thousand may differ."""
    cfg, cpu = two_layers(USE_COMPILE="0", CALIBRATION_TOKENS="1024"), t.Process("fp32")
    cpu.cuda, cpu.device = False, torch.device("cpu")
    sides = []
    for process in (t.Process("fp32"), cpu):
        model, text = model_on(process, cfg), tokens_for(cfg, process)
        exporter = t.Exporter(cfg, Quiet(), model, text, 1, 1 << 30, 0.0)
        stored = exporter.rounded(0.0)
        rounded = t.build_model(cfg, {name: entry.tensor() for name, entry in stored.items()}, process)
        with torch.no_grad():
            loss = float(rounded(text[:, :-1], text[:, 1:]).mean())
        sides.append((stored, loss))
    (here, loss), (there, expected) = sides
    same = [np.mean(here[name].values == there[name].values) for name in there]
    sizes = [there[name].values.size for name in there]
    assert np.average(same, weights=sizes) >= 0.999 and abs(loss - expected) < 1e-4


# ---- test-time training ----


def test_documents_walk_together_as_each_alone():
    """Adapters, moments and counts of steps are a document's own, whatever shares the batch."""
    cfg = two_layers(TTT_ENABLED="1", EVAL_SEQ_LEN="64", EVAL_STRIDE="16", TTT_LORA_CHUNK_TOKENS="32", USE_COMPILE="0",
                     TTT_LORA_LR="0.01", VAL_BATCH_SIZE="256", EVAL_MAX_SECONDS="0")
    process, rng = t.Process("fp32"), np.random.default_rng(0)
    ids = rng.integers(2, cfg.vocab_size, 301)
    ids[[0, 170]] = t.BOS_ID

    def walk(ids):
        stream = t.Stream(ids, OneByte(), process.device)
        return t.test_time_train(cfg, process, Quiet(), model_on(process, cfg), stream)[0].result().nats

    together = walk(ids)
    assert np.allclose(together[:170], walk(ids[:171]), atol=1e-4)
    assert np.allclose(together[170:], walk(ids[170:]), atol=1e-4)


# ---- ranks and signals ----


def test_a_process_group_of_one():
    """gloo beside the device's own: sums there, numbers and objects on the CPU."""
    process = t.Process("fp32")
    backend = "cpu:gloo,cuda:nccl" if process.cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        process.world = 2  # so that it asks the group, in which it is alone
        x = torch.arange(5.0, device=process.device)
        rows = x.clone()[None]
        process.begin_gather_(rows)()
        assert process.sum_(x) is x and torch.equal(x, process.scatter_sum_(rows))
        assert x.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert process.heard(3.5) == (3.5, 0) and process.agree({"a": 1}) == {"a": 1}
    finally:
        dist.destroy_process_group()


def test_sigterm_in_a_step_exits_143_and_the_run_goes_on(start):  # noqa: F811
    variables = LONG | {"USE_COMPILE": "0", "ITERATIONS": "60", "EXPORT_ENABLED": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
    cut = start(**variables | {"ITERATIONS": "100000"})
    cut.until(r"^step:5/")
    cut.process.send_signal(signal.SIGTERM)
    cut.end(60)
    assert cut.code == 143 and "; to go on: " in cut.err, cut.err
    again = start(**variables | {"ITERATIONS": "100000", "RESUME": "1", "MAX_WALLCLOCK_SECONDS": "UNSET"})
    again.until("resumed from step")
    again.process.send_signal(signal.SIGTERM)
    again.end(60)
    assert again.code == 143, again.err


# ---- what is compiled, last since it takes longest ----


def compiled_since() -> list:
    """What torch has compiled since the last call."""
    met = torch._dynamo.utils.get_compilation_metrics()
    torch._dynamo.utils.clear_compilation_metrics()
    return met


@on_a_gpu
def test_a_bf16_step_takes_a_fused_attention_and_compiles_to_the_same_loss():
    cfg, process = two_layers(), t.Process("bf16")
    model, ids = model_on(process, cfg), tokens_for(cfg, process, 8)
    compiled_since()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        eager = model(ids[:, :-1], ids[:, 1:]).mean()
        eager.backward()
        torch.cuda.synchronize()
    names = [event.key.lower() for event in profile.key_averages()]
    assert any("flash" in n or "cudnn" in n or "fmha" in n for n in names), names
    assert not any("softmax" in n and "flash" not in n and "cudnn" not in n for n in names), names
    forward = t.compiled(model, dataclasses.replace(cfg, use_compile="1"), process)
    loss = forward(ids[:, :-1], ids[:, 1:]).mean()
    assert abs(float(loss) - float(eager)) < 0.02
    assert [graph.co_name for graph in compiled_since()] == ["forward"]


@on_a_gpu
def test_a_pass_stays_within_the_memory_that_is_reckoned_with():
    """Compiled, by the graph of the test before; the model's weights and gradients are there already."""
    cfg, process = dataclasses.replace(two_layers(), use_compile="1"), t.Process("bf16")
    model, ids = model_on(process, cfg), tokens_for(cfg, process, 8)
    forward = t.compiled(model, cfg, process)
    forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(ids[:, :-1], ids[:, 1:]).mean().backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= t.activation_bytes(cfg, process) * ids[:, 1:].numel(), used / ids[:, 1:].numel()


@on_a_gpu
def test_a_walk_that_was_primed_compiles_nothing_and_waits_once_a_turn(monkeypatch):
    cfg = two_layers(TTT_ENABLED="1", EVAL_SEQ_LEN="256", EVAL_STRIDE="128", TTT_LORA_CHUNK_TOKENS="128",
                     VAL_BATCH_SIZE="1024", EVAL_MAX_SECONDS="0", NUM_LAYERS="1", SPARSE_START_LAYER="0")
    process, rng = t.Process("bf16"), np.random.default_rng(0)
    ids = rng.integers(2, cfg.vocab_size, 6001)
    ids[[0, 1900, 2000, 2050, 2890, 5900]] = t.BOS_ID
    stream = t.Stream(ids, OneByte(), process.device)
    compiled_since()
    t.prime(cfg, process, Quiet(), stream, OneByte())
    forward = [graph for graph in compiled_since() if graph.co_name == "forward"]
    assert len(forward) == 2, "one shape that scores, and one that learns"
    turns, waits = [0], [0]
    learn, reached = t.learn_documents, t.Process.reached

    def counted_turn(*arguments):
        turns[0] += 1
        return learn(*arguments)

    def counted_wait(self, mark):
        waits[0] += not mark.query()
        return reached(self, mark)

    monkeypatch.setattr(t, "learn_documents", counted_turn)
    monkeypatch.setattr(t.Process, "reached", counted_wait)
    evaluator, _ = t.test_time_train(cfg, process, Quiet(), model_on(process, cfg), stream)
    score = evaluator.result()
    assert score.faults == [] and np.isfinite(score.nats).all()
    assert compiled_since() == []
    assert turns[0] > 10 and waits[0] <= turns[0] + 5
