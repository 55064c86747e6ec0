"""Every formula once more, as a textbook has it, in float64 and by plain loops: the model, the optimizers, rounding,
evaluation and test-time training are held against it over several steps, columns, chunks and documents.

The formulas are those of the published model, of the papers, and of what the README and --help promise. Only the
functions of the first section call the script: what is renamed there is one edit here.
"""

import itertools
import math

import numpy as np
import pytest
import sentencepiece
import torch
from test_parts import Lone, Quiet, model_of, stream_of

import train_gpt as t

BOS = 1

# ---- the script: one function a call ----


def make_model(cfg, noise=0.3, seed=0):
    """A model of which every parameter is away from where it starts."""
    return model_of(cfg, seed, noise)


def ask_logits(model, ids, rows=None, window=0):
    return model(ids, None, rows, window)


def ask_nats(model, ids, targets, rows=None, window=0):
    return model(ids, targets, rows, window)


def make_optimizers(cfg, model):
    flat = t.FlatWeights(model, torch.device("cpu"))
    return t.Optimizers(cfg, flat, Lone())


def take_step(optimizers, step, factor):
    optimizers.step(step, factor)


def average_of(model, optimizers):
    """The moving average, by name: it lies as the flat weights do."""
    return {n: optimizers.average[p.storage_offset() :][: p.numel()].view(p.shape)
            for n, p in model.named_parameters()}


def make_trainer(cfg, model):
    return t.Trainer(cfg, Lone(), model)


def train_step(trainer, tokens, step, factor):
    """The mean loss before the step."""
    trainer.step(tokens, step, factor)
    return float(trainer.flat.loss)


def ask_factor(cfg, step, seconds):
    return t.rate_factor(cfg, step, seconds)


def round_matrices(cfg, matrices, bits, embedding, h=None, g=None):
    """Matrices of one shape as the artifact holds them, with H [n, cols, cols] and G [n, rows]."""
    if cfg.quant == "rowmax":
        return t.rowmax(matrices, bits, embedding)
    return t.balanced(matrices, bits, embedding, t.Sensitivity(*t.feedback_factors(h), g))


def calibrate(model, text, size):
    """{name: (factor, order, weight)}"""
    calibration = t.Calibration(model, model.cfg.quant_fisher)
    calibration.run(text, size, lambda: True)
    return {name: (s.factor, s.order, s.weight) for name, s in calibration.sensitivities().items()}


def score(cfg, model, stream, stride):
    evaluator = t.evaluate(cfg, Lone(), Quiet(), model, stream, stride, "")
    return evaluator.result()


def adapt_and_score(cfg, model, ids):
    """Test-time training: the nats, and for each target how many steps have learnt from it. In full mode the model is
    left as it has become."""
    evaluator, _ = t.test_time_train(cfg, Lone(), Quiet(), model, stream_of(ids))
    return evaluator.result().nats, evaluator.learnt[1:].tolist()


def read_tokenizer(path, size):
    return t.Tokenizer(path, size)


def text_stream(ids, tokenizer):
    return t.Stream(np.array(ids), tokenizer, torch.device("cpu"))


# ---- the model, one sequence at a time ----


def weights_of(model):
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()


def int32(x):
    """An integer as 32 bits hold it."""
    return (x + 2**31) % 2**32 - 2**31


def rope(x, dims, base, window):
    """x [positions, heads, width]: the pairs (i, i + dims/2) of each head turned by minus position times speed."""
    if window > 1024:
        base = base * (window / 1024) ** (dims / (dims - 2))
    half, columns, position = dims // 2, list(x.unbind(2)), torch.arange(len(x), dtype=torch.float64)[:, None]
    for i in range(half):
        angle = position * base ** (-2 * i / dims)
        a, b = columns[i], columns[i + half]
        columns[i] = a * angle.cos() + b * angle.sin()
        columns[i + half] = -a * angle.sin() + b * angle.cos()
    return torch.stack(columns, 2)


def layers_of(cfg, loops):
    """The layers in the order of a pass that runs LOOP_START to LOOP_END so many times more."""
    order = []
    for layer in range(cfg.num_layers):
        order.append(layer)
        if layer == cfg.loop_end:
            for _ in range(loops):
                order.extend(range(cfg.loop_start, cfg.loop_end + 1))
    return order


def plain_logits(w, cfg, ids, window=0, seen=None, loops=None):
    """Logits [positions, vocabulary] of one sequence of token ids, with NUM_LOOPS unless told. To the list `seen` is
    added what goes into each matrix and what comes out of it before any gain, (name, x, y), and for an embedding (name,
    ids, rows)."""
    ids, n = [int(i) for i in ids], len(ids)
    width = cfg.model_dim // cfg.num_heads
    opens = [i == 0 or (cfg.bos_mask and ids[i] == BOS) for i in range(n)]

    def matrix(name, x):
        y = x @ w[name].T
        if seen is not None:
            seen.append((name, x, y))
        return y

    def look_up(name, rows):
        y = w[name][rows]
        if seen is not None:
            seen.append((name, rows, y))
        return y

    def before(x):
        """Each position's predecessor, nothing before the first of a document."""
        y = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        return y.masked_fill(torch.tensor(opens)[:, None], 0)

    x = look_up("tok_emb.weight", ids)
    if cfg.bigram_vocab_size:
        last = cfg.bigram_vocab_size - 1
        buckets = [last if opens[i] else (int32(36313 * ids[i]) ^ int32(27191 * ids[i - 1])) % last for i in range(n)]
        x = x + matrix("bigram.proj.weight", look_up("bigram.embed.weight", buckets)) * w["bigram.scale"]
    x = rms_norm(x)
    if cfg.smear_gate_enabled:
        g = 1 / (1 + torch.exp(-w["smear"]))
        x = (1 - g) * x + g * before(x)
    order = layers_of(cfg, cfg.num_loops if loops is None else loops)
    x0, stack, half = x, [], len(order) // 2

    for place, layer in enumerate(order):
        name, scale = f"blocks.{layer}.", 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        if half <= place < 2 * half:
            skipped = w["skip_weights"][place - half] * stack.pop()
            if cfg.skip_gates_enabled:
                g = 1 / (1 + torch.exp(-w["skip_gates"][place - half]))
                x = g * x + (1 - g) * skipped
            else:
                x = x + skipped
        x = w[name + "resid_mix"][0] * x + w[name + "resid_mix"][1] * x0

        came_in = h = rms_norm(x)
        q, k, v = (matrix(f"{name}attn.{part}.weight", h) * scale for part in "qkv")
        q, k, v = q.view(n, -1, width), k.view(n, -1, width), v.view(n, -1, width)
        q, k = (rope(rms_norm(z), cfg.rope_dims or width, cfg.rope_base, window or n) for z in (q, k))
        heads, later = [], torch.ones(n, n).triu(1).bool()
        for head in range(cfg.num_heads):
            shared = head // (cfg.num_heads // cfg.num_kv_heads)
            own_q, own_k, own_v = q[:, head], k[:, shared], v[:, shared]
            scores = w[name + "attn.q_gain"][head] * own_q @ own_k.T / math.sqrt(width)
            y = torch.softmax(scores.masked_fill(later, -math.inf), 1) @ own_v
            if layer >= cfg.num_layers - cfg.xsa_last_n:
                y = y - (y * own_v).sum(1, keepdim=True) / (own_v * own_v).sum(1, keepdim=True) * own_v
            heads.append(y)
        x = x + matrix(name + "attn.proj.weight", torch.cat(heads, 1)) * w[name + "attn_scale"]

        parallel = cfg.parallel_residual_start >= 0 and layer >= cfg.parallel_residual_start
        h = matrix(name + "mlp.fc.weight", came_in if parallel else rms_norm(x)) * scale
        h = torch.where(h > 0, h, cfg.mlp_slope * h) ** 2
        x = x + matrix(name + "mlp.proj.weight", h) * w[name + "mlp_scale"]

        if layer in cfg.sparse_sites:
            site, h, kernel = cfg.sparse_sites.index(layer), rms_norm(x), w["sidecar.kernel"]
            gate = matrix("sidecar.gate.weight", h) + w["sidecar.site"][site]
            gate = gate / (1 + torch.exp(-gate))
            value = matrix("sidecar.value.weight", h)
            value = kernel[:, 2] * value + kernel[:, 1] * before(value) + kernel[:, 0] * before(before(value))
            x = x + matrix("sidecar.proj.weight", gate * value) * w["sidecar_scale"][site]
        if place < half:
            stack.append(x)

    output = "tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"
    z = matrix("adapted output" if "adapted output" in w else output, rms_norm(x))
    return cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)


def plain_nats(w, cfg, ids, targets, window=0, seen=None, loops=None):
    """Nats of each target of one sequence."""
    logits = plain_logits(w, cfg, ids, window, seen, loops)
    targets = torch.as_tensor(targets).long()
    return logits.exp().sum(1).log() - logits.gather(1, targets[:, None])[:, 0]


def plain_gradients(w, cfg, ids, targets, window=0):
    """Mean nats over sequences [n, T], and its gradients by name."""
    each = [plain_nats(w, cfg, i, j, window).mean() for i, j in zip(ids, targets, strict=True)]
    loss = torch.stack(each).mean()
    return loss.item(), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def text(n, seed=0, documents=(), vocab=400):
    ids = np.random.default_rng(seed).integers(2, vocab, n)
    ids[list(documents)] = BOS
    return ids.tolist()


SEED = {"PRESET": "seed", "NUM_LAYERS": 5, "SPARSE_START_LAYER": 2, "LOGIT_SOFTCAP": 5}
FRONTIER = {"PRESET": "frontier", "NUM_LAYERS": 4, "LOOP_START": 1, "LOOP_END": 2, "PARALLEL_RESIDUAL_START": 2,
            "BIGRAM_VOCAB_SIZE": 0, "SPARSE_HIDDEN_DIM": 0, "LOGIT_SOFTCAP": 3, "QK_GAIN_INIT": 2}
FORMS = {
    "published": SEED,
    "published, without masks at BOS": SEED | {"BOS_MASK": 0, "NUM_LAYERS": 4},
    "without LN scale, all dims turned": SEED | {"LN_SCALE": 0, "ROPE_DIMS": 0, "NUM_LAYERS": 6},
    "XSA, untied": SEED | {"XSA_LAST_N": 3, "TIE_EMBEDDINGS": 0, "SPARSE_EVERY": 2},
    "frontier": FRONTIER,
    "frontier, with what it leaves out": FRONTIER | {"BOS_MASK": 0, "XSA_LAST_N": 2, "BIGRAM_VOCAB_SIZE": 64,
                                                     "SMEAR_GATE_ENABLED": 1, "SKIP_GATES_ENABLED": 0},
    "a loop over layers with the sidecar, none in parallel": SEED | {"NUM_LOOPS": 1, "LOOP_START": 2, "LOOP_END": 4},
    "one layer three times": SEED | {"NUM_LAYERS": 1, "NUM_LOOPS": 2, "LOOP_START": 0, "LOOP_END": 0,
                                     "SKIP_GATES_ENABLED": 1, "SPARSE_START_LAYER": 0},
    "ids that overflow the hash": SEED | {"VOCAB_SIZE": 65535, "MODEL_DIM": 8, "BIGRAM_DIM": 4, "NUM_HEADS": 2,
                                          "NUM_KV_HEADS": 1},
}


@pytest.mark.parametrize("form, window", [*((form, 0) for form in FORMS), ("published", 2048), ("frontier", 1500)])
def test_forward_pass_and_every_gradient(tiny, form, window):
    """Logits, nats, picked rows, and the gradient of each parameter: none is at its start, so none is out of play."""
    cfg = tiny(**FORMS[form])
    model, start = make_model(cfg), model_of(cfg)
    for (name, p), (_, q) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        assert (p - q).abs().max() > 0.01, name
    if cfg.vocab_size > 400:
        tokens = torch.tensor([text(14, 1, [5], cfg.vocab_size), text(14, 2, [3, 4], cfg.vocab_size)])
    else:
        tokens = torch.tensor([text(45, 1, [0, 5, 6, 30, 44]), text(45, 2, [17, 33])])
    ids, targets, w = tokens[:, :-1], tokens[:, 1:], weights_of(model)
    logits, nats = ask_logits(model, ids, None, window), ask_nats(model, ids, targets, None, window)
    expected = torch.stack([plain_logits(w, cfg, one, window) for one in ids])
    assert torch.allclose(logits.double(), expected, atol=5e-5)
    assert expected.abs().max() > 0.3 * cfg.logit_softcap, "the softcap bends"
    losses = expected.exp().sum(2).log() - expected.gather(2, targets[:, :, None])[:, :, 0]
    assert torch.allclose(nats.double(), losses, atol=5e-5)
    rows = torch.tensor([[0, 12, 6, 6], [4, 3, 1, 11]])
    picked = ask_nats(model, ids, targets.gather(1, rows), rows, window)
    assert torch.allclose(picked.double(), losses.gather(1, rows), atol=5e-5)
    picked = ask_logits(model, ids, rows, window)
    assert torch.allclose(picked[1, 3].double(), expected[1, 11], atol=5e-5)

    losses.mean().backward()
    nats.mean().backward()
    for name, p in model.named_parameters():
        error, size = (p.grad.double() - w[name].grad).norm(), w[name].grad.norm()
        assert size > 0 and error < 1e-4 * size, name


def test_the_window_scales_the_base_of_rope(tiny):
    """10000 at a length of 2048 and 16 turned dimensions is 22,082, and to 1024 it is 10000: losses differ by it."""
    cfg = tiny(**SEED | {"NUM_HEADS": 2, "ROPE_DIMS": 16})
    model, ids = make_model(cfg), torch.tensor([text(48, 3, [0, 20])])
    w = {name: p.detach() for name, p in weights_of(model).items()}
    near, far = (ask_nats(model, ids[:, :-1], ids[:, 1:], None, window).double() for window in (1024, 2048))
    assert torch.allclose(near, ask_nats(model, ids[:, :-1], ids[:, 1:]).double()) and (near - far).abs().max() > 1e-3
    scaled = tiny(**SEED | {"NUM_HEADS": 2, "ROPE_DIMS": 16, "ROPE_BASE": 10000 * 2 ** (16 / 14)})
    assert round(scaled.rope_base) == 22082
    assert torch.allclose(far[0], plain_nats(w, scaled, ids[0, :-1], ids[0, 1:]), atol=1e-4)


# ---- the optimizers ----


class PlainAdam:
    """AdamW; with a decay of 0 Adam."""

    def __init__(self, beta1, beta2, epsilon=1e-8):
        self.beta1, self.beta2, self.epsilon, self.steps, self.m, self.v = beta1, beta2, epsilon, 0, {}, {}

    def step(self, w, gradients, rates, decays):
        self.steps += 1
        for name, g in gradients.items():
            self.m[name] = self.beta1 * self.m.get(name, 0) + (1 - self.beta1) * g
            self.v[name] = self.beta2 * self.v.get(name, 0) + (1 - self.beta2) * g * g
            m = self.m[name] / (1 - self.beta1**self.steps)
            v = self.v[name] / (1 - self.beta2**self.steps)
            shrunk = w[name] * (1 - rates[name] * decays[name])
            w[name] = (shrunk - rates[name] * m / (v.sqrt() + self.epsilon)).detach().requires_grad_()


def clipped(gradients, limit):
    """Scaled down to a norm of `limit` over all of them, never up."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    if limit and norm > limit:
        return {name: g * (limit / norm) for name, g in gradients.items()}
    return gradients


def newton_schulz(g, steps):
    x = g if g.size(0) <= g.size(1) else g.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
    return x if g.size(0) <= g.size(1) else x.T


class PlainTraining:
    """Muon, AdamW, the clip and the moving average, a parameter at a time. `w` has the weights by name."""

    def __init__(self, cfg, w):
        self.cfg, self.w, self.buffer = cfg, w, {}
        self.average = {name: x.detach().clone() for name, x in w.items()}
        self.adam = PlainAdam(cfg.beta1, cfg.beta2, cfg.adam_eps)

    def is_matrix(self, name):
        """What Muon has: 2-D weights of blocks, sidecar and projections."""
        return (name.endswith(".weight") or name == "sidecar.site") and self.embedding_rate(name) is None

    def embedding_rate(self, name):
        cfg = self.cfg
        if name in ("tok_emb.weight", "bigram.embed.weight"):
            return cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
        return cfg.head_lr if name == "lm_head.weight" else None

    def step(self, gradients, step, factor):
        cfg, rate = self.cfg, self.cfg.matrix_lr * factor
        gradients = clipped(gradients, cfg.grad_clip_norm)
        share = min(step / cfg.muon_momentum_warmup_steps, 1)
        momentum = cfg.muon_momentum_warmup_start + share * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)
        others, rates, decays, embed_wd = {}, {}, {}, cfg.adam_wd if cfg.embed_wd < 0 else cfg.embed_wd
        for name, g in gradients.items():
            if not self.is_matrix(name):
                lr = self.embedding_rate(name)
                others[name], rates[name] = g, factor * (cfg.scalar_lr if lr is None else lr)
                decays[name] = cfg.adam_wd if lr is None else 0.0 if name == "lm_head.weight" else embed_wd
                continue
            self.buffer[name] = momentum * self.buffer.get(name, 0) + g
            update = g + momentum * self.buffer[name]
            if cfg.muon_row_normalize:
                update = torch.stack([row / row.norm() for row in update])
            update = newton_schulz(update, cfg.muon_backend_steps)
            update = update * math.sqrt(max(1, g.size(0) / g.size(1)))
            self.w[name] = (self.w[name] * (1 - rate * cfg.muon_wd) - rate * update).detach().requires_grad_()
        self.adam.step(self.w, others, rates, decays)
        for name, x in self.w.items():
            self.average[name] = cfg.ema_decay * self.average[name] + (1 - cfg.ema_decay) * x.detach()


TRAINED = {"MUON_MOMENTUM_WARMUP_START": 0.5, "MUON_MOMENTUM": 0.9, "MUON_MOMENTUM_WARMUP_STEPS": 4, "MUON_WD": 0.7,
           "ADAM_WD": 0.4, "EMBED_WD": 0.6, "EMA_DECAY": 0.8, "BETA1": 0.8, "BETA2": 0.9, "MLP_MULT": 3,
           "MATRIX_LR": 0.03}
RULES = {
    "gradients far above and far below the limit": (SEED | TRAINED, 0.3, (30, 0.01, 0.2, 3, 0.02, 100, 0.05)),
    "no limit, one decay for all": (SEED | TRAINED | {"EMBED_WD": -1}, 0, (30, 0.01, 0.2, 3, 0.02, 100, 0.05)),
    "frontier, even rows": (FRONTIER | TRAINED, 0.3, (2, 0.1, 0.05, 1, 0.2, 3, 0.1)),
    "untied": (SEED | TRAINED | {"TIE_EMBEDDINGS": 0, "EMBED_LR": 0.1, "HEAD_LR": 0.02}, 0.3,
               (2, 0.1, 0.05, 1, 0.2, 3, 0.1)),
}


@pytest.mark.parametrize("rule", RULES)
def test_seven_steps_of_given_gradients(tiny, rule):
    """Weights and their average after each step; the gradients are another direction and size each time."""
    variables, limit, norms = RULES[rule]
    cfg = tiny(**variables, GRAD_CLIP_NORM=limit)
    model = make_model(cfg, 0.05)
    optimizers, plain, seen = make_optimizers(cfg, model), PlainTraining(cfg, weights_of(model)), set()
    torch.manual_seed(1)
    for step, norm in enumerate(norms):
        gradients = {n: torch.randn_like(p) * torch.rand(()) for n, p in model.named_parameters()}
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for name, p in model.named_parameters():
            gradients[name] *= norm / whole
            p.grad.copy_(gradients[name])
        factor = (1.0, 0.9, 0.8, 0.5, 0.7, 0.3, 0.1)[step]
        take_step(optimizers, step, factor)
        plain.step({name: g.double() for name, g in gradients.items()}, step, factor)
        average = average_of(model, optimizers)
        for name, p in model.named_parameters():
            assert torch.allclose(p.double(), plain.w[name], atol=1e-5), (step, name)
            assert torch.allclose(average[name].double(), plain.average[name], atol=1e-5), (step, name)
            seen.add((plain.is_matrix(name), p.ndim == 2 and p.size(0) > p.size(1)))
    assert (True, True) in seen and (True, False) in seen, "tall and wide matrices"


@pytest.mark.parametrize("variables", [SEED, FRONTIER])
def test_training_steps_from_tokens(tiny, variables):
    """The loss over five steps: the mean over all tokens, its gradients, the step, over three micro-batches."""
    cfg = tiny(**variables | TRAINED | {"NUM_LAYERS": 3}, TRAIN_BATCH_TOKENS=60, TRAIN_SEQ_LEN=20, MICRO_BATCH_SEQS=1,
               GRAD_CLIP_NORM=1)
    model = make_model(cfg, 0.2)
    trainer, plain = make_trainer(cfg, model), PlainTraining(cfg, weights_of(model))
    got, expected = [], []
    for step in range(5):
        tokens = torch.tensor([text(21, 10 * step + i, [3 * i]) for i in range(3)], dtype=torch.int32)
        got.append(train_step(trainer, tokens, step, 1 - step / 10))
        loss, gradients = plain_gradients(plain.w, cfg, tokens[:, :-1], tokens[:, 1:])
        expected.append(loss)
        plain.step(gradients, step, 1 - step / 10)
    assert got == pytest.approx(expected, abs=1e-4)


def test_warmdown_by_steps_and_by_time(tiny):
    for kept in ({}, {"EXPORT_MAX_SECONDS": 20}):  # without a cap nothing is kept for the export
        cfg = tiny(ITERATIONS=50, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=0, **kept)
        for step in range(50):
            expected = 1.0 if 50 - step >= 20 else (50 - step) / 20
            assert ask_factor(cfg, step, 7.0 * step) == pytest.approx(expected)
    cfg = tiny(ITERATIONS=10**6, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=60, EXPORT_ENABLED=0)
    for a_step in (0.3, 0.5, 4.0):  # seconds; at 4.0 twenty steps are more than all there is
        for step in range(1, int(60 / a_step)):
            left = 60 - step * a_step
            assert ask_factor(cfg, step, step * a_step) == pytest.approx(min(left / (20 * a_step), 1.0))
        assert ask_factor(cfg, int(60 / a_step) + 1, 60.1) == 0
    cfg = tiny(ITERATIONS=50, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=60, EXPORT_ENABLED=0)
    for a_step in (0.3, 1.1, 1.3, 4.0):  # seconds; the first two come to 50 steps in time
        for step in range(1, min(50, int(60 / a_step))):
            left = min(50 - step, 60 / a_step - step)
            assert ask_factor(cfg, step, step * a_step) == pytest.approx(min(left / 20, 1.0))


def test_warmdown_by_shares_and_its_floor(tiny):
    """WARMDOWN_FRAC is of steps or seconds, whichever end comes first, and wins over WARMDOWN_ITERS."""
    cfg = tiny(ITERATIONS=40, WARMDOWN_ITERS=20, WARMDOWN_FRAC=0.75, MIN_LR=0.1, MAX_WALLCLOCK_SECONDS=100,
               EXPORT_ENABLED=0)
    for a_step in (0.5, 2.0, 4.0):  # seconds; at 4.0 the clock ends it after 25 steps
        for step in range(min(40, int(100 / a_step)) + 1):
            left = 1 - max(step / 40, step * a_step / 100)
            assert ask_factor(cfg, step, step * a_step) == pytest.approx(max(min(left / 0.75, 1), 0.1))
    cfg = tiny(ITERATIONS=40, WARMDOWN_ITERS=20, MIN_LR=0.3)
    found = [ask_factor(cfg, step, 1.0) for step in (0, 30, 33, 34, 40, 45)]
    assert found == pytest.approx([1, 0.5, 0.35, 0.3, 0.3, 0.3])
    assert ask_factor(tiny(WARMDOWN_ITERS=0, MIN_LR=0.3), 12, 1.0) == 1


def test_layers_are_looped_from_a_share_of_training_on(tiny):
    """Each layer once until then, all its passes from then on; what is not run learns nothing, but decays."""
    cfg = tiny(**FRONTIER | TRAINED, TRAIN_BATCH_TOKENS=60, TRAIN_SEQ_LEN=20, GRAD_CLIP_NORM=1, ENABLE_LOOPING_AT=0.5)
    model = make_model(cfg, 0.2)
    trainer, plain, news = make_trainer(cfg, model), PlainTraining(cfg, weights_of(model)), []
    assert model.order == (0, 1, 2, 1, 2, 1, 2, 3) and len(model.skip_weights) == 4, "a model is looped unless told"
    for step in range(4):
        news.append(trainer.loop(step / 4))
        tokens = torch.tensor([text(21, 10 * step + i, [3 * i]) for i in range(3)], dtype=torch.int32)
        loss = train_step(trainer, tokens, step, 1.0)
        each = [plain_nats(plain.w, cfg, ids[:-1], ids[1:], loops=0 if step < 2 else 2).mean() for ids in tokens]
        expected = torch.stack(each).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-4), step
        gradients = torch.autograd.grad(expected, list(plain.w.values()), materialize_grads=True)
        plain.step(dict(zip(plain.w, gradients, strict=True)), step, 1.0)
    assert news == [True, False, True, False]


# ---- rounding ----


def damped(h):
    """H with a hundredth of its mean diagonal on the diagonal."""
    return h + np.eye(len(h)) * 0.01 * np.diag(h).mean()


def balanced(w, h, g, bits, embedding):
    """Values, row codes and column codes of a matrix w [rows, cols], from H and G: what a column's error costs once
    later columns make up for it, the steps by that, then optimal brain surgery a column at a time."""
    h, (rows, cols) = damped(h), w.shape
    order = np.argsort(-np.diag(h), kind="stable")
    inverse, inverses, cost = np.linalg.inv(h), [], np.empty(cols)
    for j in order:  # take each column out of the inverse when it is done
        cost[j] = 1 / inverse[j, j]
        inverses.append(inverse[j].copy())
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]

    g = np.maximum(g, g.mean() / 1000)
    row_step = 0.0025 * 2.0 ** (-bits) * (4 if embedding else 1) / np.sqrt(g)
    col_step = 1 / np.sqrt(cost)
    for j in range(cols):  # 127 steps must reach four standard deviations
        deviation = math.sqrt(np.mean((w[:, j] / row_step) ** 2))
        col_step[j] = max(col_step[j], 4 * deviation / 127)
    col_code = np.clip(np.round(8 * np.log2(col_step)), -128, 127)
    col_step = 2 ** (col_code / 8)
    row_code = np.empty(rows)
    for i in range(rows):  # and a row's largest value is at most 127
        step = max(row_step[i], np.abs(w[i] / col_step).max() / 127)
        row_code[i] = np.clip(math.ceil(8 * math.log2(step)), -128, 127)
    row_step = 2 ** (row_code / 8)

    left, values = w.copy(), np.empty_like(w)
    for j, row in zip(order, inverses, strict=True):
        values[:, j] = np.clip(np.round(left[:, j] / (row_step * col_step[j])), -127, 127)
        error = left[:, j] - values[:, j] * row_step * col_step[j]
        left = left - np.outer(error / row[j], row)  # columns that are done have a row of 0 here
    return values, row_code, col_code


@pytest.mark.parametrize("rows, cols, bits, embedding", [(40, 300, 2.0, False), (30, 200, 4.5, True)])
def test_balanced_rounding_a_column_at_a_time(tiny, rows, cols, bits, embedding):
    """Two matrices of one shape, wider than a block of 128 columns: inputs that lean on each other, rows of which
    one costs nothing, so that errors go from any column to all later ones."""
    rng = np.random.default_rng(cols)
    mix = rng.normal(size=(2, cols, cols)) * np.logspace(-1, 0.5, cols)
    h = np.stack([x.T @ x / 500 for x in rng.normal(size=(2, 500, cols)) @ mix])
    w, g = 0.05 * rng.normal(size=(2, rows, cols)), rng.lognormal(-9, 2, size=(2, rows))
    g[0, 3] = 0
    h, w, g = (torch.from_numpy(x).float() for x in (h, w, g))
    found = round_matrices(tiny(QUANT="balanced"), w, bits, embedding, h.clone(), g)
    for stored, *own in zip(found, w, h, g, strict=True):
        values, row_code, col_code = balanced(*(x.double().numpy() for x in own), bits, embedding)
        assert np.array_equal(stored.rows, row_code) and np.array_equal(stored.cols, col_code)
        alike = (stored.values == values).all(1)  # a value between two integers may fall either way, then its row too
        assert alike.mean() > 0.9, alike
        whole = values * 2 ** (row_code[:, None] / 8) * 2 ** (col_code / 8)
        assert np.allclose(stored.tensor().numpy()[alike], whole[alike], rtol=1e-5)
        plain = np.round(own[0].numpy() / 2 ** (row_code[:, None] / 8) / 2 ** (col_code / 8))
        assert (plain[:, 128:] != values[:, 128:]).mean() > 0.1, "errors are fed back"


@pytest.mark.parametrize("bits, embedding", [(6, False), (8, True), (4, False)])
def test_rowmax_rounding_a_row_at_a_time(tiny, bits, embedding):
    """The published rule: 2^bits values a row, the step at least that of a row whose largest weight is 1."""
    rng, top = np.random.default_rng(0), 2 ** (bits - 1) - 1
    w = torch.from_numpy(rng.normal(size=(2, 8, 700)) * np.logspace(-2, 1, 8)[:, None]).float()
    w[1, 5, 7] = 50.0
    found = round_matrices(tiny(QUANT="rowmax"), w, bits, embedding)
    for stored, matrix in zip(found, w, strict=True):
        for i, row in enumerate(matrix.double().numpy()):
            most = np.quantile(np.abs(row), 0.9999984) if embedding else np.abs(row).max()
            step = np.float16(max(most, 1) / top)
            values = np.clip(np.round(row / float(step)), -127 if embedding else -top - 1, top)
            assert stored.rows[i] == step and np.array_equal(stored.values[i], values)
            assert np.allclose(stored.tensor()[i], values * float(step))


def expected_squares(logits, cap):
    """The square of the loss's gradient at each logit before the softcap, over all targets, by the probabilities that
    the model gives them. logits [positions, vocabulary], after the softcap."""
    total = torch.zeros_like(logits)
    for p, z, row in zip(logits.softmax(1), logits, total, strict=True):
        for target in range(len(p)):
            gradient = p.clone()
            gradient[target] -= 1
            row += p[target] * (gradient * (1 - (z / cap) ** 2)) ** 2
    return total


@pytest.mark.parametrize("variables", [
    SEED | {"NUM_LAYERS": 4}, FRONTIER | {"TIE_EMBEDDINGS": 0}, SEED | {"NUM_LAYERS": 1, "QUANT_FISHER": "expected"},
    FRONTIER | {"QUANT_FISHER": "empirical"}])
def test_calibration_by_hand(tiny, variables):
    """H = mean of x x' of what goes into a matrix, G = mean square of the loss's gradient at what comes out of it:
    before the gains, which belong to the matrix. An embedding only looks rows up: its G is a row's share of the
    squares, its H how they are spread over the columns."""
    cfg = tiny(**variables)
    model, sequences = make_model(cfg), torch.tensor([text(41, 20 + i, [0, 4 + 5 * i]) for i in range(5)])
    w, inputs, squares, spread, tokens = weights_of(model), {}, {}, {}, 5 * 40
    for ids in sequences:
        seen = []
        total = plain_nats(w, cfg, ids[:-1], ids[1:], 0, seen).sum()
        for (name, x, _), dy in zip(seen, torch.autograd.grad(total, [y for _, _, y in seen]), strict=True):
            if isinstance(x, list) and name == "tok_emb.weight" and cfg.tie_embeddings:
                continue  # it counts as the output layer
            if isinstance(x, list):
                by_row = squares.setdefault(name, torch.zeros(len(w[name]), dtype=torch.float64))
                for row, d in zip(x, dy, strict=True):
                    by_row[row] += d.square().mean()
                spread[name] = spread.get(name, 0) + dy.square().sum(0)
            else:
                h, n = inputs.get(name, (0, 0))
                inputs[name] = (h + x.detach().T @ x.detach(), n + len(x))
                squares[name] = squares.get(name, 0) + dy.square().sum(0)
        if cfg.quant_fisher == "expected":  # the output layer's come last
            squares[name] -= dy.square().sum(0)
            logits = plain_logits(w, cfg, ids[:-1]).detach()
            squares[name] += expected_squares(logits, cfg.logit_softcap).sum(0)
    found = calibrate(model, sequences, 2)
    assert set(found) == {n for n in w if n.endswith(".weight")}
    for name, (factor, order, weight) in found.items():
        h = inputs[name][0] / inputs[name][1] if name in inputs else (spread[name] / spread[name].mean()).diag()
        h, order = damped(h.numpy()), order.numpy()
        assert np.allclose(weight.double(), squares[name] / tokens, rtol=2e-3, atol=1e-12), name
        factor = factor.double().numpy()
        inverse = np.empty_like(h)
        inverse[np.ix_(order, order)] = factor.T @ factor
        assert np.allclose(inverse, np.linalg.inv(h), rtol=2e-3, atol=2e-3 / np.diag(h).max()), name
        assert (np.diff(np.diag(h)[order]) < 1e-4 * np.diag(h).max()).all(), name
        assert (np.tril(factor, -1) == 0).all() and (np.diag(factor) > 0).all(), name


# ---- evaluation ----


def first_input(target, window, stride):
    """Where the window of a target begins: the first window scores all that it holds, each later one stands a stride
    further and scores its last stride."""
    begin = 0
    while target >= begin + window:
        begin += stride
    return begin


def plain_scores(w, cfg, ids, stride):
    """Nats of each target from a window cut off just before it."""
    nats = []
    for target in range(len(ids) - 1):
        begin = first_input(target, cfg.eval_len, stride)
        logits = plain_logits(w, cfg, ids[begin : target + 1], cfg.eval_len)[-1]
        nats.append(float(torch.logsumexp(logits, 0) - logits[ids[target + 1]]))
    return nats


@pytest.mark.parametrize("length, window, stride", [(42, 24, 8), (29, 12, 12), (30, 13, 5)])
def test_sliding_windows(tiny, length, window, stride):
    """Windows that begin at 0, stride, 2 x stride, ...; each target once, from the first window that holds it."""
    cfg = tiny(**SEED | {"NUM_LAYERS": 4, "EVAL_SEQ_LEN": window, "EVAL_STRIDE": stride, "VAL_BATCH_SIZE": 3 * window})
    model, ids = make_model(cfg), text(length, length, [0, 11, 25])
    w = {name: p.detach() for name, p in weights_of(model).items()}
    found, expected = score(cfg, model, stream_of(ids), stride), plain_scores(w, cfg, ids, stride)
    assert found.faults == [] and found.tokens == length - 1
    assert found.nats == pytest.approx(expected, abs=2e-4)
    assert found.val_loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert found.val_bpb == pytest.approx(sum(expected) / math.log(2) / (length - 1), abs=1e-4)


LINES = ["One two  three, and one two.", "caf\u00e9 \u4e16\u754c \U0001f600 end", "the theory of the thing", "x",
         "other one"]


def test_bits_a_byte_of_real_text(tiny, tmp_path):
    """Bytes counted piece by piece and as the text decoded: byte pieces, spaces, documents, an unknown token."""
    (tmp_path / "lines.txt").write_text("\n".join([*LINES[2:], LINES[0]] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "small"), vocab_size=320, model_type="bpe",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    ids, size = [], pieces.vocab_size()
    for line in LINES:
        ids += [BOS, *pieces.encode(line)]
    ids[-1:] = [3, ids[-1]]
    count = 0
    for previous, target in itertools.pairwise(ids):
        piece = pieces.id_to_piece(target)
        if pieces.is_control(target) or pieces.is_unknown(target):
            continue
        if pieces.is_byte(target):
            count += 1
            continue
        if piece.startswith("\u2581"):
            piece = piece[1:]
            count += not (pieces.is_control(previous) or pieces.is_unknown(previous))
        count += len(piece.encode())
    assert any(pieces.is_byte(i) for i in ids) and any(pieces.id_to_piece(i).startswith("\u2581") for i in ids)
    decoded = sum(len(pieces.decode(pieces.encode(line)).encode()) for line in LINES)
    assert count in (decoded, decoded - 1), "at most the space after the unknown token is not counted"

    cfg = tiny(**SEED | {"NUM_LAYERS": 3, "VOCAB_SIZE": size, "EVAL_SEQ_LEN": 24, "EVAL_STRIDE": 8})
    model, stream = make_model(cfg), text_stream(ids, read_tokenizer(tmp_path / "small.model", size))
    w = {name: p.detach() for name, p in weights_of(model).items()}
    expected, found = plain_scores(w, cfg, ids, 8), score(cfg, model, stream, 8)
    assert found.bytes == count and found.tokens == len(ids) - 1
    assert found.val_bpb == pytest.approx(sum(expected) / math.log(2) / count, rel=1e-5)


# ---- test-time training ----


class PlainSgd:
    def __init__(self, momentum):
        self.momentum, self.buffer = momentum, {}

    def step(self, w, gradients, rates, decays):
        for name, g in gradients.items():
            g = g + decays[name] * w[name]
            self.buffer[name] = self.momentum * self.buffer[name] + g if name in self.buffer else g
            w[name] = (w[name] - rates[name] * self.buffer[name]).detach().requires_grad_()


def cosine(share):
    """From 1 at the beginning to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * share))


def plain_full_walk(w, cfg, ids, norms):
    """Test-time training of all weights: a chunk is scored, then learnt from, then the next. Changes w."""
    origin, n, size, nats = dict(w), len(ids) - 1, cfg.ttt_chunk_tokens, []
    optimizer = PlainSgd(cfg.ttt_momentum) if cfg.ttt_optimizer == "sgd" else PlainAdam(0.9, 0.999)
    frozen = tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks))
    chunks = math.ceil(n / size)
    for chunk in range(chunks):
        begin, end = chunk * size, min((chunk + 1) * size, n)
        with torch.no_grad():
            nats += plain_window_scores(w, cfg, ids, begin, end, 0, cfg.eval_len, cfg.eval_stride)
        if end == n:
            break
        rate = cfg.ttt_lr * (cfg.ttt_lr_end + (1 - cfg.ttt_lr_end) * cosine(chunk / (chunks - 1)))
        length = cfg.train_seq_len
        starts = [min(start, end - length) for start in range(begin, end, length)]
        batches = [starts[i : i + (cfg.ttt_batch_seqs or len(starts))]
                   for i in range(0, len(starts), cfg.ttt_batch_seqs or len(starts))]
        step, warm, steps = 0, cfg.ttt_warmup_epochs * len(batches), cfg.ttt_epochs * len(batches)
        for _ in range(cfg.ttt_epochs):
            for batch in batches:
                factor, least = 1.0, cfg.ttt_lr_min / cfg.ttt_lr
                if cfg.ttt_cosine and step < warm:
                    factor = (step + 1) / warm
                elif cfg.ttt_cosine:
                    factor = least + (1 - least) * cosine((step - warm) / (steps - warm))
                _, gradients = plain_gradients(w, cfg, [ids[s : s + length] for s in batch],
                                               [ids[s + 1 : s + length + 1] for s in batch])
                gradients = {name: g for name, g in gradients.items() if not name.startswith(frozen or "-")}
                norms.append(math.sqrt(sum(float((g * g).sum()) for g in gradients.values())))
                gradients = clipped(gradients, cfg.ttt_grad_clip)
                optimizer.step(w, gradients, dict.fromkeys(w, rate * factor), dict.fromkeys(w, cfg.ttt_wd))
                step += 1
        for name, x in w.items():
            w[name] = ((1 - cfg.ttt_pull) * x + cfg.ttt_pull * origin[name]).detach().requires_grad_()
    return nats


def plain_window_scores(w, cfg, ids, begin, end, first, window, stride):
    """Nats of targets [begin, end), a stride at a time: a window ends where its stride does, and does not begin
    before `first`."""
    nats = []
    for low in range(begin, end, stride):
        high, start = min(low + stride, end), max(low + stride - window, first)
        logits = plain_logits(w, cfg, ids[start:high], cfg.eval_len)
        nats += [float(torch.logsumexp(logits[i - start], 0) - logits[i - start, ids[i + 1]]) for i in range(low, high)]
    return nats


FULL = SEED | {"TTT_ENABLED": 1, "TTT_MODE": "full", "NUM_LAYERS": 3, "TRAIN_SEQ_LEN": 16, "TRAIN_BATCH_TOKENS": 256,
               "EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 8, "TTT_CHUNK_TOKENS": 40}
WALKS = {
    "adamw": FULL | {"TTT_LR": 0.004, "TTT_EPOCHS": 3, "TTT_COSINE": 1, "TTT_WARMUP_EPOCHS": 1, "TTT_LR_MIN": 0.001,
                     "TTT_WD": 0.5, "TTT_LR_END": 0.2, "TTT_BATCH_SEQS": 2, "TTT_PULL": 0.3, "TTT_FREEZE_BLOCKS": 2},
    "sgd": FULL | {"TTT_OPTIMIZER": "sgd", "TTT_LR": 0.05, "TTT_MOMENTUM": 0.8, "TTT_EPOCHS": 2, "TTT_COSINE": 1,
                   "TTT_LR_MIN": 0.01, "TTT_WD": 0.02, "TTT_LR_END": 0, "TTT_PULL": 0.2},
}


@pytest.mark.parametrize("name, limit", [("adamw", 2.2), ("sgd", 2.6), ("sgd", 1000)])
def test_full_test_time_training(tiny, name, limit):
    """Losses of a stream of four chunks and four documents, and the weights that are left. The limit of the gradient
    lies between the norms that are met, or far above them."""
    cfg, ids = tiny(**WALKS[name], TTT_GRAD_CLIP=limit), text(141, 5, [0, 50, 52, 110])
    model = make_model(cfg, 0.2)
    w, norms = weights_of(model), []
    before = dict(w)
    expected, (found, learnt) = plain_full_walk(w, cfg, ids, norms), adapt_and_score(cfg, model, ids)
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(learnt[:120]) and not any(learnt[120:]), "the last chunk teaches nothing"
    assert limit == 1000 or min(norms) < limit < max(norms), norms
    for name, p in model.named_parameters():
        moved, error = (w[name] - before[name]).norm(), (p.double() - w[name]).norm()
        frozen = name.startswith(tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks)) or "-")
        assert error < 1e-12 if frozen else error < 1e-3 * moved, name


def plain_lora_walk(w, cfg, ids, lessons):
    """Test-time training by low-rank adapters, a document at a time; each begins in the turn in which a place gets
    free, from what those have given that have ended by then. `lessons`: of each target."""
    output = "tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"
    names = [f"blocks.{i}.mlp.{part}.weight" for i in range(cfg.num_layers) for part in ("fc", "proj")] + [output]
    downs = {name: torch.linalg.svd(w[name], full_matrices=False).Vh[: cfg.ttt_lora_rank] for name in names}
    place = {output: "adapted output"}
    starts = [i for i in range(len(ids) - 1) if i == 0 or ids[i] == BOS]
    stride, size, nats = min(cfg.eval_stride, cfg.ttt_lora_chunk_tokens), cfg.ttt_lora_chunk_tokens, []
    free, given = [0] * cfg.ttt_lora_documents, []  # the turns in which places get free; those of ends, and adapters
    for first, last in itertools.pairwise([*starts, len(ids) - 1]):
        ups = {name: torch.zeros(len(w[name]), cfg.ttt_lora_rank).double() for name in names}
        turn = min(free)
        free[free.index(turn)] = over = turn + math.ceil((last - first) / size)
        for now in sorted({ended for ended, _ in given if ended <= turn}):
            together = [adapters for ended, adapters in given if ended == now]
            for name in names:
                mean = sum(adapters[name] for adapters in together) / len(together)
                ups[name] = mean + (1 - cfg.ttt_lora_share) ** len(together) * (ups[name] - mean)
        ups = {name: up.detach().requires_grad_() for name, up in ups.items()}
        squares, steps = dict.fromkeys(names, 0.0), 0
        for begin in range(first, last, size):
            end = min(begin + size, last)
            adapted = w | {place.get(name, name): w[name] + ups[name] @ downs[name] for name in names}
            with torch.no_grad():
                nats += plain_window_scores(adapted, cfg, ids, begin, end, first, cfg.eval_len, stride)
            if end == last:
                break
            lessons[begin:end] = [1] * (end - begin)
            start = max(begin - 64, first)
            losses = plain_nats(adapted, cfg, ids[start:end], ids[start + 1 : end + 1], cfg.eval_len)[begin - start :]
            gradients = dict(zip(names, torch.autograd.grad(losses.mean(), list(ups.values())), strict=True))
            steps += 1
            for name, g in gradients.items():
                squares[name] = squares[name] + (g * g).sum(0) / len(g)
                size_of_g = (squares[name] / steps).sqrt() + 1e-8
                rate = cfg.ttt_lora_lr / cfg.ttt_lora_rank**0.5
                ups[name] = (ups[name] - rate * g / size_of_g).detach().requires_grad_()
        given.append((over, ups))
    return nats


LORA = {"TTT_ENABLED": 1, "TTT_MODE": "lora", "NUM_LAYERS": 3, "SPARSE_START_LAYER": 1, "EVAL_SEQ_LEN": 96,
        "EVAL_STRIDE": 8, "TTT_LORA_CHUNK_TOKENS": 16, "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.04, "TTT_LORA_SHARE": 0.3,
        "TTT_LORA_DOCUMENTS": 2}


@pytest.mark.parametrize("form", [SEED, FRONTIER | {"TIE_EMBEDDINGS": 0}])
def test_lora_test_time_training(tiny, form):
    """Text before the first document, documents of a whole number of chunks, of others and of less than one, and in
    one a token that repeats itself. They share two places: one document begins where another has ended, then two
    where two have, then one."""
    cfg, ids = tiny(**form | LORA), text(301, 6, [20, 132, 202, 207, 262])
    ids[60:92] = [7] * 32
    model, lessons = make_model(cfg, 0.2), [0] * 300
    w = {name: p.detach() for name, p in weights_of(model).items()}
    expected, (found, learnt) = plain_lora_walk(w, cfg, ids, lessons), adapt_and_score(cfg, model, ids)
    assert found == pytest.approx(expected, abs=1e-4)
    assert learnt == lessons, "a step a chunk, none on a document's last"
