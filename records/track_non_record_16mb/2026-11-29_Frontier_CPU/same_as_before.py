"""Whether PRESET=seed trains bit for bit as a script of before: all weights and gradients after each of 25 steps.

    git show 49d6a7b:train_gpt.py > before.py
    PRESET=seed DATA_PATH=FOLDER NUM_LAYERS=5 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=256 \
    TRAIN_BATCH_TOKENS=2048 ITERATIONS=25 MAX_WALLCLOCK_SECONDS=0 WARMDOWN_ITERS=10 SPARSE_START_LAYER=2 ADAM_WD=0.5 \
    python records/track_non_record_16mb/2026-11-29_Frontier_CPU/same_as_before.py before.py
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

NOW = Path(__file__).resolve().parents[3] / "train_gpt.py"


def trainer_of(path: str, name: str):
    """The script as a module, its trainer and its loader, under the variables of the environment."""
    spec = importlib.util.spec_from_file_location(name, path)
    script = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cfg, problems, _ = script.load_config(os.environ)
    if problems:
        sys.exit("\n".join(problems))
    process = script.Process(cfg.compute_dtype)
    torch.manual_seed(cfg.seed)
    trainer = script.Trainer(cfg, process, script.GPT(cfg, process.dtype))
    tokens = script.Tokens(Path(cfg.data_path), "train", cfg.vocab_size)
    return script, trainer, script.Loader(cfg, tokens, process)


def main(before: str):
    torch.set_num_threads(1)
    sides = [trainer_of(before, "before"), trainer_of(str(NOW), "now")]
    for step in range(sides[0][1].cfg.iterations):
        found = []
        for script, trainer, loader in sides:
            trainer.step(loader.next(), step, script.rate_factor(trainer.cfg, step, float(step)))
            found.append((trainer.flat.weights.clone(), trainer.flat.buffer.clone()))
        if not all(map(torch.equal, *found)):
            sys.exit(f"step {step + 1} differs")
    print(f"{step + 1} steps, all weights and gradients equal")


if __name__ == "__main__":
    main(sys.argv[1])
