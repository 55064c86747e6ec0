"""Test-time training: score first, once, document by document or chunk by chunk."""

import dataclasses
import itertools
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


def walk(cfg, ids, process=None, spent=0.0):
    """(score, details, evaluator) of a walk with the noisy tiny model."""
    process = process or Lone()
    model = model_of(cfg, noise=0.05)
    evaluator, details = t.test_time_train(cfg, process, Quiet(), model, stream_of(ids), spent)
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
    steps = t.FullAdapter(cfg, Lone(), model, evaluator).learn(0, 32, 0.01, lambda: True)
    assert steps == cfg.ttt_epochs and len(windows) == steps and set(windows) == {2048}


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


@pytest.mark.parametrize("documents, rows", [(1, 1), (2, 2), (8, 1), (8, 2), (8, 8)])
def test_without_a_share_documents_couple_nothing(tiny, documents, rows):
    """A document's losses are those of the document alone: gradient, its size and adapters are its own."""
    places = {"TTT_LORA_DOCUMENTS": documents, "VAL_BATCH_SIZE": rows * 16, "TTT_LORA_SHARE": 0}
    cfg, cuts = tiny(**SMALL | MODES[0] | places), [0, 60, 61, 95, 150]
    ids = tokens(211, 3, cuts)
    together = walk(cfg, ids)[0].nats
    for a, b in itertools.pairwise([*cuts, 210]):
        alone = walk(cfg, ids[a : b + 1])[0].nats
        assert np.allclose(together[a:b], alone, atol=1e-4), (a, b)
    plain = walk(dataclasses.replace(cfg, ttt_lora_lr=0.0), ids)[0].nats
    assert np.allclose(together[150:158], plain[150:158], atol=1e-4)  # a first chunk has nothing to build on
    assert not np.allclose(together[158:], plain[158:], atol=1e-3)


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


def test_only_the_documents_that_learn_change(tiny):
    cfg = tiny(**SMALL | MODES[0])
    adapters = t.LoraAdapters(cfg, Lone(), model_of(cfg), 3)
    places = torch.arange(3)
    adapters.attach(places)
    nats = adapters.leaf.sum((1, 2))[:, None].expand(3, 8)
    adapters.step(nats, places, torch.tensor([True, False, True]))
    assert (adapters.ups != 0).all((1, 2)).tolist() == [True, False, True]
    assert not adapters.ups[1].any() and adapters.steps.tolist() == [1, 0, 1]


@pytest.mark.parametrize("changes, rank", [({}, 32), ({"MLP_MULT": 0.25}, 8), ({"VOCAB_SIZE": 20}, 20)])
def test_the_default_rank_is_what_the_matrices_have(tiny, changes, rank):
    cfg = tiny(TTT_ENABLED=1, TTT_MODE="lora", MODEL_DIM=32, **changes)
    adapters = t.LoraAdapters(cfg, Lone(), model_of(cfg), 1)
    assert {len(down) for down in adapters.downs} == {rank} == {cfg.lora_rank}
    for down in adapters.downs:
        assert torch.allclose(down @ down.mT, torch.eye(rank), atol=1e-4)


def test_adapters_take_a_quarter_of_the_memory_at_most(tiny, monkeypatch):
    """At 16 bytes a number: those of 64 layers and 65,535 tokens at rank 1024 are 4.3 GB a document."""
    cfg = tiny(**SMALL | {"NUM_LAYERS": 64, "MODEL_DIM": 1024, "TTT_LORA_RANK": 1024, "VOCAB_SIZE": 65535,
                             "TTT_LORA_DOCUMENTS": 256})
    for gigabytes, places in ((1, 1), (25, 1), (75, 4), (10**4, 10)):
        monkeypatch.setattr(Lone, "memory", lambda self, n=gigabytes: (n * 10**9, 0))
        assert t.lora_places(cfg, Lone(), 10)[0] == places


@pytest.mark.parametrize("documents, warned", [(2, False), (5, True)])
def test_how_many_documents_are_side_by_side_is_said(tiny, documents, warned, monkeypatch):
    said, cfg = [], tiny(**SMALL | MODES[0] | {"TTT_LORA_DOCUMENTS": documents})

    class Loud(Quiet):
        def __call__(self, line):
            said.append(line)

    numbers = cfg.lora_rank * (cfg.num_layers * (cfg.mlp_dim + cfg.model_dim) + cfg.vocab_size)
    monkeypatch.setattr(Lone, "memory", lambda self: (4 * 16 * 3 * numbers, 0))
    t.test_time_train(cfg, Lone(), Loud(), model_of(cfg), stream_of(tokens(161, 0, [0, 20, 60, 90, 110])))
    assert sum("holds adapters of 3 documents" in line for line in said) == warned
    assert f"documents: 5, {min(documents, 3)} of them side by side" in said


def test_progress_is_that_of_all_ranks(tiny):
    """By which each tells how much is left to score, and whether it has time to learn."""
    ids, parts = tokens(161, 0, [0, 20, 60, 90, 110]), []

    class Loud(Quiet):
        main = True

        def metric(self, ttt_chunk, **values):
            parts.append(ttt_chunk)

    for rank in (0, 1):
        cfg = tiny(**SMALL | MODES[0] | {"TTT_LORA_DOCUMENTS": 3, "TTT_LORA_SHARE": 0})
        t.test_time_train(cfg, Lone(rank, 2), Loud(), model_of(cfg), stream_of(ids))
        assert parts[-1] == 20, parts
        parts.clear()


def test_ranks_share_out_the_places(tiny):
    """Over all ranks those of TTT_LORA_DOCUMENTS, and in each pass as many rows."""
    cfg = tiny(**SMALL | {"TTT_LORA_DOCUMENTS": 20, "VAL_BATCH_SIZE": 3 * 3 * 16})
    assert t.lora_places(cfg, Lone(), 100) == (20, 21, 7)
    assert t.lora_places(cfg, Lone(0, 3), 100) == (20, 9, 3)
    assert t.lora_places(cfg, Lone(0, 3), 4) == (4, 2, 2)


class Clock:
    """Seconds of a walk that pass as the test says."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(t.Walk, "now", lambda walk, wait=False: self.now)


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("limit", [1, 5.5, 10**6])
def test_the_budget_stops_learning_never_scoring(tiny, mode, limit, monkeypatch):
    limit += limit == 5.5 and mode["TTT_MODE"] == "full"  # where learning takes longer
    cfg, ids, clock = tiny(EVAL_MAX_SECONDS=limit, **SMALL | mode), tokens(401, 6, [0, 150]), Clock(monkeypatch)
    forward = t.GPT.forward

    def ticking(self, ids, *rest, **more):
        clock.now += ids.numel() / 400  # scoring takes 4 of these seconds, learning as much again
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(t.GPT, "forward", ticking)
    score, details, _ = walk(cfg, ids)
    assert score.faults == [] and score.tokens == 400
    assert details["stopped_by_budget"] == (limit < 7)
    if limit == 1:
        assert details["adapted_chunks"] <= 2 and 3.99 < clock.now < 5.5
    elif limit < 7:
        assert 1 < details["adapted_chunks"] < details["chunks"] - 2 and clock.now <= limit
    else:
        assert details["adapted_chunks"] == details["chunks"] - (1 if mode["TTT_MODE"] == "full" else 2)
        assert 5 < clock.now < 12


@pytest.mark.parametrize("mode", MODES[:2])
def test_seconds_before_the_walk_count_too(tiny, mode, monkeypatch):
    cfg, ids = tiny(EVAL_MAX_SECONDS=100, **SMALL | mode), tokens(401, 6, [0, 150])
    Clock(monkeypatch)
    for spent, stops in ((99.0, False), (100.0, True)):
        details = walk(cfg, ids, spent=spent)[1]
        assert details["stopped_by_budget"] is stops and (details["adapted_chunks"] == 0) is stops


def test_priming_compiles_the_walk_on_random_tokens(tiny, monkeypatch):
    """With a forward pass that is not the bare model, the fixed shapes of compiled models are used: the losses are
    the same, priming meets every shape that the walk meets, and it sees no validation text."""
    for mode in [*MODES, MODES[0] | {"TTT_LORA_CHUNK_TOKENS": 16},
                 MODES[0] | {"TTT_LORA_CHUNK_TOKENS": 4, "VAL_BATCH_SIZE": 32, "TTT_LORA_DOCUMENTS": 5}]:
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
    """Another model of the same form, made later, meets the graphs that priming left."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_(model, backend="eager", **how))
    quick = {"VAL_BATCH_SIZE": 64, "USE_COMPILE": 1, "NUM_LAYERS": 1, "SPARSE_START_LAYER": 0}
    cfg, ids = tiny(**SMALL | quick | mode), tokens(331, 7, [0, 100, 104, 150, 290])
    compiled = torch._dynamo.utils.get_compilation_metrics
    torch._dynamo.utils.clear_compilation_metrics()  # of other tests
    t.prime(cfg, Lone(), Quiet(), stream_of(ids), OneByte())
    met = len(compiled())
    t.test_time_train(cfg, Lone(), Quiet(), model_of(cfg, seed=1, noise=0.05), stream_of(ids))
    assert met and len(compiled()) == met


def test_a_walk_by_documents_reads_nothing_from_the_device(tiny):
    """However many turns it takes: what is where is known on the host, and faults are counted on the device."""
    cfg, reads = tiny(**SMALL | MODES[0]), []
    for chunks in (3, 8):
        stream, model = stream_of(tokens(8 * chunks + 1, 0, [0])), model_of(cfg, noise=0.05)
        seen = operations(lambda model=model, stream=stream: t.test_time_train(cfg, Lone(), Quiet(), model, stream))
        reads.append((seen["aten::_local_scalar_dense"], seen["aten::nonzero"]))
        assert seen["aten::bmm"] + seen["aten::baddbmm_"] > 20 * chunks
    assert reads[0] == reads[1]


def test_a_gpu_is_waited_for_once_a_twentieth_of_the_walk(tiny, monkeypatch):
    """However many turns there are; in between the host runs ahead, and the losses are the same."""
    cfg, ids = tiny(**SMALL | MODES[0] | {"USE_COMPILE": 0, "VAL_BATCH_SIZE": 32}), tokens(801, 6, [0, 99])
    expected, process, waits, turns = walk(cfg, ids)[0].nats, Lone(), [], []
    process.cuda, scored = True, t.Walk.scored
    monkeypatch.setattr(t.Process, "synchronize", lambda self: waits.append(1))
    monkeypatch.setattr(t.Walk, "scored", lambda self, work: turns.append(work) or scored(self, work))
    score, details, _ = walk(cfg, ids, process=process)
    assert np.allclose(score.nats, expected, atol=1e-5) and details["adapted_chunks"] > 3
    assert len(turns) > 80 and 2 <= len(waits) <= 2 * 21, (len(turns), len(waits))


@pytest.mark.parametrize("cuda", [False, True])
def test_a_slow_first_piece_does_not_end_learning(tiny, monkeypatch, cuda):
    """What happens once, as loading kernels, must not be taken for the pace of the walk."""
    cfg = tiny(EVAL_MAX_SECONDS=99, USE_COMPILE=0, **SMALL | MODES[0] | {"VAL_BATCH_SIZE": 32})
    process, forward, first, clock = Lone(), t.GPT.forward, [50.0], Clock(monkeypatch)
    process.cuda = cuda

    def ticking(self, ids, *rest, **more):
        clock.now += 0.01 + (first.pop() if first else 0.0)
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(t.GPT, "forward", ticking)
    _, details, _ = walk(cfg, tokens(801, 6, [0]), process)
    assert not details["stopped_by_budget"] and details["adapted_chunks"] == details["chunks"] - 1


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


@pytest.mark.parametrize("mode", [{"TTT_MODE": "full"},
                                  {"TTT_MODE": "lora", "TTT_LORA_LR": 0.05, "TTT_LORA_DOCUMENTS": 3}])
def test_two_ranks_adapt_like_one(launch, artifact, corpus, tmp_path, mode):
    """On documents of 90 tokens, so that most begin with what others on both ranks have given."""
    shutil.copytree(corpus, tmp_path / "short")
    (path,) = (tmp_path / "short").glob("fineweb_val_*.bin")
    words = np.fromfile(path, "<u2")
    words[512::90] = t.BOS_ID
    words.tofile(path)
    nats, runs = {}, {}
    for ranks in (1, 2):
        runs[ranks] = launch(ranks, run_id=f"r{ranks}", MODEL_PATH=artifact, DATA_PATH=tmp_path / "short",
                             NLL_DUMP=tmp_path / f"{ranks}.npy", **CLI | mode)
        assert runs[ranks].code == 0, runs[ranks].err + runs[ranks].out
        nats[ranks] = np.load(tmp_path / f"{ranks}.npy")
    assert np.abs(nats[1] - nats[2]).max() < 1e-4
    for run in runs.values():
        s = run.summary
        assert s["valid"] and s["val_bpb"] == s["eval"]["ttt"]["val_bpb"]
        assert s["eval"]["ttt"] | {"mode": mode["TTT_MODE"], "tokens": 1001} == s["eval"]["ttt"]
        assert "ttt_chunk [1/" in run.out and "legal_ttt val_loss:" in run.out and "legal_ttt_exact" in run.out
        n = s["eval"]["ttt"]["adapted_chunks"], s["eval"]["ttt"]["chunks"]
        assert n == (5, 6) if mode["TTT_MODE"] == "full" else 0 < n[0] < n[1]
    total = nats[1].sum() / np.log(2) / runs[1].summary["eval"]["ttt"]["bytes"]
    assert total == pytest.approx(runs[1].summary["val_bpb"], rel=1e-6)


def test_both_clocks_are_told(launch, tmp_path):
    """With torch's compiler but for its last part, which takes most of the time."""
    script = patched(tmp_path, "compile_ = t.torch.compile\n"
                               "t.torch.compile = lambda f, **how: compile_(f, backend='eager', **how)\n")
    run = launch(script=script, USE_COMPILE=1, TTT_ENABLED=1, FINAL_SLIDING_EVAL_ENABLE=0, ITERATIONS=2, NUM_LAYERS=1,
                 SPARSE_START_LAYER=0)
    assert run.code == 0, run.err + run.out
    s = run.summary
    read, compiling, walk = (s["seconds"][name] for name in ("read", "compile", "ttt"))
    assert compiling > 0.1 and s["eval_clocks"]["all"] == pytest.approx(read + compiling + walk)
    assert s["eval_clocks"]["without_compilation"] == pytest.approx(read + walk)
    assert "evaluation clocks: " in run.out


def test_a_budget_too_small_to_score_is_said(launch, artifact):
    run = launch(MODEL_PATH=artifact, EVAL_MAX_SECONDS=0.01, **CLI)
    s = run.summary
    assert run.code == 1 and not s["valid"] and s["eval"]["ttt"]["tokens"] == 1001, run.err + run.out
    assert "EVAL_MAX_SECONDS=0.01" in s["reasons"][0] and s["eval"]["ttt"]["adapted_chunks"] == 0
    assert "adaptation stops" in run.out and "note: EVAL_MAX_SECONDS=0.01 ended learning early" in run.out


def test_the_published_values_run_as_given(launch, artifact):
    """The seed's own command line, but for data, machine and the time that 20 epochs take: legal, and never worse."""
    published = {"MAX_WALLCLOCK_SECONDS": 596, "USE_COMPILE": 0, "TTT_EPOCHS": 20, "TTT_COSINE": 1, "TTT_LR": 0.0005,
                 "TTT_LR_MIN": 0.00002, "TTT_WARMUP_EPOCHS": 1, "TTT_WD": 0.01, "EVAL_STRIDE": 16,
                 "FINAL_SLIDING_EVAL_ENABLE": 1, "SEED": 1337, "TTT_ENABLED": "UNSET"}
    run = launch(MODEL_PATH=artifact, **CLI | published)
    s = run.summary
    assert run.code == 0 and s["valid"] and s["config"]["ttt_mode"] == "full", run.err + run.out
    assert s["eval"]["ttt"]["adapted_chunks"] == 5 and s["val_bpb"] < s["eval"]["sliding"]["val_bpb"]


def test_a_stream_without_documents_and_chunks_beyond_it(launch, artifact, tmp_path, corpus):
    folder, header = tmp_path / "plain", struct.pack("<256i", 20240520, 1, 90, *[0] * 253)
    shutil.copytree(corpus, folder)
    ids = np.random.default_rng(0).integers(2, 400, 90).astype("<u2")
    (folder / "fineweb_val_000000.bin").write_bytes(header + ids.tobytes())
    for mode in ("lora", "full"):
        run = launch(run_id=mode, MODEL_PATH=artifact, DATA_PATH=folder, TTT_MODE=mode,
                     **CLI | {"TTT_CHUNK_TOKENS": 5000})
        assert run.code == 0 and run.summary["eval"]["ttt"]["tokens"] == 89, run.err
        run = launch(run_id=mode + "1", MODEL_PATH=artifact, DATA_PATH=folder, TTT_MODE=mode,
                     **CLI | {"VAL_TOKEN_LIMIT": 1})
        assert run.code == 0 and run.summary["eval"]["ttt"]["tokens"] == 1, run.err


@pytest.mark.parametrize("variables, word", [
    ({"TTT_CHUNK_TOKENS": 7}, "TTT_CHUNK_TOKENS=7"), ({"TTT_CHUNK_TOKENS": 0}, "TTT_CHUNK_TOKENS"),
    ({"TTT_CHUNK_TOKENS": -3}, "TTT_CHUNK_TOKENS"), ({"TTT_MODE": "both"}, "TTT_MODE"),
    ({"TTT_OPTIMIZER": "lion"}, "TTT_OPTIMIZER"), ({"TTT_LORA_RANK": 33}, "TTT_LORA_RANK=33"),
    ({"EVAL_MAX_SECONDS": "nan"}, "EVAL_MAX_SECONDS"),
    ({"AUDIT": 1}, "AUDIT=1 ./run.sh"), ({"TTT_LORA_LR": "inf"}, "TTT_LORA_LR"),
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
    assert mode(TTT_GRAD_CLIP="0.5")[0] == "full"
    assert mode(TTT_LR="1", TTT_LORA_LR="1") == ("full", ["TTT_LORA_LR: no effect with TTT_MODE=full"])
    assert mode(TTT_MODE="lora", TTT_LR="1") == ("lora", ["TTT_LR: no effect with TTT_MODE=lora"])
    assert t.load_config({"MODEL_DIM": "4", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "ROPE_DIMS": "2"})[1] == []


@pytest.mark.parametrize("stride, chunk, window", [(4, 4, 16), (5, 10, 16), (4, 6, 25), (16, 16, 16), (3, 7, 30)])
def test_a_document_s_length_does_not_show_before_its_end(tiny, stride, chunk, window):
    """Which document is where goes by their lengths, which are the future; losses before an end must not know it."""
    cfg = tiny(**SMALL | MODES[0] | {"EVAL_STRIDE": stride, "TTT_LORA_CHUNK_TOKENS": chunk, "EVAL_SEQ_LEN": window,
                                     "TTT_LORA_DOCUMENTS": 2, "TTT_LORA_SHARE": 0.5})
    ids = tokens(121, 9, [0, 5, 30, 45])
    long = walk(cfg, ids)[0].nats
    for end in (6, 7, 8, 12, 29, 36, 60, 95):
        cut = ids.copy()
        cut[end] = t.BOS_ID
        assert np.allclose(walk(cfg, cut)[0].nats[: end - 1], long[: end - 1], atol=1e-4), end
