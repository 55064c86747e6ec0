#!/usr/bin/env python3
"""The stages of tools/measure.py, each in a process of its own: measure_stages.py NAME ORDER, which that one calls.

ORDER is JSON: the folder of the book, a folder for temporary files, the sizes and the limit in seconds. A figure that
needs a GPU is null elsewhere, with the reason.
"""

import contextlib
import copy
import dataclasses
import heapq
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

BEGAN = time.perf_counter()  # before torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import audit as audit_tool  # noqa: E402
import bench  # noqa: E402
import measure_book  # noqa: E402
import measure_profile  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import has_gpu  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import train_gpt as t  # noqa: E402

IMPORTED = time.perf_counter() - BEGAN
RANKS = 8  # the machine of the challenge
SLIDES = 262_144  # targets that whole runs score
PUBLISHED_STEPS = 5600  # what the published schedule is made for: about 596 s at 106 ms
NO_GPU = "no GPU"


class Stage:
    """What a stage works with: its figures, its sizes and a folder for temporary files."""

    def __init__(self, name: str, order: dict):
        self.figures, self.work = measure_book.Figures(Path(order["out"]), name), Path(order["work"])
        self.out, self.tokens, self.steps = Path(order["out"]), order["tokens"], order["steps"]
        self.seconds, self.limit, self.against = order["train_seconds"], order["limit"], order["against"]
        self.rounds = order["rounds"]

    def set(self, force: dict | None = None, **own):
        """Variables of this stage: the environment's win over its `own`, but not over those in `force`."""
        if self.tokens:
            own = {"TRAIN_BATCH_TOKENS": self.tokens} | own
        own = {"PRESET": "seed" if has_gpu() else "demo", "VAL_TOKEN_LIMIT": SLIDES} | own
        for name, value in own.items():
            os.environ.setdefault(name, str(value))
        os.environ |= {name: str(value) for name, value in (force or {}).items()}

    def configured(self, force: dict | None = None, **own) -> t.Config:
        """The configuration under the stage's variables, which is entered too. Ends the process for bad values."""
        self.set(force, **own)
        cfg, _ = t.read_launch([])
        told = {name: value for name, value in cfg.overrides().items() if not name.endswith(("_PATH", "_DIR"))}
        self.figures.about(settings={"PRESET": cfg.preset} | told, data=t.find_data(cfg).name)
        return cfg

    def bench(self, cfg: t.Config) -> bench.Bench:
        """The parts of a run, and the machine entered."""
        parts = bench.Bench(cfg, self.steps, 5)
        self.figures.about(machine=machine(parts.process))
        return parts


def machine(process: t.Process) -> dict:
    """What the figures are of."""
    found = process.hardware() | {"dtype": str(process.dtype)[6:], "python": sys.version.split()[0],
                                  "torch": torch.__version__}
    for package in ("triton", "numpy", "sentencepiece", "zstandard"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if process.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "processors": torch.cuda.get_device_properties(process.device).multi_processor_count}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"],
                encoding="utf-8", capture_output=True, timeout=10)
            found["driver, power limit, highest clock"] = asked.stdout.strip().splitlines()[0] if asked.stdout else ""
    return found


def median(values: list[float]) -> dict:
    """Median, spread and number of measurements."""
    middle, percent = bench.spread(values)
    return {"median": middle, "spread_percent": percent, "n": len(values)}


class Graphs:
    """What torch compiles, each graph entered as soon as it is known: its name, the shape that asked for it, seconds.
    A backward pass is compiled when it first runs, and so is noted at the next pass, with the shape of the last."""

    def __init__(self, figures: measure_book.Figures):
        self.figures, self.found, self.shape = figures, [], ""
        torch._dynamo.utils.clear_compilation_metrics()

    def note(self):
        """Enter what was compiled since the last call."""
        met = torch._dynamo.utils.get_compilation_metrics()
        torch._dynamo.utils.clear_compilation_metrics()
        for graph in met:
            seconds = (graph.duration_us or 0) / 1e6
            self.found.append({"graph": graph.co_name or "backward", "shape": self.shape, "seconds": seconds})
        if met:
            self.figures(graphs=self.found)

    def watched(self, forward):
        """A compiled forward pass that is watched."""
        def call(ids, *more):
            self.note()
            result = forward(ids, *more)
            learns = ", to learn from" if result.requires_grad else ""
            self.shape = f"{list(ids.shape)} -> {list(result.shape)}{learns}"
            self.note()
            return result

        return call

    @contextlib.contextmanager
    def watching(self):
        """While this holds, every forward pass that train_gpt.py compiles is watched."""
        plain = t.compiled

        def compiled(model, cfg, process):
            forward = plain(model, cfg, process)
            return forward if forward is model else self.watched(forward)

        with mock.patch.object(t, "compiled", compiled):
            yield
            self.note()


# ---- step ------------------------------------------------------------------------------------------------------------


def copy_rate(parts: bench.Bench) -> list[float]:
    """GB/s of a large copy on the device, bytes read and written."""
    size = 2**30 if parts.process.cuda else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=parts.device)
    target = torch.empty_like(source)
    parts.timed(lambda: target.copy_(source))
    return [2 * size / parts.timed(lambda: target.copy_(source)) / 1e9 for _ in range(10)]


def attention_forms(parts: bench.Bench) -> dict:
    """Ways to compute the model's attention: what each needs (empty where it is there), and a context for it."""
    fa3, cuda = t.flash_attn_func, parts.process.cuda
    gpu = "" if cuda else NO_GPU
    return {
        "as the model": ("", contextlib.nullcontext(), t.attend),
        "cuDNN": (gpu, sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cuda else None, plain_attention),
        "flash": (gpu, sdpa_kernel(SDPBackend.FLASH_ATTENTION) if cuda else None, plain_attention),
        "FlashAttention-3": (gpu or ("" if fa3 else "not found"),
                             contextlib.nullcontext(), lambda q, k, v: fa3(q, k, v, causal=True)),
    }


def plain_attention(q, k, v):
    """PyTorch's attention, of whatever backend is allowed."""
    with mock.patch.object(t, "flash_attn_func", None):
        return t.attend(q, k, v)


def attention(stage: Stage, parts: bench.Bench):
    """Milliseconds forward and backward of each attention at the shape of the model's, without a compiler."""
    cfg, dtype = parts.cfg, parts.process.dtype
    shape = parts.trainer.micro, cfg.train_seq_len, cfg.num_heads, cfg.model_dim // cfg.num_heads
    q, k, v, g = (torch.randn(shape[0], shape[1], heads, shape[3], device=parts.device).to(dtype).requires_grad_()
                  for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads, cfg.num_heads))
    stage.figures(attention_shape=f"q {list(shape)}, {cfg.num_kv_heads} KV heads, {str(dtype)[6:]}")
    for name, (lacks, context, form) in attention_forms(parts).items():
        key = f"attention_ms, {name}"
        if lacks:
            stage.figures.missing(key, lacks)
            continue

        def both(form=form):
            torch.autograd.grad(form(q, k, v), (q, k, v), g)

        try:
            with context:
                for _ in range(2):
                    parts.timed(both)
                stage.figures(**{key: median([1000 * parts.timed(both) for _ in range(10)])})
        except RuntimeError as error:  # a backend that does not take this shape says so
            stage.figures.missing(key, t.one_line(error)[:300])


def mlp(stage: Stage, parts: bench.Bench):
    """Milliseconds forward and backward of a layer's MLP, plain and by our kernel, compiled where the model is."""
    cfg, process, block = parts.cfg, parts.process, parts.model.blocks[0]
    lacks = t.why_not_fused(cfg, process)
    x, g = (torch.randn(parts.trainer.micro, cfg.train_seq_len, cfg.model_dim, device=parts.device).to(process.dtype)
            for _ in range(2))
    x.requires_grad_()
    for name, fused in (("plain", False), ("our kernel", True)):
        key = f"mlp_ms, {name}"
        if fused and lacks:
            stage.figures.missing(key, lacks)
            continue
        form = t.MLP(cfg).to(parts.device)
        form.fused = fused
        call = torch.compile(form, dynamic=False) if t.compiles(cfg, process) else form
        given = [x, *form.parameters()]

        def both(call=call, given=given):
            torch.autograd.grad(call(x, 1.0, block.mlp_scale[:, None]), given, g)

        for _ in range(2):
            parts.timed(both)
        stage.figures(**{key: median([1000 * parts.timed(both) for _ in range(10)])})


def ceilings(stage: Stage, parts: bench.Bench) -> float:
    """What this card reaches at most: products, which are returned in FLOP/s, and copies."""
    peak = parts.peak()
    stage.figures(peak_tflops=peak / 1e12, copy_gb_per_s=median(copy_rate(parts)))
    return peak


def steps(stage: Stage, parts: bench.Bench, peak: float):
    """The first step, then `steps` of them in a row, each from the end of the one before, as in a run."""
    cfg, trainer = parts.cfg, parts.trainer
    if parts.process.cuda:  # what was measured before is not of the step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if trainer.forward is not parts.model:
        trainer.forward = Graphs(stage.figures).watched(trainer.forward)
    first = parts.timed(lambda: parts.step(0))
    stage.figures(first_step_s=first, import_s=IMPORTED, parameters=len(parts.trainer.flat.weights),
                  muon_parameters=trainer.flat.borders[-1])
    loader = t.Loader(cfg, parts.tokens, parts.process, 1)
    for _ in range(3):
        trainer.step(loader.next(), 0, 1.0)
    marks, waits = [time.perf_counter()], []
    for number in range(stage.steps):
        asked = time.perf_counter()
        tokens = loader.next()
        waits.append(time.perf_counter() - asked)
        trainer.step(tokens, number, 1.0)  # returns when the step before is done: the device never idles
        marks.append(time.perf_counter())
    trainer.synchronize()
    times = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    middle, tokens = statistics.median(times), cfg.train_batch_tokens
    flops = tokens * bench.flops_per_token(parts.model, cfg, cfg.train_seq_len)
    stage.figures(step_ms=median([1000 * s for s in times]), tokens=tokens, tokens_per_s=tokens / middle,
                  micro_batch_seqs=trainer.micro, tflop_a_step=flops / 1e12,
                  share_of_peak_percent=100 * flops / middle / peak,
                  loader_share_percent=100 * statistics.median(waits) / middle,
                  peak_memory_gib=parts.process.memory()[1] / 2**30, memory_gib=parts.process.memory()[0] / 2**30)


def traced(stage: Stage, process: t.Process, action, steps: int) -> dict:
    """The kernels of action(), which takes so many steps, summed and entered, if those of a GPU can be seen."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * process.cuda]
    trace = stage.work / "trace.json"
    with torch.profiler.profile(activities=kinds) as found:
        action()
        process.synchronize()
    found.export_chrome_trace(str(trace))
    result = measure_profile.summed(trace, steps)
    if process.cuda and not result["kernels_seen"]:
        stage.figures.missing("classes_ms", "the profiler saw no kernel of the GPU")
        return result
    stage.figures(classes_ms=result["classes"], profiled_ms=result["ms_a_step"],
                  profiled="kernels" if result["kernels_seen"] else "operators of a CPU",
                  kernels=result["kernels"][: measure_profile.TOP])
    return result


def profile(stage: Stage, parts: bench.Bench, count: int = 3):
    """Sum the kernels of `count` steps."""
    trainer, loader = parts.trainer, t.Loader(parts.cfg, parts.tokens, parts.process, 1)
    update = trainer.optimizers.step

    def marked(*arguments):
        with torch.profiler.record_function("optimizers"):
            return update(*arguments)

    def some():
        for _ in range(count):
            trainer.step(loader.next(), 0, 1.0)

    with mock.patch.object(trainer.optimizers, "step", marked):
        for _ in range(2):  # the first starts the profiler itself
            result = traced(stage, parts.process, some, count)
    (stage.out / "profile.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["attention"]:
        stage.figures(attention_taken=result["attention"])
    else:
        stage.figures.missing("attention_taken", NO_GPU if not parts.process.cuda else "no kernel's name tells it")


def step(stage: Stage):
    """A training step at what each of eight GPUs has."""
    parts = stage.bench(stage.configured())
    peak = ceilings(stage, parts)
    attention(stage, parts)
    mlp(stage, parts)
    steps(stage, parts, peak)
    profile(stage, parts)


# ---- export ----------------------------------------------------------------------------------------------------------


def mean_loss(model: t.GPT, text: torch.Tensor, size: int) -> float:
    """Nats a token."""
    with torch.no_grad():
        means = [model(part[:, :-1], part[:, 1:]).double().mean(1) for part in text.split(size)]
        return float(torch.cat(means).mean())


def export(stage: Stage):
    """Each part of the export, of a model that has trained for a few short steps, so that no weight is zero."""
    length = int(os.environ.get("TRAIN_SEQ_LEN", "2048" if has_gpu() else "256"))
    cfg = stage.configured(EXPORT_FILL=1, USE_COMPILE=0, TRAIN_BATCH_TOKENS=8 * length)
    parts = stage.bench(cfg)
    loader = t.Loader(cfg, parts.tokens, parts.process)
    for number in range(5 * stage.steps):
        parts.trainer.step(loader.next(), number, 1.0)
    text, size = t.calibration_text(cfg, parts.process, parts.tokens)
    whole, code = mean_loss(parts.model, text, size), len(parts.script.counted)
    room = cfg.artifact_limit_bytes - code
    stage.figures(trained_steps=5 * stage.steps, trained_tokens_a_step=cfg.train_batch_tokens, loss_float=whole,
                  calibration_tokens=text[:, 1:].numel(), guard_s=cfg.export_seconds)
    made = []
    calibration = parts.timed(lambda: made.append(t.Exporter(cfg, parts.log, parts.model, text, size, room, 0.0)))
    stage.figures(calibration_s=calibration)
    stage.figures(rounding_s=parts.timed(lambda: made[0].rounded(0.0)))
    search = parts.timed(lambda: made.append(made[0].search()))
    stage.figures(search_s=search, export_s=calibration + search, report=made[0].report)
    if made[1] is None:
        return stage.figures.missing("loss_added", f"no setting fits {cfg.artifact_limit_bytes} bytes")
    began, (_, stored) = time.perf_counter(), t.unpack(made[1], "the artifact")
    model = t.build_model(cfg, {name: entry.tensor() for name, entry in stored.items()}, parts.process)
    parts.process.synchronize()
    stage.figures(read_back_s=time.perf_counter() - began, bytes=len(made[1]) + code,
                  limit_bytes=cfg.artifact_limit_bytes, loss_added=mean_loss(model, text, size) - whole)


# ---- test-time training ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Text:
    """As much of a stream as the search for its documents asks for."""

    tokens: torch.Tensor
    targets: int


@dataclasses.dataclass
class Walk:
    """How the documents of a stream, first target and end [n, 2], go through the model on eight ranks."""

    documents: np.ndarray
    together: int  # over all ranks
    window: int
    chunk: int

    def iterations(self) -> int:
        """How often each rank's places go through the model: documents take them in their order, a chunk a time."""
        ends = [0] * self.together
        for begin, end in self.documents.tolist():
            heapq.heapreplace(ends, ends[0] - (begin - end) // self.chunk)  # rounded up
        return max(ends)


def walk_of_eight(cfg: t.Config, process: t.Process, ids: np.ndarray) -> Walk:
    """The walk over a stream by eight ranks like this one."""
    ranks = copy.copy(process)
    ranks.world = RANKS
    documents = t.split_documents(Text(torch.from_numpy(ids.astype(np.int32)), len(ids) - 1))
    together, *_ = t.lora_places(cfg, ranks, len(documents))
    return Walk(documents, together, cfg.eval_len, min(cfg.ttt_lora_chunk_tokens, cfg.eval_len))


def excerpt(ids: np.ndarray, walk: Walk, turns: int = 8) -> np.ndarray:
    """Documents that fill a rank's places for at least so many turns, from all over the stream, cut to two windows."""
    whole = walk.documents[ids[walk.documents[:, 0]] == t.BOS_ID]
    t.require(len(whole), "the validation text has no whole document")
    length = np.minimum(whole[:, 1] - whole[:, 0], 2 * walk.window).mean()
    count = math.ceil(walk.together / RANKS) * math.ceil(turns * walk.chunk / length)
    parts = [ids[begin : min(end, begin + 2 * walk.window)] for begin, end in
             whole[np.linspace(0, len(whole) - 1, count).astype(int)].tolist()]
    return np.concatenate([*parts, [t.BOS_ID]])


class Clock:
    """Times a walk: as a whole, or `split` into scoring and learning, for which the device is waited for more often
    than in a run."""

    def __init__(self, process: t.Process, split: bool):
        self.process, self.split, self.times, self.turns = process, split, {}, 0
        self.scored, self.learn, self.walk = t.Walk.scored, t.learn_documents, t.walk_documents

    @contextlib.contextmanager
    def timed(self, kind: str):
        if self.split == (kind == "whole"):  # not what this clock is for
            yield
            return
        self.process.synchronize()
        began = time.perf_counter()
        yield
        self.process.synchronize()
        self.times.setdefault(kind, []).append(1000 * (time.perf_counter() - began))

    @contextlib.contextmanager
    def running(self):
        """While this holds, walks are timed."""
        @contextlib.contextmanager
        def scored(walk, work):
            self.turns += 1
            with self.timed("score"), self.scored(walk, work):
                yield

        def learn(*arguments):
            with self.timed("learn"):
                return self.learn(*arguments)

        def whole(*arguments, **named):
            with self.timed("whole"):
                return self.walk(*arguments, **named)

        with mock.patch.object(t.Walk, "scored", scored), mock.patch.object(t, "learn_documents", learn), \
                mock.patch.object(t, "walk_documents", whole):
            yield


def iterations(process: t.Process, walk) -> dict:
    """Milliseconds an iteration of walk(), from two walks: all of it, then scoring and learning."""
    whole, split = Clock(process, False), Clock(process, True)
    for clock in (whole, split):
        with clock.running():
            walk()
    return {"iterations": whole.turns, "whole": sum(whole.times["whole"]) / whole.turns,
            **{kind: median(split.times[kind]) if kind in split.times else None for kind in ("score", "learn")}}


def profile_walk(stage: Stage, process: t.Process, walk):
    """Sum the kernels of walk(), for an iteration."""
    clock = Clock(process, False)
    with clock.running():
        walk()
    traced(stage, process, walk, clock.turns)


def eight(walk: Walk, ms: float) -> dict:
    """What the walk of all targets takes on eight GPUs at `ms` an iteration, and the arithmetic."""
    n, seconds = walk.iterations(), walk.iterations() * ms / 1000
    return {"targets": int(walk.documents[-1][1]), "ranks": RANKS, "together": walk.together,
            "documents": len(walk.documents), "iterations": n, "seconds": seconds,
            "arithmetic": f"{n} x {ms:.2f} ms = {seconds:.1f} s, {walk.together} documents side by side on {RANKS} "
                          "ranks, of the lengths at hand, repeated up to that many targets"}


def ttt(stage: Stage):
    """Test-time training with adapters, in the shape that each of eight ranks has."""
    parts = stage.bench(stage.configured(TTT_MODE="lora"))
    process, model = parts.process, parts.model
    t.require(parts.cfg.ttt_mode == "lora", f"TTT_MODE={parts.cfg.ttt_mode}: this stage measures lora")
    cfg = dataclasses.replace(parts.cfg, ttt_enabled=True, eval_max_seconds=0.0)
    with torch.no_grad():
        for p in model.parameters():  # products with zeros may be faster than any that counts
            p.add_(0.02 * torch.randn_like(p))
    tokens = t.Tokens(Path(cfg.data_path), "val", cfg.vocab_size)
    wanted = measure_book.fineweb(cfg.vocab_size) + 1
    ids = np.resize(tokens.read(0, min(len(tokens), wanted)), wanted)
    walk = walk_of_eight(cfg, process, ids)
    mine = dataclasses.replace(cfg, val_batch_size=max(cfg.val_batch_size // RANKS, 1),
                               ttt_lora_documents=math.ceil(walk.together / RANKS))
    stream = t.Stream(excerpt(ids, walk), parts.tokenizer, process.device)
    stage.figures(shape=[f"{mine.ttt_lora_documents} documents of window {walk.window}"],
                  excerpt_targets=stream.targets, split_targets=len(tokens) - 1)
    with Graphs(stage.figures).watching():
        stage.figures(prime_s=parts.timed(lambda: t.prime(mine, process, parts.log, stream, parts.tokenizer)))
        times = iterations(process, lambda: t.test_time_train(mine, process, parts.log, model, stream))
    stage.figures(iteration_ms={walk.window: times}, eight=eight(walk, times["whole"]),
                  peak_memory_gib=process.memory()[1] / 2**30)
    few = t.Stream(excerpt(ids, walk, 2), parts.tokenizer, process.device)
    profile_walk(stage, process, lambda: t.test_time_train(mine, process, parts.log, model, few))


# ---- whole runs ------------------------------------------------------------------------------------------------------


def whole(stage: Stage, name: str, enter) -> dict:
    """A launch of train_gpt.py; `enter` hears its figures as lines tell them, and at last its summary's."""
    folder, said = stage.work / name, []

    def hear(line: str):
        print(line, end="", flush=True)
        said.append(line)
        if re.match(r"step:\d+/|final_|legal_ttt|stopping_early", line):
            enter(bench.read_log("".join(said)))

    found, code = bench.launch(t.SCRIPT, 0, folder, hear)
    path = next(folder.glob("*/summary.json"), None)
    t.require(path, f"{name}: no summary, exit code {code}; {t.one_line(said[-1]) if said else 'it said nothing'}")
    summary = json.loads(path.read_text(encoding="utf-8"))
    kept = ("train", "eval", "export", "artifact", "seconds", "val_bpb", "valid", "reasons", "memory_peak_bytes")
    result = found | {"launch_s": found["seconds"], "exit_code": code} | {key: summary.get(key) for key in kept}
    result["artifact"] = {key: value for key, value in (result["artifact"] or {}).items() if key.startswith("bytes")}
    enter(result)
    return result


def audit(stage: Stage):
    """A tiny whole run that is audited."""
    stage.configured(PRESET="demo", TRAIN_BATCH_TOKENS=4096, USE_COMPILE=0, ITERATIONS=60,
                     WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=0, VAL_TOKEN_LIMIT=16384, TRAIN_LOG_EVERY=10,
                     TTT_ENABLED=1, RUN_ID="audit")
    whole(stage, "audit", lambda found: stage.figures(**found))
    (folder,) = (path.parent for path in (stage.work / "audit").glob("*/summary.json"))
    t.require(audit_tool.main([str(folder)]) < 2, "the run could not be audited")
    found = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    stage.figures(audit=found, audit_s=found["seconds"], audit_ok=found["ok"])


def schedule(stage: Stage, preset: str) -> dict:
    """Variables of a run of `seconds`: the published schedule at its shares of the steps that fit, by the step's time
    where that was measured."""
    entry = measure_book.read(stage.out)["stages"].get("step", {}).get("figures") or {}
    ms = (entry.get("step_ms") or {}).get("median") or 100.0
    fit = max(int(1000 * stage.seconds / ms), 10)
    own = {"EMA_DECAY": max(1 - PUBLISHED_STEPS / fit / 333, 0.5),
           "MUON_MOMENTUM_WARMUP_STEPS": fit * t.Config.muon_momentum_warmup_steps // PUBLISHED_STEPS,
           "TRAIN_LOG_EVERY": 10, "FINAL_EVAL_ENABLE": 0, "TTT_ENABLED": 0}
    if "warmdown_frac" not in t.PRESETS[preset]:
        own["WARMDOWN_ITERS"] = fit * t.Config.warmdown_iters // PUBLISHED_STEPS
    if "MAX_WALLCLOCK_SECONDS" not in os.environ:  # the export has its own seconds
        own |= {"MAX_WALLCLOCK_SECONDS": stage.seconds + 10, "EXPORT_MAX_SECONDS": 10}
    return own


def run(stage: Stage, preset: str = "seed", **force):
    """A whole run of a preset on the data at hand."""
    stage.configured(force, **{"PRESET": preset if has_gpu() else "demo"} | schedule(stage, preset), RUN_ID="run")
    whole(stage, "run", lambda found: stage.figures(**found))


def frontier(stage: Stage):
    """A whole run of the other preset."""
    run(stage, "frontier", PRESET="frontier")


def presets(stage: Stage):
    """Both presets at equal seconds and bytes, in turn; what an earlier round took says whether another fits."""
    given, runs, longest = dict(os.environ), [], 0.0
    for seed in range(1337, 1337 + stage.rounds):
        for preset in ("seed", "frontier")[:: 1 if seed % 2 else -1]:
            if runs and time.perf_counter() - BEGAN + 1.1 * longest > stage.limit:
                return
            os.environ.clear()
            os.environ |= given
            began, name = time.perf_counter(), f"{preset}_{seed}"
            stage.configured({"PRESET": preset, "SEED": seed}, **schedule(stage, preset), EXPORT_FILL=1, RUN_ID=name)
            result = whole(stage, name, lambda found: None)
            longest = max(longest, time.perf_counter() - began)
            train = result["train"]
            runs.append({"preset": preset, "seed": seed, "val_bpb": result["val_bpb"], "steps": train["steps"],
                         "train_s": train["seconds"], **result["artifact"]})
            sides = {who: [r["val_bpb"] for r in runs if r["preset"] == who] for who in ("seed", "frontier")}
            stage.figures(runs=runs, mean_bpb={who: statistics.mean(bpb) for who, bpb in sides.items() if bpb})


def peers(stage: Stage):
    """The step of other scripts, each launched like ours, which is first; each launch ends after its last step."""
    last, rows = 10 + 5 * -(-stage.steps // 5), {}  # a step that is logged
    stage.configured(ITERATIONS=last, WARMDOWN_ITERS=10, MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=5, VAL_LOSS_EVERY=0,
                     TTT_ENABLED=0, WARMUP_STEPS=1, RUN_ID="ours")
    tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", t.Config.train_batch_tokens))
    for number, script in enumerate([t.SCRIPT, *map(Path, stage.against)]):
        name, said = f"{number} {script.parent.name}/{script.name}" if number else "ours", []

        def hear(line: str, name=name, said=said):
            print(line, end="", flush=True)
            said.append(line)
            if line.startswith("step:"):
                stage.figures(tokens=tokens, steps=rows | {name: bench.read_log("".join(said))})

        print(f"---- {script}", flush=True)
        found, code = bench.launch(script, 0, stage.work / f"peer_{number}", hear, last)
        rows[name] = found if "step_ms" in found else {"failed": f"exit code {code}, see the log"}
        stage.figures(tokens=tokens, steps=rows)
    t.require(all("step_ms" in row for row in rows.values()), "a script printed no two steps from step 10 on")


STAGES = {"step": step, "export": export, "ttt": ttt, "audit": audit, "run": run, "frontier": frontier, "peers": peers,
          "presets": presets}

if __name__ == "__main__":
    try:
        STAGES[sys.argv[1]](Stage(sys.argv[1], json.loads(sys.argv[2])))
    except t.UserError as problem:
        bench.fail(t.one_line(problem))
