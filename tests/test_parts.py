"""The parts one by one: bytes, model, optimizers, schedule, loader, windows, artifact."""

import collections
import importlib
import inspect
import itertools
import os
import struct
import sys
import threading
import time

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import train_gpt as t


class Quiet:
    """A log that says nothing."""

    main = False

    def __call__(self, *args, **more):
        pass

    metric = progress = __call__

    def silent(self):
        return self


class Lone(t.Process):
    """A process of one rank (or a pretended share of several) on the CPU, in fp32."""

    def __init__(self, rank=0, world=1):
        self.rank, self.world, self.main, self.cuda = rank, world, rank == 0, False
        self.device, self.dtype, self.signals = torch.device("cpu"), torch.float32, t.Signals()

    def heard(self, seconds):
        return seconds, 0

    def sum_(self, tensor):
        return tensor

    def scatter_sum_(self, rows):
        return rows[self.rank]

    def begin_gather_(self, rows):
        return lambda: None

    def agree(self, value):
        return value

    def memory(self):
        return 2**33, 0


def model_of(cfg, seed=0, noise=0.0):
    torch.manual_seed(seed)
    model = t.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


class OneByte:
    """A tokenizer whose every piece is a byte long."""

    def target_bytes(self, tokens):
        return np.ones(len(tokens) - 1, dtype=np.int64)


def stream_of(ids):
    return t.Stream(np.array(ids), OneByte(), torch.device("cpu"))


# ---- bytes ----


def test_counted_bytes_equal_decoded_text(corpus):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    tokenizer = t.Tokenizer(corpus / "tokenizer.model", sp.vocab_size())
    texts = ["One two  three", "caf\u00e9 \u4e16\u754c \U0001f600 end", "x", "def f(a, b):\n    return a", "\u2581odd"]
    assert any(sp.is_byte(i) for i in sp.encode(texts[1])), "the test needs byte-fallback pieces"
    for text in texts:
        ids = np.array([t.BOS_ID, *sp.encode(text)])
        assert tokenizer.target_bytes(ids).sum() == len(sp.decode(ids[1:].tolist()).encode())
    # over several documents the BOS between them is worth nothing and takes the next piece's space with it
    stream = np.concatenate([[t.BOS_ID, *sp.encode(text)] for text in texts])
    assert tokenizer.target_bytes(stream).sum() == sum(len(sp.decode(sp.encode(x)).encode()) for x in texts)


def test_unknown_and_control_count_nothing(corpus):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    tokenizer = t.Tokenizer(corpus / "tokenizer.model", sp.vocab_size())
    the = next(i for i in range(400) if sp.id_to_piece(i) == "\u2581the")
    ids = np.array([the, the, sp.unk_id(), the, t.BOS_ID, the])
    assert tokenizer.target_bytes(ids).tolist() == [4, 0, 3, 0, 3]


# ---- model ----


def test_parameter_count_at_the_published_shape():
    with torch.device("meta"):
        model = t.GPT(t.load_config({"PRESET": "seed"})[0])
    assert sum(p.numel() for p in model.parameters()) == 26_823_545


def test_sidecar_and_bigram_do_nothing_at_initialisation(tiny):
    ids = torch.randint(2, 400, (2, 32))
    full, bare = tiny(), tiny(SPARSE_HIDDEN_DIM=0, BIGRAM_VOCAB_SIZE=0)
    a, b = model_of(full), model_of(bare)
    b.load_state_dict(a.state_dict(), strict=False)
    assert torch.equal(a(ids), b(ids))
    with torch.no_grad():
        a.sidecar_scale.fill_(1.0)
    assert not torch.equal(a(ids), b(ids))


def test_loss_and_logits_come_from_one_pass(tiny):
    model, ids = model_of(tiny(), noise=0.05), torch.randint(2, 400, (3, 33))
    logits = model(ids[:, :-1])
    nats = model(ids[:, :-1], ids[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(nats.flatten(), expected) and logits.abs().max() <= 30
    rows = torch.tensor([[0, 5], [31, 2], [7, 7]])
    assert torch.allclose(model(ids[:, :-1], rows=rows), logits[torch.arange(3)[:, None], rows], atol=1e-5)


def test_model_is_causal(tiny):
    model = model_of(tiny(XSA_LAST_N=1), noise=0.05)
    ids = torch.randint(2, 400, (1, 32))
    changed = ids.clone()
    changed[0, 20:] = torch.randint(2, 400, (12,))
    assert torch.allclose(model(ids)[:, :20], model(changed)[:, :20], atol=1e-5)
    assert not torch.allclose(model(ids)[:, 20:], model(changed)[:, 20:], atol=1e-3)


@pytest.mark.parametrize("mask", [0, 1])
def test_document_boundary(tiny, mask):
    """With attention and MLP silent, only smear, bigram and sidecar could reach over a BOS."""
    model = model_of(tiny(BOS_MASK=mask), noise=0.2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.proj.weight.zero_()
    ids = torch.randint(2, 400, (1, 32))
    ids[0, 16] = t.BOS_ID
    changed = ids.clone()
    changed[0, :16] = torch.randint(2, 400, (16,))
    same = [bool(torch.allclose(model(ids)[0, i], model(changed)[0, i], atol=1e-5)) for i in range(16, 20)]
    assert all(same) if mask else not any(same[:2]), same
    # a document reads the same wherever it lies
    if mask:
        assert torch.allclose(model(ids[:, 16:])[0], model(ids)[0, 16:], atol=1e-5)


@pytest.mark.parametrize("length, heads, shared, dim", [(1, 2, 1, 8), (64, 4, 4, 16), (65, 4, 2, 16), (150, 6, 2, 8),
                                                        (513, 2, 1, 8), (700, 3, 1, 8)])
def test_attention_in_blocks_is_attention(length, heads, shared, dim):
    """Values and gradients against PyTorch's kernel, at lengths below, at and over a block, and of many blocks; in
    bf16, for which it is taken, rounding at most twice as much as that kernel, which keeps its scores in fp32."""
    torch.manual_seed(0)
    shapes = ((2, length, heads, dim), (2, length, shared, dim), (2, length, shared, dim))
    ours = [torch.randn(shape).mul_(2).requires_grad_() for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    got = t.attend_in_blocks(*ours)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs), is_causal=True, enable_gqa=True).transpose(1, 2)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(got, expected, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)
    rounded = [x.detach().bfloat16() for x in ours]
    kernel = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in rounded), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.equal(t.attend(*rounded), t.attend_in_blocks(*rounded))
    error, least = ((x - expected).square().mean().sqrt() for x in (t.attend(*rounded), kernel))
    assert error <= 2 * least


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norm_is_rms_norm(dtype, close):
    torch.manual_seed(0)
    for size in (1e-4, 1.0, 300.0):
        a = (size * torch.randn(3, 5, 192)).to(dtype).requires_grad_()
        b, weight = a.detach().clone().requires_grad_(), torch.randn(3, 5, 192).to(dtype)
        got, expected = t.norm(a), torch.nn.functional.rms_norm(b, (192,))
        (got * weight).sum().backward()
        (expected * weight).sum().backward()
        assert got.dtype == dtype and torch.allclose(got, expected, rtol=close, atol=close)
        assert torch.allclose(a.grad, b.grad, rtol=5 * close, atol=2 * close * float(b.grad.abs().max()))


def test_norm_takes_a_gain_a_row():
    x, gain = torch.randn(2, 3, 4, 8).requires_grad_(), torch.rand(4, 1).requires_grad_()
    torch.testing.assert_close(t.norm(x, gain), torch.nn.functional.rms_norm(x, (8,)) * gain)
    t.norm(x, gain).square().sum().backward()
    assert torch.allclose(gain.grad, 2 * 2 * 3 * 8 * gain, rtol=1e-3), "each row has a mean square of 1"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_norm_of_the_stream_hands_on_the_stream(monkeypatch, gpu, dtype, close):
    """Its norm, x itself, and the gradient through both, in the form that a GPU fuses too; rows of any size."""
    if gpu:  # which computes in fp32
        monkeypatch.setattr(t, "fuses", lambda x: True)
        close = max(close, 1e-6)
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 96) * torch.tensor([1e-2, 1.0, 300.0])[:, None, None]).to(dtype).requires_grad_()
    g_normed, g_x = (torch.randn(3, 5, 96).to(dtype) for _ in range(2))
    wide = x.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    gradient, = torch.autograd.grad((expected * g_normed).sum() + (wide * g_x).sum(), wide)
    normed, same = t.StreamNorm.apply(x)
    found, = torch.autograd.grad([normed, same], x, [g_normed, g_x])
    assert normed.dtype == same.dtype == found.dtype == dtype
    for ours, plain in ((normed, expected), (same, wide), (found, gradient)):
        for row, other in zip(ours.double(), plain, strict=True):
            assert (row - other).norm() <= close * other.norm()


def test_a_model_is_the_same_in_the_form_that_a_gpu_fuses(monkeypatch, tiny):
    """Loss and all gradients, in fp32."""
    model, ids = model_of(tiny()), torch.randint(2, 256, (2, 33))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    results = []
    for fuses in (lambda x: False, lambda x: True):
        monkeypatch.setattr(t, "fuses", fuses)
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


def test_layers_side_by_side_are_each_alone():
    """Outputs, gradients of input and weights, and what a calibration hears."""
    torch.manual_seed(0)
    layers, x, heard = [t.Linear(6, n) for n in (8, 4, 4)], torch.randn(2, 5, 6).requires_grad_(), []
    for layer in layers:
        layer.watch = lambda y, x, gain, part: heard.append((y.size(-1), gain, part))
    weights = [layer.weight for layer in layers]
    sides = []
    for y in (t.side_by_side(x, tuple(layers), 0.7), torch.cat([layer(x, 0.7) for layer in layers], -1)):
        sides.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights])))
    for together, alone in zip(*sides, strict=True):
        torch.testing.assert_close(together, alone)
    assert heard[:3] == [(16, 0.7, slice(0, 8)), (16, 0.7, slice(8, 12)), (16, 0.7, slice(12, 16))]


def test_initialisation(tiny):
    model = model_of(tiny(MODEL_DIM=128, NUM_HEADS=2, BIGRAM_DIM=64))
    w = model.blocks[0].attn.q.weight
    assert torch.allclose(w @ w.T, torch.eye(128), atol=1e-4)
    assert model.blocks[1].mlp.proj.weight.abs().max() == 0
    bigram = model.bigram.proj.weight
    assert torch.allclose(bigram.T @ bigram, torch.eye(64) / 6, atol=1e-4)  # 1 / (2 x 3 layers)
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.sidecar_scale.abs().max() == 0 and model.sidecar.site.abs().max() == 0


FRONTIER = {"MLP_SLOPE": 0.3, "NUM_LOOPS": 2, "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_RESIDUAL_START": 1,
            "SKIP_GATES_ENABLED": 1, "SMEAR_GATE_ENABLED": 0, "BIGRAM_VOCAB_SIZE": 0, "MUON_ROW_NORMALIZE": 1}


@pytest.mark.parametrize("variables", [
    {"PRESET": "seed"}, {"PRESET": "seed", "NUM_LAYERS": 2, "XSA_LAST_N": 1, "TIE_EMBEDDINGS": 0},
    {"PRESET": "frontier", "BIGRAM_VOCAB_SIZE": 0, "SPARSE_HIDDEN_DIM": 0, "PARALLEL_RESIDUAL_START": 2},
    {"PRESET": "frontier", "NUM_LOOPS": 1, "LOOP_START": 2},
])
def test_compiles_without_graph_breaks(tiny, variables):
    """In both orders of the layers, a graph each, to learn and to score; to go back to one takes no new graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    cfg = tiny(**variables)
    model, ids = model_of(cfg, noise=0.1), torch.randint(2, 400, (2, 33), dtype=torch.int32)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    rows, orders = torch.zeros(2, 4, dtype=torch.int64), {tuple(range(cfg.num_layers)), cfg.layer_order}
    for order in (*orders, *orders):
        model.order = order
        nats = compiled(ids[:, :-1], ids[:, 1:])
        nats.mean().backward()
        assert torch.allclose(nats, model(ids[:, :-1], ids[:, 1:]), atol=1e-5)
        with torch.no_grad():
            compiled(ids[:, :-1], ids[:, :4], rows)
    assert len(graphs) == 2 * len(orders) and len(orders) == (2 if cfg.num_loops else 1)


def test_rope_is_made_once_a_length_and_outside_the_graph(tiny, monkeypatch):
    """What is compiled holds no cosine; windows that RoPE is scaled for differ in their tables, not in the graph."""
    torch._dynamo.reset()
    cfg, graphs, made, rope = tiny(), [], [], t.GPT.rope
    model, ids = model_of(cfg, noise=0.05), torch.randint(2, 400, (2, 33), dtype=torch.int32)

    def backend(module, inputs):
        graphs.append(module)
        return module

    monkeypatch.setattr(torch, "compile", lambda model, **how: torch._dynamo.optimize(backend, nopython=True)(model))
    monkeypatch.setattr(t.GPT, "rope", lambda self, *key: made.append(key) or rope(self, *key))
    monkeypatch.setattr(t, "compiles", lambda cfg, process: True)
    forward = t.compiled(model, cfg, Lone())
    for window in (0, 4096, 0, 4096):
        nats = forward(ids[:, :-1], ids[:, 1:], None, window)
        assert torch.allclose(nats, model(ids[:, :-1], ids[:, 1:], None, window), atol=1e-5)
    assert made.count((32, 0)) == made.count((32, 4096)) == 3, "twice by the bare model, once for the compiled one"
    assert len(graphs) == 1 and not any(node.target in (torch.cos, torch.sin, "cos", "sin")
                                        for node in graphs[0].graph.nodes)


def test_flash_attention_3_may_return_a_tuple(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    q = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16).as_subclass(OnGPU)
    for result in (q, (q, torch.zeros(1))):
        monkeypatch.setattr(t, "flash_attn_func", lambda *args, result=result, **more: result)
        assert t.attend(q, q, q) is q


def test_flash_attention_3_is_found_where_it_may_be(monkeypatch, tmp_path):
    """As a module, in its package, and through the package kernels, which is kept from the network; else None."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert t.find_flash_attention() is None and "HF_HUB_OFFLINE" not in os.environ
    for path, source in (
        ("kernels.py", "import os\ndef get_kernel(name, version):\n    assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
         "    return type('Kernel', (), {'flash_attn_func': f'{name} {version}'})\n"),
        ("flash_attn_3/flash_attn_interface.py", "flash_attn_func = 'in a package'\n"),
        ("flash_attn_interface.py", "flash_attn_func = 'a module'\n"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
        importlib.invalidate_caches()
        found = t.find_flash_attention()
        for name in ("kernels", "flash_attn_3.flash_attn_interface", "flash_attn_3", "flash_attn_interface"):
            sys.modules.pop(name, None)
        assert found == {"kernels.py": "kernels-community/flash-attn3 1",
                         "flash_attn_interface.py": "a module"}.get(path, "in a package")
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so: no such file')\n")
    (tmp_path / "flash_attn_3/flash_attn_interface.py").write_text("other = 'an older one without the function'\n")
    (tmp_path / "kernels.py").write_text("def get_kernel(name): raise OSError('nothing is kept here')\n")
    importlib.invalidate_caches()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert t.find_flash_attention() is None and os.environ["HF_HUB_OFFLINE"] == "1"
    for name in ("kernels", "flash_attn_3.flash_attn_interface", "flash_attn_3"):
        sys.modules.pop(name, None)


def test_fp32_attention_asks_for_no_grouped_keys(monkeypatch):
    """Which a GPU's memory-efficient kernel refuses, so that all scores would be written out; bf16 has kernels."""
    asked, kernel = [], F.scaled_dot_product_attention

    def watched(q, k, v, **how):
        asked.append((q.size(1) == k.size(1) == v.size(1), how["enable_gqa"]))
        return kernel(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k = torch.randn(1, 8, 4, 8), torch.randn(1, 8, 2, 8)
    t.attend(q, k, k)
    assert asked == [(True, False)]


def test_a_thread_works_on_its_rank_s_gpu(monkeypatch):
    """The loader's, which pins memory."""
    process, chosen = Lone(), []
    process.cuda, process.device = True, torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))
    assert process.thread().submit(threading.get_ident).result() == chosen[0][0] != threading.get_ident()
    assert chosen == [(chosen[0][0], torch.device("cuda", 3))]
    assert "ThreadPoolExecutor(" in inspect.getsource(t.Process.thread)
    assert inspect.getsource(t).count("ThreadPoolExecutor(") == 1, "a thread that is not told of its GPU"


@pytest.mark.parametrize("cap", [0.1, 30.0, 75.0])
def test_nats_are_the_cross_entropy_of_the_logits(tiny, cap):
    """Up to the largest softcap, and with logits far beyond it."""
    model, ids = model_of(tiny(LOGIT_SOFTCAP=cap), noise=3.0), torch.randint(2, 400, (2, 33))
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(model(ids[:, :-1], ids[:, 1:]).flatten(), expected, rtol=1e-5, atol=1e-4)


# ---- how much work there is: counted by the profiler, since a time proves nothing ----


def operations(action) -> collections.Counter:
    """How often each operation of torch is called in `action`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return collections.Counter({event.key: event.count for event in profile.key_averages()})


@pytest.mark.parametrize("layers, micro", [(2, 4), (3, 1)])
def test_a_step_reads_one_number_from_the_device(tiny, layers, micro):
    """Whether the step was finite, on a GPU read when the next step is queued; however many layers and passes."""
    cfg = tiny(NUM_LAYERS=layers, MICRO_BATCH_SEQS=micro)
    trainer, tokens = t.Trainer(cfg, Lone(), model_of(cfg)), torch.randint(2, 400, (8, 33), dtype=torch.int32)
    trainer.step(tokens, 0, 1.0)
    seen = operations(lambda: trainer.step(tokens, 1, 1.0))
    # the fused AdamW of the CPU reads found_inf itself, once a group; that of CUDA does so inside its kernel
    assert seen["aten::_local_scalar_dense"] - seen["aten::_fused_adamw_"] == 1
    assert seen["aten::nonzero"] == 0


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_newton_schulz_runs_once_a_shape(tiny, layers):
    """Two fused products an iteration for each shape of matrix, not for each matrix; and one AdamW for all the rest."""
    cfg = tiny(NUM_LAYERS=layers, MUON_BACKEND_STEPS=5)
    model = model_of(cfg)
    shapes = {p.shape for name, p in model.named_parameters() if model.role(name) == "matrix"}
    trainer, tokens = t.Trainer(cfg, Lone(), model), torch.randint(2, 400, (8, 33), dtype=torch.int32)
    trainer.step(tokens, 0, 1.0)
    seen = operations(lambda: trainer.step(tokens, 1, 1.0))
    assert seen["aten::baddbmm"] == 2 * 5 * len(shapes)
    assert seen["aten::_fused_adamw_"] == len(trainer.optimizers.adam.param_groups)


def test_evaluation_is_as_many_operations_for_many_windows(tiny):
    """Windows of a batch are gathered by index: twenty of them take as many operations as five."""
    cfg = tiny(EVAL_SEQ_LEN=16, EVAL_STRIDE=4, VAL_BATCH_SIZE=1 << 16)
    model, counts = model_of(cfg), []
    for windows in (5, 20):
        stream = stream_of(list(range(1, 100)) * ((64 * windows) // 99 + 1))
        seen = operations(lambda: t.evaluate(cfg, Lone(), Quiet(), model, stream, 4, ""))  # noqa: B023
        counts.append((sum(n for name, n in seen.items() if name in ("aten::linear", "aten::index_add_", "aten::gather",
                                                                     "aten::embedding", "aten::item")),
                       seen["aten::item"]))
    assert counts[0] == counts[1] and counts[0][0] > 0


# ---- optimizers, schedule ----


def test_newton_schulz_approaches_the_orthogonal_factor():
    """It keeps the singular vectors and sends each singular value through the published quintic, five times."""
    torch.manual_seed(0)
    for shape in ((3, 24, 24), (2, 16, 40), (2, 40, 16)):
        u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        sigma = torch.linspace(0.2, 1.0, 16 if 40 in shape else 24).expand(shape[0], -1)
        got = t.newton_schulz(u * sigma[:, None] @ vh, 5)
        expected = sigma / sigma.norm(dim=1, keepdim=True)
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        assert torch.allclose(got, u * expected[:, None] @ vh, atol=1e-3)
        assert 0.6 < torch.linalg.svdvals(got).min() and torch.linalg.svdvals(got).max() < 1.25


def test_flat_weights_are_the_models(tiny):
    model = model_of(tiny(), noise=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = t.FlatWeights(model, torch.device("cpu"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ids = torch.randint(2, 400, (2, 33))
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    assert flat.grads.abs().sum() > 0
    for name, p in model.named_parameters():
        assert p.data_ptr() >= flat.weights.data_ptr() and p.grad.data_ptr() >= flat.grads.data_ptr(), name
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert flat.reduce(Lone()).item() == pytest.approx(float(norm), rel=1e-5)
    assert t.clip_factor(norm, float(norm) / 2).item() == pytest.approx(0.5, rel=1e-4)
    assert t.clip_factor(norm, float(norm) * 2) == t.clip_factor(norm, 0) == 1


@pytest.mark.parametrize("variables", [{}, FRONTIER])
def test_muon_step_over_ranks(tiny, variables):
    """The runs of three ranks, one after another, are one rank's update, twice in a row."""
    cfg = tiny(GRAD_CLIP_NORM=0, **variables)
    updates = []
    for world in (1, 3):
        runs = []
        for rank in range(world):
            flat = t.FlatWeights(model_of(cfg), torch.device("cpu"), world)
            torch.manual_seed(5)
            optimizers = t.Optimizers(cfg, flat, Lone(rank, world))
            for step in range(2):
                for p in flat.parameters:
                    p.grad.normal_()
                optimizers.step(step, 0.0)
            runs.append(optimizers.muon.updates[rank, : flat.borders[rank + 1] - flat.borders[rank]])
        updates.append(torch.cat(runs))
    assert torch.allclose(updates[0], updates[1], atol=1e-5) and bool(updates[0].all())


def test_kernels_of_a_step_are_compiled_once(tiny, monkeypatch):
    """Momentum, rate and the clip's factor change from step to step, and the same graphs take them."""
    cfg, results, graphs, compile = tiny(USE_COMPILE=1, **FRONTIER), [], [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 64)  # as for the model
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compile(function, dynamic=dynamic, backend=counted))
    for cuda in (False, True):
        process, model, torch_state = Lone(), model_of(cfg), torch.manual_seed(5)
        process.cuda, flat = cuda, t.FlatWeights(model, torch.device("cpu"))
        optimizers, counts = t.Optimizers(cfg, flat, process), []
        for step in range(4):
            flat.grads.normal_(std=0.01 * 10**step, generator=torch_state)
            optimizers.step(step, 1 - step / 4)
            counts.append(len(graphs))
        results.append(torch.cat([flat.weights, optimizers.average]))
    shapes = {p.shape for name, p in model.named_parameters() if model.role(name) == "matrix"}
    assert counts == [2 + len(shapes)] * 4
    assert torch.allclose(*results, atol=1e-5)


def test_both_orders_of_the_layers_are_primed_before_the_clock(tiny):
    """As a compiled model must be; training then begins with each layer once, and weights that have not moved."""
    cfg, seen = tiny(**FRONTIER | {"WARMUP_STEPS": 2, "ENABLE_LOOPING_AT": 0.5}), []
    trainer = t.Trainer(cfg, Lone(), model_of(cfg))
    before, forward = trainer.flat.weights.clone(), trainer.forward
    trainer.forward = lambda *given: seen.append(trainer.model.order) or forward(*given)
    trainer.warm_up()
    assert seen == 2 * [(0, 1, 1, 1, 2)] + 2 * [(0, 1, 2)] and trainer.model.order == (0, 1, 2)
    assert torch.equal(trainer.flat.weights, before)
    fresh = t.Trainer(cfg, Lone(), model_of(cfg)).tensors()
    for name, x in trainer.tensors().items():
        assert name == "random" or torch.equal(x, fresh[name]), name


def test_optimizer_state_goes_on_where_it_was(tiny):
    """Two steps and two more are four."""
    cfg, tokens = tiny(**FRONTIER), torch.randint(2, 400, (8, 33), dtype=torch.int32)
    whole, first, second = (t.Trainer(cfg, Lone(), model_of(cfg)) for _ in range(3))
    for step in range(4):
        whole.step(tokens, step, 1.0)
    for step in range(2):
        first.step(tokens, step, 1.0)
    second.restore({"seconds": 0.0}, {name: x.clone() for name, x in first.tensors().items()})
    for step in range(2, 4):
        second.step(tokens, step, 1.0)
    assert torch.equal(whole.flat.weights, second.flat.weights)


@pytest.mark.parametrize("size", [8, 2, 3])
def test_gradients_are_those_of_the_step_alone(tiny, size):
    """However many passes it takes, and of a rank without sequences none. What separates the runs of ranks stays 0."""
    model, one = model_of(tiny(), noise=0.1), model_of(tiny(), noise=0.1)
    flat, alone = t.FlatWeights(model, torch.device("cpu"), 3), t.FlatWeights(one, torch.device("cpu"))
    tokens = torch.randint(2, 400, (8, 33), dtype=torch.int32)
    alone.gather_gradients(one, tokens, 8, 8)
    for _ in range(2):
        flat.gather_gradients(model, tokens, size, 8)
        for p, q in zip(flat.parameters, alone.parameters, strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert float(flat.loss) == pytest.approx(float(alone.loss)) and flat.loss > 1
    for row, (begin, end) in zip(flat.rows, itertools.pairwise(flat.borders), strict=True):
        assert row[: end - begin].any() and not row[end - begin :].any()
    flat.gather_gradients(model, tokens[:0], 8, 8)
    assert not flat.buffer.any()


def test_warm_up_leaves_the_weights(tiny):
    cfg = tiny(WARMUP_STEPS=2)
    model = model_of(cfg)
    trainer = t.Trainer(cfg, Lone(), model)
    before = trainer.flat.weights.clone()
    trainer.warm_up()
    assert torch.equal(before, trainer.flat.weights)
    assert not trainer.optimizers.muon.momentum_buffer.any()
    assert trainer.optimizers.adam.state_dict()["state"] == {}


def test_validation_is_off_the_clock(tiny):
    cfg = tiny(WARMUP_STEPS=0)
    trainer = t.Trainer(cfg, Lone(), model_of(cfg))
    trainer.warm_up()
    with trainer.off_the_clock():
        time.sleep(0.5)
    assert trainer.heard()[0] < 0.4


@pytest.mark.parametrize("cap, variables, seconds", [
    (600, {}, 588), (100, {}, 90), (20, {}, 15), (600, {"EXPORT_MAX_SECONDS": 30}, 570), (0, {}, 0),
    (0, {"EXPORT_MAX_SECONDS": 30}, 0), (600, {"EXPORT_ENABLED": 0}, 600), (600, {"EXPORT_MAX_SECONDS": 0}, 600)])
def test_what_the_export_takes_from_training(cap, variables, seconds):
    given = {"PRESET": "seed", "MAX_WALLCLOCK_SECONDS": cap} | variables
    cfg, _, _ = t.load_config({name: str(value) for name, value in given.items()})
    assert cfg.training_seconds == seconds


# ---- loader ----


def test_batches_do_not_depend_on_the_world_size(tiny, corpus):
    cfg, tokens = tiny(), t.Tokens(corpus, "train", 400)
    alone = t.Loader(cfg, tokens, Lone())
    for world in (2, 8):
        ranks = [t.Loader(cfg, tokens, Lone(r, world)) for r in range(world)]
        for step in (0, 3):
            assert torch.equal(alone.batch(step), torch.cat([r.batch(step) for r in ranks]))
    assert torch.equal(alone.next(), alone.batch(0)) and torch.equal(alone.next(), alone.batch(1))


def test_each_token_is_a_target_once_an_epoch(tiny, corpus):
    cfg, tokens = tiny(), t.Tokens(corpus, "train", 400)
    loader = t.Loader(cfg, tokens, Lone())
    steps = len(tokens) // cfg.train_batch_tokens
    targets = np.concatenate([loader.batch(step)[:, 1:].flatten().numpy() for step in range(steps)])
    assert np.array_equal(targets, tokens.read(1, len(targets)))


def test_stream_goes_on_over_shards_and_epochs(tmp_path):
    for i, values in enumerate(([1, 2, 3], [4, 5])):
        header = struct.pack("<256i", 20240520, 1, len(values), *[0] * 253)
        (tmp_path / f"fineweb_train_{i:06d}.bin").write_bytes(header + struct.pack(f"<{len(values)}H", *values))
    tokens = t.Tokens(tmp_path, "train", 10)
    assert len(tokens) == 5 and tokens.read(1, 9).tolist() == [2, 3, 4, 5, 1, 2, 3, 4, 5]


def test_calibration_text_is_spread_over_the_split(tiny, corpus):
    cfg, tokens = tiny(CALIBRATION_TOKENS=320), t.Tokens(corpus, "train", 400)
    text, size = t.calibration_text(cfg, Lone(), tokens)
    starts = [i * (len(tokens) - 32) // 10 for i in range(10)]
    assert size >= 1 and text.tolist() == [tokens.read(start, 33).tolist() for start in starts]


# ---- windows ----


def brute_force(model, ids, window, stride):
    """One target at a time: each from a window cut off just after the target's predecessor."""
    nats = []
    for target in range(len(ids) - 1):
        first = 0 if target < window else window + (target - window) // stride * stride + stride - window
        context = torch.tensor([ids[first : target + 1]])
        with torch.no_grad():
            nats.append(model(context, torch.tensor([[ids[target + 1]]]), torch.tensor([[target - first]])).item())
    return np.array(nats)


@pytest.mark.parametrize("length, window, stride", [
    (101, 16, 16), (101, 16, 4), (97, 16, 5), (64, 16, 16), (17, 16, 16), (16, 16, 8), (18, 16, 3), (2, 16, 8),
    (40, 16, 1), (33, 32, 32), (50, 13, 7),
])
def test_windows_equal_brute_force_for_any_world_size(tiny, length, window, stride):
    cfg = tiny(EVAL_SEQ_LEN=window, EVAL_STRIDE=stride, VAL_BATCH_SIZE=5 * window)
    model = model_of(cfg, noise=0.05)
    ids = np.random.default_rng(length).integers(1, 400, length).tolist()
    expected = brute_force(model, ids, window, stride)
    for world in (1, 3):
        nats, count = torch.zeros(length - 1), torch.zeros(length - 1, dtype=torch.int32)
        for rank in range(world):
            evaluator = t.Evaluator(cfg, Lone(rank, world), model, stream_of(ids), stride)
            evaluator.score(0, length - 1)
            nats, count = nats + evaluator.nats, count + evaluator.count
        assert (count == 1).all()
        assert np.allclose(nats.numpy(), expected, atol=1e-4)


def test_windows_in_chunks_score_every_target_once(tiny):
    cfg = tiny(EVAL_SEQ_LEN=16, EVAL_STRIDE=4)
    evaluator = t.Evaluator(cfg, Lone(), model_of(cfg), stream_of(list(range(1, 120))), 4)
    for begin, end in ((0, 7), (7, 30), (30, 31), (31, 118)):
        evaluator.score(begin, end)
    assert (evaluator.count == 1).all()


def test_a_target_scored_twice_or_never_is_a_fault(tiny):
    cfg = tiny(EVAL_SEQ_LEN=16, EVAL_STRIDE=4)
    for parts, odd in ((((0, 60), (56, 118)), 4), (((0, 60), (64, 118)), 4), (((0, 118),), 0)):
        evaluator = t.Evaluator(cfg, Lone(), model_of(cfg), stream_of(list(range(1, 120))), 4)
        for begin, end in parts:
            evaluator.score(begin, end)
        expected = [f"{odd} of 118 targets were not scored exactly once"] if odd else []
        assert evaluator.result().faults == expected


def test_only_scored_positions_reach_the_output_layer(tiny):
    cfg = tiny(EVAL_SEQ_LEN=32, EVAL_STRIDE=8)
    model, seen = model_of(cfg), []
    norm = t.norm
    evaluator = t.Evaluator(cfg, Lone(), model, stream_of(list(range(1, 300))), 8)
    try:
        t.norm = lambda x, *gain: seen.append(x.shape) or norm(x, *gain)
        evaluator.score(0, 299)
    finally:
        t.norm = norm
    assert seen[-1][1] == 8 and seen[0][1] == 32  # the last norm before the logits, the first after the embedding


def test_tokenizers_with_spaces_inside_pieces_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("one  two   three    four\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "ws"), vocab_size=40, model_type="bpe", pad_id=0,
        bos_id=1, eos_id=2, unk_id=3, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_by_whitespace=False, hard_vocab_limit=False, minloglevel=2)
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ws.model")).vocab_size()
    with pytest.raises(t.UserError, match="past its start"):
        t.Tokenizer(tmp_path / "ws.model", size)
