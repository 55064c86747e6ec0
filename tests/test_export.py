"""The export: rounding, coding, fitting the limit, and a file that opens safely."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, SCRIPT, TINY, clean_environment
from test_parts import Lone, Quiet, model_of

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
FUZZ = int(os.environ.get("FUZZ", "400"))  # mutated files of each kind


def exporter_of(cfg, noise=0.3, room=1 << 40, seconds=0.0, text=None):
    torch.manual_seed(1)
    text = torch.randint(2, cfg.vocab_size, (24, 33)) if text is None else text
    return t.Exporter(cfg, Quiet(), model_of(cfg, noise=noise), text, 8, room, seconds)


def file_of(cfg, **more) -> bytes:
    exporter = exporter_of(cfg, **more)
    return t.pack(cfg, exporter.rounded(0.0))


# ---- rounding ----


def test_rowmax_is_the_published_rule():
    w = torch.tensor([[0.5, -0.2, 0.016, 0.017], [2.0, -2.2, 0.0, 1.0]])
    (s,) = t.rowmax(w[None], 6, False)
    assert s.rows.tolist() == [np.float16(1 / 31), np.float16(2.2 / 31)] and s.rows.dtype == np.float16
    assert s.values[0].tolist() == [round(x / float(s.rows[0])) for x in w[0].tolist()] and s.values[1, 1] == -31
    w = torch.randn(5, 3000)
    w[0, 0] = 40.0
    s = t.rowmax(torch.stack([w.flip(0), w]), 8, True)[1]
    clip = np.quantile(w.abs().numpy(), 0.9999984, axis=1)
    assert np.allclose(s.rows, np.maximum(clip, 1) / 127, rtol=1e-3) and np.abs(s.values.astype(int)).max() == 127
    assert (s.tensor() - w)[1:].abs().max() < 0.51 * clip[1:].max() / 127


def sensitivity_of(x, g) -> t.Sensitivity:
    """That of a matrix with inputs x [n, cols], as a stack of one."""
    return t.Sensitivity(*t.feedback_factors((x.T @ x / len(x))[None]), g[None])


def a_column_at_a_time(u, cols, factor, order, low, high):
    """GPTQ on a matrix alone, as plain as it gets. u [rows, columns], cols [columns]"""
    factor, u = factor / cols[order], u[:, order]
    values = torch.empty_like(u)
    for begin in range(0, u.size(1), 128):
        end = min(begin + 128, u.size(1))
        errors = torch.empty_like(u[:, begin:end])
        for j in range(begin, end):
            values[:, j] = u[:, j].round().clamp(low, high)
            errors[:, j - begin] = (u[:, j] - values[:, j]) / factor[j, j]
            for k in range(j + 1, end):
                change = errors[:, j - begin] * factor[j, k]
                u[:, k] -= change
        u[:, end:] -= errors @ factor[begin:end, end:]
    result = torch.empty_like(values)
    result[:, order] = values
    return result


@pytest.mark.parametrize("n, rows, cols", [(1, 40, 96), (3, 64, 128), (5, 33, 200), (2, 96, 300)])
def test_a_stack_is_rounded_as_its_matrices_are_alone(n, rows, cols):
    """Bit for bit, factors and values, whatever else is in the stack; and a stack of one costs no less."""
    torch.manual_seed(n)
    x = torch.randn(n, 400, cols) @ torch.randn(n, cols, cols) * torch.logspace(-1.5, 0, cols) / 2
    h, u, steps = x.mT @ x / 400, 5 * torch.randn(n, rows, cols), 2.0 ** torch.randint(-4, 4, (n, cols))
    factor, order = t.feedback_factors(h)
    found = t.Sensitivity(factor, order, torch.ones(n, rows)).feed_back(u, steps, -7, 7)
    changed = 0
    for i in range(n):
        damped = h[i].double() + torch.eye(cols) * (0.01 * h[i].diag().mean().item() + 1e-12)
        by = torch.argsort(damped.diag(), descending=True, stable=True)
        alone = torch.linalg.cholesky(torch.linalg.inv(damped[by][:, by]), upper=True)
        assert torch.equal(by, order[i]) and torch.allclose(alone.float(), factor[i], rtol=1e-3, atol=1e-4)
        assert torch.equal(t.feedback_factors(h[i : i + 1])[0][0], factor[i])
        assert torch.equal(found[i], a_column_at_a_time(u[i], steps[i], factor[i], by, -7, 7))
        changed += int((found[i] != u[i].round().clamp(-7, 7)).sum())
    assert changed > n * rows * cols / 10, "errors were fed back"


def output_error(w, stored, x) -> float:
    return float((x @ (stored.tensor() - w).mT).square().sum())


def test_feedback_and_steps_by_sensitivity_lower_the_output_error():
    torch.manual_seed(0)
    x = torch.randn(2000, 200) @ torch.randn(200, 200) * torch.logspace(-1.5, 0, 200) / 2  # more than one block
    w, g = 0.02 * torch.randn(40, 200), torch.logspace(-3, 0, 40)
    sensitivity = sensitivity_of(x, g)
    (s,) = t.balanced(w[None], 2.0, False, sensitivity)
    steps = 2 ** (torch.from_numpy(s.rows) / 8)[:, None] * 2 ** (torch.from_numpy(s.cols) / 8)
    plain = t.Stored("grid", 2.0, (w / steps).round().clamp(-127, 127).numpy().astype(np.int8), s.rows, s.cols)
    assert output_error(w, s, x) < 0.7 * output_error(w, plain, x)

    def error_at(bits):
        (s,) = t.balanced(w[None], bits, False, sensitivity)
        return float(((x @ (s.tensor() - w).mT).square().sum(0) * g).sum()) / len(x) / 2, s

    (coarse, s), (fine, finer) = error_at(0.0), error_at(1.0)
    assert fine < coarse / 2.5, "a bit halves the steps and quarters the cost"
    assert s.rows[0] > s.rows[-1] + 20, "rows that matter less have coarser steps"
    expected = s.values.size * t.BALANCED_STEP**2 / 24
    assert 0.3 * expected < coarse < 3 * expected, "the cost of a value is the one asked for"
    assert np.abs(finer.values.astype(int)).max() <= 127


@pytest.mark.parametrize("rule, embedding", [("gptq", False), ("std", False), ("std", True)])
def test_the_tool_that_compares_rules_has_gptq(rule, embedding):
    """A step a row, by the largest weight or by deviations, and errors fed back."""
    import rate_distortion

    torch.manual_seed(0)
    x = torch.randn(2000, 200) @ torch.randn(200, 200) * torch.logspace(-1.5, 0, 200) / 2
    w = 0.02 * torch.randn(40, 200)
    reach = w.abs().amax(1) if rule == "gptq" else (20 if embedding else 12.85) * w.std(1)
    (fed,) = rate_distortion.by_rows(w[None], rule, 6, embedding, sensitivity_of(x, torch.ones(40)))
    assert np.array_equal(fed.rows, (reach / 31).half().numpy()) and np.abs(fed.values).max() <= 32
    step = torch.from_numpy(fed.rows).float()[:, None]
    plain = t.Stored("rows", 6, (w / step).round().numpy().astype(np.int8), fed.rows)
    assert output_error(w, fed, x) < 0.7 * output_error(w, plain, x)


def test_calibration_takes_what_fits_without_a_compiler(tiny, corpus):
    """What listens to layers runs uncompiled, also where training is compiled."""
    cpu, memory = torch.device("cpu"), (600 << 20, 0)
    process = SimpleNamespace(cuda=True, device=cpu, dtype=torch.bfloat16, memory=lambda: memory)
    tokens = t.Tokens(corpus, "train", 400)
    cfgs = [tiny(USE_COMPILE=compiled, TRAIN_SEQ_LEN=512, TRAIN_BATCH_TOKENS=512) for compiled in (0, 1)]
    sizes = [t.calibration_text(cfg, process, tokens)[1] for cfg in cfgs]
    assert sizes[0] == sizes[1] > 1 and t.tokens_per_pass(cfgs[1], process, True) // 512 > 1.5 * sizes[1]


def test_calibration_measures_inputs_and_gradients(tiny, monkeypatch):
    """H and G of a layer, of the tied output and of a lookup, against sums over single sequences."""
    cfg = tiny()
    model, text = model_of(cfg, noise=0.3), torch.randint(2, 400, (6, 33))
    calibration = t.Calibration(model, "empirical")
    used = calibration.run(text, 4, lambda: True)
    found = calibration.sensitivities()
    assert used == 6 and model.watch_output is None and all(p.grad is None for p in model.parameters())
    assert all(module.watch is None for module in model.modules() if isinstance(module, t.Linear))
    assert set(found) == {n for n, _ in model.named_parameters() if n.endswith(".weight")}
    layer, seen = model.blocks[1].mlp.proj, {}
    hooks = [layer.register_forward_hook(lambda m, args, y: seen.update(x=args[0].detach(), y=y) or y.retain_grad()),
             model.bigram.embed.register_forward_hook(lambda m, args, y: seen.update(e=y) or y.retain_grad())]
    attn, alone, together = model.blocks[1].attn, {}, t.side_by_side

    def one_by_one(x, layers, gain=1.0):
        outputs = [together(x, (layer,), gain) for layer in layers]
        for layer, y in zip("qkv", outputs, strict=False):
            if layers[0] is attn.q:
                y.retain_grad()
                alone[layer] = y
        return torch.cat(outputs, -1)

    monkeypatch.setattr(t, "side_by_side", one_by_one)
    model(text[:, :-1], text[:, 1:]).sum().backward()
    for hook in hooks:
        hook.remove()
    x, g = seen["x"].flatten(0, 1), seen["y"].grad.flatten(0, 1)
    h = (x.T @ x / len(x)).double()
    h += 0.01 * h.diag().mean() * torch.eye(len(h))
    s = found["blocks.1.mlp.proj.weight"]
    order = torch.argsort(h.diag(), descending=True, stable=True)
    inverse = torch.linalg.inv(h[order][:, order])
    assert torch.equal(order, s.order) and torch.allclose(s.factor.mT @ s.factor, inverse.float(), atol=1e-2)
    scale = model.blocks[1].mlp_scale.detach()  # y is the product with the matrix times this
    assert scale.std() > 0.1 and torch.allclose(s.weight, (g * scale).square().sum(0) / len(x), rtol=1e-3)
    for layer, y in alone.items():
        g = y.grad.flatten(0, 1) * model.blocks[1].input_scale
        cost = found[f"blocks.1.attn.{layer}.weight"].weight
        assert torch.allclose(cost, g.square().sum(0) / len(x), rtol=1e-3), layer
    ids = model.bigram.hash(text[:, :-1], (text[:, :-1] == 1) & cfg.bos_mask)
    unused = np.setdiff1d(np.arange(cfg.bigram_vocab_size), ids.numpy())
    weight = found["bigram.embed.weight"].weight
    assert torch.allclose(weight.sum(), seen["e"].grad.square().mean(2).sum() / len(x), rtol=1e-3)
    assert (weight[unused] == 0).all() and (weight > 0).sum() == cfg.bigram_vocab_size - len(unused)
    assert len(alone) == 3 and t.Calibration(model, "expected").run(text, 4, lambda: False) == 4
    q, k, fc = (found[f"blocks.1.{name}.weight"].factor for name in ("attn.q", "attn.k", "mlp.fc"))
    assert q.data_ptr() == k.data_ptr() != fc.data_ptr(), "q and k see the same input, fc another"


# ---- coding ----


@pytest.mark.parametrize("count, kind", [(1, "any"), (31, "any"), (33, "same"), (5000, "same"), (200_000, "any"),
                                         (300_000, "narrow"), (100_000, "extremes")])
def test_rans_gives_back_what_it_was_given(count, kind):
    rng = np.random.default_rng(count)
    table_of = rng.integers(0, t.CLASSES, count).astype(np.uint8)
    symbols = {"any": rng.integers(0, 256, count), "same": np.full(count, 7), "extremes": rng.choice([0, 255], count),
               "narrow": np.clip(rng.normal(128, 2.0 ** (table_of / 12)), 0, 255)}[kind].astype(np.uint8)
    counts = np.bincount(table_of * np.int64(256) + symbols, minlength=t.CLASSES * 256).reshape(t.CLASSES, 256)
    tables = t.frequencies(counts)
    assert ((tables > 0) == (counts > 0)).all()
    data = t.rans_encode(symbols, table_of, tables)
    assert np.array_equal(t.rans_decode(data, table_of, tables), symbols)
    shares = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[counts > 0]
    ideal = -(counts[counts > 0] * np.log2(shares)).sum() / 8
    assert len(data) <= 1.01 * ideal + 4 * t.rans_lanes(count) + 8
    for bad in (data[:-2], data + b"\0\0", data[2:]):
        with pytest.raises(ValueError):
            t.rans_decode(bad, table_of, tables)


def weights_like_trained(cfg) -> dict:
    """Stored values whose rows and columns differ in spread, as trained ones do."""
    rng, stored = np.random.default_rng(0), {}
    for name, p in t.GPT(cfg).named_parameters():
        if p.ndim == 2 and name.endswith(".weight"):
            rows, cols = (np.exp(rng.normal(0, 0.4, n)) for n in p.shape)
            w = torch.from_numpy(rng.normal(0, 0.15, p.shape) * rows[:, None] * cols).float()
            (stored[name],) = t.rowmax(w[None], 6, False)
        else:
            stored[name] = t.Stored("fp16", 16, rng.normal(0, 1, p.shape).astype(np.float16))
    return stored


def test_smaller_than_its_entropy_and_than_torch_save(tiny):
    cfg = tiny(MODEL_DIM=128, QUANT="rowmax", NUM_LAYERS=4)
    stored = weights_like_trained(cfg)
    quantised = [s for s in stored.values() if s.rows is not None]
    blob = t.pack(cfg, stored)
    shares = [np.unique(s.values, return_counts=True)[1] / s.values.size for s in quantised]
    order0 = sum(-(p * np.log2(p)).sum() * s.values.size / 8 for p, s in zip(shares, quantised, strict=True))
    layout = t.lay_out(cfg, stored)
    coded = t.rans_encode(np.concatenate([s.values.ravel() for s in quantised]).view(np.uint8) ^ 128,
                          np.concatenate(layout.table_of), layout.tables)
    assert len(coded) < order0, "rows and columns differ in spread, and are coded so"
    torch.save({n: (torch.from_numpy(s.values), torch.from_numpy(s.rows) if s.rows is not None else None)
                for n, s in stored.items()}, buffer := io.BytesIO())
    assert len(blob) < 0.97 * len(zstandard.compress(buffer.getvalue(), 22))
    assert len(coded) < 0.99 * len(zstandard.compress(b"".join(s.values.tobytes() for s in quantised), 22))


@pytest.mark.parametrize("variables", [{"QUANT": q} for q in ("balanced", "rowmax")]
                         + [{"TIE_EMBEDDINGS": 0}, {"QUANT_MIN_NUMEL": 10**9},
                            {"BIGRAM_VOCAB_SIZE": 0, "SPARSE_HIDDEN_DIM": 0},
                            {"QUANT_MIN_NUMEL": 0, "QUANT_BITS_MLP": 2.5}])
def test_a_file_gives_back_what_was_stored(tiny, variables):
    cfg = tiny(**variables)
    exporter = exporter_of(cfg)
    stored = exporter.rounded(0.0)
    blob, coarse = t.pack(cfg, stored), {n: s for n, s in stored.items() if s.rows is not None}
    assert blob == file_of(cfg), "the same weights and settings must give the same bytes"
    header, tensors = t.unpack(blob, "it")
    assert all(header["config"][f.name] == getattr(cfg, f.name) for f in t.MODEL_FIELDS) and b"pickle" not in blob
    for name, w in exporter.weights.items():
        got = tensors[name].tensor()
        assert tensors[name].values.shape == w.shape and (name in coarse) == (tensors[name].rows is not None)
        assert torch.equal(got, coarse[name].tensor() if name in coarse else w.half().float()), name
    assert bool(coarse) == (cfg.quant_min_numel < 10**9)
    t.build_model(cfg, {n: s.tensor() for n, s in tensors.items()}, Lone())


@pytest.mark.parametrize("rule, nats", [("balanced", 4.5527043), ("rowmax", 4.5536017)])
def test_artifacts_of_format_3_are_read(rule, nats):
    """Two that the script of commit deca6c4 wrote, and the mean loss on a row of tokens that it found. Switches that it
    did not have are off."""
    path = Path(__file__).parent / f"format3_{rule}.ptz"
    header, stored = t.unpack(path.read_bytes(), str(path))
    cfg = t.Config(**header["config"])
    model = t.build_model(cfg, {name: s.tensor() for name, s in stored.items()}, Lone())
    ids = torch.arange(2, 34)[None]
    assert model(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(nats, abs=2e-6)


# ---- fitting the limit ----


@pytest.mark.parametrize("noise", [0.3, 0.01])
@pytest.mark.parametrize("variables", [{}, {"QUANT": "rowmax"}, {"QUANT_BITS_MLP": 2, "QUANT_BITS_EMBED": 3}])
def test_bytes_are_counted_without_coding(tiny, variables, noise):
    cfg = tiny(MODEL_DIM=96, NUM_LAYERS=4, BIGRAM_VOCAB_SIZE=1024, **variables)
    exporter = exporter_of(cfg, noise=noise)
    for common in (-20.0, 0.0, 1.5):  # the first leaves hardly a value that is not 0
        stored = exporter.rounded(common)
        counted, coded = t.lay_out(cfg, stored).size, len(t.pack(cfg, stored))
        assert abs(counted - coded) < 0.001 * coded, (counted, coded)


@pytest.mark.parametrize("rule", ["balanced", "rowmax"])
def test_the_search_keeps_the_limit_and_spends_it(tiny, rule, monkeypatch):
    low = {"QUANT_BITS_ATTN": 2, "QUANT_BITS_MLP": 2, "QUANT_BITS_EMBED": 4, "QUANT_BITS_BIGRAM": 4}
    low = {"balanced": low, "rowmax": {"QUANT": "rowmax"}}[rule]
    cfg = tiny(MODEL_DIM=64, EXPORT_FILL=1, **low)  # far from the 8 bits where nothing is left to gain
    nominal, packs, pack = len(file_of(cfg)), [], t.pack
    monkeypatch.setattr(t, "pack", lambda *arguments: packs.append(1) or pack(*arguments))
    sizes = {}
    for room in (nominal * 2 // 3, nominal * 9 // 10, nominal * 11 // 10, nominal * 10):
        exporter = exporter_of(cfg, room=room)
        sizes[room], report = len(exporter.search()), exporter.report
        assert sizes[room] <= room and packs.pop() and not packs and report["attempts"] <= t.MOST_ATTEMPTS
        moved = {report["nominal_bits"][g] - bits for g, bits in exporter.asked.items()}
        inside = all(exporter.low < bits < exporter.high for bits in report["nominal_bits"].values())
        assert not inside or max(moved) - min(moved) < 1e-9, "one common term"
        assert abs(report["bytes_first"] - nominal) < 0.002 * nominal
    assert all(sizes[r] > 0.99 * r for r in sorted(sizes)[:3]), sizes
    assert exporter_of(cfg, room=100).search() is None and not packs
    left = exporter_of(tiny(MODEL_DIM=64, **low), room=nominal * 2)
    assert len(left.search()) == nominal, "EXPORT_FILL=0 leaves room"


def test_a_count_that_was_too_low_is_made_up_for(tiny, monkeypatch):
    """The file that was counted to fit is coded, does not, and a coarser one is taken."""
    cfg, lay_out = tiny(), t.lay_out
    room = len(file_of(cfg))

    def low(*arguments):
        layout = lay_out(*arguments)
        layout.size -= 50
        return layout

    monkeypatch.setattr(t, "lay_out", low)
    exporter = exporter_of(cfg, room=room - 1)
    blob = exporter.search()
    assert 0.9 * room < len(blob) < room and exporter.report["attempts"] > 1
    assert exporter.report["nominal_bits"]["attn"] < 6


@pytest.mark.parametrize("variables", [{}, {"QUANT": "rowmax"}])
def test_every_room_is_filled_in_which_there_is_a_file(tiny, variables):
    """From the smallest file, whose values are nearly all 0, to the largest."""
    cfg = tiny(MODEL_DIM=64, EXPORT_FILL=1, QUANT_MIN_NUMEL=0, **variables)
    ends = exporter_of(cfg, noise=0.02)
    least, most = (len(t.pack(cfg, ends.rounded(common))) for common in (-20.0, 20.0))
    assert exporter_of(cfg, noise=0.02, room=least - 1).search() is None
    for share in (0.002, 0.01, 0.1, 0.95, 1.1):
        room = int(least + share * (most - least))
        blob = exporter_of(cfg, noise=0.02, room=room).search()
        assert min(0.98 * room, most) <= len(blob) <= room, share


class Clock:
    """Stands in for the module `time`: rounding takes `each` seconds, all else none."""

    def __init__(self, monkeypatch, each: float):
        self.now, rounded = 100.0, t.Exporter.rounded
        monkeypatch.setattr(t, "time", self)

        def slow(exporter, common):
            self.now += each
            return rounded(exporter, common)
        monkeypatch.setattr(t.Exporter, "rounded", slow)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [1.2, 1.5, 2, 2.4])
def test_a_tiny_guard_and_a_first_file_far_too_large(tiny, monkeypatch, share):
    """Few attempts go beyond the guard, and a file that fits comes of them."""
    cfg = tiny(MODEL_DIM=64, NUM_LAYERS=4, EXPORT_FILL=1, QUANT_MIN_NUMEL=0)
    room = int(len(file_of(cfg)) / share)
    Clock(monkeypatch, 1.0)
    exporter = exporter_of(cfg, room=room, seconds=0.01)
    blob = exporter.search()
    assert len(blob) <= room and exporter.report["attempts"] <= 3
    none = exporter_of(cfg, room=100, seconds=0.01)
    assert none.search() is None and none.report["attempts"] <= 5


def test_a_slow_search_ends_within_the_guard(tiny, monkeypatch):
    cfg = tiny(MODEL_DIM=64, EXPORT_FILL=1, QUANT_BITS_ATTN=2, QUANT_BITS_MLP=2, QUANT_BITS_EMBED=2)
    nominal = len(file_of(cfg))
    clock, attempts = Clock(monkeypatch, 3.0), {}
    following = t.Exporter.next_common

    def slowly(exporter, tried, late):  # never near enough
        return following(exporter, tried, late) and 0.01 * len(tried)

    monkeypatch.setattr(t.Exporter, "next_common", slowly)
    for guard in (2.0, 7.0, 10.0, 1000.0, 0.0):
        exporter = exporter_of(cfg, room=2 * nominal, seconds=guard)
        assert len(exporter.search()) <= 2 * nominal
        attempts[guard] = exporter.report["attempts"]
        assert not guard or clock.now - exporter.began <= max(guard, 3.0)
    assert list(attempts.values()) == [1, 2, 3, t.MOST_ATTEMPTS, t.MOST_ATTEMPTS]


def test_runs_over_and_under_the_limit(launch):
    low = {"QUANT": "rowmax", "QUANT_BITS_ATTN": 3, "QUANT_BITS_MLP": 3, "QUANT_BITS_EMBED": 4, "QUANT_BITS_BIGRAM": 4}
    first = launch(CKPT_EVERY_SECONDS=1e9, ITERATIONS=60, **low)
    assert first.code == 0, first.err
    code = SCRIPT.stat().st_size
    again = {"TRAIN_ENABLED": 0, "MODEL_PATH": first.folder} | low
    size = first.summary["artifact"]["bytes_model"]
    assert launch(run_id="same", **again).summary["artifact"]["sha256"] == first.summary["artifact"]["sha256"]
    hashes, losses = zip(*((run.summary["artifact"]["sha256"], run.summary["eval"]["int6"]["val_loss"]) for run in (
        launch(run_id=f"ranks{n}", ranks=n, **again | {"QUANT": "balanced"}) for n in (1, 2))), strict=True)
    assert hashes[0] == hashes[1] and losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, limit, fill in (("less", code + size * 3 // 4, 0), ("more", code + size * 5 // 4, 1)):
        run = launch(run_id=name, ARTIFACT_LIMIT_BYTES=limit, EXPORT_FILL=fill, **again)
        assert run.code == 0 and run.summary["valid"] and run.summary["artifact"]["bytes_total"] <= limit, run.out
        line = r"^export: nominal bits attn (\S+), .* \((.)(\S+) to all\); coded bits a value (\S+);"
        said = re.search(line, run.out, re.M)
        assert said[2] == "+-"[not fill] and abs(float(said[1]) - 3 - float(said[2] + said[3])) < 0.0101
        report = run.summary["export"]
        assert f"{report['coded_bits']:.2f}" == said[4] and 0 < report["coded_bits"] < report["nominal_bits"]["attn"]
        assert run.summary["artifact"]["bytes_total"] > limit - size // 20
    none = launch(run_id="none", ARTIFACT_LIMIT_BYTES=code + 100, **again)
    assert none.code == 1 and none.summary["artifact"] is None
    assert len(none.summary["reasons"]) == 1 and "no setting fits" in none.summary["reasons"][0]
    assert not (none.folder / "final_model.int6.ptz").exists() and none.summary["eval"]["sliding"]
    assert f"TRAIN_ENABLED=0 MODEL_PATH={first.folder} {sys.executable} {SCRIPT}\n" in none.out
    launch(run_id="other", **again | {"MODEL_DIM": 64}).refused("MODEL_DIM=64: the model of", "has 32")
    launch(run_id="less than the code", ARTIFACT_LIMIT_BYTES=1000).refused("LIMIT_BYTES=1000: the code alone has")
    trained = launch(run_id="trained", ARTIFACT_LIMIT_BYTES=code + 1000)
    assert trained.code == 1 and f"MODEL_PATH={trained.folder} {sys.executable} " in trained.out
    (kept,) = t.checkpoints(trained.folder)
    kept.write_bytes(kept.read_bytes()[:-1000])
    damaged = {"TRAIN_ENABLED": 0, "MODEL_PATH": trained.folder}
    launch(run_id="damaged", **damaged).refused(f"{kept}: not a whole checkpoint (", "remove it to go by the one")
    kept.unlink()
    launch(run_id="removed", **damaged).refused("a folder without checkpoints", "CKPT_EVERY_SECONDS")
    artifact = first.folder / "final_model.int6.ptz"
    old = launch(run_id="old", TRAIN_ENABLED=0, MODEL_PATH=artifact, ARTIFACT_LIMIT_BYTES=9)
    assert old.code == 1 and "over the limit" in old.summary["reasons"][0] and old.summary["eval"]["sliding"]


def test_the_guard_is_said_and_taken_from_training(launch):
    run = launch(MAX_WALLCLOCK_SECONDS=2, EXPORT_MAX_SECONDS=0.001, ITERATIONS=10**6, EXPORT_FILL=1,
                 CALIBRATION_TOKENS=65536, TRAIN_LOG_EVERY=0)
    assert run.code == 0 and "EXPORT_MAX_SECONDS=0.001 leaves time to calibrate on" in run.out, run.err
    assert run.summary["export"]["tokens"] < 65536 and run.summary["train"]["stop"] == "wallclock_cap"
    run = launch(run_id="long", MAX_WALLCLOCK_SECONDS=4, EXPORT_MAX_SECONDS=2, ITERATIONS=10**6, TRAIN_LOG_EVERY=0)
    assert 2 <= run.summary["train"]["seconds"] < 2.5
    for seconds in (0, 4, 5):
        launch(run_id="no", MAX_WALLCLOCK_SECONDS=4, EXPORT_MAX_SECONDS=seconds).refused("EXPORT_MAX_SECONDS=")


# ---- opening safely ----


def sign(body: bytes) -> bytes:
    return body + t.hashlib.sha256(body).digest()


def forge(blob: bytes, edit) -> bytes:
    """The file with an edited header text and a checksum that fits."""
    cut = 12 + struct.unpack("<I", blob[8:12])[0]
    header = zstandard.compress(edit(zstandard.decompress(blob[12:cut]).decode()).encode())
    return sign(blob[:8] + struct.pack("<I", len(header)) + header + blob[cut:-32])


@pytest.mark.parametrize("edit", [
    lambda h: "[" * 100000, lambda h: h.replace('"num_layers":3', '"num_layers":Infinity'),
    lambda h: h.replace('"num_layers":3', '"num_layers":4'), lambda h: h.replace("[400,32]", "[]"),
    lambda h: h.replace("[400,32]", "[10,1280]"), lambda h: h.replace("[400,32]", f"[{10**30}]"),
    lambda h: h.replace('"tok_emb.weight"', "5"), lambda h: h.replace('"model_dim":32', '"model_dim":16384'),
    lambda h: h.replace('"tensors"', '"tensor"'), lambda h: "7", lambda h: h.replace('"grid"', '"rows"'),
    lambda h: h.replace('"grid"', '"fp16"'), lambda h: h.replace('"grid"', '"other"'),
    lambda h: h.replace('"fp16"', '"fp32"'), lambda h: h.replace('"fp16"', '"grid"'),
    lambda h: h.replace('"sides":', '"sides":1'), lambda h: h.replace('"sides":', '"sides":-'),
    lambda h: h.replace('"grid",6.0,', '"grid",6.0,1'), lambda h: h.replace('"grid",6.0,', '"grid",1e9,'),
    lambda h: re.sub(r'("grid",8.0,)[1-9]\d*', r"\g<1>0", h), lambda h: h.replace('"num_heads":4', '"num_heads":5'),
])
def test_forged_headers_are_refused(tiny, edit):
    good = file_of(tiny())
    assert t.unpack(forge(good, lambda h: h), "it")[0]["config"]["num_layers"] == 3
    with pytest.raises(t.UserError, match="it: "):
        t.unpack(forge(good, edit), "it")


FUZZER = """
import random, resource, struct, sys, time
import train_gpt as t
import zstandard
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files, count, seed = [open(p, "rb").read() for p in sys.argv[3:]], int(sys.argv[1]), int(sys.argv[2])
rng, base = random.Random(seed), peak()
for f in files:
    t.unpack(f, "it")
honest, read, refused, slowest = peak(), 0, 0, 0.0
for i in range(count):
    blob, other = bytearray(rng.choice(files)), rng.choice(files)
    cut = 12 + struct.unpack("<I", blob[8:12])[0]
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
    elif kind == 1:
        del blob[rng.randrange(len(blob)):]
    elif kind == 2:
        at = rng.randrange(len(blob))
        blob[at:] = other[rng.randrange(len(other)):] if rng.random() < 0.5 else other[at:]
    elif kind == 3:
        at, size = rng.randrange(len(blob)), rng.randrange(1, 400)
        blob[at:at] = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
    else:  # the header's text, so that the rest is reached
        text = bytearray(zstandard.decompress(bytes(blob[12:cut])))
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(text))
            if kind == 4:
                text[at] = rng.choice(b'0123456789[]{},:"-eE. ') if rng.random() < 0.8 else rng.randrange(256)
            else:
                digits = [j for j, c in enumerate(text) if 48 <= c < 58]
                text[rng.choice(digits)] = rng.choice(b"0123456789")
        header = zstandard.compress(bytes(text))
        blob[8:cut] = struct.pack("<I", len(header)) + header
    if rng.random() < 0.85 and len(blob) > 44:  # a checksum that fits
        blob[-32:] = t.hashlib.sha256(bytes(blob[:-32])).digest()
    began = time.perf_counter()
    try:
        t.unpack(bytes(blob), "it")
        read += 1
    except t.UserError as error:
        refused += 1
        assert "\\n" not in str(error) and str(error).startswith("it: ")
    slowest = max(slowest, time.perf_counter() - began)
print(read, refused, slowest, base, honest, peak())
"""


def fuzz(files, count: int, seed: int) -> list[float]:
    command = [sys.executable, "-W", "error", "-c", FUZZER, str(count), str(seed), *map(str, files)]
    done = subprocess.run(command, env=clean_environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(x) for x in done.stdout.split()]


def test_mutated_files_are_read_or_refused(tiny, tmp_path):
    """Flipped, cut, spliced, stretched files and forged headers, most with a checksum that fits."""
    looped = {"NUM_LOOPS": 1, "SMEAR_GATE_ENABLED": 0, "SKIP_GATES_ENABLED": 1}
    for i, variables in enumerate(({}, {"QUANT": "rowmax"}, looped, {"NUM_LAYERS": 2})):
        (tmp_path / str(i)).write_bytes(file_of(tiny(**variables)))
    read, refused, slowest, base, honest, peak = fuzz(sorted(tmp_path.iterdir()), FUZZ, 1)
    assert read + refused == FUZZ and refused > FUZZ // 3 and slowest < 5
    assert peak < 4 * honest and peak - base < 4 * (honest - base) + 64 * 1024, "in KiB"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "magic", "shard", "header", "version"])
def test_damaged_files_are_one_line(launch, tiny, corpus, tmp_path, damage):
    good = file_of(tiny())
    bad = {"cut": good[: len(good) // 2], "flip": good[:200] + bytes([good[200] ^ 1]) + good[201:], "empty": b"",
           "magic": b"X" + good[1:], "shard": (corpus / "fineweb_val_000000.bin").read_bytes(),
           "header": sign(good[:8] + struct.pack("<I", 2**31) + good[12:-32]), "version": good[:7] + b"\1" + good[8:]}
    (tmp_path / "bad.ptz").write_bytes(bad[damage])
    why = {"cut": "checksum", "flip": "checksum", "version": "of format 1"}.get(damage, "")
    launch(TRAIN_ENABLED=0, MODEL_PATH=tmp_path / "bad.ptz").refused("bad.ptz: ", why)


def test_numbers_that_are_not_finite_are_refused(tiny):
    cfg = tiny()
    stored = {n: t.Stored("fp16", 16, p.detach().half().numpy()) for n, p in model_of(cfg, 0.3).named_parameters()}
    stored["smear"].values[3] = np.nan
    with pytest.raises(t.UserError, match="not finite"):
        t.unpack(t.pack(cfg, stored), "it")


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.ptz"
    t.write_atomically(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(t.UserError, match=r"a\.ptz: its 3 bytes cannot be written \(No space"):
                t.write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.ptz"]


def test_a_full_disk_ends_in_one_line(launch, monkeypatch, tmp_path):
    """A limit on file size stands in for a full disk: the log still fits, checkpoint and artifact do not."""
    run = launch(ITERATIONS=2)
    old = (run.folder / "final_model.int6.ptz").read_bytes()
    code = ("import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({SCRIPT.stat().st_size + 8192},) * 2);"
            f"sys.argv = ['train_gpt.py']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    env = clean_environment() | TINY | {"DATA_PATH": run.summary["config"]["data_path"], "LOG_DIR": str(tmp_path / "b"),
                                        "RUN_ID": "full", "MODEL_DIM": "256", "ITERATIONS": "2", "EXPORT_FILL": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "final_model.int6.ptz: its" in done.stderr and "cannot be written" in done.stderr
    assert not list((tmp_path / "b" / "full").rglob("*.ptz*")) and not list((tmp_path / "b").rglob("*.partial"))
    assert old == (run.folder / "final_model.int6.ptz").read_bytes()


WRITER = """
import sys
import time
from pathlib import Path
import train_gpt as t
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        t.write_atomically(Path(sys.argv[1]), letter * 3_000_000)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.ptz"
    env = clean_environment() | {"PYTHONPATH": str(ROOT)}
    for delay in (0.05, 0.11, 0.23):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=env, stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.kill()
        writer.communicate()
        assert not path.exists() or path.read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)
    assert path.exists()
