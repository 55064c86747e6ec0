"""Train a small language model, pack it under 16,000,000 bytes, score it in bits per byte (BPB).

    python train_gpt.py --help                               every variable, by stage
    python train_gpt.py --check                              what a run would do, without running it
    python train_gpt.py                                      one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs
    TRAIN_ENABLED=0 MODEL_PATH=final_model.int6.ptz python train_gpt.py    score an artifact again

A run is: train -> average (EMA) -> export (round, fit, code) -> read back -> score -> test-time training, and the file
reads in that order; `run`, near its end, is the list. Variables of the environment configure it, checked before all.
Exit codes: 0 a finished run; 1 a finished run that failed a check, such as the limit; 2 something the user must mend;
128+n after signal n, when RESUME=1 goes on.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import time
import tokenize
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve()
SIGNALS = [signal.SIGINT, signal.SIGTERM]  # that end a run, once it has saved
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
    SIGNALS.append(signal.SIGHUP)

# ==== Configuration: every variable once, with its default, what it accepts and what it is for ========================


class UserError(Exception):
    """Something the person who launched the run can mend: one line, exit code 2."""


def require(holds, problem: str):
    """UserError with this problem unless it holds."""
    if not holds:
        raise UserError(problem)


def one_line(problem) -> str:
    """A message without the line breaks that file names and variables may bring."""
    return " ".join(str(problem).splitlines())


def var(default, accepts: str, text: str, stage: str = ""):
    """A configuration field. `accepts` is shown in --help and enforced by `parse`; `stage` opens a section."""
    return dataclasses.field(default=default, metadata={"accepts": accepts, "text": text, "stage": stage})


@dataclass(frozen=True)
class Config:
    """One run's settings. Each field is set by the environment variable of its name in capitals."""

    preset: str = var("auto", "auto|seed|frontier|demo", "where defaults come from; auto: seed with a GPU, else demo",
                      "Run")
    run_id: str = var("", "name", "folder of this run under LOG_DIR; empty: time and seed")
    seed: int = var(1337, "0..4294967295", "random seed of the weights")
    log_dir: str = var("logs", "path", "where runs are kept")
    train_log_every: int = var(100, ">=0", "steps between train_loss lines, besides the first 10; 0 off; "
                               "train.log has about 200 more")
    ckpt_every_seconds: float = var(0.0, ">=0", "seconds between checkpoints; 0: only where training is interrupted")
    keep_ckpts: int = var(2, ">=1", "checkpoints that stay")
    resume: bool = var(False, "0|1", "1: go on with RUN_ID where it stopped, or start it")
    env_extra: str = var("", "text", "comma-separated names of your own variables that may look like ours")

    data_path: str = var("", "path", "folder of shards; empty: data/datasets/fineweb10B_sp<VOCAB_SIZE>, else "
                         "embedded_sp<VOCAB_SIZE> there; here, else above the script", "Data")
    tokenizer_path: str = var("", "path", "SentencePiece; empty: tokenizer.model in DATA_PATH, else data/tokenizers/"
                              "fineweb_<VOCAB_SIZE>_bpe.model")
    val_token_limit: int = var(0, ">=0", "score only the first N targets of the validation split; 0 all")

    vocab_size: int = var(1024, "2..65535", "tokens, as in the tokenizer", "Model")
    num_layers: int = var(11, "1..256", "transformer blocks")
    model_dim: int = var(512, "2..16384", "width of the residual stream")
    num_heads: int = var(8, "1..1024", "query heads")
    num_kv_heads: int = var(4, "1..1024", "key and value heads, shared by groups of query heads")
    mlp_mult: float = var(3.0, "0.01..64", "MLP hidden width as a multiple of MODEL_DIM")
    num_loops: int = var(0, "0..16", "times that layers LOOP_START to LOOP_END are run again in a pass; 0 off")
    loop_start: int = var(3, "0..255", "first layer of the loop, from 0")
    loop_end: int = var(5, "0..255", "last layer of the loop")
    parallel_residual_start: int = var(-1, "-1..255", "from this layer on attention and MLP see the same input; -1 off")
    skip_gates_enabled: bool = var(False, "0|1", "1: the U-Net mixes by learned shares instead of adding")
    smear_gate_enabled: bool = var(True, "0|1", "1: each token's embedding is mixed with the one before")
    train_seq_len: int = var(2048, "1..1048576", "tokens a training sequence")
    tie_embeddings: bool = var(True, "0|1", "1: the output layer is the token embedding")
    rope_base: float = var(10000.0, ">=1", "RoPE base up to length 1024; grows with longer sequences")
    rope_dims: int = var(16, ">=0", "dimensions of a head that RoPE turns, even; 0 all")
    qk_gain_init: float = var(1.5, ">=0", "initial gain on normalised queries, one a head")
    mlp_slope: float = var(0.0, "0..1", "slope below 0 of what the MLP squares; 0: squared ReLU")
    logit_softcap: float = var(30.0, "0.1..75", "logits are squashed into +-this by tanh")
    ln_scale: bool = var(True, "0|1", "1: the inputs of layer i are divided by sqrt(i+1)")
    xsa_last_n: int = var(0, ">=0", "exclusive self-attention on the last N layers; 0 off")
    bigram_vocab_size: int = var(2048, "0..1048576", "buckets of the hashed bigram embedding; 0 off")
    bigram_dim: int = var(96, "1..16384", "width of a bigram embedding")
    sparse_start_layer: int = var(8, "-1..256", "first layer followed by the shared sidecar; below 0 off")
    sparse_end_layer: int = var(-1, ">=-1", "last one; -1 the last layer, larger numbers are clipped")
    sparse_every: int = var(1, ">=1", "every how many layers between them")
    sparse_max_sites: int = var(0, ">=0", "at most this many sites; 0 no limit")
    sparse_hidden_dim: int = var(48, "0..16384", "hidden width of the sidecar; 0 off")
    bos_mask: bool = var(True, "0|1", "1: SmearGate, bigram and sidecar stop at document starts; 0: as published")

    train_enabled: bool = var(True, "0|1", "0: no training, start from MODEL_PATH", "Training")
    model_path: str = var("", "path", "what TRAIN_ENABLED=0 starts from: an artifact; a run's folder exports again")
    train_batch_tokens: int = var(786432, ">=1", "tokens a step over all ranks, a multiple of TRAIN_SEQ_LEN")
    micro_batch_seqs: int = var(0, ">=0", "sequences a forward pass of one rank; 0: from the device's memory")
    iterations: int = var(9000, ">=1", "steps at most")
    max_wallclock_seconds: float = var(596.0, ">=0", "training seconds at most; 0 no cap")
    warmdown_iters: int = var(3000, ">=0", "last steps before ITERATIONS or the cap, with rates that fall to MIN_LR")
    warmdown_frac: float = var(0.0, "0..1", "the same as a share of the steps or of the cap; 0: by WARMDOWN_ITERS")
    min_lr: float = var(0.0, "0..1", "rates do not fall below this share of their full values")
    enable_looping_at: float = var(0.35, "0..<1", "share of training from which on layers are looped")
    warmup_steps: int = var(20, ">=0", "steps that prime compilation on random tokens and are undone")
    val_loss_every: int = var(0, ">=0", "steps between validations of the raw weights, off the clock; 0 off")
    use_compile: str = var("auto", "auto|0|1", "torch.compile; auto: on CUDA")
    compute_dtype: str = var("auto", "auto|bf16|fp32", "auto: bf16 on GPUs and CPUs with bf16 instructions")

    matrix_lr: float = var(0.025, "0..10", "Muon's rate, for matrices", "Optimizers")
    tied_embed_lr: float = var(0.035, "0..10", "AdamW's rate for all embeddings when the output layer is tied")
    embed_lr: float = var(0.6, "0..10", "the same when untied")
    head_lr: float = var(0.008, "0..10", "Adam's rate for the untied output layer")
    scalar_lr: float = var(0.025, "0..10", "AdamW's rate for vectors, scalars and the sidecar's kernel")
    tied_embed_init_std: float = var(0.005, ">0", "standard deviation of initial tied embeddings")
    muon_momentum: float = var(0.99, "0..<1", "Muon's momentum after its warm-up")
    muon_momentum_warmup_start: float = var(0.92, "0..<1", "Muon's momentum at step 0")
    muon_momentum_warmup_steps: int = var(1500, ">=0", "steps of that warm-up")
    muon_backend_steps: int = var(5, "1..100", "Newton-Schulz iterations")
    muon_row_normalize: bool = var(False, "0|1", "1: rows are brought to one length before they are orthogonalised")
    muon_wd: float = var(0.04, "0..10", "Muon's decoupled weight decay")
    embed_wd: float = var(-1.0, "-1..10", "AdamW's weight decay of embeddings; below 0: ADAM_WD")
    adam_wd: float = var(0.04, "0..10", "AdamW's weight decay of vectors, scalars and the sidecar's kernel")
    beta1: float = var(0.9, "0..<1", "Adam's first beta")
    beta2: float = var(0.95, "0..<1", "Adam's second beta")
    adam_eps: float = var(1e-8, ">0", "Adam's epsilon")
    grad_clip_norm: float = var(0.3, ">=0", "global gradient norm at most; 0 off")
    ema_enabled: bool = var(True, "0|1", "1: export the exponential moving average of the weights")
    ema_decay: float = var(0.997, "0..<1", "its decay a step")

    export_enabled: bool = var(True, "0|1", "0: evaluate the averaged weights without an artifact", "Export")
    artifact_limit_bytes: int = var(16_000_000, ">=1", "code + model bytes at most")
    code_bytes: str = var("packed", "packed|raw", "what counts as code: packed, this script compressed, as the run "
                          "leaves it to be submitted; raw, its file as it is")
    export_fill: bool = var(True, "0|1", "1: finer steps, in the room that the limit leaves")
    export_max_seconds: float = var(-1.0, ">=-1", "of MAX_WALLCLOCK_SECONDS, for search; 0 no limit; -1: 2%, >=10 s")
    calibration_tokens: int = var(65536, ">=1", "training tokens on which rounding is calibrated")
    quant: str = var("balanced", "balanced|rowmax", "rounding; balanced: by what errors cost, rowmax: published")
    quant_fisher: str = var("expected", "empirical|expected", "what errors of output rows cost: by the targets at "
                            "hand, which tell little of rare tokens, or expected over all that the model predicts")
    quant_bits_attn: float = var(6.0, "0..12", "nominal bits of attention matrices, where a search starts: one more "
                                 "halves the steps, and the coder makes other bits of it; rowmax: 2..8")
    quant_bits_mlp: float = var(6.0, "0..12", "the same for MLP matrices")
    quant_bits_embed: float = var(8.0, "0..12", "for the token embedding and an untied output layer")
    quant_bits_bigram: float = var(8.0, "0..12", "for the bigram embedding and its projection")
    quant_bits_sidecar: float = var(6.0, "0..12", "for the sidecar")
    quant_min_numel: int = var(65536, ">=0", "tensors up to this many elements are kept in fp16")

    final_eval_enable: bool = var(True, "0|1", "1: score float and int6 weights without overlap", "Evaluation")
    final_sliding_eval_enable: bool = var(True, "0|1", "1: score the artifact in sliding windows")
    eval_stride: int = var(64, ">=0", "tokens between sliding windows; 0: no sliding evaluation")
    eval_seq_len: int = var(0, "0..1048576", "tokens an evaluation window; 0: as TRAIN_SEQ_LEN")
    val_batch_size: int = var(524288, ">=1", "tokens a validation batch over all ranks, at most")
    eval_max_seconds: float = var(-1.0, ">=-1", "seconds from artifact to val_bpb; 0 no limit; -1: 600 on CUDA, else 0")
    nll_dump: str = var("", "path", "write the nats of every target behind val_bpb to this .npy file")

    ttt_enabled: bool = var(True, "0|1", "1: score-first test-time training", "Test-time training")
    ttt_mode: str = var("auto", "auto|full|lora", "lora: adapters a document; full: all weights; auto: full where its "
                        "variables are given, else lora")
    ttt_lora_rank: int = var(128, "1..16384", "lora: rank of the adapters; by default no more than the matrices' own")
    ttt_lora_lr: float = var(0.012, "0..10", "lora: rate, divided by the square root of the rank")
    ttt_lora_chunk_tokens: int = var(64, ">=1", "lora: targets scored, then learnt from, at a time; a window at most")
    ttt_lora_documents: int = var(256, ">=1", "lora: documents side by side, over all ranks; fewer if memory lacks")
    ttt_lora_share: float = var(0.15, "0..1", "lora: share of an ended document's adapters in the start of later ones")
    ttt_chunk_tokens: int = var(16384, ">=1", "full: targets scored, then learnt from, at a time")
    ttt_optimizer: str = var("adamw", "adamw|sgd", "full: the optimizer")
    ttt_lr: float = var(0.001, "0..10", "full: its rate")
    ttt_lr_min: float = var(0.0, "0..10", "full: where TTT_COSINE ends within a chunk")
    ttt_lr_end: float = var(1.0, "0..1", "full: a cosine across chunks takes the rate to this share of it; 1 no decay")
    ttt_cosine: bool = var(False, "0|1", "full: 1: the rate falls by a cosine within a chunk")
    ttt_epochs: int = var(3, ">=0", "full: passes over each scored chunk")
    ttt_warmup_epochs: int = var(0, ">=0", "full: passes of linear warm-up under TTT_COSINE")
    ttt_wd: float = var(0.0, "0..10", "full: weight decay")
    ttt_momentum: float = var(0.9, "0..<1", "full: momentum of sgd")
    ttt_batch_seqs: int = var(0, ">=0", "full: sequences a step of a rank; 0: all of a chunk's, for any ranks")
    ttt_freeze_blocks: int = var(0, ">=0", "full: first blocks that do not adapt")
    ttt_pull: float = var(0.4, "0..1", "full: share of the way back to the artifact's weights, after each chunk")
    ttt_grad_clip: float = var(1.0, ">=0", "full: gradient norm at most; 0 off")

    explicit: frozenset = frozenset()  # names of the fields that the environment set

    @property
    def eval_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def lora_rank(self) -> int:
        """TTT_LORA_RANK, or the most that the adapted matrices have."""
        return min(self.ttt_lora_rank, self.model_dim, self.mlp_dim, self.vocab_size)

    @property
    def export_seconds(self) -> float:
        """Guard on calibration and search, 0 for none: it is training time, so training ends that much sooner."""
        cap = self.max_wallclock_seconds * self.train_enabled
        return self.export_max_seconds if self.export_max_seconds >= 0 else min(max(10.0, cap / 50), cap / 4)

    @property
    def training_seconds(self) -> float:
        """Seconds of training at most, 0 for no cap."""
        if self.max_wallclock_seconds == 0 or not self.export_enabled:
            return self.max_wallclock_seconds
        return self.max_wallclock_seconds - self.export_seconds

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The layers as a looped pass runs them, LOOP_START to LOOP_END once and NUM_LOOPS times more."""
        layers, after = tuple(range(self.num_layers)), self.loop_end + 1
        return layers[:after] + layers[self.loop_start : after] * self.num_loops + layers[after:]

    @property
    def loops_later(self) -> bool:
        """Whether training begins with each layer once and loops later."""
        return self.num_loops > 0 and self.enable_looping_at > 0

    @property
    def sparse_sites(self) -> tuple[int, ...]:
        """Layers followed by the shared sidecar."""
        end = self.num_layers if self.sparse_end_layer < 0 else min(self.sparse_end_layer + 1, self.num_layers)
        if self.sparse_start_layer < 0 or self.sparse_hidden_dim == 0:
            return ()
        return tuple(range(self.sparse_start_layer, end, self.sparse_every))[: self.sparse_max_sites or None]

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in VARIABLES}

    def overrides(self) -> dict:
        return {n.upper(): getattr(self, n) for n in sorted(self.explicit) if n != "preset"}


PRESETS = {
    # The defaults above are the published ones, but for QUANT, which is better.
    "seed": {"export_fill": False, "quant_fisher": "empirical"},  # by which it rounds as it always did
    "frontier": {  # what was published to help at full size on 8 x H100: docs/frontier.md says where, value by value
        "vocab_size": 8192, "mlp_mult": 4.0, "mlp_slope": 0.3, "qk_gain_init": 5.0, "xsa_last_n": 11, "num_loops": 2,
        "parallel_residual_start": 7, "skip_gates_enabled": True, "smear_gate_enabled": False, "bigram_vocab_size": 0,
        "sparse_hidden_dim": 0, "iterations": 20000, "warmdown_frac": 0.85, "min_lr": 0.1, "matrix_lr": 0.026,
        "muon_momentum": 0.97, "muon_row_normalize": True, "muon_wd": 0.095, "tied_embed_lr": 0.03, "embed_wd": 0.085,
        "scalar_lr": 0.02, "adam_wd": 0.02, "beta2": 0.99, "ema_decay": 0.9965,
    },
    "demo": {  # a few minutes on two CPU cores, on the embedded corpus; as many bytes a parameter as the seed has
        "num_layers": 4, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "sparse_start_layer": 2,
        "train_seq_len": 256, "train_batch_tokens": 4096, "iterations": 3000, "max_wallclock_seconds": 180.0,
        "warmdown_iters": 400, "warmup_steps": 0, "muon_momentum": 0.95, "muon_momentum_warmup_steps": 100,
        "ema_decay": 0.97, "train_log_every": 50, "val_token_limit": 131072, "quant_min_numel": 4096,
        "calibration_tokens": 32768, "artifact_limit_bytes": 750_000, "ttt_lora_documents": 8,
    },
}

NOMINAL_BITS = {"balanced": (0.0, 12.0), "rowmax": (2.0, 8.0)}  # the least and the most that a rule takes
# What other scripts of this field know and this one does not: harmless when off, an error when on.
NOT_IMPLEMENTED = ("SWA_ENABLED", "QAT_ENABLED", "LATE_QAT", "MTP_NUM_HEADS", "LAWA_ENABLED", "DTG_ENABLED",
                   "VE_ENABLED", "VE_LAYERS", "GATED_ATTENTION", "VALUE_RESIDUAL", "TRIGRAM", "PARALLEL_START_LAYER",
                   "ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED", "SPARSE_ATTN_GATE_ENABLED", "ASYM_LOGIT_RESCALE",
                   "EMBEDDING_DIM", "CASEOPS_ENABLED", "COMPRESSOR", "LQER_ENABLED", "EMBED_BITS", "MATRIX_BITS",
                   "EMBED_CLIP_SIGMAS", "MATRIX_CLIP_SIGMAS", "PHASED_TTT_NUM_PHASES", "TRAIN_SEQ_SCHEDULE", "DROPOUT")
# What this script knew once, and what took its place.
REMOVED = {
    "AUDIT": "audit from outside: AUDIT=1 ./run.sh, or ./run.sh audit LOG_DIR/RUN_ID after a run",
    "AUDIT_TOKENS": "audit from outside: ./run.sh audit --tokens N LOG_DIR/RUN_ID",
    "MUON_BETA2": "nothing at full size speaks for it; MUON_ROW_NORMALIZE=1 is what published runs do with rows",
    "NAN_POLICY": "a step that is not finite ends the run; start another with lower rates",
    "SAVE_FLOAT": "CKPT_EVERY_SECONDS=1e9 keeps the last checkpoint; TRAIN_ENABLED=0 MODEL_PATH=RUN exports it",
    "SHUFFLE": "sequences are taken in the order of the shards, as published runs do",
    "STRICT_ENV": "ENV_EXTRA names the variables that may look like ours",
    "VE_LAST_N": "value embeddings: the published runs with a vocabulary of 8192 have none",
}
# What other scripts call it; with or without the _.
CALLED_ELSEWHERE = {
    "MATRIX_LR": "LR LRATE LEARNING_RATE MAX_LR PEAK_LR BASE_LR MUON_LR",
    "MUON_WD": "WD WEIGHT_DECAY",
    "EMBED_WD": "EMBED_DECAY EMBED_WEIGHT_DECAY",
    "MIN_LR": "LR_MIN MIN_LR_FRAC MIN_LEARNING_RATE",
    "WARMDOWN_FRAC": "COOLDOWN_FRAC DECAY_FRAC",
    "NUM_LOOPS": "LOOPS N_LOOPS LOOP_COUNT",
    "MUON_MOMENTUM": "MOMENTUM",
    "GRAD_CLIP_NORM": "MAX_GRAD_NORM GRADIENT_CLIP CLIP_GRAD CLIP_GRAD_NORM",
    "ITERATIONS": "STEPS MAX_STEPS NUM_STEPS TOTAL_STEPS TRAIN_STEPS ITERS MAX_ITERS NUM_ITERS N_ITERS EPOCHS "
                  "NUM_EPOCHS MAX_EPOCHS",
    "MAX_WALLCLOCK_SECONDS": "MAX_SECONDS TRAIN_SECONDS MAX_TRAIN_SECONDS",
    "TRAIN_BATCH_TOKENS": "BATCH_SIZE BATCH_TOKENS TOTAL_BATCH_SIZE TRAIN_BATCH_SIZE MAX_BATCH_SIZE",
    "MICRO_BATCH_SEQS": "MICRO_BATCH_SIZE DEVICE_BATCH_SIZE GRAD_ACCUM_STEPS GRADIENT_ACCUMULATION_STEPS",
    "TRAIN_SEQ_LEN": "SEQ_LEN SEQ_LENGTH SEQUENCE_LENGTH MAX_SEQ_LEN MAX_SEQ_LENGTH BLOCK_SIZE CONTEXT_LENGTH CTX_LEN",
    "NUM_LAYERS": "LAYERS N_LAYER N_LAYERS DEPTH",
    "NUM_HEADS": "HEADS N_HEAD N_HEADS",
    "NUM_KV_HEADS": "KV_HEADS N_KV_HEADS",
    "MODEL_DIM": "DIM D_MODEL N_EMBD EMBED_DIM HIDDEN_DIM HIDDEN_SIZE",
    "MLP_MULT": "MLP_RATIO",
    "LOGIT_SOFTCAP": "SOFTCAP",
    "EVAL_STRIDE": "STRIDE",
    "TTT_LORA_RANK": "LORA_RANK",
    "VAL_LOSS_EVERY": "EVAL_EVERY EVAL_INTERVAL",
    "TRAIN_LOG_EVERY": "LOG_EVERY LOG_INTERVAL",
    "CKPT_EVERY_SECONDS": "SAVE_EVERY",
    "DATA_PATH": "TRAIN_DATA TRAIN_PATH TRAIN_DIR VAL_DATA",
    "COMPUTE_DTYPE": "DTYPE",
    "USE_COMPILE": "COMPILE",
    "SEED": "RANDOM_SEED",
}
# The beginnings of our names that clusters, shells and other software set.
BARE_ELSEWHERE = ("DATA", "ENV", "HEAD", "KEEP", "LOG", "MAX", "MODEL", "NUM", "RUN", "USE")
# A name with a prefix of the first group was meant for us; one of the second never was, or is a setting of the above.
FAMILIES = ("ADAM_", "BIGRAM_", "CKPT_", "EMA_", "EMBED_", "EVAL_", "EXPORT_", "FINAL_", "LOOP_", "LOOPING_", "MUON_",
            "PARALLEL_RESIDUAL_", "QUANT_", "RESUME_", "ROPE_", "SKIP_GATE", "SMEAR_", "SPARSE_", "TIED_", "TRAIN_",
            "TTT_", "VAL_", "WARMDOWN_", "WARMUP_", "XSA_")
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCH", "PET_", "CUDA_", "NVIDIA_", "NCCL_",
           "GLOO_", "OMP_", "MKL_", "KMP_", "HF_", "TRITON_", "PYTHON", "PIP_", "SLURM_", "MODULE", "MATCHED_", "SWA_",
           "QAT_", "MTP_", "LAWA_", "DTG_", "NUM_THREADS")

VARIABLES = [f for f in dataclasses.fields(Config) if "accepts" in f.metadata]
STAGES = dict(zip(
    (f.name for f in VARIABLES),
    itertools.accumulate((f.metadata["stage"] for f in VARIABLES), lambda old, new: new or old),
    strict=True,
))  # the section of --help that a variable stands in
MODEL_FIELDS = [f for f in VARIABLES if STAGES[f.name] == "Model"]  # stored in artifacts
TTT_LORA = {f.name for f in VARIABLES if f.name.startswith("ttt_lora")}  # what each mode alone listens to
TTT_FULL = {f.name for f in VARIABLES if f.metadata["text"].startswith("full: ")}


def parse(kind: type, accepts: str, raw: str):
    """A variable's value from its text. Raises ValueError when `accepts` does not admit it."""
    if kind is bool:
        holds, value = raw in ("0", "1"), raw == "1"
    elif kind is str:
        value, length = raw, len(raw.encode())  # encode() refuses what no log could hold
        holds = not re.search("[\n\0]", raw) and ("|" not in accepts or raw in accepts.split("|"))
        if accepts == "name":
            holds = holds and raw not in (".", "..") and "/" not in raw and length < 200
    else:
        value = kind(raw)
        low, _, high = accepts.partition("..")
        least, most = float(low.lstrip(">=")), float(high.lstrip("<") or 1e15)
        above, below = re.match(">[^=]", low), high.startswith("<")
        holds = least <= value <= most and not (above and value == least) and not (below and value == most)
    if not holds:
        raise ValueError("not a value that is accepted")
    return value


def check_value(field: dataclasses.Field, value):
    """A file's value for a variable, as it is. Raises ValueError or TypeError for what the variable does not accept."""
    kinds = (int, float) if field.type is float else (field.type,)
    if type(value) not in kinds:
        raise TypeError(f"{field.name.upper()} is not of type {field.type.__name__}")
    if value != "":
        parse(field.type, field.metadata["accepts"], str(int(value) if field.type is bool else value))
    return value


def alike(word: str, other: str) -> bool:
    """Whether one is the other but for a slip of the pen."""
    return sorted(word) == sorted(other) or difflib.SequenceMatcher(None, word, other).ratio() >= 0.75


def is_near(name: str, our: str) -> bool:
    """Whether the words of a name are ours but for slips, or its letters are but for a _. Not so by closeness of the
    whole: names of other software often end as ours do, in _DIR, _PATH, _ID or _ENABLED."""
    words, ours = name.split("_"), our.split("_")
    close = difflib.SequenceMatcher(None, "".join(words), "".join(ours)).ratio() >= 0.9
    return close or len(words) == len(ours) and all(map(alike, words, ours))


def meant(name: str) -> str:
    """The variable that an unknown name seems to mean, or the beginning of several; "" where it may be another
    program's."""
    word, ours = name.upper(), [f.name.upper() for f in VARIABLES]
    letters = word.replace("_", "")
    called = [our for our, others in CALLED_ELSEWHERE.items() if letters in others.replace("_", "").split()]
    begun = [our for our in ours if our.startswith(f"{word}_") and word not in BARE_ELSEWHERE]
    near = difflib.get_close_matches(word, [our for our in ours if is_near(word, our)], 1, 0.0)
    family = next((family for family in FAMILIES if word.startswith(family)), None)
    kin = [our for our in ours if family and f"{our}_".startswith(family)]
    if len(kin) > 1:
        kin = [f"one of {family}*"]
    return next(iter(called + begun + near + kin), "")


def misspelt(names, extra: set[str]) -> list[str]:
    """A line for each environment name that looks meant for this script but is not one of its variables."""
    known = {*(f.name.upper() for f in VARIABLES), *NOT_IMPLEMENTED, *REMOVED, *extra}
    odd = {name: meant(name) for name in sorted(set(names) - known) if not name.startswith(FOREIGN)}
    return [f"{name}: no such variable; did you mean {our}? (ENV_EXTRA={name} lets it pass)"
            for name, our in odd.items() if our]


def has_gpu() -> bool:
    """Whether this machine shows a GPU, told without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "any").strip() in ("", "-1")
    return not hidden and any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def read_variables(environ) -> tuple[dict, list[str]]:
    """The values that the environment gives, by field; and a line for each that is refused."""
    values, problems = {}, []
    for f in VARIABLES:
        name, raw, accepts = f.name.upper(), environ.get(f.name.upper()), f.metadata["accepts"]
        if raw is None or (raw == "" and f.type is str):
            continue
        try:
            values[f.name] = parse(f.type, accepts, raw)
        except UnicodeEncodeError:
            problems.append(f"{name}={raw[:80]!r}: not UTF-8 text in this locale; set PYTHONUTF8=1, or use ASCII")
        except (ValueError, OverflowError):
            most = ", at most 1e15" if accepts.startswith(">") else ""
            problems.append(f"{name}={raw[:80]!r}: accepts {f.type.__name__} {accepts}{most}")
    for name in (*NOT_IMPLEMENTED, *REMOVED):
        if environ.get(name, "0") not in ("0", "", "0.0"):
            why = REMOVED.get(name, "not implemented in this script")
            problems.append(f"{name}={environ[name][:80]!r}: {why}; unset it or set it to 0")
    return values, problems


def load_config(environ, ranks: int = 1) -> tuple[Config, list[str], list[str]]:
    """The configuration that the environment asks for, all problems and all warnings, a line each."""
    values, problems = read_variables(environ)
    preset = values.get("preset", "auto")
    if preset == "auto":
        preset = "seed" if has_gpu() else "demo"
    cfg = Config(**{**PRESETS[preset], **values, "preset": preset, "explicit": frozenset(values)})
    if cfg.explicit & {"warmdown_iters", "warmdown_frac"} == {"warmdown_iters"}:
        cfg = dataclasses.replace(cfg, warmdown_frac=0.0)  # variables win over presets
    if cfg.ttt_mode == "auto":
        cfg = dataclasses.replace(cfg, ttt_mode="full" if cfg.explicit & TTT_FULL else "lora")
    idle = cfg.explicit & (TTT_LORA if cfg.ttt_mode == "full" else TTT_FULL)
    warnings = [f"{name.upper()}: no effect with TTT_MODE={cfg.ttt_mode}" for name in sorted(idle) if cfg.ttt_enabled]
    if preset == "frontier" and cfg.vocab_size != PRESETS["frontier"]["vocab_size"]:
        warnings.append(f"VOCAB_SIZE={cfg.vocab_size}: good for trying PRESET=frontier on the shards at hand, not for "
                        "a score; its values were published with 8192 pieces, which won about 0.02 BPB over 1024")
    if cfg.resume and not cfg.run_id:
        problems.append("RESUME=1: needs the RUN_ID of the run to go on with, or to start")
    brought = cfg.resume or (not cfg.train_enabled and cfg.model_path)  # the run or the artifact brings the rest
    if not problems and not brought:
        problems = conflicts(cfg, ranks)
    return cfg, problems + misspelt(environ, {n.strip() for n in cfg.env_extra.split(",")}), warnings


def conflicts(cfg: Config, ranks: int) -> list[str]:
    """A line for each group of settings that cannot go together."""
    heads, dim, trains, ttt = cfg.num_heads, cfg.model_dim, cfg.train_enabled, cfg.ttt_enabled
    each, seqs = dim // heads, cfg.train_batch_tokens // cfg.train_seq_len
    slides, full = cfg.final_sliding_eval_enable or ttt, ttt and cfg.ttt_mode == "full"
    capped = trains and cfg.export_enabled and cfg.max_wallclock_seconds
    nominal = [getattr(cfg, f.name) for f in VARIABLES if f.name.startswith("quant_bits_")]
    least, most = NOMINAL_BITS[cfg.quant]
    rules = [  # (what must hold, of which variable, what to say where it does not)
        (dim % heads == 0, "model_dim", f"must be a multiple of NUM_HEADS={heads}"),
        (heads % cfg.num_kv_heads == 0, "num_kv_heads", f"must divide NUM_HEADS={heads}"),
        (each % 2 == 0, "model_dim", f"must give each head an even width for RoPE, not {each}"),
        (cfg.rope_dims % 2 == 0 and cfg.rope_dims <= each, "rope_dims", f"must be even and at most a head's {each}"),
        (cfg.bigram_vocab_size != 1, "bigram_vocab_size", "must be 0 (off) or at least 2"),
        (not cfg.num_loops or cfg.loop_start <= cfg.loop_end < cfg.num_layers, "num_loops",
         f"needs LOOP_START={cfg.loop_start} <= LOOP_END={cfg.loop_end} < NUM_LAYERS={cfg.num_layers}; 0 is no loop"),
        (not trains or not cfg.num_loops or cfg.enable_looping_at * cfg.iterations <= cfg.iterations - 1,
         "enable_looping_at", f"leaves none of ITERATIONS={cfg.iterations} steps to train with the loops"),
        (cfg.mlp_dim > 0, "mlp_mult", f"leaves no hidden unit at MODEL_DIM={dim}"),
        (not slides or cfg.eval_stride <= cfg.eval_len, "eval_stride", f"must not exceed the window's {cfg.eval_len}"),
        (not ttt or cfg.eval_stride > 0, "eval_stride", "TTT_ENABLED=1 scores in windows; give a stride"),
        (not full or cfg.ttt_chunk_tokens >= cfg.eval_stride, "ttt_chunk_tokens", "must be at least EVAL_STRIDE"),
        (not full or cfg.ttt_freeze_blocks <= cfg.num_layers, "ttt_freeze_blocks", f"only {cfg.num_layers} blocks"),
        (cfg.ttt_lora_rank == cfg.lora_rank or "ttt_lora_rank" not in cfg.explicit, "ttt_lora_rank",
         f"must not exceed {cfg.lora_rank}, the least of MODEL_DIM, the MLP's width and VOCAB_SIZE"),
        (not capped or 0 < cfg.export_seconds < cfg.max_wallclock_seconds, "export_max_seconds",
         "must be above 0 and below MAX_WALLCLOCK_SECONDS"),
        (least <= min(nominal) and max(nominal) <= most, "quant", f"takes QUANT_BITS_* of {least:g} to {most:g}"),
        (trains or cfg.model_path, "model_path", "TRAIN_ENABLED=0 needs the artifact to start from"),
        (not trains or not cfg.model_path, "model_path", "only TRAIN_ENABLED=0 starts from it; set that or unset this"),
        (not trains or cfg.train_batch_tokens % cfg.train_seq_len == 0, "train_batch_tokens",
         f"must be a multiple of TRAIN_SEQ_LEN={cfg.train_seq_len}"),
        (not trains or seqs % ranks == 0, "world_size", f"must divide the {seqs} sequences of a step (TRAIN_BATCH"
         "_TOKENS/TRAIN_SEQ_LEN); launch another number of ranks or change the batch"),
        (not trains or seqs % ranks or seqs // ranks % (cfg.micro_batch_seqs or 1) == 0, "micro_batch_seqs",
         f"must divide the {seqs // ranks} sequences of a rank's step"),
    ]
    return [f"{name.upper()}={getattr(cfg, name, ranks)}: {text}" for ok, name, text in rules if not ok]


def help_text() -> str:
    """All variables by stage: name, default (and the presets' where they differ), accepted values, meaning."""
    lines = [__doc__.strip(), "", "Options: --help; --check [--ranks N] [--time]: for N ranks; with two timed steps"]
    for f in VARIABLES:
        def shown(value, kind=f.type):
            return str(int(value) if kind is bool else value) or "empty"

        if f.metadata["stage"]:
            lines += ["", f.metadata["stage"]]
        others = [f"{preset}: {shown(given[f.name])}" for preset, given in PRESETS.items() if f.name in given]
        default = shown(f.default) + (f" ({', '.join(others)})" if others else "")
        lines.append(f"  {f.name.upper():26} {default}; {f.metadata['accepts']}")
        lines.append(f"{'':31}{f.metadata['text']}")
    return "\n".join(lines)


def complain(text: str):
    """A line on stderr, if there is somebody to read it: a terminal may be gone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def leave(code: int, said: str = "", silent: bool = False):
    """End this rank with what it has to say. A silent one waits: a launcher kills all ranks once one has failed."""
    for number in SIGNALS:  # a terminal that closes now shall not change the exit code
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
    if silent:
        time.sleep(3)
    elif said:
        complain(said)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe or a full disk, which the interpreter would stumble over again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # gloo's threads may outlive the interpreter and then abort the process
    sys.exit(code)


def show(text: str):
    """Print what was asked for; who reads its head only is served."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def read_launch(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Configuration and options of this launch. Ends the process for --help (0) and for bad values (2)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    usage = "there are --help, and --check with [--ranks N] [--time]; variables come first, ITERATIONS=5 python ..."
    parser.error = lambda problem: leave(2, f"error: {one_line(problem)}; {usage}")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args(argv)
    if options.help:
        show(help_text())
        leave(0)
    odd = [f"{name}={os.environ[name]!r}: is the launcher's to set; unset it or launch with torchrun"
           for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if not os.environ.get(name, "0").isdecimal()]
    if options.ranks is None:
        options.ranks = 1 if odd else int(os.environ.get("WORLD_SIZE", "1"))
    cfg, problems, warnings = load_config(os.environ, max(options.ranks, 1))
    problems += odd + ["--ranks: must be above 0"] * (options.ranks < 1)
    problems += ["--time: goes with --check; a run times its steps by itself"] * (options.time and not options.check)
    silent = not odd and os.environ.get("RANK", "0") != "0"
    lines = [f"error: {one_line(p)}" for p in problems] + [f"warning: {one_line(w)}" for w in warnings]
    if problems:
        leave(2, "\n".join(lines), silent)
    if not silent:
        sys.stderr.writelines(line + "\n" for line in lines)
    return cfg, options


if __name__ == "__main__":  # here, so that a typo is answered before the seconds that importing torch takes
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet, and no traceback
    sys.stdout, sys.stderr = (  # None where it was closed
        stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))
    LAUNCH = read_launch(sys.argv[1:])
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import zstandard
    from torch import Tensor, nn
    from torch.distributed.rendezvous import rendezvous
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    leave(2, f"error: {missing.name} is not installed for {sys.executable}; ./run.sh makes one that has it in .venv; "
          "or pip install -r requirements.txt", silent=os.environ.get("RANK", "0") != "0")

if re.match(r"2\.1[0-2]\b", torch.__version__):  # this fusion makes a step on an H100 4% longer
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")


def find_flash_attention():
    """The function of FlashAttention-3, Hopper's, where someone has it: as a module, in its package, or fetched before
    through the package kernels, by which nothing is downloaded here. Else None."""
    for name in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        with contextlib.suppress(Exception):  # a broken one raises what its libraries raise
            return importlib.import_module(name).flash_attn_func
    if importlib.util.find_spec("kernels"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        with contextlib.suppress(Exception):
            kernels = importlib.import_module("kernels")
            return kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    return None


flash_attn_func = find_flash_attention()
try:  # comes with PyTorch for GPUs
    import triton
    import triton.language as tl

    jit = triton.jit
except Exception:  # a broken one raises what its libraries raise
    triton = None

# ==== Process and log: this rank among the others, its device, the signals it gets, what it tells people ==============

CGROUPS = Path("/sys/fs/cgroup")  # where Linux keeps the limits of containers and jobs
# Before torch 2.13 they have other names, at which it warns.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SharedError(UserError):
    """A UserError that all ranks raise alike, so that one of them is enough to say it."""


class Diverged(SharedError):
    """Training that would meet the same fault again, if it went on."""


class Interrupted(BaseException):
    """One of SIGNALS, at a place where leaving loses nothing."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """The first of SIGNALS raises Interrupted, or waits while it is held until what must be finished is saved; a later
    one ends the process at once. Signals within 2 s are one: torchrun adds its own, and a system that shuts down sends
    several. SIGHUP is never a later one, for a terminal closes only once."""

    def __init__(self, listens: bool = False):
        self.caught, self.held, self.began = 0, False, 0.0
        for number in SIGNALS if listens else ():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame):
        if not self.caught:
            self.caught, self.began = number, time.monotonic()
            if not self.held:
                raise Interrupted(number)
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                complain(f"{name}: finishing the step and saving; a second one, after 2 s, leaves at once")
        elif number != signal.SIGHUP and time.monotonic() - self.began > 2:
            os._exit(128 + number)

    @contextlib.contextmanager
    def hold(self):
        """Within this a signal waits: it is looked for where there is something to save, or raised at the end."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.caught:
            raise Interrupted(self.caught)


def keep_freed_memory():
    """Let glibc reuse large blocks: by default each activation is mapped, and zeroed by the kernel, page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option, most in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, most)


@functools.cache
def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where a container or a job is limited."""
    limits, groups = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")], ""
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    for line in groups.splitlines():
        controllers, group = line.split(":", 2)[1:]
        if controllers == "":  # version 2
            folder, name = CGROUPS, "memory.max"
        elif controllers == "memory":
            folder, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = folder / group.lstrip("/")
        for path in (inner, *inner.parents):  # each holds for what is below it
            with contextlib.suppress(OSError, ValueError):  # no such file here, or "max"
                limits.append(int((path / name).read_text(encoding="utf-8")))
    return min(limits)


class Process:
    """This rank, its device and the few ways it talks to the other ranks; with one rank nothing is sent.

    Raises UserError when the machine has fewer GPUs than ranks or ranks have no launcher.
    """

    def __init__(self, compute_dtype: str = "auto", signals: Signals | None = None):
        self.signals, self.started = signals or Signals(), time.perf_counter()
        self.rank, self.world, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
        self.main, self.cuda = self.rank == 0, torch.cuda.is_available()
        if self.cuda:
            require(local < torch.cuda.device_count(), f"local rank {local} has no GPU of its own, this machine shows "
                    f"{torch.cuda.device_count()}; launch with --nproc_per_node at most that")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            keep_freed_memory()
        if self.world > 1:
            self._meet()
        cpuinfo = Path("/proc/cpuinfo")
        self.cpuinfo = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
        self.compute_in(compute_dtype)

    def _meet(self):
        """Find the other ranks."""
        try:
            store, *_ = next(rendezvous("env://", self.rank, self.world))
        except ValueError as error:  # MASTER_ADDR, MASTER_PORT
            raise UserError(f"WORLD_SIZE={self.world}: {error}; launch with torchrun") from None
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):  # else restarts are not counted alike
            # torchrun keeps one store over restarts: without this a rank may meet a dead one's address
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo", store=store, rank=self.rank,
                                world_size=self.world)

    def compute_in(self, compute_dtype: str):
        """Set COMPUTE_DTYPE; auto goes by features, never by a timing, so that a run is repeatable."""
        if compute_dtype != "auto":
            bf16 = compute_dtype == "bf16"
        elif self.cuda:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", self.cpuinfo)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def scatter_sum_(self, rows: Tensor) -> Tensor:
        """Sum `rows` [world, n] over the ranks, in place: each gets its own row alone, which is returned."""
        if self.world > 1:
            reduce_scatter(rows[self.rank], rows.view(-1))
        return rows[self.rank]

    def begin_gather_(self, rows: Tensor):
        """Begin to fill `rows` [world, n], of which each rank has its own, beside what is computed next. Returns what
        waits for it: on a GPU the stream, not the host."""
        return all_gather(rows.view(-1), rows[self.rank], async_op=True).wait if self.world > 1 else lambda: None

    def heard(self, seconds: float) -> tuple[float, int]:
        """Rank 0's `seconds`, and the signal that any rank has caught, 0 for none; on every rank."""
        both = torch.tensor((seconds if self.main else 0.0, self.signals.caught), dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both[0]), int(both[1])

    def agree(self, value):
        """Rank 0's `value` on every rank, by way of the CPU so that no device is waited for."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def together(self, action, main: bool = False):
        """Run `action` on every rank, or on the `main` one alone, and return its result; what the user must mend on any
        rank is raised on all."""
        result, message = None, None
        try:
            result = action() if self.main or not main else None
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'output'}: {error.strerror}; mend the path or its permissions"
        messages = [message] * self.world
        if self.world > 1:
            dist.all_gather_object(messages, message)
        if problem := next(filter(None, messages), None):
            raise SharedError(problem)
        return result

    def mark(self):
        """A place in this rank's queue of work, with a clock: None on a CPU, which has none."""
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark):
        """Wait until the device has come to `mark`."""
        if mark is not None:
            mark.synchronize()

    def synchronize(self):
        """Wait until the device has done all that was asked of it."""
        self.reached(self.mark())

    def thread(self) -> ThreadPoolExecutor:
        """A thread that works on this rank's device; by itself it would open a context of half a GB on the first."""
        choose = (lambda: torch.cuda.set_device(self.device)) if self.cuda else None
        return ThreadPoolExecutor(1, initializer=choose)

    def memory(self) -> tuple[int, int]:
        """Bytes of memory of the device, and the most held so far (on a GPU by torch, on a CPU by the process)."""
        if self.cuda:
            return torch.cuda.get_device_properties(self.device).total_memory, torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return memory_limit(), peak

    def hardware(self) -> dict:
        """What this run runs on, for the log and the summary."""
        cpu = re.search(r"model name\s*:\s*(.+)", self.cpuinfo)
        name = cpu.group(1).strip() if cpu else platform.processor() or platform.machine()
        return {"device": self.device.type, "name": torch.cuda.get_device_name() if self.cuda else name,
                "world_size": self.world, "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(),
                "memory_bytes": self.memory()[0]}


class Log:
    """Rank 0's voice: stdout, train.log and metrics.jsonl in `folder`. Other ranks are silent. No run ends for a line
    that cannot be written: that is a warning, once."""

    def __init__(self, process: Process, folder: Path):
        self.main, self.folder, self._progress_at, self._warned = process.main, folder, 0.0, False

    def __call__(self, text: str, console: bool = True, file: str = "train.log"):
        """A line for people and for the field's log parsers."""
        if not self.main:
            return
        if console:
            self._print(text)
        try:
            with open(self.folder / file, "a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text + "\n")
        except OSError as error:
            if not self._warned:
                self._print(f"warning: {self.folder / file}: {error.strerror}; the run goes on without its lines")
            self._warned = True

    def _print(self, text: str):
        with contextlib.suppress(OSError):  # a closed terminal
            print(text, flush=True)

    def silent(self):
        """The same log on a rank that says nothing."""
        log = copy.copy(self)
        log.main = False
        return log

    def metric(self, **values):
        """A line of metrics.jsonl."""
        self(json.dumps(values), console=False, file="metrics.jsonl")

    def progress(self, text: str, done: float, seconds: float):
        """The share `done` of a stage after `seconds`, and the time left; on the console, every 20 s at most."""
        now = time.monotonic()
        if self.main and done > 0 and now - self._progress_at >= 20:
            self._progress_at = now
            self._print(f"{text}: {done:.0%} after {seconds:.0f} s, about {seconds / done - seconds:.0f} s left")


# ==== Code: the script in the fewest bytes that still run, as what is submitted counts them ===========================

PACKED_NAME = "train_gpt.packed.py"
# With its lines in linecache Triton finds the source of its kernels, and tracebacks show them; those that the
# interpreter prints by itself did not look there before Python 3.13.
UNPACKER = """import base64,linecache,lzma,sys,traceback
PACKED="%s"
UNPACKED=lzma.decompress(base64.b85decode(PACKED)).decode()
linecache.cache[__file__+":unpacked"]=len(UNPACKED),None,UNPACKED.splitlines(True),__file__
if __name__=="__main__":sys.excepthook=lambda*e:traceback.print_exception(*e)
exec(compile(UNPACKED,__file__+":unpacked","exec"))
"""


class Script(NamedTuple):
    """What runs: its text, and the file that counts as its bytes."""

    source: bytes
    counted: bytes


def read_script(cfg: Config, kept: Path | None) -> Script:
    """The script that runs. One that was started packed counts as its file is. Else it is packed, unless `kept`, of the
    run that goes on, is that already: another machine's lzma may give other bytes."""
    file, unpacked = SCRIPT.read_bytes(), globals().get("UNPACKED")  # by UNPACKER
    if unpacked is not None:
        return Script(unpacked.encode(), file)
    if cfg.code_bytes == "raw":
        return Script(file, file)
    if kept and kept.is_file() and unpack_script(kept.read_bytes()) == lean(file.decode()).encode():
        return Script(file, kept.read_bytes())
    return Script(file, pack_script(file))


def pack_script(source: bytes) -> bytes:
    """A script that does the same, in fewer bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]  # for text: no words of 4 bytes
    data = lzma.compress(lean(source.decode()).encode(), check=lzma.CHECK_CRC32, filters=filters)
    return (UNPACKER % base64.b85encode(data).decode()).encode()


def unpack_script(packed: bytes) -> bytes:
    """The source that a packed script runs; empty for any other file, also one that does more than unpack."""
    head, tail = UNPACKER.encode().split(b"%s")
    with contextlib.suppress(ValueError, lzma.LZMAError):
        if packed.startswith(head) and packed.endswith(tail):
            return lzma.decompress(base64.b85decode(packed[len(head) : -len(tail)]))
    return b""


def lean(source: str) -> str:
    """A script without what does not run: comments, empty lines, docstrings but for the head's, which --help shows. A
    level of indentation becomes one space, a docstring 0. It is cut by tokens, so all else stays to the letter."""
    source = source.removeprefix("\ufeff")  # of some editors
    row_starts = list(itertools.accumulate(map(len, io.StringIO(source)), initial=0))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept, done, last_row, level, inside = [], 0, 0, 0, False  # done: up to where; inside: of a statement
    for (kind, text, start, end, _), (after, *_) in itertools.pairwise(tokens):
        if kind in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if kind == tokenize.INDENT else -1
            continue
        row, idle = row_starts[start[0] - 1], kind in (tokenize.COMMENT, tokenize.NL)
        if start[0] > last_row:  # the first token of its row
            kept += [source[done:row], "" if idle else " " * level]
            done = row_starts[start[0]] if idle else row + start[1]
        elif kind == tokenize.COMMENT:
            kept.append(source[done : row + start[1]].rstrip())
            done = row + end[1]
        alone = not inside and after in (tokenize.NEWLINE, tokenize.COMMENT)
        if kind == tokenize.STRING and level and alone and text.lstrip("rRuU")[0] in "'\"":  # no f-string
            kept.append("0")
            done = row_starts[end[0] - 1] + end[1]
        inside = inside if idle else kind != tokenize.NEWLINE
        last_row = end[0]
    return "".join(kept) + source[done:]


# ==== Data: shards of tokens, the bytes that each target stands for, batches ==========================================

BOS_ID = 1  # opens every document
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PUBLISHED_TARGETS = {1024: 62_021_632, 8192: 40_540_160}  # of FineWeb's validation, in whole windows of 2,048


def find_path(name: str) -> Path:
    """`name` here, else above the script, so that a copy in a records folder finds the data."""
    return next((p for p in (Path(name), *(folder / name for folder in SCRIPT.parents)) if p.exists()), Path(name))


def find_data(cfg: Config) -> Path:
    """The folder of shards: the one that DATA_PATH names, else FineWeb's, else that of the embedded corpus. UserError
    where it is not there."""
    if cfg.data_path:
        require(Path(cfg.data_path).is_dir(), f"DATA_PATH={cfg.data_path}: no such folder; unset it, or make it with "
                "data/prepare.py")
        return Path(cfg.data_path)
    for kind in ("fineweb10B", "embedded"):
        folder = find_path(f"data/datasets/{kind}_sp{cfg.vocab_size}")
        if folder.is_dir():
            return folder
    size = cfg.vocab_size
    require(cfg.preset != "frontier", f"DATA_PATH is not set, and data/datasets has no fineweb10B_sp{size}, which "
            f"PRESET=frontier is for; ./run.sh data --variant sp{size} fetches it, where that is published")
    raise UserError(f"DATA_PATH is not set, and data/datasets has neither fineweb10B_sp{size} (./run.sh data --variant "
                    f"sp{size} fetches it, where that is published) nor embedded_sp{size} (python data/prepare.py "
                    f"embedded --vocab-size {size} makes it)")


def find_tokenizer(cfg: Config, folder: Path) -> Path:
    """The tokenizer that TOKENIZER_PATH names, else the one that lies in the `folder` of shards, else FineWeb's."""
    if cfg.tokenizer_path:
        return Path(cfg.tokenizer_path)
    beside = folder / "tokenizer.model"
    return beside if beside.exists() else find_path(f"data/tokenizers/fineweb_{cfg.vocab_size}_bpe.model")


def open_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens (uint16), not to be written to; the file is closed again, as there may be thousands.
    Raises UserError naming the file when it is not a whole shard."""
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        remedy = "mend its permissions or fetch it again"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "allow more with ulimit -n"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if header.size < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: not a token shard, its header does not begin {SHARD_MAGIC}, {SHARD_VERSION}; make "
                        "shards with data/prepare.py")
    count = int(header[2])
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        raise UserError(f"{path}: its header promises {count} tokens in {HEADER_BYTES + 2 * max(count, 0)} bytes, the "
                        f"file has {size}; fetch or make it again")
    words = torch.from_file(os.fsencode(path), shared=False, size=size // 2, dtype=torch.uint16)
    return words.numpy()[HEADER_BYTES // 2 :]


class Tokens:
    """The shards of one split in order of name, read as one long array of tokens.

    Raises UserError for missing or broken shards and for ids at or above `vocab_size`: at once in up to 2^28
    tokens, beyond that in each shard's first million and then as `read` meets them.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.paths, self.vocab_size = sorted(folder.glob(f"fineweb_{split}_*.bin")), vocab_size
        if not self.paths:
            raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; run ./run.sh data, make shards with "
                            "data/prepare.py, or set DATA_PATH")
        self.shards = [open_shard(p) for p in self.paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        at_once = None if len(self) <= 2**28 else 2**20
        highest = max(self._check(index, shard[:at_once]) for index, shard in enumerate(self.shards))
        require(highest >= vocab_size // 2 or len(self) < 2**16, f"DATA_PATH={folder}: its {split} split has no token "
                f"id above {highest}, so no tokenizer of VOCAB_SIZE={vocab_size} has cut it; ./run.sh data --variant "
                f"sp{vocab_size} fetches FineWeb's shards of that size, where they are published")

    def _check(self, index: int, tokens: np.ndarray) -> int:
        """The highest token id."""
        highest = int(tokens.max())
        if highest >= self.vocab_size:
            raise UserError(f"{self.paths[index]}: holds token id {highest}, beyond VOCAB_SIZE={self.vocab_size}; its "
                            f"tokenizer is another, ./run.sh data --variant sp{self.vocab_size} fetches FineWeb's")
        return highest

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens from position `begin`, starting over at the end of the last shard. uint16 [count]"""
        parts, begin = [], begin % len(self)
        while count:
            index = int(np.searchsorted(self.ends, begin, side="right"))
            offset = begin - int(self.ends[index] - len(self.shards[index]))
            part = self.shards[index][offset : offset + count]
            self._check(index, part)
            parts.append(part)
            count, begin = count - len(part), (begin + len(part)) % len(self)
        return np.concatenate(parts)


class Tokenizer:
    """The SentencePiece model, known here only by what each id adds to the byte count.

    `piece_bytes[id]`: UTF-8 length of the piece without its leading word mark, 1 for a byte piece, 0 for control,
    unknown and unused ids; `spaced[id]`: the piece opens a word; `boundary[id]`: control, unknown or unused, after
    which no space is counted. Raises UserError for a file of another kind or size.
    """

    def __init__(self, path: Path, vocab_size: int):
        where = f"TOKENIZER_PATH={path}"
        require(path.is_file(), f"{where}: no such file; run ./run.sh data --variant sp{vocab_size}, or set "
                "TOKENIZER_PATH")
        self.sp = sp = sentencepiece.SentencePieceProcessor()
        size = 0
        with contextlib.suppress(Exception):  # the library raises RuntimeError, TypeError and others on foreign bytes
            sp.LoadFromSerializedProto(path.read_bytes())
            size = sp.vocab_size()
        require(size, f"{where}: not a SentencePiece model; give the .model file of the data")
        require(size == vocab_size,
                f"{where}: it has {size} pieces where VOCAB_SIZE={vocab_size}; set VOCAB_SIZE={size}, or fetch data of "
                f"{vocab_size} pieces with ./run.sh data --variant sp{vocab_size}")
        require(sp.bos_id() == BOS_ID, f"{where}: its BOS id is not {BOS_ID}, as shards need; make data and tokenizer "
                "with data/prepare.py")
        pieces = [sp.id_to_piece(i) for i in range(size)]
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)])
        odd = next((piece for i, piece in enumerate(pieces) if "\u2581" in piece[1:] and not self.boundary[i]), None)
        require(not odd, f"{where}: its piece {odd!r} marks a space past its start, which the canonical byte count "
                "does not know; train a tokenizer with data/prepare.py")
        rare = sp.encode("\u0378 \U0010fffd", out_type=str)  # no tokenizer has pieces for these
        require("<0xE2>" not in rare, f"{where}: it spells a space as the three bytes of \u2581, where the canonical "
                "byte count knows one; train a tokenizer with data/prepare.py")
        self.spaced = np.array([piece.startswith("\u2581") for piece in pieces]) & ~self.boundary
        self.piece_bytes = np.array([len(piece.removeprefix("\u2581").encode()) for piece in pieces])
        self.piece_bytes[[sp.is_byte(i) for i in range(size)]] = 1
        self.piece_bytes[self.boundary] = 0

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Canonical bytes of each target: of token i+1 after token i. int64 [len(tokens) - 1]"""
        previous, target = tokens[:-1], tokens[1:]
        return self.piece_bytes[target] + (self.spaced[target] & ~self.boundary[previous])


class Stream:
    """A stream to score: `tokens` int32 [n+1] on the device, the canonical bytes of its n targets and their sum."""

    def __init__(self, ids: np.ndarray, tokenizer: Tokenizer, device: torch.device, complete: bool = False):
        counted, self.complete = tokenizer.target_bytes(ids), complete
        self.targets, self.bytes = len(counted), int(counted.sum())
        self.tokens, self.target_bytes = (torch.from_numpy(a.astype(np.int32)).to(device) for a in (ids, counted))


def open_stream(tokens: Tokens, tokenizer: Tokenizer, limit: int, device: torch.device) -> Stream:
    """The first `limit` targets of a split, 0 for all. Raises UserError when nothing in it can be scored."""
    complete = limit == 0 or limit >= len(tokens) - 1
    stream = Stream(tokens.read(0, len(tokens) if complete else limit + 1), tokenizer, device, complete)
    if stream.targets < 1 or stream.bytes == 0:
        raise UserError(f"{tokens.paths[0]}: validation needs at least 2 tokens and a byte of text to score, this "
                        f"split has {stream.targets + 1} tokens and {stream.bytes} bytes; give a longer one")
    return stream


class Loader:
    """Training batches, prepared by a background thread and handed out in order.

    The global batches depend on the data alone: sequence g of the run starts at token g * seq_len of the endless
    repetition of the split, so each token is a target once an epoch. A rank takes its contiguous share of a batch.
    """

    def __init__(self, cfg: Config, tokens: Tokens, process: Process, first: int = 0):
        self.tokens, self.process, self.seq_len = tokens, process, cfg.train_seq_len
        self.batch_seqs = cfg.train_batch_tokens // self.seq_len
        self._pool, self._steps = process.thread(), itertools.count(first)
        self._ahead = collections.deque(self._pool.submit(self.batch, next(self._steps)) for _ in range(2))

    def batch(self, step: int) -> Tensor:
        """This rank's tokens of one step: int32 [sequences, seq_len + 1], inputs and targets overlapping."""
        share = self.batch_seqs // self.process.world
        first = step * self.batch_seqs + self.process.rank * share
        rows = [self.tokens.read(g * self.seq_len, self.seq_len + 1) for g in range(first, first + share)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int32))
        return batch.pin_memory() if self.process.cuda else batch

    def next(self) -> Tensor:
        """The next step's tokens of this rank, on the device: int32 [sequences, seq_len + 1]."""
        self._ahead.append(self._pool.submit(self.batch, next(self._steps)))
        return self._ahead.popleft().result().to(self.process.device, non_blocking=True)


# ==== Model: one forward pass for loss and logits =====================================================================


def fuses(x: Tensor) -> bool:
    """Whether what is done to x can be compiled into one kernel, so that a cast or a number made anew costs no pass
    over memory: on a GPU."""
    return x.is_cuda


def inverse_size(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in the type to compute in, and 1 / root mean square of its last dimension [..., 1]."""
    wide = x.float() if fuses(x) else x
    return wide, (wide.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()


def norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """RMSNorm over the last dimension, times `gain`, which has one number a row. https://arxiv.org/abs/1910.07467"""
    wide, scale = inverse_size(x)
    return (wide * (scale * gain).to(wide.dtype)).to(x.dtype)


class StreamNorm(torch.autograd.Function):
    """RMSNorm of the residual stream x, and x for the sum that goes on. Where operations fuse, x is made anew from its
    norm: so it is never written, nor kept for the backward pass, which needs the norm alone. x [..., C]"""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        wide, scale = inverse_size(x)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale)
        return normed, (normed / scale).to(x.dtype) if fuses(x) else x

    @staticmethod
    def backward(ctx, grad_normed: Tensor, grad_x: Tensor) -> Tensor:
        normed, scale = ctx.saved_tensors
        along = (grad_normed * normed).mean(-1, keepdim=True)  # to make x longer leaves its norm as it is
        across = torch.addcmul(grad_normed, normed, along, value=-1)
        return torch.addcmul(grad_x, across, scale.to(across.dtype))


def adapted(y: Tensor, x: Tensor, adapter: tuple[Tensor, Tensor] | None, gain: Tensor | float = 1.0) -> Tensor:
    """What a matrix makes of x [B, T, n_in], y [B, T, n_out], and its `adapter`, if it has one: low-rank factors of
    test-time training, (down [r, n_in], up [B, n_out, r]), where each row of the batch has its own."""
    if adapter is None:
        return y
    down, up = adapter
    return y + F.linear(x, down) @ (up * gain).to(x.dtype).mT


class Linear(nn.Linear):
    """A matrix without bias, kept in fp32 and used in the input's type. `adapter`: what `adapted` adds, set by
    test-time training. `watch`: set by `Calibration`."""

    adapter, watch = None, None

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """The output times `gain`, a number or [n_out, 1], by way of the matrix, which is smaller."""
        return adapted(side_by_side(x, (self,), gain), x, self.adapter, gain)


def side_by_side(x: Tensor, layers: tuple[Linear, ...], gain: Tensor | float = 1.0) -> Tensor:
    """The outputs of layers that see the same input, one after another in the last dimension, by one product: x is read
    once, and its gradient written once."""
    weight = torch.cat([layer.weight for layer in layers])
    y = F.linear(x, (weight * gain).to(x.dtype))
    end = 0
    for layer in layers:
        begin, end = end, end + layer.out_features
        if layer.watch is not None:
            layer.watch(y, x, gain, slice(begin, end))
    return y


class Embedding(nn.Embedding):
    """Rows by id, drawn where they have a place only: to draw on the meta device would import the compiler."""

    adapter = None  # of a tied output layer

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


def rotate(x: Tensor, factors: Tensor, half: int) -> Tensor:
    """Turn the pairs (i, i + half) of each head of x [B, T, H, D] by minus their angle, by the `factors` of `GPT.rope`.
    Whole heads are moved, which a compiler fuses with what is around it; slices it would not."""
    itself, after, before = factors
    y = torch.addcmul(x * itself, x.roll(-half, -1), after)
    return torch.addcmul(y, x.roll(half, -1), before)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, scale 1/sqrt(D). q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]"""
    if flash_attn_func is not None and q.is_cuda and q.dtype == torch.bfloat16:
        result = flash_attn_func(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result  # some builds add the log-sums of the scores
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v)
    if q.dtype == torch.float32:  # a GPU's only fp32 kernel that does not write all scores out takes no grouped keys
        group = q.size(2) // k.size(2)
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as plain products of blocks of queries with all keys that they may see: in bf16 on a CPU twice as fast
    as PyTorch's fused kernel, forward and backward, though scores are rounded. Heads that share keys are rows of one
    product."""
    b, t, h, d = q.shape
    kv_heads = k.size(2)
    group = h // kv_heads
    block = 64 * math.ceil(t / 512)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -t % block)) for x in (q * d**-0.5, k, v))
    padded = q.size(1)
    q = q.view(b, padded, kv_heads, group, d).transpose(1, 2).reshape(b * kv_heads, padded * group, d)
    k = k.permute(0, 2, 3, 1).flatten(0, 1)  # [B H_kv, D, T]
    v = v.transpose(1, 2).flatten(0, 1)  # [B H_kv, T, D]
    # -inf where a query of a block may not see a key; the last columns are those of the block itself
    hidden = torch.arange(block, device=q.device)[:, None] < torch.arange(block - padded, block, device=q.device)
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -math.inf).repeat_interleave(group, 0)
    done = []
    for end, queries in zip(range(block, padded + 1, block), q.split(block * group, dim=1), strict=True):
        scores = torch.baddbmm(bias[:, -end:], queries, k[:, :, :end])
        done.append(scores.softmax(-1) @ v[:, :end])
    result = torch.cat(done, 1).view(b, kv_heads, padded, group, d).transpose(1, 2)
    return result.reshape(b, padded, h, d)[:, :t]


class Attention(nn.Module):
    """Grouped-query attention with normalised q and k, partial RoPE and a learned gain a head. [B, T, C]"""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k, self.v = (Linear(cfg.model_dim, self.kv_heads * self.head_dim) for _ in "kv")
        self.proj = Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.half = (cfg.rope_dims or self.head_dim) // 2
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n

    def forward(self, x: Tensor, factors: Tensor, gain_in: float, gain_out: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], causal; queries and keys are normalised, then turned by RoPE."""
        b, t, c = x.shape
        y = side_by_side(x, (self.q, self.k, self.v), gain_in).view(b, t, -1, self.head_dim)
        q, k, v = y.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = norm(q, self.q_gain[:, None]), norm(k)
        y = attend(rotate(q, factors, self.half), rotate(k, factors, self.half), v)
        if self.exclusive:  # XSA: take out what the token's own value says
            own, y = v[:, :, :, None], y.reshape(b, t, self.kv_heads, -1, self.head_dim)  # [B, T, H_kv, 1, D]
            share = (y * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True).clamp(min=1e-24)
            y = torch.addcmul(y, share, own, value=-1)
        return self.proj(y.reshape(b, t, c), gain_out)  # not every kernel lays its result out as [B, T, H, D]


TILE = 128  # rows and columns of a result that `squared_relu_product` holds at once
if triton is not None:

    @jit
    def squared_relu_product(a_ptr, b_ptr, kept_ptr, out_ptr, n, k, b_step_k, b_step_n, slope: tl.constexpr,
                             backward: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr, depth: tl.constexpr,
                             group: tl.constexpr):
        """y = a b in tiles of [rows, cols], and while a tile is in registers: forward, its squared leaky ReLU, to
        `out`; backward, where y is the gradient of that, the gradient before it. `kept` is what went in, or with
        slope 0, where it is known from the result, that result. a [m, k], `kept` and `out` [m, n] are contiguous, b
        [k, n] has the given steps; bf16, summed in fp32. Tiles divide all sizes."""
        across = n // cols
        down = tl.num_programs(0) // across
        first = tl.program_id(0) // (group * across) * group  # so many rows of tiles share b while it is in the cache
        height = min(down - first, group)
        place = tl.program_id(0) % (group * across)
        in_m = (first + place % height).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
        in_n = place // height * cols + tl.arange(0, cols)[None, :]
        in_k = tl.arange(0, depth)
        a_ptr += in_m * k + in_k[None, :]
        b_ptr += in_k[:, None] * b_step_k + in_n * b_step_n
        y = tl.zeros((rows, cols), tl.float32)
        for _ in range(0, k, depth):
            y = tl.dot(tl.load(a_ptr), tl.load(b_ptr), y)
            a_ptr += depth
            b_ptr += depth * b_step_k
        kept_ptr += in_m * n + in_n
        if backward:
            kept = tl.load(kept_ptr).to(tl.float32)
            if slope == 0:
                y *= 2 * tl.sqrt(kept)
            else:
                y *= 2 * tl.where(kept > 0, kept, slope * slope * kept)
        else:
            if slope != 0:
                tl.store(kept_ptr, y.to(kept_ptr.dtype.element_ty))
            y = tl.where(y > 0, y, slope * y)
            y *= y
        tl.store(out_ptr + in_m * n + in_n, y.to(out_ptr.dtype.element_ty))


def bent_product(a: Tensor, b: Tensor, kept: Tensor | None, slope: float, backward: bool) -> Tensor:
    """`squared_relu_product` of a [m, k] and b [k, n]; `kept` [m, n] is None where the kernel has no use for it."""
    out = a.new_empty(len(a), b.size(1))
    grid = (len(a) // TILE * (b.size(1) // TILE),)
    squared_relu_product[grid](a, b, a if kept is None else kept, out, b.size(1), b.size(0), b.stride(0), b.stride(1),
                               slope, backward, rows=TILE, cols=TILE, depth=64, group=8, num_warps=8, num_stages=3)
    return out


class FusedMLP(torch.autograd.Function):
    """What `MLP` computes, its activation within the products on both sides: what a product gives and the next kernel
    would read again is not written. x [..., C], up [H, C], down [C, H], on a GPU in bf16."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        flat = x.reshape(-1, x.size(-1)).contiguous()
        kept = flat.new_empty(len(flat), len(up)) if slope else None
        bent = bent_product(flat, up.mT, kept, slope, backward=False)
        ctx.save_for_backward(flat, up, down, bent, kept)
        ctx.slope = slope
        return (bent @ down.mT).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        flat, up, down, bent, kept = ctx.saved_tensors
        rows = grad.reshape(flat.shape).contiguous()
        before = bent_product(rows, down, bent if kept is None else kept, ctx.slope, backward=True)
        return (before @ up).view(grad.shape), before.mT @ flat, rows.mT @ bent, None


class MLP(nn.Module):
    """Two matrices around a squared ReLU (https://arxiv.org/abs/2109.08668). [B, T, C]"""

    fused = False  # by `FusedMLP`; set by `compiled`

    def __init__(self, cfg: Config):
        super().__init__()
        self.fc, self.proj = Linear(cfg.model_dim, cfg.mlp_dim), Linear(cfg.mlp_dim, cfg.model_dim)
        self.slope = cfg.mlp_slope

    def forward(self, x: Tensor, gain_in: float, gain_out: Tensor) -> Tensor:
        bare = all(layer.adapter is None and layer.watch is None for layer in (self.fc, self.proj))
        if self.fused and bare and x.numel() % (x.size(-1) * TILE) == 0:
            up, down = (self.fc.weight * gain_in).to(x.dtype), (self.proj.weight * gain_out).to(x.dtype)
            return FusedMLP.apply(x, up, down, self.slope)
        return self.proj(F.leaky_relu(self.fc(x, gain_in), self.slope).square(), gain_out)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream. [B, T, C]"""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.tensor(([1.0] * cfg.model_dim, [0.0] * cfg.model_dim)))
        self.input_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        self.parallel = 0 <= cfg.parallel_residual_start <= layer  # as GPT-J has it: both read what comes in

    def forward(self, x: Tensor, factors: Tensor, gain: Tensor) -> Tensor:
        """The stream after the block, times `gain` [C]."""
        normed, x = StreamNorm.apply(x)
        x = x + self.attn(normed, factors, self.input_scale, self.attn_scale[:, None])
        if not self.parallel:
            normed, x = StreamNorm.apply(x)
        added = self.mlp(normed, self.input_scale, (gain * self.mlp_scale)[:, None])
        return torch.addcmul(added, gain.to(x.dtype), x)


def shift(x: Tensor, keep: Tensor) -> Tensor:
    """Each position's predecessor: x[:, i-1] at i, zero at the start and where `keep` [B, T, 1] is zero."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) * keep


class Smear(torch.autograd.Function):
    """SmearGate: mixes `gate` [C] of each position's predecessor into x [B, T, C]. Backward it moves the gradient and
    not x, so that the predecessors need not be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, keep)
        return torch.lerp(x, shift(x, keep), gate)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate, keep = ctx.saved_tensors
        moved = F.pad((grad * keep)[:, 1:], (0, 0, 0, 1)) - grad
        return torch.addcmul(grad, gate, moved), (x * moved).sum((0, 1)), None


class Bigram(nn.Module):
    """Embedding of the hashed pair (previous token, token); zero when training starts. ids [B, T] -> [B, T, C]"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.buckets = cfg.bigram_vocab_size
        self.embed = Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim) if cfg.bigram_dim != cfg.model_dim else None
        self.scale = nn.Parameter(torch.tensor(0.05))

    def hash(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Bucket of each position, int32; the last bucket is for first positions and where `starts` is true."""
        t, last = ids.to(torch.int32), self.buckets - 1
        pair = torch.bitwise_xor(36313 * t, 27191 * F.pad(t[:, :-1], (1, 0))) % last
        return torch.where(starts | (torch.arange(t.size(1), device=t.device) == 0), last, pair)

    def forward(self, ids: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.embed(self.hash(ids, starts)).to(dtype)
        return x * self.scale.to(dtype) if self.proj is None else self.proj(x, self.scale.view(1, 1))


class Sidecar(nn.Module):
    """One gated causal convolution shared by several layers ("sites"), each with its own gate bias. [B, T, C]"""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = cfg.sparse_hidden_dim
        self.gate, self.value = Linear(cfg.model_dim, hidden), Linear(cfg.model_dim, hidden)
        self.kernel = nn.Parameter(torch.empty(hidden, 3).uniform_(-(3**-0.5), 3**-0.5))
        self.proj = Linear(hidden, cfg.model_dim)
        self.site = nn.Parameter(torch.zeros(len(cfg.sparse_sites), hidden))

    def forward(self, x: Tensor, site: int, keep: Tensor, gain: Tensor) -> Tensor:
        gate, v = side_by_side(x, (self.gate, self.value)).chunk(2, -1)
        gate, w = F.silu(gate + self.site[site].to(x.dtype)), self.kernel.to(x.dtype)
        before = shift(v, keep)
        mixed = torch.addcmul(torch.addcmul(w[:, 2] * v, w[:, 1], before), w[:, 0], shift(before, keep))
        return self.proj(gate * mixed, gain)


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """Logits squashed into +-cap in their own type, as fp32."""
    return (cap * torch.tanh(logits / cap)).float()


class TargetNats(torch.autograd.Function):
    """Cross-entropy of softcapped logits [..., V] with targets [..., 1], in nats [...], all fp32: one pass over the
    logits forward and one backward. The exp of what the softcap bounds, at most 75, cannot overflow: no maximum is
    sought."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        weights = logits.exp()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, targets)
        return (total.log() - logits.gather(-1, targets))[..., 0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        weights, total, targets = ctx.saved_tensors
        hit = torch.zeros_like(weights).scatter_(-1, targets, -1.0)
        excess = hit.addcmul_(weights, 1 / total)  # each token's probability, less 1 at the target
        return excess.mul_(grad[..., None]), None


class GPT(nn.Module):
    """The whole model. Weights are fp32; activations are of type `dtype`."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.order = cfg.layer_order  # the layers that a pass runs; training begins with each once
        self.watch_output = None  # set by `Calibration`, which hooks the other layers
        self.tok_emb = Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = Bigram(cfg) if cfg.bigram_vocab_size else None
        self.smear = nn.Parameter(torch.zeros(cfg.model_dim)) if cfg.smear_gate_enabled else None
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        shape = len(self.order) // 2, cfg.model_dim  # a row for each output that the U-Net hands on
        self.skip_weights = nn.Parameter(torch.ones(shape))
        self.skip_gates = nn.Parameter(torch.zeros(shape)) if cfg.skip_gates_enabled else None
        if cfg.sparse_sites:
            self.sidecar = Sidecar(cfg)
            self.sidecar_scale = nn.Parameter(torch.zeros(len(cfg.sparse_sites), cfg.model_dim))
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size)
        if not self.skip_weights.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """Zero output projections, so that a block starts as the identity; other large matrices orthogonal."""
        if self.cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=self.cfg.tied_embed_init_std)
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.embed.weight)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                if name == "lm_head" or re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.proj", name):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)
                    if name.endswith(".proj"):  # muP-style: outputs into the residual stream shrink with depth
                        module.weight.mul_(1 / math.sqrt(2 * self.cfg.num_layers))

    def role(self, name: str) -> str:
        """How a parameter is trained: matrix (Muon), embed, head or vector (AdamW)."""
        if name in ("tok_emb.weight", "bigram.embed.weight"):
            return "embed"
        if name == "lm_head.weight":
            return "head"
        return "matrix" if name.endswith(".weight") or name == "sidecar.site" else "vector"

    def rope(self, length: int, window: int = 0) -> Tensor:
        """RoPE's factors [3, length, 1, D] of each number of a head, of the one ROPE_DIMS/2 places after it and of the
        one as many before it (https://arxiv.org/abs/2104.09864). Beyond 1024 tokens the base grows with the window
        (NTK-aware scaling), which is `length` unless given."""
        attn, base, device = self.blocks[0].attn, self.cfg.rope_base, self.skip_weights.device
        half, dims, span = attn.half, 2 * attn.half, max(window or length, 1024)
        if dims > 2:
            base *= (span / 1024) ** (dims / (dims - 2))
        speed = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed)
        itself, after, before = factors = torch.zeros(3, length, attn.head_dim, device=device)
        itself[:, :half] = itself[:, half:dims] = angle.cos()
        itself[:, dims:] = 1.0
        after[:, :half] = angle.sin()
        before[:, half:dims] = -angle.sin()
        return factors[:, :, None].to(self.dtype)

    def forward(self, ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None, window: int = 0,
                factors: Tensor | None = None) -> Tensor:
        """ids int [B, T] -> fp32 nats of `targets` [B, S], or without targets fp32 logits [B, S, V].

        `rows` int64 [B, S] picks the positions that go through the output layer; without it all T do. `window`: the
        length that RoPE is scaled for, where ids are of another. `factors`: what `rope` gives for it, where it is kept.
        """
        cfg = self.cfg
        starts = (ids == BOS_ID) & cfg.bos_mask
        keep = (~starts)[:, :, None].to(self.dtype)
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, starts, self.dtype)
        x = norm(x)
        x0 = x if self.smear is None else Smear.apply(x, torch.sigmoid(self.smear.to(x.dtype)), keep)
        factors = self.rope(ids.size(1), window) if factors is None else factors
        # A block begins with x_lambda * x + x0_lambda * x0. The branch that ends the one before gets x_lambda by way of
        # its weights, so that x itself is never written; only what the U-Net hands on has to be.
        ones = torch.ones(cfg.model_dim, device=x.device)
        lambdas = [*(self.blocks[layer].resid_mix for layer in self.order), (ones, None)]
        x = (lambdas[0][0] + lambdas[0][1]).to(x.dtype) * x0
        skips, stack = len(self.order) // 2, []  # U-Net: the first half hands its outputs to the second, last to first
        for place, layer in enumerate(self.order):
            x_lambda, x0_lambda = lambdas[place + 1]
            hands_on, has_site, skip = place < skips, layer in cfg.sparse_sites, place + 1 - skips
            skip_lambda = x_lambda
            if 0 <= skip < skips and self.skip_gates is not None:
                share = torch.sigmoid(self.skip_gates[skip])
                x_lambda, skip_lambda = share * x_lambda, (1 - share) * x_lambda
            last_branch = ones if hands_on else x_lambda
            x = self.blocks[layer](x, factors, ones if has_site else last_branch)
            if has_site:
                site = cfg.sparse_sites.index(layer)
                normed, x = StreamNorm.apply(x)
                added = self.sidecar(normed, site, keep, (last_branch * self.sidecar_scale[site])[:, None])
                x = torch.addcmul(added, last_branch.to(x.dtype), x)
            if hands_on:
                stack.append(x)
                x = x_lambda.to(x.dtype) * x
            if x0_lambda is not None:
                x = torch.addcmul(x, x0_lambda.to(x.dtype), x0)
            if 0 <= skip < skips:
                x = torch.addcmul(x, (skip_lambda * self.skip_weights[skip]).to(x.dtype), stack.pop())
        if rows is not None:
            x = x.gather(1, rows[:, :, None].expand(-1, -1, x.size(-1)))
        x = norm(x)
        head = self.tok_emb if self.lm_head is None else self.lm_head
        logits = adapted(F.linear(x, head.weight.to(x.dtype)), x, head.adapter)
        if self.watch_output is not None:
            self.watch_output(logits, x)
        logits = softcapped(logits, cfg.logit_softcap)
        return logits if targets is None else TargetNats.apply(logits, targets.long()[..., None])


def shapes_of(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, of which none is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}


@functools.cache
def model_size(cfg: Config) -> int:
    """A model's number of parameters."""
    return sum(map(math.prod, shapes_of(cfg).values()))


def activation_bytes(cfg: Config, process: Process) -> int:
    """Estimated bytes of memory that a token takes in training: 12 C + 2 H numbers in each layer that is run, as many
    again where the backward pass is at work, and 8 V bytes for its logits, compiled; else about twice as many."""
    number = process.dtype.itemsize * (1 if compiles(cfg, process) else 2)
    return number * (len(cfg.layer_order) + 1) * (12 * cfg.model_dim + 2 * cfg.mlp_dim) + 8 * cfg.vocab_size


def tokens_per_pass(cfg: Config, process: Process, training: bool) -> int:
    """Tokens that one forward pass of a rank should hold: activations may take two thirds of what torch, the weights
    and the optimizers leave of the device's memory, and evaluation, which keeps none, takes three times as many. On a
    CPU more than a few thousand only leave the caches."""
    left = max(process.memory()[0] - 2**29 - 40 * model_size(cfg), 0)
    room = 2 * left // 3 // activation_bytes(cfg, process) * (1 if training else 3)
    return room if process.cuda else min(room, 4096 if training else 8192)


def micro_batch(cfg: Config, process: Process, share: int) -> int:
    """Sequences of one forward pass, of a rank's `share` of a step, which they divide."""
    most = cfg.micro_batch_seqs or max(tokens_per_pass(cfg, process, True) // cfg.train_seq_len, 1)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


def compiles(cfg: Config, process: Process) -> bool:
    """Whether forward passes are compiled."""
    return process.cuda if cfg.use_compile == "auto" else cfg.use_compile == "1"


@functools.cache
@torch.enable_grad()
def why_not_fused(cfg: Config, process: Process) -> str:
    """Why `FusedMLP` is not used: what it lacks, or how a trial of it on this GPU ended; empty where it is used."""
    if not process.cuda or process.dtype != torch.bfloat16 or torch.cuda.get_device_capability() < (9, 0):
        return "it is for bf16 on a GPU of compute capability 9.0 or more"
    if triton is None or not compiles(cfg, process) or cfg.model_dim % TILE or cfg.mlp_dim % TILE:
        return f"it needs Triton, USE_COMPILE and widths that {TILE} divides"
    generator, rows = torch.Generator(process.device).manual_seed(0), 16 * TILE
    shapes = (rows, cfg.model_dim), (cfg.mlp_dim, cfg.model_dim), (cfg.model_dim, cfg.mlp_dim), (rows, cfg.model_dim)
    drawn = [torch.randn(shape, generator=generator, device=process.device) for shape in shapes]
    *given, gradient = (x.div_(x.size(-1) ** 0.5).bfloat16().requires_grad_() for x in drawn)

    def fused(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return FusedMLP.apply(x, up, down, cfg.mlp_slope)

    def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.leaky_relu(F.linear(x, up), cfg.mlp_slope).square(), down)

    try:
        results = []
        for form in (torch.compile(fused, fullgraph=True, dynamic=False), plain):
            y = form(*given)
            results.append([y.detach(), *torch.autograd.grad(y, given, gradient)])
        apart = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
    except Exception as error:  # Triton's compiler and drivers have many kinds
        return f"a trial of it failed: {type(error).__name__}: {one_line(error)}"
    off = [error for error in apart if not error < 0.02]  # NaN too
    return f"in a trial it was off by {off[0]:.2g}" if off else ""


def compiled(model: GPT, cfg: Config, process: Process):
    """The model's forward pass, compiled without graph breaks where that is wanted."""
    for block in model.blocks:
        block.mlp.fused = not why_not_fused(cfg, process)
    if not compiles(cfg, process):
        return model
    torch._dynamo.config.cache_size_limit = 64  # one entry each for training, scoring, and their last batches
    graph, tables = torch.compile(model, dynamic=False, fullgraph=True), {}

    def forward(ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None, window: int = 0) -> Tensor:
        key = ids.size(1), window
        if key not in tables:  # RoPE's, once for a length and outside the graph, where each layer would make them anew
            tables[key] = model.rope(*key)
        return graph(ids, targets, rows, 0, tables[key])

    return forward


# ==== Optimizers: one flat vector of weights, Muon for matrices, AdamW for the rest, EMA ==============================


def cut(sizes: list[int], runs: int) -> list[int]:
    """Where to cut tensors of these sizes, which lie one after another, into runs as even as can be: the first element
    of each run, and the end of the last. A run takes tensors until it is nearest to its share of what is left."""
    borders, sizes = [0], collections.deque(sizes)
    for left in range(runs, 0, -1):
        share, size = sum(sizes) / left, 0
        while sizes and size + sizes[0] / 2 <= share:
            size += sizes.popleft()
        borders.append(borders[-1] + size)
    return borders


class FlatWeights:
    """All weights as views of one fp32 vector, and all gradients of another.

    `weights` has the matrices first, those of one shape side by side, so that Muon's batch is a view. They are cut into
    a run for each of `ranks`, at `borders`. `buffer` has the gradients: `rows` [ranks, longest run] of the matrices,
    whose padding is always 0, then `rest`, which ends in the loss, so that it travels with them. `spans` lists (role,
    run, shape, first element in `weights`) of each tensor; those that are no matrices are one more run.
    """

    def __init__(self, model: GPT, device: torch.device, ranks: int = 1):
        order = {"matrix": 0, "embed": 1, "head": 2, "vector": 3}  # the smallest last, so that views stay aligned
        named = sorted(model.named_parameters(), key=lambda item: (
            order[model.role(item[0])], -item[1].numel(), tuple(item[1].shape)))
        self.borders = cut([p.numel() for name, p in named if model.role(name) == "matrix"], ranks)
        longest, total = max(b - a for a, b in itertools.pairwise(self.borders)), sum(p.numel() for _, p in named)
        padding = ranks * longest - self.borders[-1]
        self.weights, self.buffer = torch.empty(total, device=device), torch.zeros(total + padding + 1, device=device)
        self.grads, self.loss = self.buffer[:-1], self.buffer[-1]
        self.rows, self.rest = self.buffer[: ranks * longest].view(ranks, longest), self.buffer[ranks * longest :]
        self.spans: list[tuple[str, int, torch.Size, int]] = []
        self.parameters, begin = [p for _, p in named], 0
        for name, p in named:
            run = bisect.bisect_right(self.borders, begin) - 1
            weights = self.weights[begin : begin + p.numel()]
            grads = self.buffer[run * longest + begin - self.borders[run] :][: p.numel()]
            weights.copy_(p.data.flatten())
            p.data, p.grad = weights.view(p.shape), grads.view(p.shape)
            self.spans.append((model.role(name), run, p.shape, begin))
            begin += p.numel()

    def extent(self, role: str) -> slice:
        """Where the weights of a role lie."""
        ends = [(begin, begin + shape.numel()) for r, _, shape, begin in self.spans if r == role]
        return slice(ends[0][0], ends[-1][1]) if ends else slice(0, 0)

    def gather_gradients(self, forward, tokens: Tensor, size: int, total: int):
        """What this rank adds to the gradients and the mean loss of a step of `total` sequences: the part of its own,
        tokens [n, seq_len + 1], taken `size` at a time."""
        if not len(tokens):
            self.buffer.zero_()
            return
        learning = [p for p in self.parameters if p.requires_grad]
        sums = [*(p.grad for p in learning), self.loss]
        for i, part in enumerate(tokens.split(size)):
            loss = forward(part[:, :-1], part[:, 1:]).mean() * (len(part) / total)
            grads = torch.autograd.grad(loss, learning, materialize_grads=True)
            put = torch._foreach_add_ if i else torch._foreach_copy_  # on a GPU a launch or two, not one a tensor
            put(sums, [*grads, loss.detach()])

    def reduce(self, process: Process) -> Tensor:
        """Sum over the ranks what they have gathered, of the matrices this rank's run alone. Returns the global norm of
        the gradients, the same on every rank, without waiting for the device."""
        own = torch.linalg.vector_norm(process.scatter_sum_(self.rows))
        rest = torch.linalg.vector_norm(process.sum_(self.rest)[:-1])
        return (process.sum_(own.square()) + rest.square()).sqrt()


def clip_factor(length: Tensor, limit: float) -> Tensor:
    """What brings gradients of a global norm `length` down to one of `limit`; 0 is off."""
    return ((limit or math.inf) / (length + 1e-6)).clamp(max=1.0)


def nesterov(grad: Tensor, buffer: Tensor, update: Tensor, momentum: Tensor, factor: Tensor):
    """Nesterov's momentum of gradients times `factor`, with its `buffer`, into `update`. All are flat but momentum and
    factor, which are tensors [] so that other values need no other kernel."""
    grad = grad * factor
    buffer.mul_(momentum).add_(grad)
    update.copy_(grad.addcmul_(buffer, momentum))


def descend(weights: Tensor, average: Tensor | None, update: Tensor, rate: Tensor, decay: float, ema: float):
    """Take an update at `rate`, a tensor [], with decoupled weight decay; the average moves to the weights by `ema`."""
    weights.mul_(1 - rate * decay).addcmul_(update, rate, value=-1)
    if average is not None:
        average.lerp_(weights, ema)


def newton_schulz(g: Tensor, steps: int, even_rows: bool = False) -> Tensor:
    """Push the singular values of each matrix of g [n, rows, cols] towards 1 by a quintic iteration; they land
    within about 0.7 to 1.2. (Muon, https://kellerjordan.github.io/posts/muon/) `even_rows`: of g with rows of one
    length. (MuonEq-R, https://arxiv.org/abs/2603.28254)"""
    a, b, c = 3.4445, -4.7750, 2.0315
    if even_rows:
        g = g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-7)
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


class Muon:
    """Nesterov momentum, orthogonalised, for matrices. (https://kellerjordan.github.io/posts/muon/)

    A rank treats the matrices of its run and holds their momentum alone; those of one shape are one batch. `updates`
    [world, longest run] has a row of each rank.
    """

    def __init__(self, cfg: Config, flat: FlatWeights, process: Process):
        self.cfg, self.flat, self.process = cfg, flat, process
        own_kernels = process.cuda and compiles(cfg, process)
        self.nesterov, self.orthogonalise, self.descend = (
            torch.compile(function, dynamic=False) if own_kernels else function
            for function in (nesterov, newton_schulz, descend))
        self.updates = torch.zeros_like(flat.rows, dtype=process.dtype)
        self.batches = []  # (shape, where in this rank's run)
        mine = [(shape, begin - flat.borders[run]) for _, run, shape, begin in flat.spans if run == process.rank]
        for shape, group in itertools.groupby(mine, lambda span: span[0]):
            begins = [begin for _, begin in group]
            self.batches.append((shape, slice(begins[0], begins[-1] + shape.numel())))
        self.reset()

    def reset(self):
        """Fresh state of this rank's run, as before the first step, as long as the longest rank's."""
        self.momentum_buffer = torch.zeros_like(self.flat.rows[0])

    def momentum(self, step: int) -> float:
        """Grows linearly over MUON_MOMENTUM_WARMUP_STEPS."""
        cfg = self.cfg
        warm = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
        return (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum

    def begin(self, step: int, factor: Tensor):
        """Compute this rank's updates of this step, counted from 0, from gradients times `factor`, and begin to gather
        those of the others. Returns what waits for that."""
        cfg, rank = self.cfg, self.process.rank
        momentum, update = self.flat.weights.new_full((), self.momentum(step)), self.updates[rank]
        self.nesterov(self.flat.rows[rank], self.momentum_buffer, update, momentum, factor)
        for shape, part in self.batches:
            batch = update[part].view(-1, *shape)
            turned = self.orthogonalise(batch, cfg.muon_backend_steps, cfg.muon_row_normalize)
            torch.mul(turned, max(1.0, shape[0] / shape[1]) ** 0.5, out=batch)
        return self.process.begin_gather_(self.updates)

    def finish(self, rate: float, average: Tensor | None):
        """Take all updates, run by run, and move the average."""
        cfg, rate = self.cfg, self.flat.weights.new_full((), rate)
        for update, (begin, end) in zip(self.updates, itertools.pairwise(self.flat.borders), strict=True):
            weights, of_run = self.flat.weights[begin:end], None if average is None else average[begin:end]
            self.descend(weights, of_run, update[: end - begin], rate, cfg.muon_wd, 1 - cfg.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """The state, whole on every rank."""
        rows = torch.zeros_like(self.flat.rows)
        rows[self.process.rank] = self.momentum_buffer
        self.process.begin_gather_(rows)()
        runs = zip(rows, itertools.pairwise(self.flat.borders), strict=True)
        return {"momentum": torch.cat([row[: end - begin] for row, (begin, end) in runs])}

    def restore(self, tensors: dict[str, Tensor]):
        """Put back what `tensors` gave, on any number of ranks."""
        rank = self.process.rank
        begin, end = self.flat.borders[rank : rank + 2]
        self.momentum_buffer[: end - begin].copy_(tensors["momentum"][begin:end])


class Optimizers:
    """Muon for matrices and AdamW for the rest, over the flat weights, and the weights' moving average."""

    def __init__(self, cfg: Config, flat: FlatWeights, process: Process):
        self.cfg, self.flat = cfg, flat
        self.muon = Muon(cfg, flat, process)
        self.average = flat.weights.clone() if cfg.ema_enabled else None
        self.reset()

    def reset(self):
        """Fresh state, as before the first step."""
        cfg, flat, groups = self.cfg, self.flat, []
        self.muon.reset()
        embed_lr = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
        embed_wd = cfg.embed_wd if cfg.embed_wd >= 0 else cfg.adam_wd
        for role, lr, decay in (("embed", embed_lr, embed_wd), ("head", cfg.head_lr, 0.0),
                                ("vector", cfg.scalar_lr, cfg.adam_wd)):
            part, before = flat.extent(role), flat.borders[-1]
            weights = nn.Parameter(flat.weights[part])
            if len(weights):
                weights.grad = flat.rest[part.start - before : part.stop - before]
                groups.append({"params": [weights], "lr": lr, "base_lr": lr, "weight_decay": decay})
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, step: int, factor: float) -> Tensor:
        """Update all weights from the gradients that the ranks have gathered, at `factor` times their rates, and their
        average; `step` counts from 0. Returns whether loss and gradients were finite, on the device so that nobody
        waits."""
        cfg, flat, others = self.cfg, self.flat, self.flat.borders[-1]
        length = flat.reduce(self.muon.process)
        clip = clip_factor(length, cfg.grad_clip_norm)
        wait = self.muon.begin(step, clip)
        flat.rest[:-1].mul_(clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adam.step()
        if self.average is not None:
            self.average[others:].lerp_(flat.weights[others:], 1 - cfg.ema_decay)
        wait()
        self.muon.finish(cfg.matrix_lr * factor, self.average)
        return torch.isfinite(length + flat.loss)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, whole on every rank."""
        tensors = {"weights": self.flat.weights} | self.muon.tensors()
        if self.average is not None:
            tensors["average"] = self.average
        for i, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]):
        """Put back what `tensors` gave, on any number of ranks."""
        self.flat.weights.copy_(tensors["weights"])
        if self.average is not None:
            self.average.copy_(tensors.get("average", tensors["weights"]))
        self.muon.restore(tensors)
        state = collections.defaultdict(dict)
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, part = name.split(".")
                state[int(i)][part] = value
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})


# ==== Training: steps, their clock and rates, checkpoints =============================================================


def write_atomically(path: Path, data, size: int = 0):
    """Write a file whole or not at all: bytes, or the `size` bytes that data(file) writes. UserError where it cannot,
    naming the path and the bytes needed."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        size = size or len(data)
        raise UserError(f"{path}: its {size} bytes cannot be written ({error.strerror}); make room") from None


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step_*.npz") if re.fullmatch(r"step_\d+", p.stem, re.A)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def write_checkpoint(folder: Path, keep: int, facts: dict, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint, .npz without pickle, and delete all but the newest `keep`, also what a kill left half
    written. Raises UserError."""
    path = folder / "checkpoints" / f"step_{facts['step']:07d}.npz"
    arrays = {name: t.cpu().numpy() for name, t in tensors.items()}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays), sum(a.nbytes for a in arrays.values()))
    for old in (*checkpoints(folder)[:-keep], *path.parent.glob("*.partial")):
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The facts and tensors of a checkpoint, its weights among them. Raises UserError when it is not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:  # zip: every array is read against its checksum
            if sum(entry.file_size for entry in file.zip.infolist()) > path.stat().st_size:
                raise ValueError("it claims more than it holds")
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        facts = json.loads(bytes(tensors.pop("facts").numpy()))
        check_settings(facts["settings"])
        facts["explicit"] = sorted(STAGES.keys() & facts["explicit"])
        numbers = facts["seconds"], facts["step"], facts["train_tokens"]
        if [type(n) for n in numbers] != [float, int, int] or not 0 <= min(numbers) <= max(numbers) <= 1e15:
            raise ValueError("its step or seconds cannot be")
        return facts, tensors
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # the library raises its own, zipfile's and zlib's errors on foreign bytes
        why = one_line(error).partition(". ")[0] or "empty"
        raise UserError(f"{path}: not a whole checkpoint ({why}); remove it to go by the one before") from None


def check_settings(settings: dict):
    """ValueError, TypeError or KeyError where a file's settings are not what the variables would accept."""
    for field in VARIABLES:
        check_value(field, settings[field.name])


def share_done(cfg: Config, step: int, seconds: float) -> float:
    """The share of training that is done, by the steps or by the wall-clock cap, whichever is further."""
    by_clock = seconds / cfg.training_seconds if cfg.training_seconds else 0.0
    return max(step / cfg.iterations, by_clock)


def rate_factor(cfg: Config, step: int, seconds: float) -> float:
    """Learning rates at a step, as a share of their full values: 1, then a linear warmdown to 0, but not below MIN_LR.

    The end is the step ITERATIONS or the wall-clock cap, whichever comes first: WARMDOWN_ITERS before it at the speed
    measured so far, or the last WARMDOWN_FRAC of training.
    """
    if cfg.warmdown_frac:
        factor = (1 - share_done(cfg, step, seconds)) / cfg.warmdown_frac
    elif cfg.warmdown_iters:
        left = cfg.iterations - step
        if cfg.training_seconds and seconds > 0:
            left = min(left, (cfg.training_seconds - seconds) * step / seconds)
        factor = left / cfg.warmdown_iters
    else:
        factor = 1.0
    return min(max(factor, cfg.min_lr), 1.0)


class Trainer:
    """One rank's training: its share of each batch, the step and the clock."""

    def __init__(self, cfg: Config, process: Process, model: GPT):
        self.cfg, self.process, self.model, self.started = cfg, process, model, 0.0
        self._marks, self.fault = collections.deque(), ""  # steps not waited for; what was not finite, and where
        self.raw_bpb = None  # of the weights that are not averaged, when last validated
        self.told = 0  # 200ths of training that were done at the last line about a step
        self.flat, self.forward = FlatWeights(model, process.device, process.world), compiled(model, cfg, process)
        self.optimizers = Optimizers(cfg, self.flat, process)
        self.share = cfg.train_batch_tokens // cfg.train_seq_len // process.world
        self.micro = micro_batch(cfg, process, self.share)

    def loop(self, share: float) -> bool:
        """Run the model with its loops once this share of training is done. Returns whether that is new."""
        order = self.cfg.layer_order if share >= self.cfg.enable_looping_at else tuple(range(self.cfg.num_layers))
        changed, self.model.order = order != self.model.order, order
        return changed

    def step(self, tokens: Tensor, step: int, factor: float):
        """One update from this rank's tokens [sequences, seq_len + 1]; leaves the mean loss in `flat.loss`. `fault`
        says what was not finite (on a GPU up to the step before, which is known by then)."""
        self.flat.gather_gradients(self.forward, tokens, self.micro, self.share * self.process.world)
        finite = self.optimizers.step(step, factor).to("cpu", non_blocking=True)
        self._marks.append((finite, self.process.mark(), step + 1, factor))
        if not self.process.cuda or len(self._marks) > 1:
            self._settle()

    def _settle(self):
        """Wait for the oldest step not waited for: the clock stays true and the device, one step ahead, never idles."""
        finite, mark, step, factor = self._marks.popleft()
        self.process.reached(mark)
        if not finite and not self.fault:
            self.fault = (f"step {step}: the loss or a gradient is not finite, at rate {factor:.3g} x MATRIX_LR="
                          f"{self.cfg.matrix_lr:g}, SCALAR_LR={self.cfg.scalar_lr:g}")

    def synchronize(self):
        """Wait for all steps so far."""
        self.process.synchronize()
        while self._marks:
            self._settle()

    def warm_up(self):
        """Prime compilation on random tokens at rate 0, which leaves the weights as they are; start the clock."""
        generator = torch.Generator().manual_seed(0)
        for share in (1.0, 0.0) if self.cfg.loops_later else (0.0,):  # each order of the layers
            self.loop(share)
            for _ in range(self.cfg.warmup_steps):
                shape = self.share, self.cfg.train_seq_len + 1
                tokens = torch.randint(self.cfg.vocab_size, shape, generator=generator)
                self.step(tokens.to(self.process.device, torch.int32), 0, 0.0)
        self.synchronize()
        self.optimizers.reset()
        self.started = time.perf_counter()

    def heard(self) -> tuple[float, int]:
        """Training seconds so far and the signal that any rank has caught, the same on every rank."""
        return self.process.heard(time.perf_counter() - self.started)

    @contextlib.contextmanager
    def off_the_clock(self):
        self.synchronize()
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.started += time.perf_counter() - begin

    def tensors(self) -> dict[str, Tensor]:
        """All that the steps to come depend on, whole on every rank."""
        random = {"random": torch.get_rng_state()}
        if self.process.cuda:
            random["random_cuda"] = torch.cuda.get_rng_state()
        return self.optimizers.tensors() | random

    def restore(self, facts: dict, tensors: dict[str, Tensor]):
        """Go on from a checkpoint, with its clock. UserError for one of another model."""
        try:
            self.optimizers.restore(tensors)
            torch.set_rng_state(tensors["random"])
            if self.process.cuda and "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"])
        except (LookupError, RuntimeError, ValueError, TypeError) as error:
            raise SharedError(f"the checkpoint is of another model or device ({error}); start afresh") from None
        self.started = time.perf_counter() - facts["seconds"]

    def save(self, folder: Path, log: Log, facts: dict):
        """Write a checkpoint on rank 0, for which the others wait; that it could not be written is a warning."""
        began, tensors = time.perf_counter(), self.tensors()
        if self.process.main:
            try:
                path = write_checkpoint(folder, self.cfg.keep_ckpts, facts, tensors)
                log(f"checkpoint {path}; training waited {time.perf_counter() - began:.1f} s", console=False)
            except UserError as error:
                log(f"warning: checkpoint {error}; the run goes on")
        self.process.agree(None)

    def check(self, folder: Path):
        """Raises Diverged after a step that was not finite."""
        if self.fault:
            newest = self.process.agree([str(path) for path in checkpoints(folder)][-1:])
            raise Diverged(f"{self.fault}; start another run with lower rates; last good checkpoint: "
                           f"{''.join(newest) or 'none'}")


def train(cfg: Config, process: Process, log: Log, model: GPT, tokens: Tokens, stream: Stream,
          saved: tuple[dict, dict[str, Tensor]] | None, clocks: dict) -> dict:
    """Train `model` in place, from the start or from a checkpoint, and leave the averaged weights in it. The seconds of
    the warm-up are added to `clocks`. Returns the summary's `train` entry.

    Raises Diverged when a loss or gradient is not finite, and Interrupted after a signal, when the state is written.
    """
    if process.cuda:
        torch.cuda.reset_peak_memory_stats()  # what was compiled before has run too
    trainer = Trainer(cfg, process, model)
    log(f"world_size:{process.world} grad_accum_steps:{trainer.share // trainer.micro} "
        f"micro_batch_seqs:{trainer.micro} compute_dtype:{str(process.dtype)[6:]} warmup_steps:{cfg.warmup_steps}")
    if tokens_per_pass(cfg, process, True) < cfg.train_seq_len:
        log(f"warning: {process.memory()[0] / 2**30:.1f} GiB of memory are little for a sequence of this model; if the "
            "run is killed, lower TRAIN_SEQ_LEN or the model's size")
    with timed(clocks, "warm_up"):
        trainer.warm_up()
    log(f"warm-up: {clocks['warm_up']:.1f} s before training's clock")
    first, seconds, caught = 0, 0.0, 0
    if saved:
        trainer.restore(*saved)
        first, seconds = saved[0]["step"], saved[0]["seconds"]
    loader = Loader(cfg, tokens, process, first)
    step, kept = first, seconds
    with process.signals.hold():
        while True:  # what saves, stops and heeds a signal stands before the step
            share, stop = share_done(cfg, step, seconds), ""
            if trainer.loop(share) and step > first:
                log(f"layer_loop:enabled step:{step} frac:{share:.3f} order:{' '.join(map(str, trainer.model.order))}")
            if 0 < cfg.training_seconds <= seconds:
                stop = "wallclock_cap"
            elif step >= cfg.iterations:
                stop = "iterations"
            due = stop or caught or 0 < cfg.ckpt_every_seconds <= seconds - kept
            if due:
                trainer.synchronize()
            trainer.check(log.folder)
            if due and step > first:
                trainer.save(log.folder, log, {"step": step, "seconds": seconds, "train_tokens": len(tokens),
                                               "settings": cfg.settings(), "explicit": sorted(cfg.explicit)})
                kept = seconds
            if caught:
                raise Interrupted(caught)
            if (cfg.val_loss_every and step % cfg.val_loss_every == 0) or (stop and cfg.final_eval_enable):
                caught = validate(trainer, log, stream, step, seconds)
                if caught:
                    continue
            if stop:
                break
            factor = rate_factor(cfg, step, seconds)
            trainer.step(loader.next(), step, factor)
            step, (seconds, caught) = step + 1, trainer.heard()
            report_step(trainer, log, step, step - first, seconds, factor)
    if stop == "wallclock_cap":
        log(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{cfg.iterations}")
    log(f"peak memory allocated: {process.memory()[1] // 2**20} MiB")
    if trainer.optimizers.average is not None:
        trainer.flat.weights.copy_(trainer.optimizers.average)
    return {"steps": step, "tokens": step * cfg.train_batch_tokens, "seconds": seconds,
            "step_ms": 1000 * seconds / max(step, 1), "stop": stop, "raw_bpb": trainer.raw_bpb}


def validate(trainer: Trainer, log: Log, stream: Stream, step: int, seconds: float) -> int:
    """Score the raw weights off the clock. Returns the signal that came meanwhile, which ends it."""
    cfg = trainer.cfg
    with trainer.off_the_clock():
        evaluator = evaluate(cfg, trainer.process, log, trainer.forward, stream, cfg.eval_len, "validation")
        caught = trainer.heard()[1]
        if caught:
            return caught
        raw = evaluator.result()
    log(f"step:{step}/{cfg.iterations} val_loss:{raw.val_loss:.4f} val_bpb:{raw.val_bpb:.4f} "
        f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms")
    log.metric(step=step, val_loss=raw.val_loss, val_bpb=raw.val_bpb, train_seconds=seconds)
    trainer.raw_bpb = raw.val_bpb
    return 0


def report_step(trainer: Trainer, log: Log, step: int, steps: int, seconds: float, factor: float):
    """Log a step: the first 10 of this launch, those due, and the last; also one in each 200th of training, which the
    console does not show. `steps`: of this launch so far."""
    cfg = trainer.cfg
    speed, done = step * cfg.train_batch_tokens / seconds, share_done(cfg, step, seconds)
    every, share = cfg.train_log_every, round(200 * done)
    due = every and (steps <= 10 or step % every == 0 or done >= 1)
    if due or (every and share > trainer.told):
        trainer.told = share
        trainer.process.synchronize()
        loss = trainer.flat.loss.item()
        log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
            f"step_avg:{1000 * seconds / step:.2f}ms", console=due)
        log.metric(step=step, train_loss=loss if math.isfinite(loss) else None, train_seconds=seconds,
                   rate_factor=factor, tokens_per_second=speed)
    log.progress(f"step {step}, {speed:,.0f} tokens/s", done, seconds)


# ==== Export: values rounded where it costs least, coded by their spread, in one file that rebuilds the model =========
#   bytes 0-7    magic "GPT16MB" and format version 3
#   bytes 8-11   length of the compressed header, little-endian
#   then         zstd(header): JSON {"config": {...}, "sides": compressed bytes of the next part, "tensors":
#                [[name, shape, kind, nominal bits, offset], ...]}; offset: a tensor's first value of kinds rows and
#                grid, its first number of kind fp16
#   then         zstd(sides): 16-bit words in the order of `side_parts`, int8 in pairs, the low bytes before the high
#   then         the int8 values of kinds rows and grid, as rANS words
#   last 32      sha256 of everything before

BALANCED_STEP = 0.0025  # of "balanced" at 6 nominal bits for a matrix and 8 for an embedding, which cost alike
ARTIFACT_NAME, ARTIFACT_MAGIC = "final_model.int6.ptz", b"GPT16MB\x03"
FILE_MOST, HEADER_MOST = 1 << 31, 1 << 20  # bytes of a file and of a header
CLASSES, PRECISION = 64, 14  # rANS tables, and the bits of their frequencies
GROUPS = ("bigram", "sidecar", "attn", "mlp", "embed")  # what has nominal bits of its own: QUANT_BITS_<group>
FILLED, AIM, LATE_AIM = 0.995, 0.998, 0.5  # of the room: near enough; what the next attempt aims at; where it is late
MOST_ATTEMPTS = 12  # of a search, but for two that end it where nothing fits
BYTES_A_BIT = {"balanced": 0.65 / 8, "rowmax": 1 / 8}  # a value's, of trained models: a first guess


@dataclass
class Stored:
    """A tensor as the file holds it: numbers (fp16) or int8 values with their steps: an fp16 a row (rows), or 2**(k/8)
    of an int8 k a row and a column (grid). `nominal`: the bits that set the steps, not what the coder makes of them."""

    kind: str
    nominal: float
    values: np.ndarray
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None

    @property
    def coded(self) -> bool:
        return self.rows is not None

    def tensor(self) -> Tensor:
        """The fp32 values that the model computes with."""
        values = self.values.astype(np.float32)
        if self.kind == "grid":  # exact everywhere: a rounded root and a shift of the exponent
            roots = np.array([2 ** (i / 8) for i in range(8)], np.float32)
            for steps, shape in ((self.rows, (-1, 1)), (self.cols, (1, -1))):
                values *= np.ldexp(roots[steps & 7], steps >> 3).reshape(shape)
        elif self.kind == "rows":
            values *= self.rows.astype(np.float32)[:, None]
        return torch.from_numpy(values)


def spreads(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log spreads of rows and columns of int8 values, in quarter octaves: their sum says how far a value tends to be
    from 0, and so which table codes it. int8 [rows], [cols]"""
    squares = np.square(values, dtype=np.float32)
    rows, cols = np.ones(len(values), np.float32), np.ones(values.shape[1], np.float32)
    for _ in range(3):
        rows = (squares @ (1 / cols)) / len(cols) + np.float32(0.02)
        cols = (1 / rows) @ squares / len(rows) + np.float32(0.02)
    return tuple(np.rint(2 * np.log2(s.astype(np.float64))).astype(np.int8) for s in (rows, cols))


def classes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The table of each value, from the log spreads. uint8 [rows * cols]"""
    return np.clip(rows.astype(np.int16)[:, None] + cols + 16, 0, CLASSES - 1).astype(np.uint8).ravel()


def count(values: np.ndarray, table_of: np.ndarray) -> np.ndarray:
    """How often each int8 value occurs under each table. int64 [CLASSES, 256]"""
    index = table_of.astype(np.int32) * 256 + (values.ravel().astype(np.int32) + 128)
    return np.bincount(index, minlength=CLASSES * 256).reshape(CLASSES, 256)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [CLASSES, 256] as uint16 frequencies: 2**PRECISION in sum a table, at least 1 where any are."""
    result = np.zeros(counts.shape, np.int64)
    for row, seen in zip(result, counts, strict=True):
        if total := seen.sum():
            row[:] = np.where(seen, np.maximum((seen << PRECISION) // total, 1), 0)
            row[seen.argmax()] += (1 << PRECISION) - row.sum()  # never below 1: at most 255 others were raised to 1
    return result.astype(np.uint16)


def rans_lanes(n: int) -> int:
    """How many states code n values side by side."""
    return max(min(n, max(n // 4096, 32)), 1)


def rans_encode(symbols: np.ndarray, table_of: np.ndarray, tables: np.ndarray) -> bytes:
    """uint8 symbols, each under its table of `tables` [CLASSES, 256], as uint16 words. Many interleaved states, one a
    lane, make each step a numpy operation. (ANS, https://arxiv.org/abs/1311.2540)"""
    n, lanes = len(symbols), rans_lanes(len(symbols))
    share, start = tables.astype(np.uint64).ravel(), (np.cumsum(tables, 1) - tables).astype(np.uint64).ravel()
    shift, half = np.uint64(PRECISION), np.uint64(16)
    states, words = np.full(lanes, 1 << 16, np.uint64), []
    for begin in range((n - 1) // lanes * lanes, -1, -lanes):  # last symbol first: what comes out is read backwards
        part = slice(begin, min(begin + lanes, n))
        index = table_of[part].astype(np.int32) * 256 + symbols[part]
        f, x = share[index], states[: part.stop - begin]
        full = x >= f << np.uint64(32 - PRECISION)
        words.append(x[full].astype("<u2"))
        x[full] >>= half
        quotient, rest = np.divmod(x, f)
        x[:] = (quotient << shift) + rest + start[index]
    words += [(states >> half).astype("<u2"), states.astype("<u2")]
    return np.concatenate(words[::-1]).tobytes()


def rans_decode(data: bytes, table_of: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The symbols of `rans_encode`, uint8 [len(table_of)]. Raises ValueError for data that it cannot have written."""
    n, lanes, mask = len(table_of), rans_lanes(len(table_of)), np.uint32((1 << PRECISION) - 1)
    words, sums = np.frombuffer(data, "<u2"), tables.astype(np.int64).sum(1)
    used = np.bincount(table_of, minlength=CLASSES) > 0
    if not np.isin(sums, (0, 1 << PRECISION)).all() or not sums[used].all() or len(words) < 2 * lanes:
        raise ValueError("tables that do not code the values")
    share, start = tables.astype(np.uint32).ravel(), (np.cumsum(tables, 1) - tables).astype(np.uint32).ravel()
    lookup = np.zeros((CLASSES, 1 << PRECISION), np.uint8)
    lookup[sums > 0] = [np.repeat(np.arange(256, dtype=np.uint8), row) for row in tables[sums > 0]]
    lookup, at, symbols = lookup.ravel(), 2 * lanes, np.empty(n, np.uint8)
    states = words[:lanes].astype(np.uint32) | words[lanes:at].astype(np.uint32) << np.uint32(16)
    for begin in range(0, n, lanes):
        table = table_of[begin : begin + lanes].astype(np.int32)
        x = states[: len(table)]
        slot = x & mask
        symbols[begin : begin + lanes] = symbol = lookup[(table << PRECISION) + slot]
        index = (table << 8) + symbol
        x[:] = share[index] * (x >> np.uint32(PRECISION)) + slot - start[index]
        low = np.flatnonzero(x < 1 << 16)
        if at + len(low) > len(words):
            raise ValueError("values that end early")
        x[low] = x[low] << np.uint32(16) | words[at : at + len(low)]
        at += len(low)
    if at != len(words) or (states != 1 << 16).any():
        raise ValueError("values that do not end where they should")
    return symbols


def side_parts(tensors: list) -> list[tuple[tuple[str, str], int]]:
    """What the sides hold, in order, each ((tensor, part), words): all numbers, the steps of rows and then of columns
    (fp16 or int8), the int8 log spreads of rows and columns, and the frequencies of the values. So a matrix m of kind
    grid and a vector v give (v, values), (m, rows), (m, cols), (m, spread0), (m, spread1), ("", tables)."""
    parts, coded = [], []
    for name, shape, kind, *_ in tensors:
        if kind in ("rows", "grid"):
            coded.append((name, shape, kind))
        else:
            parts.append(((name, "values"), math.prod(shape)))
    pairs = [[math.ceil(n / 2) for n in shape] for _, shape, _ in coded]  # words of an int8 a row, a column
    for (name, shape, kind), (rows, _) in zip(coded, pairs, strict=True):
        parts.append(((name, "rows"), rows if kind == "grid" else shape[0]))
    for (name, _, kind), (_, cols) in zip(coded, pairs, strict=True):
        if kind == "grid":
            parts.append(((name, "cols"), cols))
    for axis in (0, 1):
        parts += [((name, f"spread{axis}"), words[axis]) for (name, *_), words in zip(coded, pairs, strict=True)]
    if coded:
        parts.append((("", "tables"), CLASSES * 256))
    return parts


@dataclass
class Layout:
    """A file of these tensors but for its coded values."""

    size: int  # bytes of the whole file, to about 0.1%, by the counts of its values
    head: bytes  # what comes before the values
    tables: np.ndarray  # [CLASSES, 256]
    table_of: list[np.ndarray]  # which of these each value takes, a coded tensor after another


def lay_out(cfg: Config, stored: dict[str, Stored]) -> Layout:
    """What a file of these tensors holds before their values, and how long it will be."""
    table, ends = [], {True: 0, False: 0}
    for name, s in stored.items():
        table.append([name, list(s.values.shape), s.kind, round(s.nominal, 3), ends[s.coded]])
        ends[s.coded] += s.values.size
    spread = {name: spreads(s.values) for name, s in stored.items() if s.coded}
    table_of = {name: classes(*pair) for name, pair in spread.items()}
    counts = sum((count(stored[name].values, tables) for name, tables in table_of.items()),
                 np.zeros((CLASSES, 256), np.int64))
    tables, words = frequencies(counts), []
    for (name, what), _ in side_parts(table):
        if what == "tables":
            part = tables
        elif what.startswith("spread"):
            part = spread[name][int(what[-1])]
        else:
            part = getattr(stored[name], what)
        part = np.ascontiguousarray(part).ravel()
        if part.dtype == np.int8:
            part = np.pad(part, (0, len(part) % 2))
        words.append(part.view("<u2"))
    by_bytes = np.concatenate(words).view(np.uint8).reshape(-1, 2).T.tobytes()
    sides = zstandard.compress(by_bytes, 22)
    header = {"config": {f.name: getattr(cfg, f.name) for f in MODEL_FIELDS}, "sides": len(sides), "tensors": table}
    header = zstandard.compress(json.dumps(header, separators=(",", ":")).encode(), 22)
    head = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + sides
    lanes = rans_lanes(counts.sum()) if spread else 0
    values = (counts * (PRECISION - np.log2(np.maximum(tables, 1)))).sum() / 8
    values = 4 * lanes + max(values - lanes, 0)  # a lane ends in 4 bytes, which hold one of its values' on the average
    return Layout(len(head) + int(values) + 32, head, tables, list(table_of.values()))


def pack(cfg: Config, stored: dict[str, Stored]) -> bytes:
    """A file's bytes from the model's settings and its tensors; the same give the same."""
    layout = lay_out(cfg, stored)
    blob = layout.head
    symbols = [s.values.ravel().view(np.uint8) ^ 128 for s in stored.values() if s.coded]  # as value + 128
    if symbols:
        blob += rans_encode(np.concatenate(symbols), np.concatenate(layout.table_of), layout.tables)
    return blob + hashlib.sha256(blob).digest()


def coded_bits(blob: bytes) -> float:
    """Bits that a value of kinds rows and grid takes in the file, on the average; 0 without any."""
    header, cut = read_header(blob)
    values = sum(math.prod(shape) for _, shape, kind, *_ in header["tensors"] if kind != "fp16")
    return 8 * (len(blob) - 32 - cut - header["sides"]) / max(values, 1)


def decompress(data: bytes, most: int, exact: bool = True) -> bytes:
    """One zstd frame of `most` bytes, or up to that, checked before any is allocated. Raises ValueError, ZstdError."""
    size = zstandard.frame_content_size(data)
    if not 0 <= size <= most or (exact and size != most):
        raise ValueError(f"a frame of {size} bytes for {most}")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=max(size, 1), allow_extra_data=False)


def read_header(blob: bytes) -> tuple[dict, int]:
    """A file's header as it is, and where it ends. Raises what a forged one can cause."""
    end = 12 + struct.unpack("<I", blob[8:12])[0]
    return json.loads(decompress(blob[12:end], HEADER_MOST, exact=False)), end


def check_header(header: dict, size: int) -> dict:
    """A header's configuration, checked like environment variables, and its tensors against it. Raises ValueError and
    what else a forged header can cause. `size`: the file's; beyond 64 M elements each must take a bit of it."""
    config = {f.name: check_value(f, header["config"].get(f.name, f.default)) for f in MODEL_FIELDS}
    cfg = Config(train_enabled=False, model_path="-", ttt_enabled=False, final_sliding_eval_enable=False, **config)
    if lines := conflicts(cfg, 1):
        raise ValueError(lines[0])
    wanted, ends = shapes_of(cfg), {True: 0, False: 0}
    for name, shape, kind, nominal, offset in header["tensors"]:
        if wanted.pop(name, None) != tuple(shape):
            raise ValueError(f"{name} {shape} is not of the model that its header describes")
        coded = kind in ("rows", "grid")
        if not (coded and len(shape) == 2 or kind == "fp16") or offset != ends[coded] or not 0 <= nominal <= 32:
            raise ValueError(f"{name} of kind {kind} at {offset} with {nominal} bits")
        ends[coded] += math.prod(shape)
    if wanted or sum(ends.values()) > 8 * size + (1 << 26):
        raise ValueError(f"{sum(ends.values())} elements in {size} bytes, {len(wanted)} tensors missing")
    return config


def read_tensors(table: list, sides: bytes, values: bytes) -> dict[str, Stored]:
    """The tensors of a checked header. Raises ValueError or ZstdError where the parts have other sizes than it says."""
    layout = side_parts(table)
    sizes = [words for _, words in layout]
    low_and_high = np.frombuffer(decompress(sides, 2 * sum(sizes)), np.uint8).reshape(2, -1)
    words = low_and_high.T.copy().view("<u2").ravel()
    parts = dict(zip((key for key, _ in layout), np.split(words, np.cumsum(sizes)[:-1]), strict=True))
    coded, decoded = [entry for entry in table if entry[2] in ("rows", "grid")], np.empty(0, np.int8)
    if coded:
        table_of = [classes(*(parts[name, f"spread{i}"].view(np.int8)[: shape[i]] for i in (0, 1)))
                    for name, shape, *_ in coded]
        tables = parts["", "tables"].reshape(CLASSES, 256)
        decoded = (rans_decode(values, np.concatenate(table_of), tables) ^ 128).view(np.int8)
    elif values:
        raise ValueError("values that no tensor has")
    tensors = {}
    for name, shape, kind, nominal, offset in table:
        numbers, rows, cols = decoded[offset : offset + math.prod(shape)], None, None
        if kind == "fp16":
            numbers = parts[name, "values"].view("<f2")
        elif kind == "rows":
            rows = parts[name, "rows"].view("<f2")
        else:
            rows, cols = (parts[name, axis].view(np.int8)[:n] for axis, n in zip(("rows", "cols"), shape, strict=True))
        if kind != "grid" and not np.isfinite(numbers if rows is None else rows).all():
            raise ValueError(f"{name}: numbers that are not finite")
        tensors[name] = Stored(kind, float(nominal), numbers.reshape(shape), rows, cols)
    return tensors


def read_file(path: str, variable: str = "") -> bytes:
    """The bytes of an artifact. Raises UserError for what is no file, cannot be read, or larger than any artifact."""
    file, problem = Path(path), "no file that could be an artifact"
    try:
        if file.is_file() and file.stat().st_size <= FILE_MOST:
            return file.read_bytes()
    except OSError as error:
        problem = error.strerror
    raise UserError(f"{variable}{path[:300]!r}: {problem}; give the {ARTIFACT_NAME} of a run")


def unpack(blob: bytes, source: str) -> tuple[dict, dict[str, Stored]]:
    """A file's header, with the model's settings in "config", and its tensors.

    Raises UserError, naming `source`, for all but a whole, consistent file.
    """
    magic, source = ARTIFACT_MAGIC, one_line(source)
    require(len(blob) >= 44 and blob[:7] == magic[:7], f"{source}: not an artifact of this script; give the "
            f"{ARTIFACT_NAME} of a run")
    require(blob[7] == magic[7], f"{source}: of format {blob[7]}, this script reads {magic[7]}; use its own script")
    require(hashlib.sha256(blob[:-32]).digest() == blob[-32:], f"{source}: damaged, its checksum does not match; copy "
            "or export it again")
    try:
        header, cut = read_header(blob)
        header["config"] = check_header(header, len(blob))
        end = cut + header["sides"]
        return header, read_tensors(header["tensors"], blob[cut:end], blob[end:-32])
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
            zstandard.ZstdError) as error:  # whatever a forged header can cause
        problem = f"its parts do not agree ({type(error).__name__}: {error})"[:400]
        raise UserError(one_line(f"{source}: {problem}; export it again, or use its own script")) from None


def is_quantised(name: str, shape, min_numel: int) -> bool:
    """Whether a tensor becomes int8 values: large matrices, embeddings and heads; all else stays fp16."""
    return name.endswith(".weight") and math.prod(shape) > min_numel


def group_of(name: str) -> str:
    """The tensor's group, one of GROUPS."""
    return next((g for g in GROUPS if name.startswith(g) or f".{g}." in name), "embed")


def feedback_factors(h: Tensor) -> tuple[Tensor, Tensor]:
    """For each H of h fp32 [n, cols, cols] the upper Cholesky factor of its inverse, and the order of columns, those
    that matter most first, in which the factor's rows and columns are. fp32 [n, cols, cols], int64 [n, cols]"""
    damping = 0.01 * h.diagonal(dim1=1, dim2=2).contiguous().mean(1).double() + 1e-12
    h, one = h.double(), torch.arange(len(h), device=h.device)[:, None, None]
    h.diagonal(dim1=1, dim2=2).add_(damping.float()[:, None])
    order = torch.argsort(h.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[one, order[:, :, None], order[:, None, :]]))
    return torch.linalg.cholesky(inverse, upper=True).float(), order


@dataclass
class Sensitivity:
    """What rounding a matrix costs, from training text: H = E[x x'] of its inputs and G = E[(dL/dy)^2] of its outputs.
    `factor` and `order` are those of `feedback_factors`: an error of e at column j costs e^2 / factor[j, j]^2 once the
    columns after it have made up for what they can. `weight`: G [rows]. Of n matrices of one shape, [n, ...] each."""

    factor: Tensor
    order: Tensor
    weight: Tensor

    @classmethod
    def stack(cls, alone: list) -> "Sensitivity":
        """Those of single matrices, all of one shape, as one."""
        return cls(*(torch.stack([getattr(s, part) for s in alone]) for part in ("factor", "order", "weight")))

    def feed_back(self, u: Tensor, cols: Tensor, low: int, high: int) -> Tensor:
        """Round each matrix of u [n, rows, cols] to integers column by column; the columns not yet rounded take up each
        one's error. `cols` [n, cols]: steps by which the columns were divided. (GPTQ, https://arxiv.org/abs/2210.17323)
        A block of columns lies transposed, so that each of all n is one operation: their number is the time on a GPU.
        On a CPU each matrix comes out as it would alone, to the last bit."""
        factor = self.factor / cols.gather(1, self.order)[:, None]  # as of the divided columns. [n, cols, cols]
        order = self.order[:, None].expand_as(u)
        u, values = u.gather(2, order), torch.empty_like(u)
        for begin in range(0, u.size(2), 128):
            end = min(begin + 128, u.size(2))
            block, share = u[:, :, begin:end].mT.contiguous(), factor[:, begin:end, begin:end].contiguous()
            rounded, errors = torch.empty_like(block), torch.empty_like(block)
            for j in range(end - begin):
                torch.round(block[:, j], out=rounded[:, j]).clamp_(low, high)
                torch.sub(block[:, j], rounded[:, j], out=errors[:, j]).div_(share[:, j, j, None])
                block[:, j + 1 :].sub_(share[:, j, j + 1 :, None] * errors[:, j, None])  # fused, it would round once
            values[:, :, begin:end] = rounded.mT
            for rest, error, part in zip(u[:, :, end:], errors.mT, factor[:, begin:end, end:], strict=True):
                rest -= error @ part  # views of one matrix: [rows, later], [rows, block], [block, later]
        return torch.empty_like(values).scatter_(2, order, values)


def balanced(w: Tensor, nominal: float, embedding: bool, cost: Sensitivity) -> list[Stored]:
    """Round matrices of one shape, [n, rows, cols], so that the expected rise of the loss, G e^2 / 2 by `cost`, is the
    same for every value of the model: coarse where a row or column matters little, which the coder then turns into
    bytes. One nominal bit more halves every step; rows end at 255 values, which a byte holds.
    (A uniform step and an entropy coder are near the best: Gish and Pierce 1968; reverse water-filling.)
    """
    weight, important = cost.weight, cost.factor.diagonal(dim1=1, dim2=2)
    weight = weight.clamp(min=1e-3 * weight.mean(1, keepdim=True) + 1e-20)
    wish = BALANCED_STEP * 2 ** (2 * embedding - nominal) / weight.sqrt()
    cols = torch.empty_like(w[:, 0]).scatter_(1, cost.order, important)
    cols = torch.maximum(cols, (w / wish[:, :, None]).square().mean(1).sqrt() * 4 / 127)  # 127 reach 4 deviations
    cols = (8 * cols.log2()).round().clamp(-128, 127)
    most = (w / 2 ** (cols / 8)[:, None]).abs().amax(2) / 127 + 1e-30
    rows = (8 * torch.maximum(wish, most).log2()).ceil().clamp(-128, 127)
    u = w / 2 ** (rows / 8)[:, :, None] / 2 ** (cols / 8)[:, None]
    values = cost.feed_back(u, 2 ** (cols / 8), -127, 127)
    parts = (t.to(torch.int8).cpu().numpy() for t in (values, rows, cols))
    return [Stored("grid", nominal, *matrix) for matrix in zip(*parts, strict=True)]


def rowmax(w: Tensor, nominal: float, embedding: bool) -> list[Stored]:
    """Round matrices of one shape, [n, rows, cols], by the published rule: 2**nominal values between a row's largest
    and its negative. It has a floor that gives every row of weights below 1 the same coarse step."""
    top = 2 ** (nominal - 1) - 1
    low, high = max(-math.ceil(2 ** (nominal - 1)), -127), math.ceil(2 ** (nominal - 1)) - 1
    most = w.abs().amax(2)
    if embedding:  # in pieces, since torch.quantile takes at most 16 M values
        most = torch.cat([p.abs().quantile(0.9999984, dim=1) for p in w.flatten(0, 1).split(1024)]).view_as(most)
    steps = (most.clamp(min=1.0) / top).clamp(max=65504).half()  # for fp16
    values = (w / steps.float()[:, :, None]).round().clamp(low, high).to(torch.int8)
    return [Stored("rows", nominal, *matrix)
            for matrix in zip(values.cpu().numpy(), steps.cpu().numpy(), strict=True)]


class Calibration:
    """Sums over training text that tell what rounding each matrix of `model` costs.

    Embeddings look rows up, so their H only tells how the gradient is spread over the columns; a tied one is seen as
    the output layer. Layers that see the same input, as q, k and v do, share its H.
    """

    def __init__(self, model: GPT, fisher: str):
        self.model, self.expected, self.tokens = model, fisher == "expected", 0
        self.inputs: dict[str, Tensor] = {}  # sum of x x', by the first layer that saw this input
        self.seen: dict[str, float] = {}  # what it is divided by
        self.outputs: dict[str, Tensor] = {}  # sum of (dL/dy)^2 a row, by layer
        self.source: dict[str, str] = {}  # whose H is a layer's
        self._latest = "", None  # the layer that last saw a new input, and this

    def hooks(self) -> list:
        """Listen to all layers."""
        handles, tied = [], self.model.cfg.tie_embeddings
        for path, module in self.model.named_modules():
            name = f"{path}.weight"
            if isinstance(module, Linear):
                module.watch = functools.partial(self.product, name)
            elif isinstance(module, nn.Embedding) and not (tied and path == "tok_emb"):
                handles.append(module.register_forward_hook(
                    lambda module, given, y, name=name: self.look_up(name, len(module.weight), *given, y)))
        head = "tok_emb.weight" if tied else "lm_head.weight"
        self.model.watch_output = functools.partial(self.predictions if self.expected else self.product, head)
        return handles

    def see(self, name: str, x: Tensor):
        """x [B, T, cols] goes into the matrix of this name, after others that may have seen it already."""
        if x is not self._latest[1]:
            self._latest = name, x
            flat = x.detach().flatten(0, 1).float()
            self.inputs[name] = self.inputs.get(name, 0.0) + flat.T @ flat
            self.seen[name] = self.seen.get(name, 1e-30) + len(flat)
        self.source[name] = self._latest[0]

    def product(self, name: str, y: Tensor, x: Tensor, gain: Tensor | float = 1.0, part: slice = slice(None)):
        """y [B, T, rows], in this part of it, = x [B, T, cols] times the matrix of this name, its rows times `gain`."""
        self.see(name, x)
        scale = gain.detach()[:, 0] ** 2 if isinstance(gain, Tensor) else gain**2  # from y back to the bare product

        def gradient(g: Tensor):
            squares = g[..., part].flatten(0, 1).float().square().sum(0)
            self.outputs[name] = self.outputs.get(name, 0.0) + squares * scale

        y.register_hook(gradient)

    def predictions(self, name: str, y: Tensor, x: Tensor):
        """y [B, T, V], before the softcap, = x [B, T, cols] times the output matrix. Its squared gradients are expected
        over all targets, each as probable as predicted: p (1 - p), times the softcap's slope squared. Targets at hand
        tell less: of most tokens there are none. (The true Fisher information, https://arxiv.org/abs/1905.12558)"""
        self.see(name, x)
        cap = self.model.cfg.logit_softcap
        for part in y.detach().flatten(0, 1).split(1024):
            capped = softcapped(part, cap)
            p, slope = capped.softmax(-1), 1 - (capped / cap).square()
            self.outputs[name] = self.outputs.get(name, 0.0) + (p * (1 - p) * slope.square()).sum(0)

    def look_up(self, name: str, rows: int, ids: Tensor, y: Tensor):
        """y [B, T, cols] = the rows `ids` [B, T] of the embedding of this name."""
        self.source[name] = name

        def gradient(g: Tensor):
            squares = g.flatten(0, 1).float().square()
            by_row = squares.new_zeros(rows).index_add_(0, ids.flatten(), squares.mean(1))
            self.inputs[name] = self.inputs.get(name, 0.0) + squares.sum(0).diag()
            self.seen[name] = self.seen.get(name, 1e-30) + squares.sum(0).mean()
            self.outputs[name] = self.outputs.get(name, 0.0) + by_row

        y.register_hook(gradient)

    def run(self, sequences: Tensor, size: int, may_go_on) -> int:
        """Go through sequences [n, T + 1], `size` at a time, while may_go_on(). Returns how many were taken."""
        handles, used = self.hooks(), 0
        for part in sequences.split(size):
            self.model(part[:, :-1], part[:, 1:]).sum().backward()
            used += len(part)
            if part.is_cuda:
                torch.cuda.synchronize()  # else the guard would see the host's time alone
            if not may_go_on():
                break
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.watch = None
        self.model.watch_output = None
        for handle in handles:
            handle.remove()
        self.model.zero_grad(set_to_none=True)
        self.tokens += used * (sequences.size(1) - 1)
        return used

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Of each matrix. Raises UserError where the model's gradients are not finite."""
        sums = [t.sum() for t in (*self.inputs.values(), *self.outputs.values())]
        require(torch.stack(sums).isfinite().all(), "export: gradients on training text are not finite; lower the "
                "rates, or see what is left with QUANT=rowmax")
        factors = {}
        for width in {len(h) for h in self.inputs.values()}:  # a stack for each
            names = [name for name, h in self.inputs.items() if len(h) == width]
            found = feedback_factors(torch.stack([self.inputs[name] / self.seen[name] for name in names]))
            factors |= zip(names, zip(*found, strict=True), strict=True)
        return {name: Sensitivity(*factors[self.source[name]], g / self.tokens) for name, g in self.outputs.items()}


class Exporter:
    """Rounds a trained model so that its file keeps the limit: at the nominal bits asked for where that fits
    (EXPORT_FILL=0), else with one common term to all of them. Runs on one rank.

    `room`: bytes that the file may take; `sequences` [n, T + 1]: training text, on which this calibrates, `size` of
    them at a time; `seconds`: the guard, 0 for none. A search rounds, counts bytes, and in the end codes once.
    """

    def __init__(self, cfg: Config, log: Log, model: GPT, sequences: Tensor, size: int, room: int, seconds: float):
        self.cfg, self.log, self.room, self.guard, self.began = cfg, log, room, seconds, time.perf_counter()
        self.report = {"rule": cfg.quant}
        self.weights = {name: p.detach().float() for name, p in model.named_parameters()}
        alike = collections.defaultdict(list)  # names by group and shape
        for name, w in self.weights.items():
            if is_quantised(name, w.shape, cfg.quant_min_numel):
                alike[group_of(name), w.shape].append(name)
        found = self.calibrate(model, sequences, size) if cfg.quant == "balanced" and alike else {}
        self.stacks = []  # (group, names, weights [n, rows, cols], their sensitivity)
        for (group, _), names in alike.items():
            cost = Sensitivity.stack([found[name] for name in names]) if found else None
            self.stacks.append((group, names, torch.stack([self.weights[name] for name in names]), cost))
        self.low, self.high = NOMINAL_BITS[cfg.quant]
        self.asked = {group: getattr(cfg, f"quant_bits_{group}") for group in sorted({group for group, _ in alike})}

    def calibrate(self, model: GPT, sequences: Tensor, size: int) -> dict[str, Sensitivity]:
        """What rounding each matrix costs, found in half of the guard's time."""
        calibration = Calibration(model, self.cfg.quant_fisher)
        used = calibration.run(sequences, size, lambda: self.in_time(0.5))
        self.report["tokens"] = calibration.tokens
        if used < len(sequences):
            self.log(f"export: EXPORT_MAX_SECONDS={self.guard:g} leaves time to calibrate on {used} of "
                     f"{len(sequences)} sequences")
        return calibration.sensitivities()

    def in_time(self, share: float = 1.0, needs: float = 0.0) -> bool:
        """Whether `needs` more seconds end within `share` of the guard."""
        return not self.guard or time.perf_counter() - self.began + needs < share * self.guard

    def nominal(self, common: float) -> dict[str, float]:
        """The nominal bits of each group, those asked for and a common term: by "balanced" values cost the same in
        all."""
        return {g: min(max(asked + common, self.low), self.high) for g, asked in self.asked.items()}

    def rounded(self, common: float) -> dict[str, Stored]:
        """All tensors as the file holds them: the large ones rounded at their group's bits, the others in fp16."""
        coarse, nominal = {}, self.nominal(common)
        for group, names, w, cost in self.stacks:
            embedding = group in ("embed", "bigram")
            rounded = balanced(w, nominal[group], embedding, cost) if cost else rowmax(w, nominal[group], embedding)
            coarse |= zip(names, rounded, strict=True)
        fine = {name: Stored("fp16", 16, w.clamp(-65504, 65504).half().cpu().numpy())
                for name, w in self.weights.items() if name not in coarse}
        return {name: coarse[name] if name in coarse else fine[name] for name in self.weights}

    def next_common(self, tried: dict[float, int], late: bool) -> float | None:
        """The common term to try next, by the bytes of those that were tried; None where what fits is near enough, or
        it is late. Between one that fits and one that does not log sizes lie near a line; halves surely come nearer."""
        fits = {common: size for common, size in tried.items() if size <= self.room}
        over = {common: size for common, size in tried.items() if size > self.room}
        filled = fits and max(fits.values()) >= FILLED * self.room
        if not self.asked or filled or (fits and (late or 0.0 in fits and not self.cfg.export_fill)):
            return None
        least, most = self.low - max(self.asked.values()), self.high - min(self.asked.values())
        aim = (LATE_AIM if late else AIM) * self.room  # late: low, so that one more attempt gives a file
        if fits and over:
            low, high = max(fits, key=fits.get), min(over, key=over.get)
            share = math.log(aim / fits[low]) / math.log(over[high] / fits[low]) if len(tried) < 6 else 0.5
            common = low + min(max(share, 0.02), 0.98) * (high - low)
            while common in tried:  # sizes are not quite even
                common = (low + common) / 2
        else:
            common, size = list(tried.items())[-1]
            step = (aim - size) / sum(w.numel() for _, _, w, _ in self.stacks) / BYTES_A_BIT[self.cfg.quant]
            common += step * 2 ** (len(tried) - 1)  # further each time that was not enough
        common = min(max(common, least), most)
        if common in tried and late:
            common = least  # if this has been tried too, nothing fits
        return None if common in tried else common

    def attempt(self, common: float, tried: dict[float, int]) -> bool:
        """Round at this common term and enter the bytes. Returns whether the time left is too short for another attempt
        and the coding."""
        began = time.perf_counter()
        self.latest = common, self.rounded(common)
        counting = time.perf_counter()
        tried[common] = lay_out(self.cfg, self.latest[1]).size
        ended = time.perf_counter()
        needs = ended - began + 3 * (ended - counting)  # the coding counts again and takes twice as long
        return len(tried) >= MOST_ATTEMPTS or not self.in_time(needs=needs)

    def search(self) -> bytes | None:
        """The file, or None where no setting keeps it within `room`."""
        blob, best, common, tried = None, 0.0, 0.0, {}
        while blob is None:
            while common is not None:
                late = self.attempt(common, tried)
                common = self.next_common(tried, late)
            fits = [c for c, size in tried.items() if size <= self.room]
            if not fits:
                break
            best = max(fits, key=tried.get)
            latest, stored = self.latest
            blob = pack(self.cfg, stored if best == latest else self.rounded(best))
            tried[best] = len(blob)  # which was counted to 0.1%
            if len(blob) > self.room:
                blob, common = None, self.next_common(tried, late)
        nominal = self.nominal(best if blob else 0.0)
        self.report |= {"attempts": len(tried), "nominal_bits": nominal, "bytes_first": tried[0.0]}
        if blob and nominal:
            self.report["coded_bits"] = coded_bits(blob)
            groups = ", ".join(f"{group} {bits:.2f}" for group, bits in nominal.items())
            self.log(f"export: nominal bits {groups} ({best:+.2f} to all); coded bits a value "
                     f"{self.report['coded_bits']:.2f}; {tried[0.0]} -> {len(blob)} bytes of {self.room}")
        return blob


def build_model(cfg: Config, tensors: dict[str, Tensor], process: Process) -> GPT:
    """A model on the device with these weights."""
    with torch.device("meta"):  # nothing is drawn that is overwritten
        model = GPT(cfg, process.dtype)
    model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model.to(process.device)


# ==== Evaluation: every target once, with up to a full window before it ===============================================


@dataclass
class Score:
    """One evaluation: mean nats a target, bits a canonical byte, and what they were measured over."""

    val_loss: float
    val_bpb: float
    seconds: float
    tokens: int
    bytes: int
    faults: list[str]  # what of "every target once, and before any step that learnt from it" did not hold
    nats: np.ndarray  # float32 [tokens], in stream order

    def summary(self) -> dict:
        return {k: getattr(self, k) for k in ("val_loss", "val_bpb", "seconds", "tokens", "bytes")}


class Evaluator:
    """Scores parts of a stream and keeps the books: for each target its nats and how often it was scored, for each
    token how many optimizer steps have learnt from it, and how many of those came before its score.

    A window is EVAL_SEQ_LEN inputs; windows stand `stride` apart and each scores its last `stride` targets, the
    first all of its own. A target's window follows from its position in the stream (or, for `record`, from what the
    caller gives), not from the batch or number of ranks.
    """

    def __init__(self, cfg: Config, process: Process, forward, stream: Stream, stride: int):
        self.cfg, self.process, self.forward, self.stream = cfg, process, forward, stream
        self.window, self.stride = cfg.eval_len, stride
        self.batch = 0  # windows a forward pass, by the first call of `score`
        self.started = time.perf_counter()
        self.nats = torch.zeros(stream.targets, device=process.device)
        self.count = torch.zeros(stream.targets, dtype=torch.int32, device=process.device)
        self.learnt = torch.zeros(stream.targets + 1, dtype=torch.int32, device=process.device)
        self.early = torch.zeros((), dtype=torch.int64, device=process.device)

    def blocks(self, begin: int, end: int) -> np.ndarray:
        """Blocks that cover targets [begin, end), [3, n]: first target, end, and first input of each one's window."""
        w, s = self.window, self.stride
        low = np.concatenate((np.arange(begin, min(w, end), s), np.arange(max(begin, w), end, s)))
        high = np.minimum(low + s, np.where(low < w, min(w, end), end))
        return np.stack((low, high, np.where(low < w, 0, low + s - w)))

    def score(self, begin: int, end: int, tick=lambda done: None):
        """Score targets [begin, end), blocks shared out over the ranks. `tick` hears how much is done, 0 to 1, and may
        say to stop."""
        rank, world, device = self.process.rank, self.process.world, self.process.device
        blocks = self.blocks(begin, end)
        mine = torch.from_numpy(blocks[:, blocks.shape[1] * rank // world : blocks.shape[1] * (rank + 1) // world])
        mine, n = mine.to(device), mine.size(1)
        if not self.batch:  # of equal size, so that a compiled model sees one shape; later calls keep it
            most = min(self.cfg.val_batch_size // world, tokens_per_pass(self.cfg, self.process, False)) // self.window
            batches = math.ceil(n / max(most, 1))
            self.batch = math.ceil(n / batches) if n else 0
        for first in range(0, n, self.batch or 1):
            pick = torch.arange(first, first + self.batch, device=device)
            low, high, start = mine[:, pick.clamp(max=n - 1)]
            self.record(low, torch.where(pick < n, high, 0), start)
            if tick(min(first + self.batch, n) / n):
                return

    @torch.no_grad()
    def record(self, low: Tensor, high: Tensor, start: Tensor):
        """Score one batch of blocks: in each row targets `low` to `high` - 1, of which i is token i + 1, by the window
        of inputs from `start` on. Places from `high` on are computed for the shape and not recorded."""
        tokens, last = self.stream.tokens, self.stream.targets - 1
        length = min(self.window, last + 1)  # of what there is
        inputs = tokens[(start[:, None] + torch.arange(length, device=low.device)).clamp(max=last)]
        targets = low[:, None] + torch.arange(self.stride, device=low.device)
        rows, scored = (targets - start[:, None]).clamp(max=length - 1), targets < high[:, None]
        targets = targets.clamp(max=last)
        nats = self.forward(inputs, tokens[targets + 1], rows, self.window)
        for book, entry in ((self.nats, nats), (self.count, scored.int())):
            book.index_add_(0, targets.flatten(), torch.where(scored, entry, 0).flatten())
        self.early += torch.where(scored, self.learnt[targets + 1], 0).sum()

    def lesson(self, positions: Tensor, who: Tensor | None = None) -> Tensor:
        """The tokens at `positions` [n, length], which an optimizer step is about to learn from: noted as such, in
        the rows where `who` [n] holds."""
        marks = torch.ones_like(positions, dtype=torch.int32) * (1 if who is None else who[:, None].int())
        positions = positions.clamp(max=self.stream.targets)
        self.learnt.index_add_(0, positions.flatten(), marks.flatten())
        return self.stream.tokens[positions]

    def running_bpb(self, shared: bool = True) -> float:
        """BPB of what all ranks, or this rank, have scored so far."""
        sums = torch.stack((self.nats.sum(), (self.count * self.stream.target_bytes).sum().float()))
        nats, scored = (self.process.sum_(sums) if shared else sums).tolist()
        return nats / math.log(2) / max(scored, 1)

    def result(self) -> Score:
        """Gather all ranks' books into the score. Call once, when everything has been scored."""
        nats, n = self.process.sum_(self.nats).cpu(), self.stream.targets
        odd, early = int((self.process.sum_(self.count) != 1).sum()), int(self.process.sum_(self.early))
        faults = []
        if odd:
            faults.append(f"{odd} of {n} targets were not scored exactly once")
        if early:
            faults.append(f"{early} optimizer steps had seen a target before its score")
        total = float(nats.double().sum())
        if not math.isfinite(total):
            faults.append("the score is not a finite number")
        bpb, seconds = total / math.log(2) / (self.stream.bytes or math.nan), time.perf_counter() - self.started
        return Score(total / n, bpb, seconds, n, self.stream.bytes, faults, nats.numpy())


def evaluate(cfg: Config, process: Process, log: Log, forward, stream: Stream, stride: int, label: str) -> Evaluator:
    """Score the whole stream, or until a signal that is held; stride = EVAL_SEQ_LEN gives non-overlapping windows."""
    evaluator = Evaluator(cfg, process, forward, stream, stride)

    def tick(done: float) -> bool:
        log.progress(label, done, time.perf_counter() - evaluator.started)
        return bool(process.signals.caught)

    evaluator.score(0, stream.targets, tick)
    return evaluator


# ==== Test-time training: score a chunk for good, only then learn from it =============================================

LORA_CONTEXT = 64  # tokens before a chunk that go in when it is learnt: whole windows taught 0.001 BPB more, far slower


def ttt_factor(cfg: Config, step: int, steps_per_epoch: int) -> float:
    """The rate at a step within a chunk, as a share of the chunk's."""
    warm, total = cfg.ttt_warmup_epochs * steps_per_epoch, cfg.ttt_epochs * steps_per_epoch
    if not cfg.ttt_cosine or cfg.ttt_lr == 0:
        return 1.0
    if step < warm:
        return (step + 1) / warm
    least = cfg.ttt_lr_min / cfg.ttt_lr
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


class Walk:
    """One walk of test-time training over a stream: its clock, its lines, and when it must stop learning. In lora mode
    ranks walk apart, else in step (`shared`)."""

    def __init__(self, cfg: Config, process: Process, log: Log, evaluator: Evaluator, spent: float):
        self.cfg, self.process, self.log, self.evaluator = cfg, process, log, evaluator
        self.spent, self.shared = spent, cfg.ttt_mode == "full"
        self.work, self.total = 0, 0  # units of scoring that are done, and all
        self.timed_work, self.timed_seconds = 0, 0.0  # of scoring whose pace was taken
        self.lesson, self.asked = 0.0, None  # seconds of the longest lesson; when the last one began
        self.paced = 0  # the twentieth of the walk in which a pace was taken last
        self.stopped, self.chunks, self.adapted = False, 0, 0

    def twentieth(self) -> int:
        """In which of twenty parts the walk is, from 0."""
        return int(20 * self.work / self.total)

    def now(self, wait: bool = False) -> float:
        """Seconds of this walk, on a GPU after what was asked of it so far if it is to be waited for."""
        if wait:
            self.process.synchronize()
        return time.perf_counter() - self.evaluator.started

    @contextlib.contextmanager
    def scored(self, work: int):
        """A piece of scoring of `work` units, whose pace is taken, but for the first, which pays for what happens once;
        on a GPU once a twentieth of the walk, since to wait each time would leave the device idle."""
        part = self.twentieth()
        timed = self.work > 0 and (not self.process.cuda or part > self.paced)
        began = self.now(timed)
        yield
        self.work += work
        if timed:
            self.timed_work += work
            self.timed_seconds += self.now(True) - began
            self.paced = part

    def may_learn(self) -> bool:
        """Whether EVAL_MAX_SECONDS leave time for a lesson, with the rest left to score after it and a quarter for
        unevenness. Ranks that walk in step ask at the same place and hear rank 0's answer."""
        now, limit = self.now(), self.cfg.eval_max_seconds
        if self.asked is not None:
            self.lesson = max(self.lesson, now - self.asked)
        pace = self.timed_seconds / max(self.timed_work, 1)
        need = self.lesson + 1.25 * (self.total - self.work) * pace
        stop = self.stopped or 0 < limit <= self.spent + now + need
        if self.shared and limit:
            stop = self.process.agree(stop)
        if stop and not self.stopped:
            self.log(f"EVAL_MAX_SECONDS={limit:g}: adaptation stops, the time left is for scoring")
        self.stopped, self.asked = stop, now
        return not stop

    def line(self, i: int, n: int, rate: float):
        """Chunk i of n is done; in lora mode, where the BPB is of this rank's share, the i-th twentieth."""
        bpb = self.evaluator.running_bpb(self.shared)  # which waits for the device
        seconds = self.now()
        self.log(f"ttt_chunk [{i}/{n}] bpb={bpb:.6f} rate={rate:.3g} time={seconds:.1f}s "
                 f"eta={seconds / i * (n - i):.1f}s")
        self.log.metric(ttt_chunk=i, chunks=n, running_bpb=bpb, rate=rate, ttt_seconds=seconds)


class FullAdapter:
    """TTT_MODE=full: the weights learn from one chunk after another; ranks share a step's sequences, and stay alike.

    After each chunk the weights go back a share TTT_PULL of their way from the artifact's: what helped once fades,
    what helps again stays (after dynamic evaluation, https://arxiv.org/abs/1709.07432).
    """

    def __init__(self, cfg: Config, process: Process, model: GPT, evaluator: Evaluator):
        self.cfg, self.process, self.evaluator = cfg, process, evaluator
        self.flat = FlatWeights(model, process.device)
        self.origin = self.flat.weights.clone()
        for block in model.blocks[: cfg.ttt_freeze_blocks]:
            block.requires_grad_(False)
        adapted = [p for p in model.parameters() if p.requires_grad]
        if cfg.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(adapted, cfg.ttt_lr, cfg.ttt_momentum, weight_decay=cfg.ttt_wd)
        else:
            self.optimizer = torch.optim.AdamW(adapted, cfg.ttt_lr, weight_decay=cfg.ttt_wd)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The nats of whole sequences, with RoPE as in the windows that are scored."""
        return self.evaluator.forward(ids, targets, None, self.cfg.eval_len)

    def learn(self, begin: int, end: int, rate: float, may_go_on) -> int:
        """TTT_EPOCHS passes over targets [begin, end), all of them scored. Returns the steps taken."""
        cfg, flat, world, rank = self.cfg, self.flat, self.process.world, self.process.rank
        length = min(cfg.train_seq_len, end)
        starts = torch.arange(begin, end, length, device=flat.weights.device).clamp(max=end - length)
        group, size = cfg.ttt_batch_seqs * world or len(starts), tokens_per_pass(cfg, self.process, True) // length
        per_epoch, step = math.ceil(len(starts) / group), 0
        while step < cfg.ttt_epochs * per_epoch and may_go_on():
            self.optimizer.param_groups[0]["lr"] = rate * ttt_factor(cfg, step, per_epoch)
            batch = starts[step % per_epoch * group :][:group]
            tokens = self.evaluator.lesson(batch[:, None] + torch.arange(length + 1, device=batch.device))
            flat.gather_gradients(self.forward, tokens[rank::world], max(size, 1), len(tokens))
            self.process.sum_(flat.buffer)
            flat.grads.mul_(clip_factor(torch.linalg.vector_norm(flat.grads), cfg.ttt_grad_clip))
            self.optimizer.step()
            step += 1
        with torch.no_grad():
            flat.weights.lerp_(self.origin, cfg.ttt_pull)
        return step


def walk_full(walk: Walk, model: GPT):
    """Score and learn chunk by chunk."""
    cfg, evaluator, n = walk.cfg, walk.evaluator, walk.evaluator.stream.targets
    adapter = FullAdapter(cfg, walk.process, model, evaluator)
    chunks, walk.total = math.ceil(n / cfg.ttt_chunk_tokens), n
    for i in range(chunks):
        begin, end = i * cfg.ttt_chunk_tokens, min((i + 1) * cfg.ttt_chunk_tokens, n)
        with walk.scored(end - begin):
            evaluator.score(begin, end)
        fall = 0.5 * (1 + math.cos(math.pi * i / max(chunks - 1, 1)))  # a cosine across chunks, to a share of the rate
        rate = cfg.ttt_lr * (cfg.ttt_lr_end + (1 - cfg.ttt_lr_end) * fall)
        if end < n and cfg.ttt_epochs and not walk.stopped:
            walk.adapted += adapter.learn(begin, end, rate, walk.may_learn) > 0
        walk.chunks = i + 1
        walk.line(walk.chunks, chunks, rate)


class LoraAdapters:
    """TTT_MODE=lora: low-rank adapters (https://arxiv.org/abs/2106.09685) on the MLPs' matrices and the output layer.

    The first factor is fixed (https://arxiv.org/abs/2308.03303) and the same for all documents: the directions of its
    input that a matrix amplifies most, its right singular vectors (https://arxiv.org/abs/2404.02948). The second is a
    document's own and learns. `ups` [places, all outputs, rank] are those of all layers, one below the other, for as
    many documents as this rank has at a time; `start` [all outputs, rank], zero at first, is what a document begins
    with. Once made, nothing here waits for the device.
    """

    def __init__(self, cfg: Config, process: Process, model: GPT, places: int):
        model.requires_grad_(False)
        self.cfg, self.process, self.device, self.dtype = cfg, process, process.device, model.dtype
        self.layers = [layer for block in model.blocks for layer in (block.mlp.fc, block.mlp.proj)]
        self.layers.append(model.tok_emb if model.lm_head is None else model.lm_head)
        self.rate = cfg.ttt_lora_lr / math.sqrt(cfg.lora_rank)  # all directions together move as far at any rank
        self.sizes = [len(layer.weight) for layer in self.layers]
        spectra = (torch.linalg.svd(layer.weight, full_matrices=False) for layer in self.layers)
        self.downs = [found.Vh[: cfg.lora_rank].to(self.dtype) for found in spectra]
        self.start = torch.zeros(sum(self.sizes), cfg.lora_rank, device=self.device)
        self.ups = self.start.repeat(places, 1, 1)
        self.squares = torch.zeros(places, len(self.layers), cfg.lora_rank, device=self.device)
        self.steps = torch.zeros(places, device=self.device)
        own_kernels = process.cuda and compiles(cfg, process)
        self.update = torch.compile(descend_directions, dynamic=False) if own_kernels else descend_directions

    def learn_start(self, places: np.ndarray, count: int):
        """Move the start a share of the way to the mean of the `count` adapters whose documents have ended on all
        ranks, those in `places` here (Reptile, https://arxiv.org/abs/1803.02999)."""
        mean = self.process.sum_(self.ups[to_device(places, self.device)].sum(0)) / count
        self.start.lerp_(mean, 1 - (1 - self.cfg.ttt_lora_share) ** count)

    def renew(self, places: np.ndarray):
        """Let new documents begin in these places."""
        if len(places):
            places = to_device(places, self.device)
            self.ups[places] = self.start
            for state in (self.squares, self.steps):
                state.index_fill_(0, places, 0.0)

    def attach(self, places: Tensor, times: int = 1):
        """Give the layers the adapters in `places`, a row of the next batch each, the whole repeated so many times."""
        everyone = len(places) == len(self.ups)
        self.leaf = (self.ups.detach() if everyone else self.ups[places]).requires_grad_()
        rows = self.leaf.to(self.dtype)
        if times > 1:
            rows = rows.repeat(times, 1, 1)
        for layer, down, up in zip(self.layers, self.downs, rows.split(self.sizes, 1), strict=True):
            layer.adapter = (down, up)

    def detach(self):
        for layer in self.layers:
            layer.adapter = None

    def step(self, nats: Tensor, places: Tensor, learns: Tensor):
        """A step on the mean of each row of nats [rows, targets], for the attached `places` where `learns` [rows]."""
        grad, = torch.autograd.grad((nats.mean(1) * learns).sum(), self.leaf)
        whole = self.ups, self.squares, self.steps
        everyone = len(places) == len(self.ups)
        mine = whole if everyone else [state[places] for state in whole]
        with torch.no_grad():
            self.update(*mine, grad, learns, self.sizes, self.rate)
        if not everyone:
            for state, rows in zip(whole, mine, strict=True):
                state.index_copy_(0, places, rows)


def descend_directions(ups: Tensor, squares: Tensor, steps: Tensor, grad: Tensor, learns: Tensor, sizes: list[int],
                       rate: float):
    """A step against `grad`, in place: what a layer learns from one direction of its input is divided by the root mean
    square of that direction's gradients so far. A row that does not learn has no gradient. ups and grad [rows,
    outputs, rank], of layers with so many outputs each (`sizes`); squares [rows, layers, rank]; steps and learns
    [rows]."""
    grads = grad.split(sizes, 1)
    steps.add_(learns)
    squares.add_(torch.stack([part.square().mean(1) for part in grads], 1))
    scales = (squares / steps.clamp(min=1.0)[:, None, None]).sqrt() + 1e-8
    for up, part, scale in zip(ups.split(sizes, 1), grads, scales.unbind(1), strict=True):
        up.addcdiv_(part, scale[:, None], value=-rate)


def split_documents(stream: Stream) -> np.ndarray:
    """First target and end of each document, [n, 2]: its targets are those from its BOS to the next; what comes before
    the first BOS is one too."""
    starts = np.union1d([0], torch.nonzero(stream.tokens[:-1] == BOS_ID)[:, 0].cpu().numpy())
    return np.stack((starts, np.append(starts[1:], stream.targets)), axis=1)


def lora_places(cfg: Config, process: Process, documents: int) -> tuple[int, int, int]:
    """How many of so many documents are walked side by side, on all ranks; how many places for them each rank has, and
    how many of its places go through the model in one pass: each time as many, for a compiled model."""
    adapters = cfg.lora_rank * (cfg.num_layers * (cfg.mlp_dim + cfg.model_dim) + cfg.vocab_size)
    room = process.memory()[0] // 4 // (16 * adapters)  # with gradients, and both in the compute type too
    together = min(cfg.ttt_lora_documents, documents, max(room, 1) * process.world)
    tokens = min(tokens_per_pass(cfg, process, True), cfg.val_batch_size // process.world)
    places = math.ceil(together / process.world)
    passes = math.ceil(places / max(tokens // cfg.eval_len, 1))
    rows = math.ceil(places / passes)
    return together, passes * rows, rows


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of an array, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def walk_lora(walk: Walk, model: GPT):
    """Score and learn documents chunk by chunk, many side by side. They begin in the order of the stream, each where
    one has ended, from a start to which only documents have given that ended by then: all of them stand before it."""
    process, documents = walk.process, split_documents(walk.evaluator.stream)
    together, places, rows = process.agree(lora_places(walk.cfg, process, len(documents)))
    walk.log(f"documents: {len(documents)}, {together} of them side by side")
    if together < min(walk.cfg.ttt_lora_documents, len(documents)):
        walk.log(f"warning: the memory holds adapters of {together} documents, not of TTT_LORA_DOCUMENTS; the score "
                 "differs from that of a machine with more")
    adapters = LoraAdapters(walk.cfg, process, model, places)
    walk_documents(walk, adapters, documents, together, rows, fixed=walk.evaluator.forward is not model)
    adapters.detach()
    counts = torch.tensor((walk.adapted, walk.chunks, walk.stopped), device=process.device)
    walk.adapted, walk.chunks, walk.stopped = process.sum_(counts).tolist()


def walk_documents(walk: Walk, adapters: LoraAdapters, documents: np.ndarray, together: int, rows: int, fixed: bool):
    """Walk `documents` [n, 2], so many `together` on all ranks and so many `rows` of this one in a pass. `fixed`:
    places without a document stay in the batch, so that a compiled model sees one shape.

    Which document is in which place, where it is and whether it learns follows from the documents' lengths, so every
    rank knows it of all places without waiting for a device, and the score does not hang on the number of ranks.
    """
    rank, world, places = walk.process.rank, walk.process.world, len(adapters.ups)
    queue, chunk = collections.deque(documents.tolist()), min(walk.cfg.ttt_lora_chunk_tokens, walk.cfg.eval_len)
    begin, end, at = np.zeros((3, world * places), np.int64)  # of each place's document; its next target
    walk.total = walk.evaluator.stream.targets

    def own(chosen: np.ndarray) -> np.ndarray:
        """Those of this rank, counted from its first."""
        return chosen[chosen % world == rank] // world

    while True:
        ended = np.flatnonzero((at == end) & (end > 0))
        if queue and len(ended) and walk.cfg.ttt_lora_share:
            adapters.learn_start(own(ended), len(ended))
        free = np.flatnonzero(at[:together] == end[:together])[: len(queue)]
        for place in free:
            begin[place], end[place] = queue.popleft()
            at[place] = begin[place]
        adapters.renew(own(free))
        left = end - at
        if not left.any():
            return
        mine = left[rank::world]
        chosen = np.arange(places) if fixed else np.flatnonzero(mine)
        state = np.stack((chosen, *(row[rank::world][chosen] for row in (begin, at, end))))
        passes = to_device(state, walk.process.device).split(rows, 1) if len(chosen) else ()
        with walk.scored(int(np.minimum(left, chunk).sum())):
            for some in passes:
                score_documents(walk, adapters, chunk, *some)
        walk.chunks += int((mine > 0).sum())
        if (mine > chunk).any() and walk.may_learn():
            for some in passes:
                learn_documents(walk, adapters, chunk, *some)
            walk.adapted += int((mine > chunk).sum())
        if walk.log.main and walk.twentieth() > walk.paced:
            walk.line(walk.twentieth(), 20, walk.cfg.ttt_lora_lr)
        np.minimum(at + chunk, end, out=at)


def score_documents(walk: Walk, adapters: LoraAdapters, chunk: int, places: Tensor, first: Tensor, low: Tensor,
                    end: Tensor):
    """Score the next `chunk` targets, from `low` on, of the documents [first, end) in `places`, a stride in each row
    of the batch; a window ends where its stride does and does not begin before the document."""
    evaluator, window, stride = walk.evaluator, walk.evaluator.window, walk.evaluator.stride
    offsets = torch.arange(0, chunk, stride, device=low.device)[:, None]
    strides = max(tokens_per_pass(walk.cfg, walk.process, False) // (window * len(places)), 1)
    for some in offsets.split(strides):
        adapters.attach(places, len(some))
        begins, ends = low + some, (low + (some + stride).clamp(max=chunk)).minimum(end)
        starts = (begins + stride - window).maximum(first)
        evaluator.record(begins.flatten(), ends.flatten(), starts.flatten())


def learn_documents(walk: Walk, adapters: LoraAdapters, chunk: int, places: Tensor, first: Tensor, low: Tensor,
                    end: Tensor):
    """A step of each document on the chunk from `low` on, if that is not its last; no later token goes in, and of the
    earlier ones LORA_CONTEXT: of a chunk of 64 from target 1000 on, inputs 936 to 1063 and tokens 1001 to 1064."""
    evaluator, length = walk.evaluator, min(walk.cfg.eval_len, chunk + LORA_CONTEXT)
    learns, start = low + chunk < end, (low + chunk - length).maximum(first)[:, None]
    inputs = (start + torch.arange(length, device=low.device)).minimum(low[:, None] + chunk - 1)
    targets = low[:, None] + torch.arange(chunk, device=low.device)
    tokens = evaluator.lesson(targets + 1, learns)
    adapters.attach(places)
    inputs = evaluator.stream.tokens[inputs.clamp(max=evaluator.stream.targets)]
    nats = evaluator.forward(inputs, tokens, targets - start, evaluator.window)
    adapters.step(nats, places, learns)


def prime(cfg: Config, process: Process, log: Log, stream: Stream, tokenizer: Tokenizer):
    """Where forward passes are compiled, let an untrained model walk over random tokens, never validation text, in the
    shapes that `stream` will need: the walk that counts then meets no graph for the first time. Torch keeps compiled
    code for all models of one form, so this can be done before there is an artifact, and before training's clock."""
    if not compiles(cfg, process):
        return
    model = GPT(cfg, process.dtype).to(process.device)
    rng, starts, n = np.random.default_rng(0), [], min(2 * cfg.ttt_chunk_tokens, stream.targets)
    if cfg.ttt_mode == "lora":  # documents that learn once, in all places
        together, *_ = process.agree(lora_places(cfg, process, len(split_documents(stream))))
        length = min(cfg.ttt_lora_chunk_tokens, cfg.eval_len) + 1
        starts, n = np.arange(together) * length, max(together * length, min(cfg.eval_len, stream.targets))
    ids = rng.integers(BOS_ID + 1, max(cfg.vocab_size, BOS_ID + 2), n + 1)
    ids[starts] = BOS_ID
    cfg = dataclasses.replace(cfg, eval_max_seconds=0.0)
    test_time_train(cfg, process, log.silent(), model, Stream(ids, tokenizer, process.device))


def test_time_train(cfg: Config, process: Process, log: Log, model: GPT, stream: Stream,
                    spent: float = 0.0) -> tuple[Evaluator, dict]:
    """Walk the stream once: score a chunk for good, learn from it, score the next. Changes `model` in full mode.
    `spent`: seconds of EVAL_MAX_SECONDS that are gone already. Returns the books and what to report of the walk."""
    lora = cfg.ttt_mode == "lora"
    stride = min(cfg.eval_stride, cfg.ttt_lora_chunk_tokens, cfg.eval_len) if lora else cfg.eval_stride
    evaluator = Evaluator(cfg, process, compiled(model, cfg, process), stream, stride)
    walk = Walk(cfg, process, log, evaluator, spent)
    if lora:
        walk_lora(walk, model)
    else:
        walk_full(walk, model)
    return evaluator, {"chunks": walk.chunks, "mode": cfg.ttt_mode, "adapted_chunks": walk.adapted,
                       "stopped_by_budget": bool(walk.stopped)}


# ==== Main: find what to go on with, open and check, run the stages, judge ============================================

EXCERPT_WINDOWS = 4  # whose losses a run leaves behind, for ./run.sh audit to meet again


def lock(folder: Path) -> int:
    """Lock a run's folder for as long as this process lives, since nobody closes the handle that is returned; the lock
    of a dead one is no obstacle. UserError when a live run has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"RUN_ID={folder.name}: a live run writes into {folder}; wait for it or choose another "
                        "RUN_ID") from None
    except OSError:  # a file system without locks
        pass
    return handle


@dataclass
class Past:
    """What RESUME=1 found in its run's folder: what the summary says is done, where the artifact is whole, else the
    newest good checkpoint, else nothing."""

    notes: list[str]  # for the log
    resumes: list[str]  # what the summary says of the times before
    settings: dict | None = None  # of the run so far
    explicit: tuple[str, ...] = ()  # fields that its environment had set
    finished: bool = False
    done: dict | None = None  # the summary's entries that stay
    facts: dict | None = None  # of the checkpoint, and its tensors
    tensors: dict[str, Tensor] | None = None
    changes: list[str] = dataclasses.field(default_factory=list)  # settings that this launch has changed
    seconds: dict = dataclasses.field(default_factory=dict)  # of the stages that are done; "earlier": of all launches


def find_past(cfg: Config) -> Past | None:
    """What there is to go on with in LOG_DIR/RUN_ID, which is locked; None for a new run. On rank 0."""
    folder = Path(cfg.log_dir, cfg.run_id)
    if not cfg.resume or not folder.is_dir():
        return None
    lock(folder)
    summary, resumes, earlier = None, [], 0.0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or a foreign one
        summary = json.loads((folder / "summary.json").read_bytes())
        resumes += summary["resumes"]
        earlier = check_seconds(summary["seconds"]["total"])
    past = past_of_summary(folder, summary, resumes) or past_of_checkpoint(folder, resumes)
    trained = past.facts["seconds"] if past.facts else 0.0  # a launch that was killed did not write its total
    past.seconds["earlier"] = max(earlier, trained)
    return past


def check_seconds(value) -> float:
    """A file's number of seconds. Raises ValueError or TypeError for what no clock shows."""
    if not 0 <= value <= 1e15:
        raise ValueError("not a number of seconds")
    return float(value)


def past_of_summary(folder: Path, summary, resumes: list[str]) -> Past | None:
    """The run up to its artifact, where that is as its summary says, or up to its end."""
    try:
        check_settings(summary["config"])
        if not summary["finished"]:
            blob = (folder / ARTIFACT_NAME).read_bytes()
            require(hashlib.sha256(blob).hexdigest() == summary["artifact"]["sha256"], "another artifact")
        done = {name: summary[name] for name in ("train", "export", "artifact")}
        done["eval"] = dict.fromkeys(summary["eval"]) | {"float": summary["eval"]["float"]}  # the others are made anew
        done["reasons"] = [reason for reason in summary["reasons"] if reason.startswith("float:")]
        explicit = tuple(f.name for f in VARIABLES if f.name.upper() in summary["overrides"])
        stages = {"warm_up", "train", "search", "export"} & summary["seconds"].keys()
        seconds = {stage: check_seconds(summary["seconds"][stage]) for stage in sorted(stages)}
        resumes = [*resumes, "resumed from its artifact"]
        return Past([], resumes, summary["config"], explicit, bool(summary["finished"]), done, seconds=seconds)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None


def past_of_checkpoint(folder: Path, resumes: list[str]) -> Past:
    """The run up to its newest good checkpoint."""
    past = Past([], resumes)
    for path in reversed(checkpoints(folder)):
        try:
            past.facts, past.tensors = read_checkpoint(path)
        except UserError as error:
            past.notes.append(f"RESUME=1: passed over: {error}")
            continue
        past.settings, past.explicit = past.facts["settings"], tuple(past.facts["explicit"])
        past.resumes.append(f"resumed from step {past.facts['step']} in {path}")
        return past
    past.notes.append(f"RESUME=1: nothing to resume in {folder}, starting afresh there")
    return past


def continued(cfg: Config, past: Past | None, ranks: int) -> Config:
    """The settings of the run so far, if there are any, with what the environment changes. UserError where its state
    hangs on one of these, or they cannot go together."""
    stages = {"Model", "Data", "Optimizers"} | ({"Export"} if past and past.done else set())
    bound = {name for name, stage in STAGES.items() if stage in stages}
    bound |= {"seed", "train_batch_tokens", "train_enabled", "model_path"}
    own = {"run_id", "log_dir", "resume", "nll_dump", "env_extra"}  # where to write is not for a file to say
    if past and past.settings:
        kept = {name: value for name, value in past.settings.items() if name in STAGES and name not in own}
        for name in sorted(cfg.explicit - own - {"preset"}):
            value, before = getattr(cfg, name), past.settings[name]
            require(name not in bound or value == before, f"{name.upper()}={value}: the run to go on with has {before}"
                    "; unset it, or start another run")
            if value != before:
                past.changes.append(f"resumed with {name.upper()}={value}, before {before}")
            kept[name] = value
        if "preset" in cfg.explicit and cfg.preset != kept["preset"]:
            past.notes.append(f"PRESET={cfg.preset} is not taken over: the run has {kept['preset']}")
        cfg = dataclasses.replace(cfg, **kept, explicit=cfg.explicit | (set(past.explicit) - own))
    problems = conflicts(cfg, ranks) if cfg.train_enabled else []  # else the artifact brings its model first
    require(not problems, "; ".join(problems))
    return cfg


@dataclass
class Inputs:
    """What a run reads, opened and checked."""

    script: Script
    tokenizer_path: Path
    tokenizer: Tokenizer
    train: Tokens | None
    stream: Stream
    data: dict  # sha256 of the tokenizer, and what is known of the shards
    of_a_byte: float | None  # canonical bytes of a byte of the text before it was tokenised, where that is known
    doubts: list[str]  # what is known of the data that speaks against a score on it
    blob: bytes | None  # of MODEL_PATH: an artifact to score,
    weights: Tensor | None  # or a run's averaged weights to export


def read_model(path: str) -> tuple[dict, bytes | None, Tensor | None]:
    """MODEL_PATH: its model's settings, and an artifact's bytes or the averaged weights of a run's last checkpoint.
    Raises UserError."""
    if not Path(path).is_dir():
        blob = read_file(path, "MODEL_PATH=")
        return unpack(blob, path)[0]["config"], blob, None
    saved = checkpoints(Path(path))
    require(saved, f"MODEL_PATH={path}: a folder without checkpoints; give that of a run whose last one "
            f"CKPT_EVERY_SECONDS has kept, or a {ARTIFACT_NAME}")
    facts, tensors = read_checkpoint(saved[-1])
    return {f.name: facts["settings"][f.name] for f in MODEL_FIELDS}, None, tensors.get("average", tensors["weights"])


# What reading a JSON file raises that is not there, or that something else has written.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)


def read_manifest(folder: Path) -> tuple[str | None, float | None, list[str]]:
    """What data/prepare.py has noted beside its shards: the sha256 of the tokenizer that cut them; the bytes that are
    counted of a byte of the validation text as it was given; and where the tokenizer has changed that by more than
    0.5%, a line on what it does to BPB. None for what it does not say. Raises UserError where the shards are not of one
    origin."""
    cut_with, of_a_byte, doubts = None, None, []
    with contextlib.suppress(*UNREADABLE):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        require(manifest.get("origin") != {}, f"DATA_PATH={folder}: fetching was cut short and its shards may be of "
                "several origins; run ./run.sh data again")
        cut_with = manifest["tokenizer"]["sha256"]
        split = manifest["splits"]["val"]
        raw, counted = split["raw_bytes"], split["counted_bytes"]
        of_a_byte = counted / raw if 0 < counted < 1e15 and raw > 0 else None
        if counted > 1.005 * raw:
            doubts.append(f"BPB is too low: the tokenizer's normalisation makes {counted} bytes of the text's {raw}")
        lost = split["lost_bytes"]
        if lost > 0.005 * raw:
            doubts.append(f"BPB leaves out {lost} of the text's {raw} bytes, which the tokenizer does not know")
    return cut_with, of_a_byte, doubts


def digest_of(states) -> str:
    """sha256 of the name, bytes and time of change of each shard: by it shards are known again without reading them."""
    return hashlib.sha256(json.dumps(sorted(states)).encode()).hexdigest()


def state_of(folder: Path) -> str:
    """The digest of the shards as they are."""
    files = [(path.name, path.stat()) for path in folder.glob("fineweb_*.bin")]
    return digest_of((name, file.st_size, int(file.st_mtime)) for name, file in files)


def read_verified(folder: Path) -> tuple[dict | None, list[str]]:
    """What ./run.sh data --verify has found in these shards, with one sha256 for all of theirs; None where it has not
    seen them as they are. With it, what speaks against a score on them."""
    with contextlib.suppress(*UNREADABLE):
        found = json.loads((folder / "verified.json").read_bytes())
        if digest_of((file["name"], file["bytes"], file["mtime"]) for file in found["files"]) == state_of(folder):
            sums = sorted((file["name"], file["sha256"]) for file in found["files"])
            lines = "".join(f"{digest}  {name}\n" for name, digest in sums)  # as sha256sum fineweb_*.bin prints them
            told = {name: found[name] for name in ("date", "equal_documents", "shared_documents", "shared_tokens")}
            faults = [f"data, as verified: {fault}" for fault in found["faults"]]
            return told | {"sha256": hashlib.sha256(lines.encode()).hexdigest(), "faults": len(faults)}, faults
    return None, []


def open_inputs(cfg: Config, process: Process, past: Past | None, seconds: dict,
                script: Script) -> tuple[Config, Inputs]:
    """Open MODEL_PATH, whose model comes with its settings, the tokenizer and the data. UserError for the first that is
    missing or does not fit; the data must be that of a checkpoint."""
    blob = weights = None
    if not cfg.train_enabled and not (past and past.done):
        with timed(seconds, "read"):
            made, blob, weights = read_model(cfg.model_path)
        for name in cfg.explicit & made.keys():
            value = getattr(cfg, name)
            require(value == made[name],
                    f"{name.upper()}={value}: the model of {cfg.model_path} has {made[name]}; unset it")
        cfg = dataclasses.replace(cfg, **made)
        problems = conflicts(cfg, 1)
        require(not problems, "; ".join(problems))
    folder = find_data(cfg)
    path, cfg = find_tokenizer(cfg, folder), dataclasses.replace(cfg, data_path=str(folder))
    tokenizer, (cut_with, of_a_byte, doubts) = Tokenizer(path, cfg.vocab_size), read_manifest(folder)
    verified, faults = read_verified(folder)
    data = {"tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "verified": verified,
            "state_sha256": state_of(folder)}
    require(cut_with in (None, data["tokenizer_sha256"]), f"TOKENIZER_PATH={path}: not the "
            f"tokenizer that cut the data, by {folder / 'manifest.json'}; give that one, or other data: ./run.sh data "
            f"--variant sp{cfg.vocab_size} fetches FineWeb's")
    train = None
    if cfg.train_enabled or (weights is not None and cfg.export_enabled):
        train = Tokens(folder, "train", cfg.vocab_size)
        require(len(train) > cfg.train_seq_len, f"{train.paths[0]}: the training split has {len(train)} tokens, a "
                f"sequence takes {cfg.train_seq_len + 1}; give more text or lower TRAIN_SEQ_LEN")
    if past and past.facts:
        count, before = len(train or ()), past.facts["train_tokens"]
        require(count == before, f"DATA_PATH={folder}: {count} training tokens where the run to go on with had {before}"
                "; give the same data")
    stream = open_stream(Tokens(folder, "val", cfg.vocab_size), tokenizer, cfg.val_token_limit, process.device)
    return cfg, Inputs(script, path, tokenizer, train, stream, data, of_a_byte, doubts + faults, blob, weights)


def check_machine(cfg: Config, process: Process, past: Past | None, script: Script):
    """UserError where a run would end for want of room on the disk or a place to write to."""
    folder, dump = Path(cfg.log_dir, cfg.run_id).absolute(), Path(cfg.nll_dump).absolute()
    taken = cfg.run_id and not past and os.path.lexists(folder)
    require(not taken, f"RUN_ID={cfg.run_id}: {folder} exists and no run is overwritten; choose another RUN_ID, or "
            "RESUME=1 if that run is to go on")
    here = next(p for p in (folder, *folder.parents) if os.path.lexists(p))  # a link may lead nowhere
    require(here.is_dir() and os.access(here, os.W_OK),
            f"LOG_DIR={cfg.log_dir}: {here} is not a folder that can be written to")
    replaceable = dump.is_file() or not dump.exists()  # a device or a folder is not
    require(not cfg.nll_dump or replaceable and dump.parent.is_dir() and os.access(dump.parent, os.W_OK),
            f"NLL_DUMP={cfg.nll_dump}: not a file in a folder that can be written to")
    code, limit = len(script.counted), cfg.artifact_limit_bytes
    require(not (cfg.train_enabled and cfg.export_enabled) or code < limit,
            f"ARTIFACT_LIMIT_BYTES={limit}: the code alone has {code} bytes; raise the limit")
    elements = model_size(cfg)
    need = len(script.source) + code + 2**20  # the log, which holds the script, and what is counted of it
    if cfg.train_enabled:
        need += 16 * elements * (cfg.keep_ckpts + 1 if cfg.ckpt_every_seconds else 1)
    if cfg.export_enabled:
        need += min(2 * elements, limit)
    free = shutil.disk_usage(here).free
    require(free >= need or not process.main, f"LOG_DIR={cfg.log_dir}: log, checkpoints and artifact need about "
            f"{need / 1e6:,.1f} MB, {here} has {free / 1e6:,.1f}; make room, or set LOG_DIR to another disk")


def time_steps(cfg: Config, process: Process, tokens: Tokens, ranks: int) -> tuple[int, str]:
    """How many steps a training on `ranks` will do, and what they take: for each order of the layers the faster of two
    steps on what a forward pass takes of a rank's sequences, for all of them. What ranks send and spare each other is
    left out."""
    cfg = dataclasses.replace(cfg, train_batch_tokens=cfg.train_batch_tokens // ranks * process.world)
    trainer = Trainer(cfg, process, GPT(cfg, process.dtype).to(process.device))
    batch, found = Loader(cfg, tokens, process).next()[: trainer.micro], {}
    for share, step in itertools.product((0.0, 1.0) if cfg.loops_later else (1.0,), range(2)):  # the first compiles
        trainer.loop(share)
        process.synchronize()
        began = time.perf_counter()
        trainer.flat.gather_gradients(trainer.forward, batch, trainer.micro, trainer.share * process.world)
        process.synchronize()
        updating = time.perf_counter()
        trainer.optimizers.step(step, 1.0)
        process.synchronize()
        seconds = (updating - began) * trainer.share / trainer.micro + time.perf_counter() - updating
        found[share] = min(seconds, found.get(share, math.inf))
    before, after = found.get(0.0, found[1.0]), found[1.0]
    count, said = cfg.iterations, f"{1000 * after:,.1f} ms each"
    if cfg.training_seconds:
        steps_a_second = cfg.enable_looping_at / before + (1 - cfg.enable_looping_at) / after
        count = min(count, math.ceil(cfg.training_seconds * steps_a_second))
    if cfg.loops_later:
        said += f", before the loops {1000 * before:,.1f}"
    return count, f"{said}, timed on {trainer.micro} of a rank's {trainer.share} sequences"


def check(cfg: Config, process: Process, inputs: Inputs, ranks: int, times: bool = False) -> str:
    """What a run would do, with `times` after timing a step. UserError for more ranks than GPUs. The bytes are a guess
    before any search: a value takes about 1.6 bits less than its nominal ones, as in the run of record; other training
    will differ."""
    require(not process.cuda or ranks <= torch.cuda.device_count(), f"{ranks} ranks: this machine has "
            f"{torch.cuda.device_count()} GPUs; launch at most as many")
    counts = dict.fromkeys((*GROUPS, "fp16"), 0)
    for name, shape in shapes_of(cfg).items():
        counts[group_of(name) if is_quantised(name, shape, cfg.quant_min_numel) else "fp16"] += math.prod(shape)
    bits = {g: max(getattr(cfg, f"quant_bits_{g}") - 1.6, 0.0) for g in GROUPS} | {"fp16": 16}
    code, parameters = len(inputs.script.counted), sum(counts.values())
    predicted = code + int(sum(n * bits[g] / 8 for g, n in counts.items()))
    left = 8 * (cfg.artifact_limit_bytes - code) / parameters
    scored = f"windows, stride {cfg.eval_stride}"
    if cfg.ttt_enabled:
        scored = f"test-time training, {cfg.ttt_mode}, {scored}"
    lines = [
        f"preset:     {cfg.preset} {json.dumps(cfg.overrides())}",
        f"machine:    {ranks} x {process.hardware()['name']}, {process.memory()[0] / 2**30:.1f} GiB, "
        f"{str(process.dtype)[6:]}",
        f"tokenizer:  {inputs.tokenizer_path}, {cfg.vocab_size} pieces",
        f"validation: {inputs.stream.targets:,} targets, {inputs.stream.bytes:,} bytes of {cfg.data_path}",
        f"evaluation: {scored}, {f'within {cfg.eval_max_seconds:g} s' if cfg.eval_max_seconds else 'no time limit'}",
        f"parameters: {parameters:,} ({', '.join(f'{n:,} {kind}' for kind, n in counts.items() if n)})",
        f"artifact:   about {predicted:,} bytes, {code:,} of them code, before the search, which keeps it within "
        f"{cfg.artifact_limit_bytes:,}: that leaves {left:.2f} bits a parameter"]
    if cfg.train_enabled:
        share, cap = cfg.train_batch_tokens // cfg.train_seq_len // ranks, cfg.training_seconds
        micro, steps = micro_batch(cfg, process, share), f"{cfg.iterations:,} of {cfg.train_batch_tokens:,} tokens"
        if times:
            count, said = time_steps(cfg, process, inputs.train, ranks)
            steps = f"about {count:,} of at most {steps}: {said}"
        elif cap:
            steps = f"at most {steps}; how many {cap:g} s allow is unknown, --check --time measures it"
        activations = micro * cfg.train_seq_len * activation_bytes(cfg, process)
        lines += [f"memory:     about {40 * model_size(cfg) / 2**30:.1f} GiB for weights and optimizers, "
                  f"{activations / 2**30:.1f} for {micro} of a rank's {share} sequences at a time",
                  f"training:   {len(inputs.train):,} tokens in {len(inputs.train.paths)} shards",
                  f"steps:      {steps}"]
    return "\n".join(lines)


@contextlib.contextmanager
def timed(seconds: dict, name: str):
    """Add what is done within to `seconds`[name]."""
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def open_log(cfg: Config, process: Process, inputs: Inputs, past: Past | None) -> Log:
    """Make LOG_DIR/RUN_ID, or take it up again, and write into its log what someone needs who reads it a year from
    now."""
    name = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"_seed{cfg.seed}"
    if not cfg.run_id and Path(cfg.log_dir, name).exists():  # another run began in the same second
        name += f"_{os.getpid()}"
    folder, (source, counted) = Path(cfg.log_dir, process.agree(name)), inputs.script

    def make():
        if past is None:
            folder.mkdir(parents=True)
            lock(folder)
        if counted != source:
            write_atomically(folder / PACKED_NAME, counted)

    process.together(make, main=True)
    log = Log(process, folder)
    versions = {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
    if past:
        for note in (*past.notes, *past.changes, *(past.resumes[-1:] if past.settings else ())):
            log(note)
    log(source.decode() + "=" * 100, console=False)
    log(f"code counted: {len(counted)} bytes, sha256 {hashlib.sha256(counted).hexdigest()}", console=False)
    log(f"python {platform.python_version()} {versions}\nhardware {process.hardware()}", console=False)
    log(f"config {json.dumps(cfg.settings())}", console=False)
    log(f"preset:{cfg.preset} seed:{cfg.seed} overrides:{json.dumps(cfg.overrides())}")
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={inputs.tokenizer_path}")
    if process.cuda:
        log(f"FlashAttention-3, for attention in bf16: {'found' if flash_attn_func else 'not found, or broken'}")
        log(f"own kernel for the MLP: {why_not_fused(cfg, process) or 'used'}")
    if inputs.train:
        log(f"train_loader:dataset:{Path(cfg.data_path).name} train_shards:{len(inputs.train.paths)} "
            f"tokens:{len(inputs.train)}")
    log(f"val_loader:tokens:{inputs.stream.targets} bytes:{inputs.stream.bytes}")
    log(f"data {json.dumps(inputs.data)}", console=False)
    return log


def new_summary(cfg: Config, process: Process, name: str) -> dict:
    """What summary.json says before the first stage."""
    return {"run_id": name, "seed": cfg.seed, "preset": cfg.preset, "config": cfg.settings(),
            "overrides": cfg.overrides(), "hardware": process.hardware(), "train": None, "export": None,
            "artifact": None, "eval": dict.fromkeys(("float", "int6", "sliding", "ttt")), "val_bpb": None,
            "val_bpb_raw_bytes": None, "finished": False, "valid": False, "reasons": [], "caveats": [], "resumes": [],
            "seconds": {}}


def save_summary(process: Process, folder: Path, summary: dict):
    """Write summary.json, with the seconds of all launches so far. On rank 0."""
    seconds = summary["seconds"]
    seconds["total"] = seconds["earlier"] + time.perf_counter() - process.started
    text = re.sub(r"(?<=: )(NaN|-?Infinity)(?=,?\n)", "null", json.dumps(summary, indent=1)) + "\n"  # not JSON
    write_atomically(folder / "summary.json", text.encode())


def write_summary(process: Process, folder: Path, summary: dict):
    process.together(lambda: save_summary(process, folder, summary), main=True)


def run(cfg: Config, process: Process, log: Log, inputs: Inputs, past: Past | None, summary: dict) -> int:
    """One run, stage by stage. A stage whose switch is off does nothing; what the others find goes into the summary,
    which is written after each. Returns the exit code."""
    about, stream = (cfg, process, log, summary), inputs.stream
    compile_ahead(*about, inputs)
    model, scores = None, []
    if not summary["artifact"] and inputs.blob is None:
        model = train_and_average(*about, inputs, past)
        scores.append(score(*about, model, stream, "float"))
        export(*about, model, inputs)
    model = read_back(*about, inputs) or model
    scores.append(score(*about, model, stream, "int6"))
    scores.append(score(*about, model, stream, "sliding"))
    scores.append(adapt(*about, model, stream))
    keep_losses(*about, [found for found in scores if found])
    return judge(*about, inputs, past)


def compile_ahead(cfg: Config, process: Process, log: Log, summary: dict, inputs: Inputs):
    """Compile what test-time training needs while no clock runs; the evaluation's seconds count it all the same."""
    if cfg.ttt_enabled:
        with timed(summary["seconds"], "compile"):
            prime(cfg, process, log, inputs.stream, inputs.tokenizer)


def train_and_average(cfg: Config, process: Process, log: Log, summary: dict, inputs: Inputs, past: Past | None) -> GPT:
    """The model with its averaged weights: those of the run that MODEL_PATH names, or trained."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, process.dtype).to(process.device)
    if inputs.weights is not None:
        FlatWeights(model, process.device).weights.copy_(inputs.weights)
        return model
    log(f"model_params:{model_size(cfg)}")
    saved = (past.facts, past.tensors) if past and past.facts else None
    with timed(summary["seconds"], "train"):
        summary["train"] = train(cfg, process, log, model, inputs.train, inputs.stream, saved, summary["seconds"])
    write_summary(process, log.folder, summary)
    return model


def score(cfg: Config, process: Process, log: Log, summary: dict, model: GPT, stream: Stream, key: str) -> Score | None:
    """Evaluate the model in windows side by side ("float", "int6") or EVAL_STRIDE apart ("sliding")."""
    kind = "int6" if summary["artifact"] else "float"
    stride = cfg.eval_stride if key == "sliding" else cfg.eval_len
    enabled = cfg.final_sliding_eval_enable if key == "sliding" else cfg.final_eval_enable and key == kind
    if not enabled or not stride:
        return None
    evaluator = evaluate(cfg, process, log, compiled(model, cfg, process), stream, stride, f"score, {key}")
    if key == "sliding":
        return report(process, log, summary, key, f"final_{kind}_sliding_window", evaluator.result(), stride=stride)
    tag = "final_float" if key == "float" else "final_int6_roundtrip"
    return report(process, log, summary, key, tag, evaluator.result())


def adapt(cfg: Config, process: Process, log: Log, summary: dict, model: GPT, stream: Stream) -> Score | None:
    """Score with test-time training."""
    if not cfg.ttt_enabled:
        return None
    seconds = summary["seconds"]
    spent = seconds.get("read", 0.0) + seconds["compile"]
    evaluator, details = test_time_train(cfg, process, log, model, stream, spent)
    return report(process, log, summary, "ttt", "legal_ttt", evaluator.result(), **details)


def report(process: Process, log: Log, summary: dict, key: str, tag: str, score: Score, **details) -> Score:
    """Log a score in the field's form and enter it."""
    more = "".join(f"{k}:{v} " for k, v in details.items())
    log(f"{tag} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} {more}eval_time:{1000 * score.seconds:.0f}ms")
    log(f"{tag}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
    summary["eval"][key], summary["seconds"][key] = {**score.summary(), **details}, score.seconds
    summary["reasons"] += [f"{key}: {fault}" for fault in score.faults]
    write_summary(process, log.folder, summary)
    return score


def export(cfg: Config, process: Process, log: Log, summary: dict, model: GPT, inputs: Inputs):
    """Round, fit, code and write the artifact, on rank 0; where nothing fits the last checkpoint stays."""
    def encode() -> dict:
        """The summary's entry, after the file is written."""
        seconds = summary["seconds"]
        text, size = calibration_text(cfg, process, inputs.train)
        with timed(seconds, "search"):
            room = cfg.artifact_limit_bytes - len(inputs.script.counted)
            exporter = Exporter(cfg, log, model, text, size, room, cfg.export_seconds)
            blob = exporter.search()
        if cfg.export_seconds:
            log(f"export: took {seconds['search']:.1f} s of the {cfg.export_seconds:g} s kept for it")
        with timed(seconds, "export"):
            if blob:
                write_atomically(log.folder / ARTIFACT_NAME, blob)
            else:
                kept = shlex.quote(cfg.model_path or str(log.folder))
                log("export: no setting fits the limit; to export again, with what should differ: TRAIN_ENABLED=0 "
                    f"MODEL_PATH={kept} {launcher()}")
        return exporter.report | {"fits": blob is not None}

    if cfg.export_enabled:
        summary["export"] = process.agree(process.together(encode, main=True))


def calibration_text(cfg: Config, process: Process, tokens: Tokens) -> tuple[Tensor, int]:
    """Sequences spread evenly over the training split, [n, T + 1], and how many of them a forward pass takes."""
    length = cfg.train_seq_len
    count = min(max(cfg.calibration_tokens // length, 1), len(tokens) // length)
    starts = [i * (len(tokens) - length) // count for i in range(count)]
    text = torch.from_numpy(np.stack([tokens.read(s, length + 1) for s in starts]).astype(np.int32))
    size = tokens_per_pass(dataclasses.replace(cfg, use_compile="0"), process, True)  # what listens to layers is not
    return text.to(process.device), max(size // length, 1)


def read_back(cfg: Config, process: Process, log: Log, summary: dict, inputs: Inputs) -> GPT | None:
    """The model of the artifact, of MODEL_PATH or of this run, on every rank from rank 0's disk: nodes need not share
    one. Over the limit a run goes on, to end not valid."""
    path, blob, limit = cfg.model_path, inputs.blob, cfg.artifact_limit_bytes
    made = summary["artifact"] or summary["export"] and summary["export"]["fits"]
    with timed(summary["seconds"], "read"):
        if made:
            path = str(log.folder / ARTIFACT_NAME)
            blob = process.agree(process.together(lambda: read_file(path), main=True))
        elif blob is None:
            return None
        elif "artifact_limit_bytes" not in cfg.explicit:
            limit = Config.artifact_limit_bytes  # another run made it, maybe with another preset
        weights = {name: s.tensor() for name, s in unpack(blob, path)[1].items()}
        model = build_model(cfg, weights, process)
    source, code = map(len, inputs.script)
    total = len(blob) + code
    log(f"Code size: {code} bytes" if source == code else f"Code size (uncompressed): {source} bytes\n"
        f"Code size (compressed): {code} bytes")
    log(f"Serialized model int6+zstd: {len(blob)} bytes")
    log(f"Total submission size int6+zstd: {total} bytes")
    if total > limit:
        summary["reasons"].append(f"artifact over the limit: {total} > {limit} bytes")
        log(f"over the limit by {total - limit} bytes; all files are kept, the score is not valid")
    summary["artifact"] = {"path": path, "bytes_model": len(blob), "bytes_code": code, "bytes_source": source,
                           "bytes_total": total, "limit": limit, "sha256": hashlib.sha256(blob).hexdigest()}
    write_summary(process, log.folder, summary)
    if process.main and not cfg.ckpt_every_seconds:  # nothing needs them any more
        shutil.rmtree(log.folder / "checkpoints", ignore_errors=True)
    return model


def keep_losses(cfg: Config, process: Process, log: Log, summary: dict, scores: list[Score]):
    """The last score is val_bpb. Write the losses behind it, for an audit: those of the first windows, and their sums
    over every EVAL_SEQ_LEN targets; with NLL_DUMP all."""
    if not scores:
        if cfg.nll_dump:
            log(f"warning: NLL_DUMP={cfg.nll_dump} is not written, there is no final evaluation")
        return
    summary["val_bpb"], nats = scores[-1].val_bpb, scores[-1].nats

    def write():
        sums = np.add.reduceat(nats, np.arange(0, len(nats), cfg.eval_len), dtype=np.float64)
        files = {log.folder / "excerpt.npy": nats[: EXCERPT_WINDOWS * cfg.eval_len], log.folder / "sums.npy": sums}
        if cfg.nll_dump:
            files[Path(cfg.nll_dump)] = nats
        for path, array in files.items():
            write_atomically(path, lambda file, array=array: np.save(file, array), array.nbytes + 128)

    process.together(write, main=True)


def judge(cfg: Config, process: Process, log: Log, summary: dict, inputs: Inputs, past: Past | None) -> int:
    """Fill `valid`, `reasons` and `caveats`, and say them. Returns the exit code: 1 if a check failed."""
    seconds, hardware, train, reasons = summary["seconds"], summary["hardware"], summary["train"], summary["reasons"]
    scores, artifact = [s for s in summary["eval"].values() if s], summary["artifact"]
    if summary["export"] and not summary["export"]["fits"]:
        reasons.append(f"no setting fits ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}")
    if summary["eval"]["ttt"]:
        walk, read, compiling = summary["eval"]["ttt"]["seconds"], seconds.get("read", 0.0), seconds["compile"]
        summary["eval_clocks"] = {"all": walk + read + compiling, "without_compilation": walk + read}
        log(f"evaluation clocks: {walk + read + compiling:.1f} s with all inside (reading {read:.1f}, compiling "
            f"{compiling:.1f}, walk {walk:.1f}), {walk + read:.1f} s with compilation outside; "
            f"EVAL_MAX_SECONDS={cfg.eval_max_seconds:g} holds for the first")
    took = (scores[-1]["seconds"] if scores else 0.0) + seconds.get("read", 0.0) + seconds.get("compile", 0.0)
    if 0 < cfg.eval_max_seconds < took:
        reasons.append(f"evaluation took {took:.0f} s, EVAL_MAX_SECONDS={cfg.eval_max_seconds:g}")
    failed = bool(reasons)
    if artifact is None and not cfg.export_enabled:
        reasons.append("EXPORT_ENABLED=0: no artifact, the scores are of float weights")
    cap, data = cfg.max_wallclock_seconds, Path(cfg.data_path).name
    changes, lag = past.changes if past else [], lag_of_average(cfg, summary)
    spent = train["seconds"] + seconds.get("search", 0.0) if train else 0.0  # both are training time
    caveats = [  # (holds, what is said)
        (not scores, "no final evaluation ran"),
        (cap and spent > 1.01 * cap, f"training and export took {spent:.1f} s, MAX_WALLCLOCK_SECONDS={cap:g}"),
        (lag, lag),
        ((summary["eval"]["ttt"] or {}).get("stopped_by_budget"),
         f"EVAL_MAX_SECONDS={cfg.eval_max_seconds:g} ended learning early: a faster machine would score otherwise"),
        *split_caveats(cfg, inputs.stream),
        (not data.startswith("fineweb10B"), f"not the challenge's data: {data}"),
        (summary["resumes"], f"resumed {len(summary['resumes'])} times"),
        (changes, "; ".join(changes)),
        (hardware["world_size"] != 8 or "H100" not in hardware["name"],
         f"not 8 x H100: {hardware['world_size']} x {hardware['name']}"),
        (True, f"not audited; ./run.sh audit {log.folder}")]
    summary["caveats"] = [text for holds, text in caveats if holds] + inputs.doubts
    if summary["val_bpb"] and inputs.of_a_byte:
        summary["val_bpb_raw_bytes"] = summary["val_bpb"] * inputs.of_a_byte
        log(f"val_bpb over the bytes of the text before it was tokenised: {summary['val_bpb_raw_bytes']:.4f}")
    summary["valid"], summary["finished"] = not reasons, True
    summary["memory_peak_bytes"] = process.memory()[1]
    write_summary(process, log.folder, summary)
    log("valid: yes" if not reasons else "valid: NO, " + "; ".join(reasons))
    for caveat in summary["caveats"]:
        log(f"note: {caveat}")
    log(f"summary: {log.folder / 'summary.json'}")
    return int(failed)


def split_caveats(cfg: Config, stream: Stream) -> list[tuple[bool, str]]:
    """What holds of the validation split, and what is said then: a cut one scores as if it were whole."""
    name, published = Path(cfg.data_path).name, PUBLISHED_TARGETS.get(cfg.vocab_size, 0)
    other = published and name == f"fineweb10B_sp{cfg.vocab_size}" and stream.targets // 2048 * 2048 != published
    return [(not stream.complete, f"partial split: its first {stream.targets} targets"),
            (stream.complete and other, f"not the published split: {stream.targets} targets, there about {published}")]


def lag_of_average(cfg: Config, summary: dict) -> str:
    """What to say where a short run's average still holds so much of its early weights that it scores worse."""
    train, averaged = summary["train"], summary["eval"]["float"]
    if not train or not averaged or not train.get("raw_bpb") or averaged["val_bpb"] <= 1.02 * train["raw_bpb"]:
        return ""
    suits = max(0.0, 1 - 20 / train["steps"])  # a memory of 5% of the steps, as the published 0.997 is of 7,000
    return (f"the averaged weights score {averaged['val_bpb']:.4f} BPB, the last ones {train['raw_bpb']:.4f}: "
            f"EMA_DECAY={cfg.ema_decay:g} remembers too much for {train['steps']} steps, "
            + (f"{suits:.2g} suits them" if suits else "EMA_ENABLED=0 suits them"))


def how_to_resume(cfg: Config, folder: Path) -> str:
    """The command that goes on after an end before the end: that of this launch, with its variables."""
    names = [name.upper() for name in sorted(cfg.explicit - {"run_id", "resume"})]
    given = {name: os.environ[name] for name in names if name in os.environ}  # others are in the checkpoint
    given |= {"RUN_ID": folder.name, "RESUME": "1"}
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    saved = checkpoints(folder) or (folder / ARTIFACT_NAME).exists()
    does = "to go on" if saved else "nothing is saved yet, to start again"
    return f"{does}: {words} {launcher()}"


def launcher() -> str:
    """The command that started this run, as run.sh says; torchrun is the parent of its ranks."""
    words = [sys.executable, *sys.orig_argv[1:]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1] or words
    return os.environ.get("LAUNCHED_BY") or shlex.join(words)


def remedy(problem: Exception) -> str:
    """What is wrong and what to do, where a library's error is one that the person who launched can mend; else ""."""
    if "an't allocate memory" in str(problem) or isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory; lower MICRO_BATCH_SEQS, VAL_BATCH_SIZE or the model's size"
    if any(kind.__name__ == "BackendCompilerFailed" for kind in type(problem).__mro__):  # of a module not yet imported
        reason = str(problem).partition("\n")[0]
        return f"USE_COMPILE: PyTorch's compiler fails here ({reason}); install a C++ compiler, or set USE_COMPILE=0"
    return ""


def main(cfg: Config, options: argparse.Namespace, signals: Signals) -> int:
    """One launch on one rank: set up the process, find, open and check, then run. Returns the exit code; raises
    UserError and Interrupted."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode must not end a run
    process, seconds = Process(cfg.compute_dtype, signals), {"earlier": 0.0}
    past = process.agree(process.together(lambda: find_past(cfg), main=True))
    if past and past.finished:
        if process.main:
            show(f"nothing to do: the run is finished, see {Path(cfg.log_dir, cfg.run_id, 'summary.json')}")
        return 0
    if past:
        seconds |= past.seconds
    if cfg.resume:
        cfg = process.together(lambda: continued(cfg, past, process.world))
        process.compute_in(cfg.compute_dtype)
    kept = Path(cfg.log_dir, cfg.run_id, PACKED_NAME) if past else None
    script = process.agree(process.together(lambda: read_script(cfg, kept), main=True))
    cfg, inputs = process.together(lambda: open_inputs(cfg, process, past, seconds, script))
    if cfg.eval_max_seconds < 0:
        cfg = dataclasses.replace(cfg, eval_max_seconds=600.0 if process.cuda else 0.0)
    process.together(lambda: check_machine(cfg, process, past, script))
    if options.check:
        said = process.together(lambda: check(cfg, process, inputs, options.ranks, options.time))
        if process.main:
            show(said)
        return 0
    log = open_log(cfg, process, inputs, past)
    summary = new_summary(cfg, process, log.folder.name) | {"data": inputs.data}
    if past:
        summary |= {"resumes": past.resumes} | (past.done or {})
    summary["seconds"] = seconds
    try:
        write_summary(process, log.folder, summary)
        code = process.agree(run(cfg, process, log, inputs, past, summary))  # no rank leaves before rank 0 has written
    except Interrupted as stop:
        if process.main:  # the other ranks may be anywhere
            with contextlib.suppress(UserError):
                save_summary(process, log.folder, summary)
        stop.args = (f"{stop}; {how_to_resume(cfg, log.folder)}",)
        raise
    except Diverged:
        raise
    except UserError as error:
        raise type(error)(f"{error}; {how_to_resume(cfg, log.folder)}") from None
    return code


if __name__ == "__main__":
    second = os.environ.get("RANK", "0") != "0"
    try:
        leave(main(*LAUNCH, Signals(listens=True)))
    except UserError as problem:
        leave(2, f"error: {one_line(problem)}", silent=second and isinstance(problem, SharedError))
    except Interrupted as problem:
        leave(128 + problem.number, "" if second else str(problem))
    except OSError as problem:
        leave(2, f"error: {problem.filename or 'output'}: {problem.strerror}; mend the path or make room")
    except Exception as problem:
        if advice := remedy(problem):
            leave(2, f"error: {advice}")
        if "gloo" in str(problem) or isinstance(problem, dist.DistError):  # the lost rank says why
            leave(1, f"error: rank {os.environ['RANK']}: another rank is gone ({one_line(problem)[:200]})")
        traceback.print_exc()
        leave(1)
