"""Two versions of train_gpt.py under the same variables: the losses of their steps, and the processor time of these.

    python compare.py losses BEFORE AFTER --dtype fp32 --steps 20 [--seed 1] [VARIABLE=VALUE ...]
    python compare.py times BEFORE AFTER --dtype bf16 --steps 14 [VARIABLE=VALUE ...]

`losses` trains one after the other on the same batches; `times` lets them take turns, step by step, one thread each.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["losses", "times"])
parser.add_argument("scripts", nargs=2, metavar=("BEFORE", "AFTER"))
parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("variables", nargs="*", metavar="VARIABLE=VALUE")
options = parser.parse_intermixed_args()
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

torch.set_num_threads(1)


def trainer_of(path: str):
    """A trainer of the script at this path, and its batches; in the order of --seed."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = {"PRESET": "seed", "WARMUP_STEPS": "0", "MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": str(options.steps)}
    given |= {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH") if name in os.environ}
    cfg, problems, _ = script.load_config(given | dict(pair.split("=", 1) for pair in options.variables))
    assert not problems, problems
    process = script.Process(options.dtype)
    torch.manual_seed(options.seed)
    trainer = script.Trainer(cfg, process, script.GPT(cfg, process.dtype))
    tokens = script.Tokens(Path(cfg.data_path), "train", cfg.vocab_size)
    return trainer, script.Loader(cfg, tokens, process, 300 * options.seed), script.rate_factor, cfg


def losses():
    found = []
    for path in options.scripts:
        trainer, loader, rate_factor, cfg = trainer_of(path)
        found.append([])
        for step in range(options.steps):
            trainer.step(loader.next(), step, rate_factor(cfg, step, 0.0))
            found[-1].append(float(trainer.flat.loss))
    apart = [abs(a - b) for a, b in zip(*found, strict=True)]
    means = [statistics.mean(run[-50:]) for run in found]
    print(f"first step apart by {apart[0]:.1e}, all by at most {max(apart):.1e}; mean of the last "
          f"{min(options.steps, 50)}: {means[0]:.4f} and {means[1]:.4f}")


def times():
    both, seconds = [trainer_of(path) for path in options.scripts], ([], [])
    for step in range(options.steps):
        for i in (0, 1) if step % 2 else (1, 0):
            trainer, loader, _, _ = both[i]
            tokens, began = loader.next(), time.process_time()
            trainer.step(tokens, step, 1.0)
            trainer.synchronize()
            if step > 1:
                seconds[i].append(time.process_time() - began)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"before {1000 * statistics.median(seconds[0]):.0f} ms, after {1000 * statistics.median(seconds[1]):.0f} ms, "
          f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), {len(ratios)} pairs")


losses() if options.what == "losses" else times()
