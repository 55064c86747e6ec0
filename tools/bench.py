#!/usr/bin/env python3
"""Time train_gpt.py part by part on this machine, or whole runs of it against another script of this field.

    ./run.sh bench                                   a table, and JSON in LOG_DIR
    ./run.sh bench --against other/train_gpt.py      whole runs, alternating, and their ratios

The variables of train_gpt.py set the model, the data and the device's type as in a run. Parts are timed on one rank;
whole runs on --ranks. Times are medians; the spread is the distance of the quartiles in percent of the median.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train_gpt.py does

import corpus  # noqa: E402
import torch  # noqa: E402
from sweep_results import tell  # noqa: E402

import train_gpt as t  # noqa: E402


def fail(problem: str):
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(2)


def spread(values: list[float]) -> tuple[float, float]:
    """Median, and the distance of the quartiles in percent of it (0 with fewer than two values)."""
    middle = statistics.median(values)
    if len(values) < 2 or not middle:
        return middle, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, 100 * (high - low) / middle


def flops_per_token(model: t.GPT, cfg: t.Config, length: int) -> float:
    """Floating-point operations of a forward and backward pass: 6 a weight that multiplies and, for causal attention
    of each layer, 6 T C, as often as the layer is run; embeddings that are only looked up do not count, the tied one
    multiplies in the output."""
    apart = ("blocks.", "bigram.embed.") + (() if cfg.tie_embeddings else ("tok_emb.",))
    used = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(apart))
    for layer in model.order:
        used += sum(p.numel() for p in model.blocks[layer].parameters())
    return 6.0 * used + 6.0 * len(model.order) * length * cfg.model_dim


class Bench:
    """The parts of a run, each timed alone after a warm-up."""

    def __init__(self, cfg: t.Config, steps: int, repeats: int):
        t.require(cfg.train_enabled, "TRAIN_ENABLED=0: training is timed too; unset it")
        self.steps, self.repeats, self.rows = steps, repeats, {}
        self.process = t.Process(cfg.compute_dtype)
        self.device = self.process.device
        self.script = t.read_script(cfg, None)
        self.cfg, inputs = t.open_inputs(cfg, self.process, None, {}, self.script)
        self.tokenizer, self.tokens = inputs.tokenizer, inputs.train
        torch.manual_seed(cfg.seed)
        self.log = t.Log(self.process, Path(os.devnull)).silent()
        self.model = t.GPT(cfg, self.process.dtype).to(self.device)
        self.trainer = t.Trainer(cfg, self.process, self.model)

    def timed(self, action) -> float:
        """Seconds of `action`, the device's work included."""
        self.process.synchronize()
        began = time.perf_counter()
        action()
        self.process.synchronize()
        return time.perf_counter() - began

    def add(self, name: str, values: list[float], unit: str, digits: int = 1):
        middle, percent = spread(values)
        self.rows[name] = {"median": middle, "spread_percent": percent, "unit": unit, "n": len(values)}
        tell(f"{name:32}{middle:>16,.{digits}f} {unit:<10} ±{percent:.1f}%  of {len(values)}")

    def peak(self) -> float:
        """What matrix products reach here in the type of the run, in FLOP/s."""
        n = 8192 if self.process.cuda else 2048
        a, b = (torch.randn(n, n, device=self.device).to(self.process.dtype) for _ in "ab")
        self.timed(lambda: a @ b)
        times = [self.timed(lambda: a @ b) for _ in range(max(self.repeats, 5))]
        self.add(f"peak {str(self.process.dtype)[6:]} {n}x{n}", [2 * n**3 / s / 1e12 for s in times], "TFLOP/s", 3)
        return 2 * n**3 / min(times)

    def training(self):
        """Whole steps; then the optimizers alone, and waiting for the loader alone."""
        cfg, trainer, peak = self.cfg, self.trainer, self.peak()
        first = self.timed(lambda: self.step(0))
        self.add("first step, compilation included", [first], "s", 2)
        loader = t.Loader(cfg, self.tokens, self.process, 1)
        for _ in range(2):
            trainer.step(loader.next(), 0, 1.0)
        trainer.synchronize()
        marks, waits = [], []
        for _ in range(self.repeats):
            began, waited = time.perf_counter(), 0.0
            for step in range(self.steps):
                asked = time.perf_counter()
                tokens = loader.next()
                waited += time.perf_counter() - asked
                trainer.step(tokens, step, 1.0)
            trainer.synchronize()
            marks.append((time.perf_counter() - began) / self.steps)
            waits.append(waited / self.steps)
        self.add("training step", [1000 * s for s in marks], "ms")
        self.add("training", [cfg.train_batch_tokens / s for s in marks], "tokens/s", 0)
        flops = cfg.train_batch_tokens * flops_per_token(self.model, cfg, cfg.train_seq_len)
        self.add("share of the measured peak", [100 * flops / s / peak for s in marks], "%")

        def update():
            trainer.optimizers.step(self.steps, 1.0)

        update()
        step = statistics.median(marks)
        self.add("optimizers' share of a step", [100 * self.timed(update) / step for _ in range(self.repeats)], "%")
        self.add("loader's share of a step", [100 * s / step for s in waits], "%", 2)

    def step(self, number: int):
        self.trainer.step(t.Loader(self.cfg, self.tokens, self.process, number).next(), number, 1.0)

    def stream(self, targets: int) -> t.Stream:
        tokens = t.Tokens(Path(self.cfg.data_path), "val", self.cfg.vocab_size)
        return t.open_stream(tokens, self.tokenizer, targets, self.device)

    def evaluation(self, windows: int):
        """Sliding windows over the start of the validation text."""
        stride = self.cfg.eval_stride or self.cfg.eval_len
        cfg, stream = self.cfg, self.stream(windows * stride)
        forward = t.compiled(self.model, cfg, self.process)

        def score():
            t.evaluate(cfg, self.process, self.log, forward, stream, stride, "")

        score()
        count = -(-stream.targets // stride)
        times = [self.timed(score) for _ in range(self.repeats)]
        self.add(f"evaluation, stride {stride}", [count / s for s in times], "windows/s")

    def adaptation(self, targets: int):
        """Test-time training from the same weights each time."""
        cfg = dataclasses.replace(self.cfg, ttt_enabled=True, eval_max_seconds=0.0)
        stream, weights = self.stream(targets), self.trainer.flat.weights.clone()

        def adapt():
            t.test_time_train(cfg, self.process, self.log, self.model, stream)

        times = []
        for _ in range(self.repeats + 1):
            times.append(self.timed(adapt))
            with torch.no_grad():
                self.trainer.flat.weights.copy_(weights)
        self.add(f"test-time training, {cfg.ttt_mode}", [stream.targets / s for s in times[1:]], "tokens/s", 0)

    def artifact(self):
        """Search and code the artifact, then read it back."""
        cfg = self.cfg
        text, size = t.calibration_text(cfg, self.process, self.tokens)
        room, blobs = cfg.artifact_limit_bytes - len(self.script.counted), []

        def write():
            exporter = t.Exporter(cfg, self.log, self.model, text, size, room, cfg.export_seconds)
            blobs.append(exporter.search())

        self.add("export", [self.timed(write)], "s", 2)
        if blobs[-1] is None:
            return print("load: not measured, the artifact does not fit its limit")

        def load():
            _, stored = t.unpack(blobs[-1], "the artifact")
            t.build_model(cfg, {name: entry.tensor() for name, entry in stored.items()}, self.process)

        self.add("load", [self.timed(load) for _ in range(self.repeats)], "s", 2)


# ---- whole runs of two scripts ---------------------------------------------------------------------------------------


def read_log(text: str) -> dict:
    """Training step ms, of the steps after the tenth, and seconds of the sliding evaluation and of test-time training,
    from a script's output; losses in nats/token.

    Lines of this field: `step:N/M train_loss:X train_time:Tms step_avg:Ams`, `final_..._sliding... eval_time:Tms`, and
    `legal_ttt ... eval_time:Tms`, or `ttt:elapsed=Ts` from scripts that adapt before they score.
    """
    marks = [(int(n), float(ms)) for n, ms in re.findall(r"^step:(\d+)/\d+ .*?train_time:([\d.]+)ms", text, re.M)]
    early, late = [m for m in marks if m[0] >= 10][:1], marks[-1:]
    found = {}
    if early and late[0][0] > early[0][0]:
        found["step_ms"] = (late[0][1] - early[0][1]) / (late[0][0] - early[0][0])
    if losses := re.findall(r"^step:(\d+)/\d+ train_loss:([\d.]+)", text, re.M):
        found["train_loss"] = float(losses[-1][1])
    if lines := re.findall(r"^final_\w*sliding\w* val_loss:([\d.]+) .*?eval_time:([\d.]+)ms", text, re.M):
        found["sliding_loss"], found["sliding_s"] = float(lines[-1][0]), float(lines[-1][1]) / 1000
    if lines := re.findall(r"^legal_ttt val_loss:([\d.]+) .*?eval_time:([\d.]+)ms", text, re.M):
        found["ttt_loss"], found["ttt_s"] = float(lines[-1][0]), float(lines[-1][1]) / 1000
    elif lines := re.findall(r"^ttt:elapsed=([\d.]+)s", text, re.M):
        found["ttt_s"] = float(lines[-1])
    return found


def launch(script: Path, ranks: int, folder: Path, hear=lambda line: None, last: int = 0) -> tuple[dict, int]:
    """One launch of `script` with this environment, in a folder of its own, by torchrun where several ranks are asked
    for; the seconds it took, and its log's, and its exit code. `hear` is given each line. With `last` the launch is
    ended once it has logged that step."""
    folder.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script)]
    environment = os.environ | {"LOG_DIR": str(folder), "PYTHONUNBUFFERED": "1"}  # each line when printed, for step 1
    began, lines, start = time.perf_counter(), [], {}
    with (open(folder / "output.txt", "w", encoding="utf-8") as out,
          subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           encoding="utf-8", errors="replace") as process):
        for line in process.stdout:
            if not start and re.match(r"step:1/\d+ train_loss:", line):
                start = {"start_s": time.perf_counter() - began}
            lines.append(line)
            out.write(line)
            hear(line)
            if last and re.match(rf"step:{last}/\d+ train_loss:", line):
                process.terminate()  # torchrun then ends its workers
                last = 0
    return start | read_log("".join(lines)) | {"seconds": time.perf_counter() - began}, process.returncode


def whole_run(script: Path, ranks: int, folder: Path) -> dict:
    """One launch of `script`, which must finish; what it told."""
    found, code = launch(script, ranks, folder)
    if code or "step_ms" not in found:
        why = f"ended with exit code {code}" if code else "printed no two steps from step 10 on"
        fail(f"{script} {why}; what it printed is in {folder / 'output.txt'}")
    return found


NAMES = {"start_s": "launch to first step done, s", "step_ms": "training step, ms",
         "sliding_s": "sliding evaluation, s", "ttt_s": "test-time training, s", "seconds": "launch to end, s",
         "train_loss": "last training loss", "sliding_loss": "sliding loss, nats/token",
         "ttt_loss": "TTT loss, nats/token"}


def against(other: Path, ranks: int, repeats: int, folder: Path) -> dict:
    """Alternate whole runs of both scripts; medians and the other's share of ours."""
    runs = {"ours": [], "other": []}
    for i in range(repeats):
        for who, script in (("ours", t.SCRIPT), ("other", other))[:: 1 if i % 2 == 0 else -1]:
            runs[who].append(whole_run(script, ranks, folder / f"{who}_{i + 1}"))
            said = ", ".join(f"{NAMES[key]} {value:.4g}" for key, value in runs[who][-1].items())
            print(f"{who} {i + 1}: {said}", flush=True)
    print(f"\n{'median of ' + str(repeats):30}{'ours':>12}{'other':>12}{'other/ours':>12}{'spread':>16}")
    rows = {}
    for key, name in NAMES.items():
        sides = [[run[key] for run in runs[who] if key in run] for who in runs]
        if not any(sides):
            continue
        if not all(sides):
            print(f"{name:30}{'not printed by ' + ('other' if sides[0] else 'ours'):>36}")
            continue
        (a, wide), (b, other_wide) = map(spread, sides)
        rows[key] = {"ours": a, "other": b, "ratio": b / a, "spread_percent": [wide, other_wide]}
        tell(f"{name:30}{a:12.4f}{b:12.4f}{b / a:12.3f}{f'±{wide:.1f}% ±{other_wide:.1f}%':>16}")
    return {"runs": runs, "median": rows, "script": str(other), "ranks": ranks}


def launched(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda problem: fail(f"{problem}; ./run.sh bench --help says how")
    parser.add_argument("--against", metavar="SCRIPT", type=Path, help="another script of this field")
    parser.add_argument("--steps", type=int, default=5, help="training steps in one measurement (5)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a part (5), or runs of a script")
    parser.add_argument("--windows", type=int, default=64, help="windows that evaluation scores (64)")
    parser.add_argument("--ttt-tokens", type=int, default=4096, help="targets of test-time training (4096)")
    parser.add_argument("--ranks", type=int, default=max(torch.cuda.device_count(), 1), help="of whole runs (all GPUs)")
    options = parser.parse_args(argv)
    if min(options.steps, options.repeats, options.windows, options.ttt_tokens, options.ranks) < 1:
        fail("--steps, --repeats, --windows, --ttt-tokens and --ranks must be at least 1")
    if options.against and not options.against.is_file():
        fail(f"--against {options.against}: no such file")
    cfg, _ = t.read_launch([])
    corpus.provide(cfg)
    out = Path(cfg.log_dir).absolute() / f"bench_{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    hardware = t.Process(cfg.compute_dtype).hardware()
    record = {"hardware": hardware, "torch": torch.__version__, "settings": cfg.settings()}
    print(f"{hardware['name']}, {hardware['threads']} threads, torch {torch.__version__}", flush=True)
    if options.against:
        data = t.find_data(cfg).absolute()  # each run is in a folder of its own
        os.environ |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(t.find_tokenizer(cfg, data).absolute())}
        record["against"] = against(options.against.resolve(), options.ranks, options.repeats, out.with_suffix(""))
    else:
        bench = Bench(cfg, options.steps, options.repeats)
        bench.training()
        bench.evaluation(options.windows)
        bench.artifact()
        bench.adaptation(options.ttt_tokens)  # last, since it freezes weights
        bench.add("peak memory", [bench.process.memory()[1] / 2**20], "MiB", 0)
        record["parts"] = bench.rows
    out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"written: {out}")
    return 0


def main(argv: list[str]) -> int:
    try:
        return launched(argv)
    except t.UserError as problem:
        fail(t.one_line(problem))
    except OSError as problem:
        fail(f"{problem.filename or 'output'}: {problem.strerror}; mend the path, or set LOG_DIR to another")
    except Exception as problem:
        if not (advice := t.remedy(problem)):
            raise
        fail(advice)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
