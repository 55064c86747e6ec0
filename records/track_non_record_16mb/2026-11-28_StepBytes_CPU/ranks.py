"""What a reduce-scatter in bf16 would do to the loss: ranks on this CPU train a small model, rounded and not.

    python ranks.py DATA_PATH --ranks 2 --steps 250 --seeds 1 2      # from the project's folder, bf16 compute
"""

import argparse
import os
import sys
import warnings

import torch
import torch.multiprocessing as mp

sys.path.insert(0, os.getcwd())
warnings.simplefilter("ignore")


class Quiet:
    main = False

    def __call__(self, *given, **named):
        pass

    metric = progress = __call__

    def silent(self):
        return self


def work(rank: int, port: int, rounded: bool, seed: int, options: argparse.Namespace):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      LOCAL_WORLD_SIZE=str(options.ranks), MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import train_gpt as t

    plain = t.Process.scatter_sum_

    def in_bf16(process, rows):
        short = rows.bfloat16()
        plain(process, short)
        rows[process.rank] = short[process.rank].float()
        return rows[process.rank]

    if rounded:
        t.Process.scatter_sum_ = in_bf16
    cfg, problems, _ = t.load_config({
        "PRESET": "demo", "DATA_PATH": options.data, "SEED": str(seed), "ITERATIONS": str(options.steps),
        "NUM_LAYERS": "4", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": "128",
        "TRAIN_BATCH_TOKENS": "2048", "WARMDOWN_ITERS": str(options.steps // 3), "MAX_WALLCLOCK_SECONDS": "0",
        "VAL_TOKEN_LIMIT": "30001", "MUON_MOMENTUM_WARMUP_STEPS": str(options.steps // 3)}, options.ranks)
    assert not problems, problems
    process = t.Process("bf16")
    torch.manual_seed(cfg.seed)
    trainer, folder = t.Trainer(cfg, process, t.GPT(cfg, process.dtype)), t.find_data(cfg)
    loader, losses = t.Loader(cfg, t.Tokens(folder, "train", cfg.vocab_size), process, 0), []
    for step in range(options.steps):
        trainer.step(loader.next(), step, t.rate_factor(cfg, step, 0.0))
        losses.append(trainer.flat.loss.item())
    trainer.flat.weights.copy_(trainer.optimizers.average)
    tokenizer = t.Tokenizer(t.find_tokenizer(cfg, folder), cfg.vocab_size)
    text = t.Tokens(folder, "val", cfg.vocab_size)
    stream = t.open_stream(text, tokenizer, cfg.val_token_limit, process.device)
    score = t.evaluate(cfg, process, Quiet(), trainer.forward, stream, cfg.eval_len, "").result()
    if rank == 0:
        print(f"{options.ranks} ranks, seed {seed}, {'bf16' if rounded else 'fp32'}: mean of the last 50 losses "
              f"{sum(losses[-50:]) / len(losses[-50:]):.4f}, validation {score.val_loss:.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    for number, (seed, rounded) in enumerate((s, r) for s in given.seeds for r in (False, True)):
        mp.spawn(work, (29700 + number, rounded, seed, given), given.ranks)
