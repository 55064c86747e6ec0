"""Test-time training: score first, once, document by document or chunk by chunk; and the audit that proves it."""

import dataclasses
import itertools
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from test_parts import Lone, OneByte, Quiet, brute_force, model_of, operations, stream_of
from test_survive import patched

import train_gpt as t

SMALL = {"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 40, "TTT_LORA_CHUNK_TOKENS": 8, "EVAL_STRIDE": 4, "EVAL_SEQ_LEN": 16,
         "TTT_LORA_RANK": 4}
MODES = [{"TTT_MODE": "lora", "TTT_LORA_LR": 0.1}, {"TTT_MODE": "full", "TTT_LR": 0.01, "TTT_PULL": 0.1},
         {"TTT_MODE": "full", "TTT_OPTIMIZER": "sgd", "TTT_LR": 0.1, "TTT_BATCH_SEQS": 1, "TTT_LR_END": 0}]


def tokens(n, seed=0, documents=()):
    ids = np.random.default_rng(seed).integers(2, 400, n)
    ids[list(documents)] = t.BOS_ID
    return ids.tolist()


def walk(cfg, ids, budget=None, probe=(), process=None):
    """(score, details, evaluator) of a walk with the noisy tiny model."""
    process = process or Lone()
    model = model_of(cfg, noise=0.05)
    evaluator, details = t.test_time_train(cfg, process, Quiet(), model, stream_of(ids), budget, probe)
    return evaluator.result(), details, evaluator


# ---- the walk ----


def test_full_mode_learns_with_the_rope_of_the_windows_that_it_scores(tiny):
    cfg = tiny(**SMALL | MODES[1] | {"EVAL_SEQ_LEN": 2048})
    model = model_of(cfg, noise=0.05)
    evaluator = t.Evaluator(cfg, Lone(), model, stream_of(tokens(40)), cfg.eval_stride)
    ids, windows = torch.tensor([tokens(33, 2)]), []
    nats, plain = model(ids[:, :-1], ids[:, 1:], None, 2048), model(ids[:, :-1], ids[:, 1:])
    assert not torch.allclose(nats, plain, atol=1e-4)

    def forward(ids, targets, rows=None, window=0):
        windows.append(window)
        return model(ids, targets, rows, window)

    evaluator.forward = forward
    steps, undone = t.FullAdapter(cfg, Lone(), model, evaluator).learn(0, 32, 0.01, lambda: True)
    assert steps == cfg.ttt_epochs and not undone and len(windows) > steps and set(windows) == {2048}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length, documents, changes", [
    (2, [0], {}), (17, [0], {}), (41, [0, 20], {}), (131, [0, 1, 2, 60, 130], {}), (100, [], {}),
    (97, [5, 50, 51], {"TTT_CHUNK_TOKENS": 7, "TTT_LORA_CHUNK_TOKENS": 3}),
    (97, [0, 9, 96], {"TTT_CHUNK_TOKENS": 96, "TTT_LORA_CHUNK_TOKENS": 16, "EVAL_STRIDE": 5}),
    (97, [0, 3, 50, 56], {"EVAL_STRIDE": 16, "TTT_LORA_CHUNK_TOKENS": 16}),
    (60, [0], {"TTT_CHUNK_TOKENS": 1000, "TTT_LORA_CHUNK_TOKENS": 1000, "EVAL_STRIDE": 16}),
])
def test_every_target_once_and_before_any_step_that_saw_it(tiny, mode, length, documents, changes):
    cfg = tiny(**SMALL | changes | mode)
    score, details, evaluator = walk(cfg, tokens(length, 1, documents))
    assert score.faults == [] and score.tokens == length - 1 and np.isfinite(score.nats).all()
    assert details["mode"] == mode["TTT_MODE"] and details["adapted_chunks"] <= details["chunks"]
    # the end of the stream, or of a document, is scored and never learnt from
    size = min(cfg.ttt_lora_chunk_tokens, 16) if details["mode"] == "lora" else cfg.ttt_chunk_tokens
    starts = sorted({0, *documents} - {length - 1}) if details["mode"] == "lora" else [0]
    for begin, end in itertools.pairwise([*starts, length - 1]):
        last = begin + (end - begin - 1) // size * size
        assert not evaluator.learnt[last + 1 : end + 1].any()
        assert last == begin or evaluator.learnt[begin + 1 : last + 1].all()


@pytest.mark.parametrize("mode", MODES[1:])
def test_full_mode_is_causal_to_the_bit_and_learns(tiny, mode):
    cfg, ids = tiny(**SMALL | mode), tokens(200)
    other = ids[:121] + tokens(79, 1)
    (a, details, _), (b, _, _) = walk(cfg, ids), walk(cfg, other)
    plain = t.Evaluator(cfg, Lone(), model_of(cfg, noise=0.05), stream_of(ids), cfg.eval_stride)
    plain.score(0, 199)
    assert np.array_equal(a.nats[:120], b.nats[:120])
    assert np.array_equal(a.nats[:40], plain.nats[:40].numpy()) and not np.allclose(a.nats[40:], plain.nats[40:])
    assert details["chunks"] == 5 and details["adapted_chunks"] == 4


def test_what_repeats_is_learnt(tiny):
    """A stream that repeats itself is scored better and better, in both modes."""
    cfg = tiny(**SMALL | {"TTT_MODE": "full", "TTT_LR": 0.01, "TTT_EPOCHS": 4})
    ids = tokens(40) * 8
    nats = walk(cfg, ids)[0].nats
    assert nats[-40:].mean() < nats[:40].mean() - 1
    nats = walk(tiny(**SMALL | MODES[0]), [t.BOS_ID, *(tokens(40) * 8)])[0].nats
    assert nats[-40:].mean() < nats[:40].mean() - 0.2


def test_lora_without_a_rate_is_each_document_by_itself(tiny):
    """Windows inside the document, whatever lies around it, and the BOS after it as its last target."""
    cfg, cuts = tiny(**SMALL | {"TTT_MODE": "lora", "TTT_LORA_LR": 0}), [0, 30, 31, 37, 90]
    ids, model = tokens(121, 2, cuts), model_of(cfg, noise=0.05)
    expected = [brute_force(model, ids[a : b + 1], 16, 4) for a, b in itertools.pairwise([*cuts, 120])]
    assert np.allclose(walk(cfg, ids)[0].nats, np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize("places", [1, 2, 8])
def test_documents_couple_nothing(tiny, places):
    """A document's losses are those of the document alone: gradient, clip, Adam and adapters are its own."""
    cfg, cuts = tiny(**SMALL | MODES[0] | {"TTT_GRAD_CLIP": 0.1, "VAL_BATCH_SIZE": places * 16}), [0, 60, 61, 95, 150]
    ids = tokens(211, 3, cuts)
    together = walk(cfg, ids)[0].nats
    for a, b in itertools.pairwise([*cuts, 210]):
        alone = walk(cfg, ids[a : b + 1])[0].nats
        assert np.allclose(together[a:b], alone, atol=1e-4), (a, b)
    plain = walk(dataclasses.replace(cfg, ttt_lora_lr=0.0), ids)[0].nats
    assert np.allclose(together[150:158], plain[150:158], atol=1e-4)  # a first chunk has nothing to build on
    assert not np.allclose(together[158:], plain[158:], atol=1e-3)


def test_lora_against_a_plain_reimplementation(tiny):
    """One document, weights W + BA by hand, torch's own Adam."""
    cfg, ids = tiny(**SMALL | MODES[0] | {"TTT_GRAD_CLIP": 0}), tokens(50, 4, [0])
    model = model_of(cfg, noise=0.05)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, t.Linear) and n.startswith("blocks.")}
    start, generator, factors = {n: m.weight.detach().clone() for n, m in layers.items()}, torch.Generator(), {}
    generator.manual_seed(0)
    for n, w in start.items():
        factors[n] = ((torch.randn(4, w.size(1), generator=generator) / w.size(1) ** 0.5).requires_grad_(),
                      torch.zeros(w.size(0), 4, requires_grad=True))
    adam = torch.optim.Adam([f for pair in factors.values() for f in pair], 0.1, betas=(0.9, 0.99))
    names, expected = list(start), []
    for first in range(0, 49, 8):
        weights = {n + ".weight": start[n] + factors[n][1] @ factors[n][0] for n in names}
        with torch.no_grad():
            for target in range(first, min(first + 8, 49)):
                begin = 0 if target < 16 else 16 + (target - 16) // 4 * 4 + 4 - 16
                row = (torch.tensor([ids[begin : target + 1]]), torch.tensor([[ids[target + 1]]]),
                       torch.tensor([[target - begin]]))
                expected.append(torch.func.functional_call(model, weights, row).item())
        begin, end = max(first + 8 - 16, 0), first + 8
        if end < 49:
            row = (torch.tensor([ids[begin:end]]), torch.tensor([ids[first + 1 : end + 1]]),
                   torch.arange(first - begin, end - begin)[None])
            adam.zero_grad()
            torch.func.functional_call(model, weights, row).mean().backward()
            adam.step()
    assert np.allclose(walk(cfg, ids)[0].nats, expected, atol=1e-3)


def test_frozen_blocks_and_full_pull_stay(tiny):
    cfg, ids = tiny(**SMALL | MODES[1] | {"TTT_FREEZE_BLOCKS": 2}), tokens(100)
    model, before = model_of(cfg, noise=0.05), model_of(cfg, noise=0.05).state_dict()
    t.test_time_train(cfg, Lone(), Quiet(), model, stream_of(ids))
    same = {n: bool(torch.equal(p, before[n])) for n, p in model.named_parameters()}
    assert all(same[n] == n.startswith(("blocks.0", "blocks.1")) for n in same if n.endswith("fc.weight"))
    pulled, plain = (walk(tiny(**SMALL | MODES[1] | c), ids)[0].nats for c in ({"TTT_PULL": 1}, {"TTT_EPOCHS": 0}))
    assert np.allclose(pulled, plain, atol=1e-5)


def test_rates_within_a_chunk_and_across_chunks(tiny):
    cfg = tiny(TTT_ENABLED=1, TTT_MODE="full", TTT_EPOCHS=4, TTT_COSINE=1, TTT_LR=0.1, TTT_LR_MIN=0.01,
               TTT_WARMUP_EPOCHS=1)
    rates = [0.1 * t.ttt_factor(cfg, step, 2) for step in range(8)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1]) and rates == sorted(rates[:2]) + sorted(rates[2:])[::-1]
    assert 0.01 < rates[-1] < 0.02
    rates = []

    class Loud(Quiet):
        def metric(self, **values):
            rates.append(values["rate"])

    cfg = tiny(**SMALL | MODES[2])
    t.test_time_train(cfg, Lone(), Loud(), model_of(cfg), stream_of(tokens(161)))
    assert rates == pytest.approx([0.1, 0.075, 0.025, 0.0])


@pytest.mark.parametrize("mode", [
    {"TTT_MODE": "full", "TTT_OPTIMIZER": "sgd", "TTT_LR": 1e14, "TTT_GRAD_CLIP": 0, "TTT_PULL": 0},
    {"TTT_MODE": "full", "TTT_LR": 1e14}, {"TTT_MODE": "lora", "TTT_LORA_LR": 1000, "TTT_GRAD_CLIP": 0},
])
def test_adaptation_that_is_not_finite_is_undone(tiny, mode):
    cfg, ids = tiny(**SMALL | mode), tokens(200, 5, [0])
    score, details, _ = walk(cfg, ids)
    assert np.isfinite(score.nats).all() and score.faults == []
    if mode["TTT_MODE"] == "full":
        plain = walk(dataclasses.replace(cfg, ttt_epochs=0), ids)[0].nats
        assert details["undone_chunks"] == 4 and details["adapted_chunks"] == 0
        assert np.allclose(score.nats, plain, atol=1e-5)


def test_a_document_that_is_not_finite_is_left_alone(tiny):
    """Only the document at fault keeps its adapters; the others learn."""
    cfg = tiny(**SMALL | MODES[0])
    adapters = t.LoraAdapters(cfg, Lone(), model_of(cfg))
    adapters.reset(3)
    scale, places = torch.tensor([1.0, float("nan"), 1.0]), torch.arange(3)
    adapters.attach(places)
    nats = (adapters.leaf.sum(1) * scale)[:, None].expand(3, 8)
    adapters.step(nats, places, torch.tensor([True, True, False]))
    moved = (adapters.weights != adapters.initial).any(1)
    assert int(adapters.undone) == 1 and moved.tolist() == [True, False, False]


class Clock(t.Budget):
    """A budget whose seconds are the forward passes asked for."""

    def __init__(self, limit):
        self.limit, self.now = limit, 0.0

    def spent(self):
        return self.now


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("limit", [1, 5.5, 10**6])
def test_the_budget_stops_learning_never_scoring(tiny, mode, limit, monkeypatch):
    limit += limit == 5.5 and mode["TTT_MODE"] == "full"  # where learning takes longer
    cfg, ids, clock = tiny(**SMALL | mode), tokens(401, 6, [0, 150]), Clock(limit)
    forward = t.GPT.forward

    def ticking(self, ids, *rest, **more):
        clock.now += ids.numel() / 400  # scoring takes 4 of these seconds, learning as much again
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(t.GPT, "forward", ticking)
    score, details, _ = walk(cfg, ids, clock)
    assert score.faults == [] and score.tokens == 400
    assert details["stopped_by_budget"] == (limit < 7)
    if limit == 1:
        assert details["adapted_chunks"] <= 1 and 4 <= clock.now < 5.5
    elif limit < 7:
        assert 1 < details["adapted_chunks"] < details["chunks"] - 2 and clock.now <= limit
    else:
        assert details["adapted_chunks"] == details["chunks"] - (1 if mode["TTT_MODE"] == "full" else 2)
        assert 5 < clock.now < 12


def test_priming_compiles_the_walk_on_random_tokens(tiny, monkeypatch):
    """With a forward pass that is not the bare model, the fixed shapes of compiled models are used: the losses are
    the same, priming meets every shape that the walk meets, and it sees no validation text."""
    for mode in [*MODES, MODES[0] | {"TTT_LORA_CHUNK_TOKENS": 16},
                 MODES[0] | {"TTT_LORA_CHUNK_TOKENS": 4, "VAL_BATCH_SIZE": 32}]:  # the last learns in two windows
        cfg, ids = tiny(**SMALL | {"VAL_BATCH_SIZE": 64} | mode), tokens(331, 7, [0, 100, 104, 112, 119, 150, 290])
        plain, shapes, seen = walk(cfg, ids)[0].nats, [], []

        def wrapped(model, *rest, shapes=shapes, seen=seen):
            def forward(inputs, *args):
                shapes.append((tuple(inputs.shape), torch.is_grad_enabled()))
                seen.append(inputs)
                return model(inputs, *args)

            return forward

        with monkeypatch.context() as patch:
            patch.setattr(t, "compiled", wrapped)
            patch.setattr(t, "compiles", lambda cfg, process: True)
            t.prime(cfg, Lone(), Quiet(), stream_of(ids), OneByte())
            primed, rows = set(shapes), torch.cat([x.flatten() for x in seen]).tolist()
            shapes.clear()
            model = model_of(cfg, noise=0.05)
            nats = t.test_time_train(cfg, Lone(), Quiet(), model, stream_of(ids))[0].result().nats
        assert np.allclose(nats, plain, atol=1e-3), mode
        assert shapes and set(shapes) <= primed, mode
        assert mode["TTT_MODE"] == "full" or len({shape for shape, learns in shapes if learns}) == 1
        text = "".join(chr(i) for i in rows)
        assert not any("".join(chr(i) for i in ids[a : a + 6]) in text for a in range(320))


@pytest.mark.parametrize("mode", MODES[:2])
def test_what_was_primed_before_training_is_not_compiled_again(tiny, monkeypatch, mode):
    """Another model of the same form, made later, meets the graphs that priming left; their seconds are noted."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_(model, backend="eager", **how))
    quick = {"VAL_BATCH_SIZE": 64, "USE_COMPILE": 1, "NUM_LAYERS": 1, "SPARSE_START_LAYER": 0}
    cfg, ids = tiny(**SMALL | quick | mode), tokens(331, 7, [0, 100, 104, 150, 290])
    process, said = Lone(), []

    class Loud(Quiet):
        def __call__(self, text, *rest):
            said.append(text)

        def silent(self):
            return Quiet()

    torch._dynamo.utils.clear_compilation_metrics()  # of other tests
    t.prime(cfg, process, Loud(), stream_of(ids), OneByte())
    met = len(process.graphs)
    assert met and all(g["seconds"] > 0 and "->" in g["shape"] for g in process.graphs)
    assert [line for line in said if line.startswith("compile: forward [")]
    t.test_time_train(cfg, process, Quiet(), model_of(cfg, seed=1, noise=0.05), stream_of(ids))
    t.note_graphs(process, "")
    assert len(process.graphs) == met, process.graphs[met:]


def test_a_walk_by_documents_reads_nothing_from_the_device(tiny):
    """However many turns it takes: what is where is known on the host, and faults are counted on the device."""
    cfg, reads = tiny(**SMALL | MODES[0]), []
    for chunks in (4, 12):
        stream, model = stream_of(tokens(8 * chunks + 1, 0, [0])), model_of(cfg, noise=0.05)
        seen = operations(lambda model=model, stream=stream: t.test_time_train(cfg, Lone(), Quiet(), model, stream))
        reads.append((seen["aten::_local_scalar_dense"], seen["aten::nonzero"]))
        assert seen["aten::bmm"] + seen["aten::baddbmm_"] > 20 * chunks
    assert reads[0] == reads[1]


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_gpu_is_waited_for_once_a_turn_and_never_left_idle(tiny, monkeypatch, mode):
    """With marks that stand for a GPU's events, passed in order: the one waited for is never the latest, and the
    seconds between them decide on learning."""
    passed, made, waited = [0], [0], []

    class Mark:
        def __init__(self, enable_timing):
            self.polls = 0

        def record(self):
            made[0] += 1
            self.number = made[0]

        def query(self):
            self.polls += 1
            passed[0] = max(passed[0], self.number * (self.polls > 2))
            return self.number <= passed[0]

        def elapsed_time(self, later):
            return 1000.0 * (later.number - self.number)

    def reached(self, mark):
        waited.append((made[0] - mark.number, mark.number > passed[0]))
        t.wait_until(mark.query)

    cfg, ids = tiny(**SMALL | mode | {"USE_COMPILE": 0, "VAL_BATCH_SIZE": 32, "TTT_EPOCHS": 1}), tokens(401, 6, [0, 99])
    expected, process, turns = walk(cfg, ids)[0].nats, Lone(), []
    process.cuda, scored = True, t.Walk.scored
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(t.Process, "reached", reached)
    monkeypatch.setattr(t.Walk, "scored", lambda self, work: turns.append(work) or scored(self, work))
    score, details, _ = walk(cfg, ids, process=process)
    assert np.allclose(score.nats, expected, atol=1e-5) and details["adapted_chunks"] > 3
    assert all(ahead >= 1 for ahead, blocks in waited[:-1] if blocks), waited
    if mode["TTT_MODE"] == "lora":
        assert len(turns) - 1 <= len(waited) <= len(turns) + 1, (waited, len(turns))
        assert waited[-1][0] <= 1, "at the end all is waited for"


# ---- the audit ----


def audited(cfg, trial, ids=None, counted=None):
    stream = stream_of(tokens(330, 8, [0, 90, 95, 200]) if ids is None else ids)

    class Pieces:  # one byte a piece, no boundary but BOS
        def __len__(self):
            return 400

        def id_to_piece(self, i):
            return "x"

        is_control = is_unknown = is_unused = is_byte = staticmethod(lambda i: False)

    stream.bytes = stream.bytes if counted is None else counted
    result = t.audit(cfg, Lone(), Quiet(), trial, stream, Pieces())
    return {name for name, check in result.items() if isinstance(check, dict) and not check["ok"]}, result


def honest(cfg, model=t.GPT, evaluator=None):
    def trial(ids, probe=(), **changes):
        torch.manual_seed(0)
        net = model_of(cfg, noise=0.05) if model is t.GPT else model(cfg)
        changed = dataclasses.replace(cfg, **changes)
        if cfg.ttt_enabled:
            return t.test_time_train(changed, Lone(), Quiet(), net, stream_of(ids), None, probe)[0]
        return t.evaluate(changed, Lone(), Quiet(), net, stream_of(ids), cfg.eval_stride, "it", probe)

    return trial


AUDITED = SMALL | {"AUDIT_TOKENS": 300, "TTT_CHUNK_TOKENS": 30, "EVAL_STRIDE": 8, "TTT_LORA_CHUNK_TOKENS": 16,
                   "VAL_BATCH_SIZE": 32}


@pytest.mark.parametrize("mode", [*MODES, {"TTT_ENABLED": 0}])
def test_the_audit_passes_what_is_honest(tiny, mode):
    cfg = tiny(**AUDITED | mode)
    failed, result = audited(cfg, honest(cfg))
    assert failed == set() and result["ok"], result
    if cfg.ttt_enabled:
        assert min(json.loads(result["causal"]["detail"].split("the cuts: ")[1])) >= 60  # several updates


def noisy(cfg):
    torch.manual_seed(0)
    return model_of(cfg, noise=0.05)


def full_cheat(cfg, order):
    """A walk in full mode whose chunks do what `order` says: a list of 'score' and 'learn'."""
    def trial(ids, probe=(), **changes):
        changed, model = dataclasses.replace(cfg, **changes), noisy(cfg)
        evaluator = t.Evaluator(changed, Lone(), model, stream_of(ids), cfg.eval_stride, probe)
        adapter, n = t.FullAdapter(changed, Lone(), model, evaluator), len(ids) - 1
        order(evaluator, lambda a, b: adapter.learn(a, b, cfg.ttt_lr, lambda: True), n)
        return evaluator

    return trial


def adapt_first(evaluator, learn, n):
    learn(0, n)
    evaluator.score(0, n)


def last_epoch(evaluator, learn, n):
    for a in range(0, n, 30):
        learn(a, min(a + 30, n))
        evaluator.score(a, min(a + 30, n))


def tail_again(evaluator, learn, n):
    evaluator.score(0, n)
    learn(0, n)
    evaluator.score(n - 20, n)


def better_of_two(evaluator, learn, n):
    """Score everything, adapt, score again, keep the better loss of each target."""
    evaluator.score(0, n)
    first = evaluator.nats.clone()
    learn(0, n)
    evaluator.nats.zero_()
    evaluator.count.zero_()
    evaluator.score(0, n)
    evaluator.nats = torch.minimum(first, evaluator.nats)


@pytest.mark.parametrize("order, broken", [
    (adapt_first, {"causal", "score_before_update"}), (last_epoch, {"causal", "score_before_update"}),
    (tail_again, {"one_pass", "score_before_update"}), (better_of_two, {"causal", "score_before_update"}),
])
def test_the_audit_rejects_who_learns_too_early(tiny, order, broken):
    cfg = tiny(**AUDITED | MODES[1])
    failed, result = audited(cfg, full_cheat(cfg, order))
    assert broken <= failed and not result["ok"], result


def test_the_audit_sees_early_learning_that_is_not_declared(tiny, monkeypatch):
    """Books that are not kept hide nothing from the causality check."""
    cfg = tiny(**AUDITED | MODES[1])
    monkeypatch.setattr(t.Evaluator, "lesson", lambda self, positions, who=None: self.stream.tokens[positions])
    failed, _ = audited(cfg, full_cheat(cfg, last_epoch))
    assert failed == {"causal"}


class Blend(t.GPT):
    """Adds a hundredth to the probability of the target alone, as careless caches do."""

    def forward(self, ids, targets=None, *rest):
        nats = super().forward(ids, targets, *rest)
        return nats if torch.is_grad_enabled() else -torch.log(0.99 * torch.exp(-nats) + 0.01)


class Peek(t.GPT):
    """Knows the token that it has to predict: position i also reads token i+1."""

    def forward(self, ids, targets=None, rows=None, *rest):
        nats = super().forward(ids, targets, rows, *rest)
        follows = torch.roll(ids, -1, 1) if rows is None else torch.roll(ids, -1, 1).gather(1, rows)
        odd = (follows % 2 == targets % 2).float()
        return nats if torch.is_grad_enabled() else nats - torch.log(1.5 * odd + 0.5 * (1 - odd))


@pytest.mark.parametrize("mode", [MODES[0], MODES[1], {"TTT_ENABLED": 0}])
@pytest.mark.parametrize("model, broken", [(Blend, "normalised"), (Peek, "causal")])
def test_the_audit_rejects_scores_that_are_no_probability_or_peek(tiny, mode, model, broken):
    cfg = tiny(**AUDITED | mode)

    def make(cfg):
        net = noisy(cfg)
        net.__class__ = model
        return net

    failed, result = audited(cfg, honest(cfg, make))
    assert broken in failed, result


def test_the_audit_rejects_a_rare_peek_into_the_next_token(tiny):
    cfg = tiny(**AUDITED | {"TTT_ENABLED": 0})

    def make(cfg):
        net = noisy(cfg)
        net.__class__ = Peek
        forward = net.forward

        def seldom(ids, targets=None, rows=None, *rest):
            nats = t.GPT.forward(net, ids, targets, rows, *rest)
            return torch.where(rows % 8 == 3, forward(ids, targets, rows, *rest), nats)

        net.forward = seldom
        return net

    assert "causal" in audited(cfg, honest(cfg, make))[0]


def test_the_audit_rejects_adapters_that_outlive_their_document(tiny, monkeypatch):
    cfg = tiny(**AUDITED | MODES[0])
    monkeypatch.setattr(t.LoraAdapters, "renew", lambda self, places: None)
    assert "causal" in audited(cfg, honest(cfg))[0]


def test_the_audit_rejects_adapters_of_the_neighbour(tiny, monkeypatch):
    cfg = tiny(**AUDITED | MODES[0])
    attach = t.LoraAdapters.attach

    def next_row(self, places, times=1):
        attach(self, places, times)
        for layer in self.layers:
            layer.adapter = tuple(factor.roll(1, 0) for factor in layer.adapter)

    monkeypatch.setattr(t.LoraAdapters, "attach", next_row)
    assert "causal" in audited(cfg, honest(cfg))[0]


def test_the_audit_rejects_the_better_of_two_walks(tiny):
    cfg = tiny(**AUDITED | MODES[1])

    def trial(ids, probe=(), **changes):
        walks = [honest(dataclasses.replace(cfg, ttt_lr=lr))(ids, probe, **changes) for lr in (0.01, 0.02)]
        return min(walks, key=lambda evaluator: float(evaluator.nats.sum()))

    failed, result = audited(cfg, trial)
    assert "one_pass" in failed and "2 walk(s)" in result["one_pass"]["detail"]


@pytest.mark.parametrize("change", [lambda nats: nats * 0.99, lambda nats: nats - 0.0005])
def test_the_audit_rejects_losses_changed_after_the_fact(tiny, change):
    cfg = tiny(**AUDITED | MODES[1])

    def trial(ids, probe=(), **changes):
        evaluator = honest(cfg)(ids, probe, **changes)
        evaluator.nats = change(evaluator.nats)
        return evaluator

    assert audited(cfg, trial)[0] == {"normalised"}


def test_the_audit_rejects_bytes_that_are_not_there(tiny):
    cfg = tiny(**AUDITED | {"TTT_ENABLED": 0})
    assert audited(cfg, honest(cfg), counted=400)[0] == {"bytes"}


def test_the_audit_rejects_a_smear_across_the_documents_of_a_batch(tiny, monkeypatch):
    """Under lora documents lie side by side; SmearGate must not take the last token of the one before."""
    cfg = tiny(**AUDITED | MODES[0] | {"BOS_MASK": 0})
    assert audited(cfg, honest(cfg))[0] == set()

    def leaking(x, keep):
        y = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        y[1:, 0] = x[:-1, -1]
        return y * keep

    monkeypatch.setattr(t, "shift", leaking)
    assert "causal" in audited(cfg, honest(cfg))[0]


def test_bytes_from_decoded_pieces_are_the_table_s(corpus):
    """And the published mistakes are not: spaces counted twice, byte pieces counted as three."""
    tokenizer = t.Tokenizer(corpus / "tokenizer.model", 400)
    ids = np.random.default_rng(0).integers(0, 400, 5000)
    text = tokenizer.sp.encode("caf\u00e9 \u4e16\u754c \U0001f600 and on\nwith it")
    for stream in (ids, ids[1:], np.array([1, *text, 1, *text]), np.array([*text, 1]), np.array([2, 1])):
        assert t.decoded_bytes(tokenizer.sp, stream) == tokenizer.target_bytes(stream).sum()
    assert any(tokenizer.sp.is_byte(i) for i in text)
    tokenizer.piece_bytes[tokenizer.spaced] += 1
    assert t.decoded_bytes(tokenizer.sp, ids) < tokenizer.target_bytes(ids).sum()


# ---- through the command line ----


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, corpus):
    """An artifact of the tiny model, made without evaluating it."""
    import os
    import subprocess
    import sys

    from conftest import SCRIPT, TINY, clean_environment

    folder = tmp_path_factory.mktemp("artifact")
    env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(folder), "RUN_ID": "a"}
    env |= {"TTT_ENABLED": "0", "FINAL_EVAL_ENABLE": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
    subprocess.run([sys.executable, str(SCRIPT)], env=env, check=True, capture_output=True)
    return os.path.join(folder, "a", "final_model.int6.ptz")


CLI = {"TTT_ENABLED": 1, "TRAIN_ENABLED": 0, "FINAL_EVAL_ENABLE": 0, "FINAL_SLIDING_EVAL_ENABLE": 0,
       "TTT_CHUNK_TOKENS": 200}


@pytest.mark.parametrize("mode", [{"TTT_MODE": "full"}, {"TTT_MODE": "lora", "TTT_LORA_LR": 0.05}])
def test_two_ranks_adapt_like_one(launch, artifact, tmp_path, mode):
    nats, runs = {}, {}
    for ranks in (1, 2):
        runs[ranks] = launch(ranks, run_id=f"r{ranks}", MODEL_PATH=artifact, AUDIT=1, AUDIT_TOKENS=128,
                             NLL_DUMP=tmp_path / f"{ranks}.npy", **CLI | mode)
        assert runs[ranks].code == 0, runs[ranks].err + runs[ranks].out
        nats[ranks] = np.load(tmp_path / f"{ranks}.npy")
    assert np.abs(nats[1] - nats[2]).max() < 1e-4
    for run in runs.values():
        s = run.summary
        assert s["valid"] and s["audit"]["ok"] and s["val_bpb"] == s["eval"]["ttt"]["val_bpb"]
        assert s["eval"]["ttt"] | {"mode": mode["TTT_MODE"], "tokens": 1001} == s["eval"]["ttt"]
        assert {"causal", "normalised", "one_pass", "score_before_update", "bytes"} < s["audit"].keys()
        assert "ttt_chunk [1/" in run.out and "legal_ttt val_loss:" in run.out and "legal_ttt_exact" in run.out
        n = s["eval"]["ttt"]["adapted_chunks"], s["eval"]["ttt"]["chunks"]
        assert n == (5, 6) if mode["TTT_MODE"] == "full" else 0 < n[0] < n[1]
    total = nats[1].sum() / np.log(2) / runs[1].summary["eval"]["ttt"]["bytes"]
    assert total == pytest.approx(runs[1].summary["val_bpb"], rel=1e-6)


def test_graphs_are_compiled_before_training_and_both_clocks_are_told(launch, tmp_path):
    """With torch's compiler but for its last part, which takes most of the time."""
    script = patched(tmp_path, "compile_ = t.torch.compile\n"
                               "t.torch.compile = lambda f, **how: compile_(f, backend='eager', **how)\n")
    run = launch(script=script, USE_COMPILE=1, TTT_ENABLED=1, FINAL_SLIDING_EVAL_ENABLE=0, ITERATIONS=2, NUM_LAYERS=1,
                 SPARSE_START_LAYER=0)
    assert run.code == 0, run.err + run.out
    lines = run.out.splitlines()
    graphs = [i for i, line in enumerate(lines) if line.startswith("compile: ")]
    assert graphs and graphs[-1] < next(i for i, line in enumerate(lines) if line.startswith("world_size:"))
    s = run.summary
    read, compiling, walk = (s["seconds"][name] for name in ("read", "compile", "ttt"))
    assert compiling > 0.1 and s["eval_clocks"]["all"] == pytest.approx(read + compiling + walk)
    assert s["eval_clocks"]["without_compilation"] == pytest.approx(read + walk)
    assert any(line.startswith("evaluation clocks: ") for line in lines)


def test_a_budget_too_small_to_score_is_said(launch, artifact):
    run = launch(MODEL_PATH=artifact, EVAL_MAX_SECONDS=0.01, **CLI)
    s = run.summary
    assert run.code == 1 and not s["valid"] and s["eval"]["ttt"]["tokens"] == 1001, run.err + run.out
    assert "EVAL_MAX_SECONDS=0.01" in s["reasons"][0] and s["eval"]["ttt"]["adapted_chunks"] == 0
    assert "adaptation stops" in run.out


def test_the_published_values_run_as_given(launch, artifact):
    """The seed's own command line, but for data, machine and the time that 20 epochs take: legal, and never worse."""
    published = {"MAX_WALLCLOCK_SECONDS": 596, "USE_COMPILE": 0, "TTT_EPOCHS": 20, "TTT_COSINE": 1, "TTT_LR": 0.0005,
                 "TTT_LR_MIN": 0.00002, "TTT_WARMUP_EPOCHS": 1, "TTT_WD": 0.01, "EVAL_STRIDE": 16,
                 "FINAL_SLIDING_EVAL_ENABLE": 1, "SEED": 1337, "TTT_ENABLED": "UNSET"}
    run = launch(MODEL_PATH=artifact, **CLI | published)
    s = run.summary
    assert run.code == 0 and s["valid"] and s["config"]["ttt_mode"] == "full", run.err + run.out
    assert s["eval"]["ttt"]["adapted_chunks"] == 5 and s["val_bpb"] < s["eval"]["sliding"]["val_bpb"]


def test_a_failed_audit_fails_the_run(launch, artifact, tmp_path):
    """A copy of the script whose evaluation learns before it scores: every figure is there, nothing is valid."""
    from conftest import SCRIPT

    text = SCRIPT.read_text()
    line = "        with walk.scored(end - begin):\n            evaluator.score(begin, end)\n"
    assert text.count(line) == 1
    cheat = tmp_path / "train_gpt.py"
    cheat.write_text(text.replace(line, "        adapter.learn(begin, end, cfg.ttt_lr, lambda: True)\n" + line))
    run = launch(script=cheat, MODEL_PATH=artifact, AUDIT=1, AUDIT_TOKENS=128, TTT_MODE="full", **CLI)
    s = run.summary
    assert run.code == 1 and not s["valid"] and not s["audit"]["ok"]
    assert not s["audit"]["causal"]["ok"] and not s["audit"]["score_before_update"]["ok"]
    assert any("audit: causal" in reason for reason in s["reasons"]) and "optimizer steps had seen" in s["reasons"][0]


def test_an_audit_is_of_what_was_run(launch, artifact, tmp_path):
    """A copy of the script that walks twice, the second time on weights that have learnt everything."""
    from conftest import SCRIPT

    budget = "Budget(cfg, before)"
    line = f"            evaluator, details = self.final(cfg, self.log, model, self.stream, {budget})\n"
    text = SCRIPT.read_text().replace(f"{budget},\n{'':44}checkpoints=self.checkpoints)", f"{budget})")
    assert text.count(line) == 1
    cheat = tmp_path / "train_gpt.py"
    cheat.write_text(text.replace(line, line + line))
    run = launch(script=cheat, MODEL_PATH=artifact, AUDIT=1, AUDIT_TOKENS=128, TTT_MODE="full", TTT_LR=0.01,
                 **CLI)
    assert run.code == 1 and not run.summary["audit"]["causal"]["ok"], run.summary["audit"]
    assert "between the run and a trial" in run.summary["reasons"][0]


def test_an_audit_without_an_evaluation(launch, artifact):
    """Every score switched off: what would be behind val_bpb is audited all the same."""
    run = launch(MODEL_PATH=artifact, AUDIT=1, AUDIT_TOKENS=64, **CLI | {"TTT_ENABLED": 0})
    assert run.code == 0 and run.summary["audit"]["ok"] and run.summary["val_bpb"] is None, run.err


def test_a_stream_without_documents_and_chunks_beyond_it(launch, artifact, tmp_path, corpus):
    folder, header = tmp_path / "plain", struct.pack("<256i", 20240520, 1, 90, *[0] * 253)
    shutil.copytree(corpus, folder)
    ids = np.random.default_rng(0).integers(2, 400, 90).astype("<u2")
    (folder / "fineweb_val_000000.bin").write_bytes(header + ids.tobytes())
    for mode in ("lora", "full"):
        run = launch(run_id=mode, MODEL_PATH=artifact, DATA_PATH=folder, TTT_MODE=mode,
                     **CLI | {"TTT_CHUNK_TOKENS": 5000})
        assert run.code == 0 and run.summary["eval"]["ttt"]["tokens"] == 89, run.err
        run = launch(run_id=mode + "1", MODEL_PATH=artifact, DATA_PATH=folder, TTT_MODE=mode, AUDIT=1,
                     **CLI | {"VAL_TOKEN_LIMIT": 1})
        assert run.code == 0 and run.summary["audit"]["ok"] and run.summary["eval"]["ttt"]["tokens"] == 1, run.err


@pytest.mark.parametrize("variables, word", [
    ({"TTT_CHUNK_TOKENS": 7}, "TTT_CHUNK_TOKENS=7"), ({"TTT_CHUNK_TOKENS": 0}, "TTT_CHUNK_TOKENS"),
    ({"TTT_CHUNK_TOKENS": -3}, "TTT_CHUNK_TOKENS"), ({"TTT_MODE": "both"}, "TTT_MODE"),
    ({"TTT_OPTIMIZER": "lion"}, "TTT_OPTIMIZER"), ({"TTT_LORA_RANK": 33}, "TTT_LORA_RANK=33"),
    ({"TTT_LR": 0.1, "TTT_LORA_LR": 0.1}, "TTT_MODE"), ({"EVAL_MAX_SECONDS": "nan"}, "EVAL_MAX_SECONDS"),
    ({"AUDIT_TOKENS": -1}, "AUDIT_TOKENS"), ({"TTT_LORA_LR": "inf"}, "TTT_LORA_LR"),
])
def test_bad_values_are_one_line(launch, variables, word):
    launch(TTT_ENABLED=1, **variables).refused(word)


def test_the_mode_follows_the_variables_given():
    def mode(**variables):
        cfg, problems, warnings = t.load_config({"PRESET": "seed"} | variables)
        assert not problems
        return cfg.ttt_mode, warnings

    published = {"TTT_EPOCHS": "20", "TTT_COSINE": "1", "TTT_LR": "0.0005", "TTT_LR_MIN": "0.00002",
                 "TTT_WARMUP_EPOCHS": "1", "TTT_WD": "0.01"}
    assert mode() == ("lora", []) and mode(**published) == ("full", [])
    assert mode(TTT_LORA_LR="0.1") == ("lora", []) and mode(TTT_MODE="full") == ("full", [])
    assert mode(TTT_MODE="lora", TTT_LR="1") == ("lora", ["TTT_LR: no effect with TTT_MODE=lora"])
    assert t.load_config({"MODEL_DIM": "4", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "ROPE_DIMS": "2"})[1] == []


@pytest.mark.parametrize("stride, chunk, window", [(4, 4, 16), (5, 10, 16), (4, 6, 25), (16, 16, 16), (3, 7, 30)])
def test_a_document_s_length_does_not_show_before_its_end(tiny, stride, chunk, window):
    """Windows go by the length of a document, which is the future; losses before its end must not know it."""
    cfg = tiny(**SMALL | MODES[0] | {"EVAL_STRIDE": stride, "TTT_LORA_CHUNK_TOKENS": chunk, "EVAL_SEQ_LEN": window})
    ids = tokens(121, 9, [0])
    long = walk(cfg, ids)[0].nats
    for end in (3, 6, 7, 8, 11, 12, 13, 15, 16, 25, 60):
        cut = ids.copy()
        cut[end] = t.BOS_ID
        assert np.allclose(walk(cfg, cut)[0].nats[: end - 1], long[: end - 1], atol=1e-4), end
