"""Train a small language model, pack it under 16,000,000 bytes, score it in bits per byte (BPB).

    python train_gpt.py --help                               every variable, by stage
    python train_gpt.py --check                              what a run would do, without running it
    python train_gpt.py                                      one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs
    TRAIN_ENABLED=0 MODEL_PATH=final_model.int6.ptz python train_gpt.py    score an artifact again
    python train_gpt.py --inspect final_model.int6.ptz       what an artifact holds

A run is: train -> average (EMA) -> export (round, fit, code) -> read back -> evaluate -> test-time training, and the
file reads in that order. Configuration is by environment variables and is checked before anything else.
Exit codes: 0 a finished run; 1 a finished run that failed a check, such as the limit; 2 something the user must mend;
128+n after signal n, when RESUME=1 goes on.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import hashlib
import io
import itertools
import json
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
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SCRIPT = Path(__file__).resolve()
DEFAULT_DATA, DEFAULT_TOKENIZER = "./data/datasets/fineweb10B_sp1024", "./data/tokenizers/fineweb_1024_bpe.model"

# ==== Configuration: every variable once, with its default, what it accepts and what it is for ========================


class UserError(Exception):
    """Something the person who launched the run can mend: one line, exit code 2. `shared`: all ranks raise it alike."""

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


def require(holds, problem: str):
    """UserError with this problem unless it holds."""
    if not holds:
        raise UserError(problem)


def var(default, accepts: str, text: str, stage: str = ""):
    """A configuration field. `accepts` is shown in --help and enforced by `parse`; `stage` opens a section."""
    return dataclasses.field(default=default, metadata={"accepts": accepts, "text": text, "stage": stage})


@dataclass(frozen=True)
class Config:
    """One run's settings. Each field is set by the environment variable of its name in capitals."""

    preset: str = var("auto", "auto|seed|frontier|demo", "where defaults come from; auto: seed with a GPU, else demo",
                      "Run")
    run_id: str = var("", "name", "folder of this run under LOG_DIR; empty: time and seed")
    seed: int = var(1337, "0..4294967295", "random seed of weights and, with SHUFFLE=1, of the data order")
    log_dir: str = var("logs", "path", "where runs are kept")
    train_log_every: int = var(100, ">=0", "steps between train_loss lines, besides the first 10; 0 off")
    ckpt_every_seconds: float = var(0.0, ">=0", "seconds between checkpoints, of training and of TTT; 0 off")
    keep_ckpts: int = var(2, ">=1", "checkpoints of training that stay")
    resume: str = var("0", "0|1|path", "1: go on with RUN_ID, or start it; a run's folder or a checkpoint: with that")
    nan_policy: str = var("stop", "stop|skip", "at a step that is not finite: stop, or skip it, three in a row at most")
    strict_env: bool = var(True, "0|1", "1: a variable that looks misspelt stops the run; 0: it is a warning")
    env_extra: str = var("", "text", "comma-separated names of your own variables that may look like ours")

    data_path: str = var(DEFAULT_DATA, "path", "folder of shards; the default is sought above the script too", "Data")
    tokenizer_path: str = var("", "path", f"SentencePiece; empty: DATA_PATH/tokenizer.model or {DEFAULT_TOKENIZER}")
    shuffle: bool = var(False, "0|1", "1: the order of sequences within an epoch is drawn from SEED")
    val_token_limit: int = var(0, ">=0", "score only the first N targets of the validation split; 0 all")

    vocab_size: int = var(1024, "2..65535", "tokens, as in the tokenizer", "Model")
    num_layers: int = var(11, "1..256", "transformer blocks")
    model_dim: int = var(512, "2..16384", "width of the residual stream")
    num_heads: int = var(8, "1..1024", "query heads")
    num_kv_heads: int = var(4, "1..1024", "key and value heads, shared by groups of query heads")
    mlp_mult: float = var(3.0, "0.01..64", "MLP hidden width as a multiple of MODEL_DIM")
    train_seq_len: int = var(2048, "1..1048576", "tokens a training sequence")
    tie_embeddings: bool = var(True, "0|1", "1: the output layer is the token embedding")
    rope_base: float = var(10000.0, ">=1", "RoPE base up to length 1024; grows with longer sequences")
    rope_dims: int = var(16, ">=0", "dimensions of a head that RoPE turns, even; 0 all")
    qk_gain_init: float = var(1.5, ">=0", "initial gain on normalised queries, one a head")
    mlp_slope: float = var(0.0, "0..1", "slope below 0 of what the MLP squares; 0: squared ReLU")
    ve_last_n: int = var(0, "0..256", "last layers whose values are given an embedding of the token; 0 off")
    ve_dim: int = var(64, "1..16384", "width of that embedding")
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
    model_path: str = var("", "path", "artifact to evaluate when TRAIN_ENABLED=0")
    train_batch_tokens: int = var(786432, ">=1", "tokens a step over all ranks, a multiple of TRAIN_SEQ_LEN")
    micro_batch_seqs: int = var(0, ">=0", "sequences a forward pass of one rank; 0: from the device's memory")
    iterations: int = var(9000, ">=1", "steps at most")
    max_wallclock_seconds: float = var(596.0, ">=0", "training seconds at most; 0 no cap")
    warmdown_iters: int = var(3000, ">=0", "final steps of linear decay to 0, in their measured time under a cap")
    warmup_steps: int = var(20, ">=0", "steps that prime compilation on random tokens and are undone")
    val_loss_every: int = var(0, ">=0", "steps between validations of the raw weights, off the clock; 0 off")
    use_compile: str = var("auto", "auto|0|1", "torch.compile; auto: on CUDA")
    compute_dtype: str = var("auto", "auto|bf16|fp32", "auto: bf16 on GPUs and CPUs with bf16 instructions")

    matrix_lr: float = var(0.025, ">=0", "Muon's rate, for matrices", "Optimizers")
    tied_embed_lr: float = var(0.035, ">=0", "AdamW's rate for all embeddings when the output layer is tied")
    embed_lr: float = var(0.6, ">=0", "the same when untied")
    head_lr: float = var(0.008, ">=0", "Adam's rate for the untied output layer")
    scalar_lr: float = var(0.025, ">=0", "AdamW's rate for vectors, scalars and the sidecar's kernel")
    tied_embed_init_std: float = var(0.005, ">0", "standard deviation of initial tied embeddings")
    muon_momentum: float = var(0.99, "0..<1", "Muon's momentum after its warm-up")
    muon_momentum_warmup_start: float = var(0.92, "0..<1", "Muon's momentum at step 0")
    muon_momentum_warmup_steps: int = var(1500, ">=0", "steps of that warm-up")
    muon_backend_steps: int = var(5, "1..100", "Newton-Schulz iterations")
    muon_beta2: float = var(0.0, "0..<1", "memory of the row sizes by which Muon's updates are divided; 0 off")
    muon_wd: float = var(0.04, ">=0", "Muon's decoupled weight decay")
    adam_wd: float = var(0.04, ">=0", "AdamW's weight decay")
    beta1: float = var(0.9, "0..<1", "Adam's first beta")
    beta2: float = var(0.95, "0..<1", "Adam's second beta")
    adam_eps: float = var(1e-8, ">0", "Adam's epsilon")
    grad_clip_norm: float = var(0.3, ">=0", "global gradient norm at most; 0 off")
    ema_enabled: bool = var(True, "0|1", "1: export the exponential moving average of the weights")
    ema_decay: float = var(0.997, "0..<1", "its decay a step")

    export_enabled: bool = var(True, "0|1", "0: evaluate the averaged weights without an artifact", "Export")
    artifact_limit_bytes: int = var(16_000_000, ">=1", "code + model bytes at most")
    export_fill: bool = var(True, "0|1", "1: finer values, up to 8 bits each, in the room that is left")
    export_max_seconds: float = var(-1.0, ">=-1", "of MAX_WALLCLOCK_SECONDS, for search; 0 no limit; -1: 2%, >=10 s")
    calibration_tokens: int = var(65536, ">=1", "training tokens on which rounding is calibrated")
    save_float: bool = var(False, "0|1", "1: also keep the averaged weights, to export again with MODEL_PATH")
    quant: str = var("balanced", "balanced|rowmax", "rounding; balanced: by what errors cost, rowmax: published")
    quant_bits_attn: float = var(6.0, "2..8", "bits of attention matrices, one more halves steps; a search starts here")
    quant_bits_mlp: float = var(6.0, "2..8", "the same for MLP matrices")
    quant_bits_embed: float = var(8.0, "2..8", "for token and value embeddings and an untied output layer")
    quant_bits_bigram: float = var(8.0, "2..8", "for the bigram embedding and its projection")
    quant_bits_sidecar: float = var(6.0, "2..8", "for the sidecar")
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
    ttt_lora_rank: int = var(32, "1..16384", "lora: rank of the adapters; the default is clipped to MODEL_DIM")
    ttt_lora_lr: float = var(0.004, "0..1000", "lora: Adam's rate")
    ttt_lora_chunk_tokens: int = var(128, ">=1", "lora: targets scored, then learnt from, at a time; a window at most")
    ttt_chunk_tokens: int = var(16384, ">=1", "full: targets scored, then learnt from, at a time")
    ttt_optimizer: str = var("adamw", "adamw|sgd", "full: the optimizer")
    ttt_lr: float = var(0.001, ">=0", "full: its rate")
    ttt_lr_min: float = var(0.0, ">=0", "full: where TTT_COSINE ends within a chunk")
    ttt_lr_end: float = var(1.0, "0..1", "full: a cosine across chunks takes the rate to this share of it; 1 no decay")
    ttt_cosine: bool = var(False, "0|1", "full: 1: the rate falls by a cosine within a chunk")
    ttt_epochs: int = var(3, ">=0", "full: passes over each scored chunk")
    ttt_warmup_epochs: int = var(0, ">=0", "full: passes of linear warm-up under TTT_COSINE")
    ttt_wd: float = var(0.0, ">=0", "full: weight decay")
    ttt_momentum: float = var(0.9, "0..<1", "full: momentum of sgd")
    ttt_batch_seqs: int = var(0, ">=0", "full: sequences a step of a rank; 0: all of a chunk's, for any ranks")
    ttt_freeze_blocks: int = var(0, ">=0", "full: first blocks that do not adapt")
    ttt_pull: float = var(0.4, "0..1", "full: share of the way back to the artifact's weights, after each chunk")
    ttt_grad_clip: float = var(1.0, ">=0", "gradient norm at most (lora: of each document); 0 off")

    audit: bool = var(False, "0|1", "1: prove on an excerpt that the evaluation behind val_bpb is causal", "Audit")
    audit_tokens: int = var(0, ">=0", "targets of the excerpt, a window at least; 0: four windows")

    explicit: frozenset = frozenset()  # names of the fields that the environment set

    @property
    def eval_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def export_seconds(self) -> float:
        """Guard on calibration and search, 0 for none: it is training time, so training ends that much sooner."""
        cap = self.max_wallclock_seconds * self.train_enabled
        return self.export_max_seconds if self.export_max_seconds >= 0 else min(max(10.0, cap / 50), cap / 4)

    @property
    def sparse_sites(self) -> tuple[int, ...]:
        """Layers followed by the shared sidecar."""
        end = self.num_layers if self.sparse_end_layer < 0 else min(self.sparse_end_layer + 1, self.num_layers)
        sites = tuple(range(self.sparse_start_layer, end, self.sparse_every))[: self.sparse_max_sites or None]
        return sites if self.sparse_start_layer >= 0 and self.sparse_hidden_dim else ()

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in VARIABLES}

    def overrides(self) -> dict:
        return {n.upper(): getattr(self, n) for n in sorted(self.explicit) if n != "preset"}


PRESETS = {
    "seed": {"export_fill": False},  # the defaults above are the published ones, but for QUANT, which is better
    "frontier": {  # what won against it at CPU size, see records/ablations; nothing of it was measured at full size
        "mlp_slope": 0.5, "logit_softcap": 15.0, "ve_last_n": 4, "sparse_hidden_dim": 0, "muon_beta2": 0.95,
        "warmdown_iters": 4500, "ttt_lora_chunk_tokens": 64, "quant_min_numel": 32768,
    },
    "demo": {  # a few minutes on two CPU cores, on the embedded corpus; as many bytes a parameter as the seed has
        "num_layers": 4, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "sparse_start_layer": 2,
        "train_seq_len": 256, "train_batch_tokens": 4096, "iterations": 3000, "max_wallclock_seconds": 180.0,
        "warmdown_iters": 400, "warmup_steps": 0, "muon_momentum": 0.95, "muon_momentum_warmup_steps": 100,
        "ema_decay": 0.97, "train_log_every": 50, "val_token_limit": 131072, "quant_min_numel": 4096,
        "calibration_tokens": 32768, "artifact_limit_bytes": 750_000, "ttt_lora_chunk_tokens": 64,
    },
}

# Switches of this field's other scripts that are not implemented here: harmless when off, an error when on.
NOT_IMPLEMENTED = ("SWA_ENABLED", "QAT_ENABLED", "LATE_QAT", "MTP_NUM_HEADS", "LAWA_ENABLED", "DTG_ENABLED",
                   "VE_ENABLED", "GATED_ATTENTION", "VALUE_RESIDUAL", "TRIGRAM", "NUM_LOOPS", "PARALLEL_START_LAYER",
                   "SKIP_GATES", "SKIP_GATES_ENABLED", "ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED", "MIN_LR",
                   "SPARSE_ATTN_GATE_ENABLED", "MUON_ROW_NORMALIZE", "EMBEDDING_DIM", "CASEOPS_ENABLED", "COMPRESSOR",
                   "LQER_ENABLED", "EMBED_BITS", "MATRIX_BITS", "EMBED_CLIP_SIGMAS", "MATRIX_CLIP_SIGMAS",
                   "PHASED_TTT_NUM_PHASES")
# A name with a prefix of the first group was meant for us; one of the second never was, or is a setting of the above.
FAMILIES = ("ADAM_", "AUDIT_", "BIGRAM_", "CKPT_", "EMA_", "EVAL_", "EXPORT_", "FINAL_", "MUON_", "QUANT_", "RESUME_",
            "ROPE_", "SPARSE_", "TIED_", "TRAIN_", "TTT_", "VAL_", "VE_", "WARMDOWN_", "WARMUP_", "XSA_")
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCH", "PET_", "CUDA_", "NVIDIA_", "NCCL_",
           "GLOO_", "OMP_", "MKL_", "KMP_", "HF_", "TRITON_", "PYTHON", "PIP_", "SLURM_", "MODULE", "MATCHED_", "SWA_",
           "QAT_", "MTP_", "LAWA_", "DTG_")

VARIABLES = [f for f in dataclasses.fields(Config) if "accepts" in f.metadata]
_stages = list(itertools.accumulate((f.metadata["stage"] for f in VARIABLES), lambda old, new: new or old))
TTT_LORA = {f.name for f in VARIABLES if f.name.startswith("ttt_lora")}  # what each mode alone listens to
TTT_FULL = {f.name for f in VARIABLES if f.metadata["text"].startswith("full: ")}
MODEL_FIELDS = [f for f, stage in zip(VARIABLES, _stages, strict=True) if stage == "Model"]  # stored in artifacts


def parse(kind: type, accepts: str, raw: str):
    """A variable's value from its text. Raises ValueError when `accepts` does not admit it."""
    if kind is bool:
        ok, value = raw in ("0", "1"), raw == "1"
    elif kind is str:
        ok = not re.search("[\n\0]", raw) and ("|" not in accepts or "path" in accepts or raw in accepts.split("|"))
        short = len(raw.encode()) < 200  # encode() refuses what no log could hold
        ok, value = ok and (accepts != "name" or raw not in (".", "..") and "/" not in raw and short), raw
    else:
        value, (low, _, high) = kind(raw), accepts.partition("..")
        bounds = [low] if low[0] == ">" else [f">={low}", f"{'<' if high[0] == '<' else '<='}{high.lstrip('<')}"]
        against = [(b, float(b.lstrip("<>="))) for b in bounds]
        ok = all((value > x if b[0] == ">" else value < x) or ("=" in b and value == x) for b, x in against)
        ok = ok and abs(value) <= 1e15  # also refuses nan and inf
    if not ok:
        raise ValueError
    return value


def check_value(field: dataclasses.Field, value):
    """A file's value for a variable, as it is. Raises ValueError or TypeError for what the variable does not accept."""
    if type(value) not in (field.type, int if field.type is float else field.type):
        raise TypeError(f"{field.name.upper()} is not of type {field.type.__name__}")
    if value != "":
        parse(field.type, field.metadata["accepts"], str(int(value) if field.type is bool else value))
    return value


def near(a: str, b: str, edits: int) -> bool:
    """Whether at most so many insertions, deletions and substitutions turn `a` into `b`."""
    if a[:1] == b[:1]:
        return not a or near(a[1:], b[1:], edits)
    return edits > 0 and any(near(x, y, edits - 1) for x, y in ((a[1:], b), (a, b[1:]), (a[1:], b[1:])))


def misspelt(names, extra: set[str]) -> list[str]:
    """A line for each environment name that looks meant for this script but is not one of its variables."""
    ours, lines = sorted(f.name.upper() for f in VARIABLES), []
    for name in sorted(set(names) - {*ours, *NOT_IMPLEMENTED, *extra}):
        family = next((prefix for prefix in FAMILIES if name.upper().startswith(prefix)), "")
        close = [o for edits in (1, 2) for o in ours if near(name.upper(), o, edits)]
        if (close or family) and not name.startswith(FOREIGN):
            close += difflib.get_close_matches(name.upper(), [o for o in ours if o.startswith(family)], 1, 0.0)
            lines.append(f"{name}: no such variable; did you mean {close[0]}? (ENV_EXTRA={name} lets it pass)")
    return lines


def has_gpu() -> bool:
    """Whether this machine shows a GPU, told without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "any").strip() in ("", "-1")
    return not hidden and any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def inductor_defaults(torch_version: str) -> dict[str, str]:
    """Variables that torch's compiler should find on a GPU unless they are set."""
    # torch 2.10 to 2.12 fuse reductions over rows with those over columns, and by published runs a step takes 9% longer
    slow = re.match(r"2\.(10|11|12)\b", torch_version)
    return {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"} if slow else {}


def load_config(environ, ranks: int = 1) -> tuple[Config, list[str], list[str]]:
    """The configuration that the environment asks for, all problems and all warnings, a line each."""
    problems, values = [], {}
    for f in VARIABLES:
        name, raw = f.name.upper(), environ.get(f.name.upper())
        try:
            if raw is not None and (raw or f.type is not str):
                values[f.name] = parse(f.type, f.metadata["accepts"], raw)
        except (ValueError, OverflowError):
            most = ", at most 1e15" if f.metadata["accepts"].startswith(">") else ""
            problems.append(f"{name}={raw[:80]!r}: accepts {f.type.__name__} {f.metadata['accepts']}{most}")
    problems += [f"{name}={environ[name][:80]!r}: not implemented in this script; unset it or set it to 0"
                 for name in NOT_IMPLEMENTED if environ.get(name, "0") not in ("0", "", "0.0")]
    preset = values.get("preset", "auto")
    preset = ("seed" if has_gpu() else "demo") if preset == "auto" else preset
    cfg = Config(**{**PRESETS[preset], **values, "preset": preset, "explicit": frozenset(values)})
    full, lora = (sorted(n.upper() for n in cfg.explicit & names) if cfg.ttt_enabled else [] for names in
                  (TTT_FULL, TTT_LORA))
    idle = {"full": lora, "lora": full, "auto": []}[cfg.ttt_mode]
    warnings = [f"{name}: no effect with TTT_MODE={cfg.ttt_mode}" for name in idle]
    if cfg.ttt_mode == "auto":
        cfg = dataclasses.replace(cfg, ttt_mode="full" if full else "lora")
        if full and lora:
            problems.append(f"TTT_MODE: {full[0]} belongs to full and {lora[0]} to lora; say which")
    later = cfg.resume != "0" or not cfg.train_enabled and cfg.model_path  # the run or the artifact brings the rest
    problems += [] if problems else [s for s in conflicts(cfg, ranks) if not later or s.startswith("RESUME=")]
    typos = misspelt(environ, {n.strip() for n in cfg.env_extra.split(",")})
    return (cfg, problems + typos, warnings) if cfg.strict_env else (cfg, problems, typos + warnings)


def conflicts(cfg: Config, ranks: int) -> list[str]:
    """A line for each group of settings that cannot go together."""
    heads, dim, trains, ttt = cfg.num_heads, cfg.model_dim, cfg.train_enabled, cfg.ttt_enabled
    each, seqs, cap = dim // heads, cfg.train_batch_tokens // cfg.train_seq_len, cfg.max_wallclock_seconds
    slides, full = cfg.final_sliding_eval_enable or ttt, ttt and cfg.ttt_mode == "full"
    rules = [  # (what must hold, of which variable, what to say where it does not)
        (dim % heads == 0, "model_dim", f"must be a multiple of NUM_HEADS={heads}"),
        (heads % cfg.num_kv_heads == 0, "num_kv_heads", f"must divide NUM_HEADS={heads}"),
        (each % 2 == 0, "model_dim", f"must give each head an even width for RoPE, not {each}"),
        (cfg.rope_dims % 2 == 0 and cfg.rope_dims <= each, "rope_dims", f"must be even and at most a head's {each}"),
        (cfg.bigram_vocab_size != 1, "bigram_vocab_size", "must be 0 (off) or at least 2"),
        (cfg.mlp_dim > 0, "mlp_mult", f"leaves no hidden unit at MODEL_DIM={dim}"),
        (not slides or cfg.eval_stride <= cfg.eval_len, "eval_stride", f"must not exceed the window's {cfg.eval_len}"),
        (not ttt or cfg.eval_stride > 0, "eval_stride", "TTT_ENABLED=1 scores in windows; give a stride"),
        (not full or cfg.ttt_chunk_tokens >= cfg.eval_stride, "ttt_chunk_tokens", "must be at least EVAL_STRIDE"),
        (not full or cfg.ttt_freeze_blocks <= cfg.num_layers, "ttt_freeze_blocks", f"only {cfg.num_layers} blocks"),
        (cfg.ttt_lora_rank <= dim or "ttt_lora_rank" not in cfg.explicit, "ttt_lora_rank",
         f"must not exceed the width MODEL_DIM={dim}"),
        (not cfg.export_enabled or not trains or not cap or 0 < cfg.export_seconds < cap, "export_max_seconds",
         "must be above 0 and below MAX_WALLCLOCK_SECONDS"),
        (trains or cfg.model_path, "model_path", "TRAIN_ENABLED=0 needs the artifact to start from"),
        (not trains or not cfg.model_path, "model_path", "only TRAIN_ENABLED=0 starts from it; set that or unset this"),
        (cfg.resume != "1" or cfg.run_id, "resume", "needs the RUN_ID of the run to go on with, or to start"),
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
    lines = [__doc__.strip(), "", "Options: --help; --check [--step-ms MS] [--ranks N]: for N ranks at MS a step; "
             "--inspect FILE: an artifact's contents"]
    for f in VARIABLES:
        others = [f"{p}: {int(v) if f.type is bool else v}" for p, v in ((p, of.get(f.name)) for p, of in
                  PRESETS.items()) if v is not None]
        default = str(int(f.default) if f.type is bool else f.default) + (f" ({', '.join(others)})" if others else "")
        lines += ["", f.metadata["stage"]] if f.metadata["stage"] else []
        lines.append(f"  {f.name.upper():26} {default or 'empty'}; {f.metadata['accepts']}\n{'':31}"
                     f"{f.metadata['text']}")
    return "\n".join(lines)


def one_line(problem) -> str:
    """A message without the line breaks that file names and variables may bring."""
    return " ".join(str(problem).splitlines())


def show(text: str):
    """Print what was asked for; who reads its head only is served. Ends the process where it cannot be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        leave(2, f"error: output: {error.strerror}; mend the path or make room")


def leave(code: int, said: str = "", silent: bool = False):
    """End this rank with what it has to say. A silent one waits: a launcher kills all ranks once one has failed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if silent:
        time.sleep(3)
    elif said:
        sys.stderr.write(said + "\n")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe or a full disk, which the interpreter would stumble over again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # gloo's threads may outlive the interpreter and then abort the process
    sys.exit(code)


def read_launch(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Configuration and options of this launch. Ends the process for --help (0) and for bad values (2)."""
    parser = argparse.ArgumentParser(add_help=False, usage="[VARIABLE=VALUE ...] train_gpt.py [--help | --check | "
                                     "--inspect FILE]")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--inspect", metavar="FILE")
    parser.add_argument("--step-ms", type=float, default=106.0)
    parser.add_argument("--ranks", type=int)
    options = parser.parse_args(argv)
    if options.help:
        show(help_text())
        leave(0)
    odd = [f"{name}={os.environ[name]!r}: is the launcher's to set; unset it or launch with torchrun" for name in
           ("RANK", "WORLD_SIZE", "LOCAL_RANK") if not re.fullmatch(r"[0-9]{1,6}", os.environ.get(name, "0"), re.A)]
    if options.ranks is None:
        options.ranks = 1 if odd else int(os.environ.get("WORLD_SIZE", "1"))
    cfg, problems, warnings = load_config(os.environ, max(options.ranks, 1))
    problems += odd + ["--ranks and --step-ms: must be above 0"] * (options.ranks < 1 or not options.step_ms > 0)
    silent = not odd and os.environ.get("RANK", "0") != "0"
    lines = [f"error: {one_line(p)}" for p in problems] + [f"warning: {one_line(w)}" for w in warnings]
    if problems:
        leave(2, "\n".join(lines), silent)
    sys.stderr.writelines([] if silent else [line + "\n" for line in lines])
    return cfg, options


if __name__ == "__main__":  # here, so that a typo is answered before the seconds that importing torch takes
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet, and no traceback
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # None where it was closed
    LAUNCH = read_launch(sys.argv[1:])
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower
if has_gpu():
    with contextlib.suppress(metadata.PackageNotFoundError):  # a torch that no installer knows
        for name, value in inductor_defaults(metadata.version("torch")).items():
            os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import zstandard  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402

try:  # Hopper's FlashAttention-3, where someone has installed it
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

# ==== Process and log: this rank among the others, its device, the signals it gets, what it tells people ==============


class Interrupted(BaseException):
    """SIGINT or SIGTERM, at a place where leaving loses nothing."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class PeerLost(Exception):
    """An exchange with the other ranks failed, most likely because one is gone; that one says why."""


class Signals:
    """SIGINT and SIGTERM. The first raises Interrupted, or waits while it is held until what must be finished is
    saved; a second ends the process at once. Under torchrun, which adds its own, signals within 2 s are one."""

    def __init__(self, listens: bool = False):
        self.caught, self.held, self.began = 0, False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM) if listens else ():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame):
        if not self.caught:
            self.caught, self.began = number, time.monotonic()
            if not self.held:
                raise Interrupted(number)
            if os.environ.get("RANK", "0") == "0":
                sys.stderr.write(f"{signal.Signals(number).name}: finishing the step and saving; a second one leaves "
                                 "at once\n")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self.began > 2:
            os._exit(128 + number)

    @contextlib.contextmanager
    def hold(self):
        """Within this a signal waits: it is looked for where there is something to save, or raised at the end."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before
        if self.caught and not before:
            raise Interrupted(self.caught)


def wait_until(ready):
    """Wait until ready() holds, in short sleeps: a signal's handler runs between them, where a wait inside the driver
    or a library for what another rank never sends would hold it up for good."""
    while not ready():
        time.sleep(1e-4)


def keep_freed_memory():
    """Let glibc reuse large blocks: by default each activation is mapped, and zeroed by the kernel, page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option, most in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, most)


class Process:
    """This rank, its device and the few ways it talks to the other ranks; with one rank nothing is sent.

    Raises UserError when the machine has fewer GPUs than ranks or ranks have no launcher, PeerLost when one is gone.
    """

    def __init__(self, compute_dtype: str = "auto", signals: Signals | None = None):
        self.signals, self.lock = signals or Signals(), None
        self.graphs: list[dict] = []  # that torch has compiled in this process
        self.rank, self.world, local = (int(os.environ.get(n, d)) for n, d in
                                        (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
        self.main, self.cuda = self.rank == 0, torch.cuda.is_available()
        if self.cuda and local >= torch.cuda.device_count():
            raise UserError(f"local rank {local} has no GPU of its own, this machine shows "
                            f"{torch.cuda.device_count()}; launch with --nproc_per_node at most that")
        self.device = torch.device("cuda", local) if self.cuda else torch.device("cpu")
        torch.cuda.set_device(self.device) if self.cuda else keep_freed_memory()
        self._apart = self.thread()  # for exchanges that block
        if self.world > 1:
            with self._exchange():
                try:
                    store, *_ = next(rendezvous("env://", self.rank, self.world))
                except ValueError as error:  # MASTER_ADDR, MASTER_PORT
                    raise UserError(f"WORLD_SIZE={self.world}: {error}; launch with torchrun") from None
                if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):  # else restarts are not counted alike
                    # torchrun keeps one store over restarts: without this a rank may meet a dead one's address
                    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo", store=store, rank=self.rank,
                                        world_size=self.world)
        cpuinfo = Path("/proc/cpuinfo")
        self.cpuinfo = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
        self.compute_in(compute_dtype)

    def compute_in(self, compute_dtype: str):
        """Set COMPUTE_DTYPE; auto goes by features, never by a timing, so that a run is repeatable."""
        bf16 = compute_dtype == "bf16" or compute_dtype == "auto" and (
            torch.cuda.is_bf16_supported(including_emulation=False) if self.cuda else
            re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", self.cpuinfo))
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @contextlib.contextmanager
    def _exchange(self):
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(str(error).strip().splitlines()[0]) from error

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place."""
        self.begin_sum_(tensor)()
        return tensor

    def begin_sum_(self, tensor: Tensor):
        """Begin to sum `tensor` over the ranks, in place, beside what is computed next. Returns what waits for it."""
        if self.world == 1:
            return lambda: None
        with self._exchange():
            work = dist.all_reduce(tensor, async_op=True)

        def wait():
            with self._exchange():
                if not tensor.is_cuda:
                    wait_until(work.is_completed)
                work.wait()  # on a GPU the stream waits, not the host

        return wait

    def heard(self, seconds: float) -> tuple[float, int]:
        """Rank 0's `seconds`, and the signal that any rank has caught, 0 for none; on every rank."""
        both = torch.tensor((seconds if self.main else 0.0, self.signals.caught), dtype=torch.float64)
        if self.world > 1:
            with self._exchange():
                work = dist.all_reduce(both, dist.ReduceOp.MAX, async_op=True)
                wait_until(work.is_completed)
                work.wait()  # which raises what went wrong
        return float(both[0]), int(both[1])

    def agree(self, value):
        """Rank 0's `value` on every rank, by way of the CPU so that no device is waited for."""
        box = [value]
        if self.world > 1:
            self._talk(dist.broadcast_object_list, box, 0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value) -> list:
        """Each rank's `value`, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            self._talk(dist.all_gather_object, values, value)
        return values

    def _talk(self, exchange, *arguments, **more):
        """An exchange that blocks, in a thread, so that signals are handled while others let this rank wait."""
        with self._exchange():
            self._apart.submit(exchange, *arguments, **more).result()

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
        if any(messages := self.gather(message)):
            raise UserError(next(filter(None, messages)), shared=True)
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
            wait_until(mark.query)

    def synchronize(self):
        """Wait until the device has done all that was asked of it."""
        self.reached(self.mark())

    def thread(self) -> ThreadPoolExecutor:
        """A thread that works on this rank's device; by itself it would open a context of half a GB on the first."""
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_device if self.cuda else None,
                                  initargs=(self.device,) if self.cuda else ())

    def memory(self) -> tuple[int, int]:
        """Bytes of memory of the device, and the most held so far (on a GPU by torch, on a CPU by the process)."""
        if self.cuda:
            return torch.cuda.get_device_properties(self.device).total_memory, torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), peak

    def hardware(self) -> dict:
        """What this run runs on, for the log and the summary."""
        cpu = re.search(r"model name\s*:\s*(.+)", self.cpuinfo)
        name = cpu.group(1).strip() if cpu else platform.processor() or platform.machine()
        return {"device": self.device.type, "name": torch.cuda.get_device_name() if self.cuda else name,
                "world_size": self.world, "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(),
                "memory_bytes": self.memory()[0]}


class Log:
    """Rank 0's voice: stdout, train.log and metrics.jsonl in `folder`. Other ranks are silent.

    On a terminal progress is one live line, rewritten in place; elsewhere a plain line now and then. What a full or
    broken disk does not take is kept and written later: no run ends for a line.
    """

    def __init__(self, process: Process, folder: Path):
        self.main, self.folder, self.terminal, self._live_at = process.main, folder, sys.stdout.isatty(), 0.0
        self._unwritten: dict[str, bytes] = {}

    def __call__(self, text: str, console: bool = True, file: str = "train.log"):
        """A line for people and for the field's log parsers."""
        if not self.main:
            return
        if console:
            self._print(("\r\033[K" if self.terminal else "") + text + "\n")
        kept = self._unwritten.get(file, b"")
        rest = kept + (text + "\n").encode("utf-8", "backslashreplace")
        try:
            with open(self.folder / file, "ab", buffering=0) as out:
                while rest:
                    rest = rest[out.write(rest) :]
        except OSError as error:
            if not kept:
                self._print(f"warning: {self.folder / file}: {len(rest)} bytes cannot be written ({error.strerror}); "
                            "the run goes on, make room and they are written with the next line\n")
        self._unwritten[file] = rest

    @staticmethod
    def _print(text: str):
        with contextlib.suppress(OSError):  # nor for a closed terminal
            print(text, end="", flush=True)

    def silent(self):
        """The same log on a rank that says nothing."""
        log = copy.copy(self)
        log.main = False
        return log

    def metric(self, **values):
        """A line of metrics.jsonl."""
        self(json.dumps(values), console=False, file="metrics.jsonl")

    def live(self, text: str, done: float, seconds: float, every: float = 15.0):
        """Progress: the share `done` of the work after `seconds`, with the time left."""
        now = time.monotonic()
        if self.main and done > 0 and now - self._live_at >= (0.2 if self.terminal else every):
            self._live_at = now
            text += f": {done:4.0%}, {duration(seconds)} elapsed, {duration(seconds / done - seconds)} left"
            width = shutil.get_terminal_size().columns - 1
            self._print("\r\033[K" + text[:width] if self.terminal else text + "\n")


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m05s, 2h10m."""
    s = round(seconds)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


# ==== Checkpoints: what a run needs to go on where it stopped =========================================================


def write_atomically(path: Path, data, size: int = 0, patience: float = 0.0, say=print):
    """Write a file whole or not at all: bytes, or the `size` bytes that data(file) writes. Where there is no room it is
    tried again for `patience` seconds; then UserError, naming the path and the bytes needed."""
    partial = path.with_name(path.name + ".partial")
    for last in (*[False] * math.ceil(patience / 5), True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                data(file) if callable(data) else file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            problem = f"{path}: its {size or len(data)} bytes cannot be written ({error.strerror}); make room"
        if last:
            raise UserError(problem)
        say(f"{problem}; what it holds is kept nowhere else, it is tried again for up to {patience:.0f} s")
        time.sleep(5)


def read_state(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The facts and tensors of a checkpoint. Raises UserError when it is not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:  # zip: every array is read against its checksum
            if sum(entry.file_size for entry in file.zip.infolist()) > path.stat().st_size:
                raise ValueError("it claims more than it holds")
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        facts = json.loads(bytes(tensors.pop("facts").numpy()))
        check_settings(facts)
        counts = [facts.get(name, 0) for name in ("step", "dropped", "seconds", "train_tokens")]
        if any(isinstance(n, bool) or not 0 <= n <= 1e15 for n in counts) or counts[0] * 1.0 != int(counts[0]):
            raise ValueError("its step or seconds cannot be")
        if not parse(str, "name", facts["run_id"]):
            raise ValueError("it does not say of which run")
        return {**facts, "file": str(path)}, tensors
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a checkpoint or a run's folder") from None
    except Exception as error:  # the library raises its own, zipfile's and zlib's errors on foreign bytes
        raise UserError(f"{path}: not a whole checkpoint ({one_line(error) or 'empty'}); RESUME=1 takes the newest "
                        "good one") from None


def check_settings(facts: dict):
    """ValueError, TypeError or KeyError where a file's settings are not what the variables would accept."""
    settings, fields = facts["settings"], {f.name: f for f in VARIABLES}
    for name in settings.keys() & fields.keys():
        check_value(fields[name], settings[name])
    if not set(facts["explicit"]) <= fields.keys() or not fields.keys() <= settings.keys():
        raise ValueError("its settings are those of another script")


def step_files(folder: Path) -> list[Path]:
    """Checkpoints of training, oldest first."""
    found = [p for p in folder.glob("step_*.npz") if re.fullmatch(r"step_\d+", p.stem, re.A)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


class Checkpoints:
    """A run's states in `folder`: .npz files (no pickle), each written whole or not at all by a background thread, so
    that training waits for a copy in the device's memory only."""

    def __init__(self, log: Log, keep: int, about: dict, thread: ThreadPoolExecutor):
        self.log, self.folder, self.keep, self.about = log, log.folder / "checkpoints", keep, about
        self._pool, self._writing, self.newest, self.problem = thread, None, "", ""

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict) -> bool:
        """Begin to write a state; False if the one before is still being written."""
        if self._writing and not self._writing.done():
            return False
        self.wait()
        copies = {n: t.detach().clone() for n, t in tensors.items()}
        side = next((torch.cuda.Stream(t.device) for t in copies.values() if t.is_cuda), None)
        if side:  # on a stream of its own, so that training's does not wait for the way to the host
            side.wait_stream(torch.cuda.current_stream())
        self._writing = self._pool.submit(self._write, self.folder / name, copies, facts, side)
        return True

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict, side) -> Path:
        with torch.cuda.stream(side) if side else contextlib.nullcontext():
            arrays = {name: t.cpu().numpy() for name, t in tensors.items()}
        if not all(np.isfinite(arrays[name]).all() for name in ("weights", "average") if name in arrays):
            raise UserError(f"{path}: not written, its weights are not finite")
        arrays["facts"] = np.frombuffer(json.dumps(self.about | facts).encode(), np.uint8)
        write_atomically(path, lambda file: np.savez(file, **arrays), sum(a.nbytes for a in arrays.values()))
        for old in step_files(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def wait(self) -> str:
        """Wait for the state being written. Its path, or nothing where it could not be written, which is said."""
        writing, self._writing = self._writing, None
        try:
            if writing:
                self.newest, self.problem = str(writing.result()), ""
        except UserError as error:
            self.problem = str(error)
            self.log(f"warning: checkpoint {error}; the run goes on")
        return "" if self.problem else self.newest

    def remove(self, pattern: str):
        """Delete what is not needed any more."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(pattern):
                path.unlink()
            self.folder.rmdir()  # where nothing is left


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    return {f"optimizer.{i}.{name}": value for i, state in optimizer.state_dict()["state"].items()
            for name, value in state.items() if value is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]):
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            state[int(name.split(".")[1])][name.split(".")[2]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ==== Data: shards of tokens, the bytes that each target stands for, batches ==========================================

BOS_ID = 1  # opens every document
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024


def find_path(value: str) -> Path:
    """`value`; the defaults are also sought above the script, so that a copy in a records folder finds the data."""
    above = SCRIPT.parents if value in (DEFAULT_DATA, DEFAULT_TOKENIZER) else ()
    return next((p for p in (Path(value), *(folder / value for folder in above)) if p.exists()), Path(value))


def open_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens (uint16). Raises UserError naming the file when it is not a whole shard."""
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions or fetch it again") from None
    if header.size < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: not a token shard, its header does not begin {SHARD_MAGIC}, {SHARD_VERSION}; make "
                        "shards with data/prepare.py")
    count = int(header[2])
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        raise UserError(f"{path}: its header promises {count} tokens in {HEADER_BYTES + 2 * max(count, 0)} bytes, the "
                        f"file has {size}; fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


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
        for index, shard in enumerate(self.shards):
            for begin in range(0, len(shard) if len(self) <= 2**28 else min(len(shard), 2**20), 2**24):
                self._check(index, shard[begin : begin + 2**24])

    def _check(self, index: int, tokens: np.ndarray):
        if int(tokens.max()) >= self.vocab_size:
            raise UserError(f"{self.paths[index]}: holds token id {int(tokens.max())}, beyond VOCAB_SIZE="
                            f"{self.vocab_size}; the data and the tokenizer do not belong together")

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
        self.sp, size = sentencepiece.SentencePieceProcessor(), 0
        with contextlib.suppress(Exception):  # the library raises RuntimeError, TypeError and others on foreign bytes
            self.sp.LoadFromSerializedProto(path.read_bytes())
            size = self.sp.vocab_size()
        pieces = [self.sp.id_to_piece(i) for i in range(size)]
        odd = next((p for p in pieces if "\u2581" in p[1:]), None)
        for ok, problem in (
                (path.is_file(), "no such file; run ./run.sh data or set TOKENIZER_PATH"),
                (size, "not a SentencePiece model; give the .model file of the data"),
                (size == vocab_size, f"it has {size} pieces where VOCAB_SIZE={vocab_size}; set VOCAB_SIZE={size}"),
                (size and self.sp.bos_id() == BOS_ID, f"its BOS id is not {BOS_ID}, as shards need; make data and "
                 "tokenizer with data/prepare.py"),
                (not odd, f"its piece {odd!r} marks a space past its start, which the canonical byte count does not "
                 "know; train a tokenizer with data/prepare.py")):
            if not ok:
                raise UserError(f"TOKENIZER_PATH={path}: {problem}")
        sp = self.sp
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)])
        self.spaced = np.array([p.startswith("\u2581") for p in pieces]) & ~self.boundary
        self.piece_bytes = np.array([0 if self.boundary[i] else 1 if sp.is_byte(i) else
                                     len(p.removeprefix("\u2581").encode()) for i, p in enumerate(pieces)])

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

    The global batches depend on the data alone (and on SEED when shuffled): sequence g of the run starts at token
    g * seq_len of the endless repetition of the split, so each token is a target once an epoch; shuffling permutes
    the sequences within an epoch. A rank takes its contiguous share of a batch.
    """

    def __init__(self, cfg: Config, tokens: Tokens, process: Process, first: int = 0):
        self.cfg, self.tokens, self.process, self.seq_len = cfg, tokens, process, cfg.train_seq_len
        self.batch_seqs, self.epoch_seqs = cfg.train_batch_tokens // self.seq_len, max(len(tokens) // self.seq_len, 1)
        self._epoch, self._order = -1, np.empty(0)
        self._pool, self._steps = process.thread(), itertools.count(first)
        self._ahead = collections.deque(self._pool.submit(self.batch, next(self._steps)) for _ in range(2))

    def start_of(self, g: int) -> int:
        """Position of the first input token of sequence `g` of the run."""
        if self.cfg.shuffle:
            epoch, i = divmod(g, self.epoch_seqs)
            if epoch != self._epoch:
                self._order = np.random.default_rng((self.cfg.seed, epoch)).permutation(self.epoch_seqs)
                self._epoch = epoch
            g = epoch * self.epoch_seqs + int(self._order[i])
        return g * self.seq_len

    def batch(self, step: int) -> Tensor:
        """This rank's tokens of one step: int32 [sequences, seq_len + 1], inputs and targets overlapping."""
        share = self.batch_seqs // self.process.world
        first = step * self.batch_seqs + self.process.rank * share
        rows = [self.tokens.read(self.start_of(g), self.seq_len + 1) for g in range(first, first + share)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int32))
        return batch.pin_memory() if self.process.cuda else batch

    def next(self) -> Tensor:
        """The next step's tokens of this rank, on the device: int32 [sequences, seq_len + 1]."""
        self._ahead.append(self._pool.submit(self.batch, next(self._steps)))
        return self._ahead.popleft().result().to(self.process.device, non_blocking=True)


# ==== Model: one forward pass for loss and logits =====================================================================


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a weight. https://arxiv.org/abs/1910.07467"""
    if x.is_cuda:
        return F.rms_norm(x, (x.size(-1),))
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()  # on a CPU thrice as fast


class Linear(nn.Linear):
    """A matrix without bias, kept in fp32 and used in the input's type. `gain`, a number or [n_out, 1], multiplies the
    output by way of the matrix, which is smaller. `adapter`: low-rank factors that test-time training adds for each row
    of the batch, (down [B, r, n_in], up [B, n_out, r])."""

    adapter = None

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        y = F.linear(x, (self.weight * gain).to(x.dtype))
        if self.adapter is not None:
            down, up = self.adapter
            y.baddbmm_(x @ down.mT, (up * gain).to(x.dtype).mT)  # in place: a fresh output costs more than the product
        return y


class Embedding(nn.Embedding):
    """Rows by id, drawn where they have a place only: to draw on the meta device would import the compiler."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


def rope_tables(length: int, dims: int, base: float, device: torch.device, dtype: torch.dtype,
                window: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, 1, dims/2] of rotary embeddings (https://arxiv.org/abs/2104.09864); beyond 1024
    tokens the base grows with the window (NTK-aware scaling), which is `length` unless given."""
    if (window or length) > 1024 and dims > 2:
        base = base * ((window or length) / 1024) ** (dims / (dims - 2))
    speed = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed)[:, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + dims/2) of the first dims of each head of x [B, T, H, D] by minus their angle."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, scale 1/sqrt(D). q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]"""
    if flash_attn_func is not None and q.is_cuda and q.dtype == torch.bfloat16:
        return flash_attention_3(q, k, v)
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v)
    if q.dtype == torch.float32:  # a GPU's only fp32 kernel that does not write all scores out takes no grouped keys
        group = q.size(2) // k.size(2)
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by FlashAttention-3, of which some builds return the log-sums of the scores beside the result."""
    result = flash_attn_func(q, k, v, causal=True)
    return result[0] if isinstance(result, tuple) else result


def attention_advice(device: torch.device) -> str:
    """What the log should say where the fastest attention of a GPU is not installed, else nothing."""
    if device.type != "cuda" or flash_attn_func is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return ""
    return ("attention: PyTorch's own; FlashAttention-3, made for this GPU, is not installed (package flash-attn-3, "
            "module flash_attn_interface)")


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as plain products of blocks of queries with all keys that they may see: in bf16 on a CPU twice as fast
    as PyTorch's fused kernel, forward and backward, though scores are rounded. Heads that share keys are rows of one
    product."""
    (b, t, h, d), group, block = q.shape, q.size(2) // k.size(2), 64 * -(-q.size(1) // 512)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -t % block)) for x in (q * d**-0.5, k, v))
    q = q.view(b, q.size(1), -1, group, d).transpose(1, 2).reshape(b * k.size(2), -1, d)  # [B H_kv, T group, D]
    k, v = k.permute(0, 2, 3, 1).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # [B H_kv, D, T], [B H_kv, T, D]
    hidden = torch.arange(block, device=q.device)[:, None] < torch.arange(block - v.size(1), block, device=q.device)
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -math.inf).repeat_interleave(group, 0)
    done = []
    for end, rows in zip(range(block, v.size(1) + 1, block), q.split(block * group, dim=1), strict=True):
        scores = torch.baddbmm(bias[:, -end:], rows, k[:, :, :end])
        done.append(scores.softmax(-1) @ v[:, :end])
    return torch.cat(done, 1).view(b, h // group, -1, group, d).transpose(1, 2).reshape(b, -1, h, d)[:, :t]


class Attention(nn.Module):
    """Grouped-query attention with normalised q and k, partial RoPE and a learned gain a head. [B, T, C]"""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k, self.v = (Linear(cfg.model_dim, self.kv_heads * self.head_dim) for _ in "kv")
        self.proj = Linear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, gain_in: float, gain_out: Tensor,
                extra: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C], causal; queries and keys are normalised, then turned by RoPE."""
        b, t, c = x.shape
        q = norm(self.q(x, gain_in).view(b, t, self.heads, self.head_dim))
        k, v = (matrix(x, gain_in).view(b, t, self.kv_heads, self.head_dim) for matrix in (self.k, self.v))
        v = v if extra is None else v + extra.view(v.shape)
        y = attend(rotate(q, cos, sin) * self.q_gain.to(x.dtype)[:, None], rotate(norm(k), cos, sin), v)
        if self.exclusive:  # XSA: take out what the token's own value says
            own, y = v[:, :, :, None], y.reshape(b, t, self.kv_heads, -1, self.head_dim)  # [B, T, H_kv, 1, D]
            share = (y * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True).clamp(min=1e-24)
            y = torch.addcmul(y, share, own, value=-1)
        return self.proj(y.reshape(b, t, c), gain_out)  # not every kernel lays its result out as [B, T, H, D]


class MLP(nn.Module):
    """Two matrices around a squared ReLU (https://arxiv.org/abs/2109.08668). [B, T, C]"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.fc, self.proj = Linear(cfg.model_dim, cfg.mlp_dim), Linear(cfg.mlp_dim, cfg.model_dim)
        self.slope = cfg.mlp_slope

    def forward(self, x: Tensor, gain_in: float, gain_out: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x, gain_in), self.slope).square(), gain_out)


class Block(nn.Module):
    """Residual mix with the model's input x0, attention, MLP. [B, T, C]"""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.tensor(([1.0] * cfg.model_dim, [0.0] * cfg.model_dim)))
        self.input_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, extra: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = torch.addcmul(mix[0] * x, mix[1], x0)
        x = x + self.attn(norm(x), cos, sin, self.input_scale, self.attn_scale[:, None], extra)
        return x + self.mlp(norm(x), self.input_scale, self.mlp_scale[:, None])


def shift(x: Tensor, keep: Tensor) -> Tensor:
    """Each position's predecessor: x[:, i-1] at i, zero at the start and where `keep` [B, T, 1] is zero."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) * keep


class Bigram(nn.Module):
    """Embedding of the hashed pair (previous token, token); zero when training starts. ids [B, T] -> [B, T, C]"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.buckets = cfg.bigram_vocab_size
        self.embed = Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim) if cfg.bigram_dim != cfg.model_dim else nn.Identity()
        self.scale = nn.Parameter(torch.tensor(0.05))

    def hash(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Bucket of each position, int32; the last bucket is for first positions and where `starts` is true."""
        t, last = ids.to(torch.int32), self.buckets - 1
        pair = torch.bitwise_xor(36313 * t, 27191 * F.pad(t[:, :-1], (1, 0))) % last
        return torch.where(starts | (torch.arange(t.size(1), device=t.device) == 0), last, pair)

    def forward(self, ids: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(self.hash(ids, starts)).to(dtype)) * self.scale.to(dtype)


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
        gate = F.silu(self.gate(x) + self.site[site].to(x.dtype))
        v, w = self.value(x), self.kernel.to(x.dtype)
        before = shift(v, keep)
        mixed = torch.addcmul(torch.addcmul(w[:, 2] * v, w[:, 1], before), w[:, 0], shift(before, keep))
        return self.proj(gate * mixed, gain)


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """Logits squashed into +-cap in their own type, as fp32."""
    return (cap * torch.tanh(logits / cap)).float()


class GPT(nn.Module):
    """The whole model. Weights are fp32; activations are of type `dtype`."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.dtype, self.skips = cfg, dtype, cfg.num_layers // 2
        self.watch_output = None  # set by `calibrate`, which hooks the other layers
        self.tok_emb = Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = Bigram(cfg) if cfg.bigram_vocab_size else None
        self.smear = nn.Parameter(torch.zeros(cfg.model_dim))
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.skips, cfg.model_dim))
        self.value_emb = Embedding(cfg.vocab_size, cfg.ve_dim) if cfg.ve_last_n else None
        self.late = cfg.num_layers - min(cfg.ve_last_n, cfg.num_layers)  # the first layer that is given them
        if cfg.ve_last_n:  # ResFormer's idea (https://arxiv.org/abs/2410.17897), from the token and not from a layer
            self.value_proj = Linear(cfg.ve_dim, cfg.model_dim // cfg.num_heads * cfg.num_kv_heads)
            self.value_scale = nn.Parameter(torch.full((cfg.num_layers - self.late,), 0.1))
        if cfg.sparse_sites:
            self.sidecar = Sidecar(cfg)
            self.sidecar_scale = nn.Parameter(torch.zeros(len(cfg.sparse_sites), cfg.model_dim))
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size)
        if not self.smear.is_meta:
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
        special = {"tok_emb.weight": "embed", "bigram.embed.weight": "embed", "value_emb.weight": "embed",
                   "lm_head.weight": "head", "sidecar.site": "matrix"}
        return special.get(name, "matrix" if name.endswith(".weight") else "vector")

    def rope(self, length: int, window: int = 0) -> tuple[Tensor, Tensor]:
        """RoPE's tables for `length` tokens of a window, which is of that length unless given."""
        dims = self.cfg.rope_dims or self.cfg.model_dim // self.cfg.num_heads
        return rope_tables(length, dims, self.cfg.rope_base, self.smear.device, self.dtype, window)

    def forward(self, ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None, window: int = 0,
                tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids int [B, T] -> fp32 nats of `targets` [B, S], or without targets fp32 logits [B, S, V].

        `rows` int64 [B, S] picks the positions that go through the output layer; without it all T do. `window`: the
        length that RoPE is scaled for, where ids are of another. `tables`: what `rope` gives for it, where it is kept.
        """
        cfg, starts = self.cfg, (ids == BOS_ID) & self.cfg.bos_mask
        keep = (~starts)[:, :, None].to(self.dtype)
        x = self.tok_emb(ids).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, starts, self.dtype)
        x, g = norm(x), torch.sigmoid(self.smear.to(x.dtype))
        x = x0 = (1 - g) * x + g * shift(x, keep)  # SmearGate
        values = self.value_proj(self.value_emb(ids).to(x.dtype)) if self.value_emb is not None else None
        cos, sin = tables or self.rope(ids.size(1), window)
        stack = []  # U-Net: the first half of the layers hands its outputs to the second, last to first
        for i, block in enumerate(self.blocks):
            if i >= self.skips and stack:
                x = x + self.skip_weights[i - self.skips].to(x.dtype) * stack.pop()
            extra = self.value_scale[i - self.late].to(x.dtype) * values if i >= self.late else None
            x = block(x, x0, cos, sin, extra)
            if i in cfg.sparse_sites:
                site = cfg.sparse_sites.index(i)
                x = x + self.sidecar(norm(x), site, keep, self.sidecar_scale[site][:, None])
            if i < self.skips:
                stack.append(x)
        if rows is not None:
            x = x.gather(1, rows[:, :, None].expand(-1, -1, x.size(-1)))
        name, head = ("tok_emb.weight", self.tok_emb) if self.lm_head is None else ("lm_head.weight", self.lm_head)
        logits = F.linear(x := norm(x), head.weight.to(x.dtype))
        if self.watch_output is not None:
            self.watch_output(name, logits, x)
        if targets is None:
            return softcapped(logits, cfg.logit_softcap)
        # exp of what the softcap bounds, at most 75, cannot overflow: one pass does, compiled without an fp32 copy
        total = softcapped(logits, cfg.logit_softcap).exp_().sum(-1).log()
        return total - softcapped(logits.gather(-1, targets.long()[..., None]), cfg.logit_softcap)[..., 0]


def shapes_of(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, of which none is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}


def activation_bytes(cfg: Config) -> int:
    """Estimated bytes that a token keeps for the backward pass: 2 x (16 C + 2 H) a layer and 10 V for its logits."""
    return 2 * cfg.num_layers * (16 * cfg.model_dim + 2 * cfg.mlp_dim) + 10 * cfg.vocab_size


def tokens_per_pass(cfg: Config, process: Process, training: bool) -> int:
    """Tokens that one forward pass of a rank should hold: activations may take half of the device's memory, and
    evaluation, which keeps none, takes four times as many. On a CPU more than a few thousand only leave the caches."""
    room = process.memory()[0] // 2 // activation_bytes(cfg) * (1 if training else 4)
    return room if process.cuda else min(room, 4096 if training else 8192)


def compiles(cfg: Config, process: Process) -> bool:
    """Whether forward passes are compiled."""
    return process.cuda if cfg.use_compile == "auto" else cfg.use_compile == "1"


def note_graphs(process: Process, shape: str):
    """Add to `process.graphs` what torch has compiled since the last call, by the shape that made it necessary."""
    met = torch._dynamo.utils.get_compilation_metrics()
    torch._dynamo.utils.clear_compilation_metrics()
    for graph in met:
        seconds = (graph.duration_us or 0) / 1e6
        process.graphs.append({"graph": graph.co_name or "backward", "shape": shape, "seconds": seconds})


def compiled(model: GPT, cfg: Config, process: Process):
    """The model's forward pass, compiled without graph breaks where that is wanted."""
    if not compiles(cfg, process):
        return model
    torch._dynamo.config.cache_size_limit = 64  # one entry each for training, scoring, and their last batches
    graph, tables, last = torch.compile(model, dynamic=False, fullgraph=True), {}, ""

    def forward(ids: Tensor, targets: Tensor | None = None, rows: Tensor | None = None, window: int = 0) -> Tensor:
        nonlocal last
        key = ids.size(1), window
        if key not in tables:  # RoPE's, once for a length and outside the graph, where each layer would make them anew
            tables[key] = model.rope(*key)
        note_graphs(process, last)  # a backward pass is compiled when it first runs, so after this function
        result = graph(ids, targets, rows, 0, tables[key])
        last = f"{list(ids.shape)} -> {list(result.shape)}{', to learn from' if result.requires_grad else ''}"
        note_graphs(process, last)
        return result

    return forward


# ==== Optimizers: one flat vector of weights, Muon for matrices, AdamW for the rest, EMA ==============================


class FlatWeights:
    """All weights as views of one fp32 vector, and all gradients of another.

    Matrices come first, those of one shape side by side: Muon's batch, the reduction over ranks, clipping and the
    EMA are then each one operation on a view. `buffer` has one more element than `grads`, the loss, which so travels
    with them. `spans` lists (role, shape, first element, number of tensors).
    """

    def __init__(self, model: GPT, device: torch.device):
        order = {"matrix": 0, "embed": 1, "head": 2, "vector": 3}  # the smallest last, so that views stay aligned
        named = sorted(model.named_parameters(), key=lambda item: (
            order[model.role(item[0])], -item[1].numel(), tuple(item[1].shape)))
        total, begin = sum(p.numel() for _, p in named), 0
        self.weights, self.buffer = torch.empty(total, device=device), torch.zeros(total + 1, device=device)
        self.grads, self.loss = self.buffer[:total], self.buffer[total]
        self.spans: list[tuple[str, torch.Size, int, int]] = []
        for (role, shape), group in itertools.groupby(named, lambda item: (model.role(item[0]), item[1].shape)):
            params = [p for _, p in group]
            self.spans.append((role, shape, begin, len(params)))
            for p in params:
                part = slice(begin, begin := begin + p.numel())
                self.weights[part].copy_(p.data.flatten())
                p.data, p.grad = self.weights[part].view(shape), self.grads[part].view(shape)

    def extent(self, role: str) -> slice:
        """Where the weights of a role lie."""
        ends = [(begin, begin + n * shape.numel()) for r, shape, begin, n in self.spans if r == role]
        return slice(ends[0][0], ends[-1][1]) if ends else slice(0, 0)

    def gather_gradients(self, forward, tokens: Tensor, size: int, total: int, process: Process):
        """Gradients and mean loss of a step of `total` sequences, of which this rank has tokens [n, seq_len + 1],
        taken `size` at a time; summed over the ranks."""
        self.buffer.zero_()
        for part in tokens.split(size) if len(tokens) else ():
            loss = forward(part[:, :-1], part[:, 1:]).mean() * (len(part) / total)
            loss.backward()
            self.loss.add_(loss.detach())
        process.sum_(self.buffer)

    def clip_(self, limit: float) -> Tensor:
        """Scale the gradients down to a global norm of `limit`, 0 is off, without waiting for the device. Returns
        whether they and the loss are finite; where not, the gradients are 0."""
        norm = torch.linalg.vector_norm(self.grads)
        if limit > 0:
            self.grads.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        finite = torch.isfinite(norm + self.loss)
        self.grads.masked_fill_(~finite, 0.0)
        return finite


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix of g [n, rows, cols] towards 1 by a quintic iteration; they land
    within about 0.7 to 1.2. (Muon, https://kellerjordan.github.io/posts/muon/)"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


def even_rows(x: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
    """Divide the rows of each matrix of x [n, rows, cols] by the root of their running mean square `sizes`, [n, rows,
    1], into which this one enters with `weight`; the matrix keeps its norm. (https://arxiv.org/abs/2510.05491)"""
    sizes.lerp_(x.float().square().mean(-1, keepdim=True), weight)
    y = x / (sizes.sqrt() + 1e-8).to(x.dtype)
    length, other = (torch.linalg.vector_norm(z, dim=(-2, -1), keepdim=True) for z in (x, y))
    return y * (length / (other + 1e-7))


class Optimizers:
    """Muon for matrices and AdamW for the rest, over the flat weights, and the weights' moving average.

    Muon takes the matrices of one shape as one batch, of which each rank treats its share and holds the momentum;
    the sum over ranks gives everyone the whole update. A step whose loss or gradient is not finite changes nothing;
    `bad` counts how many there were in a row, on the device so that nobody waits.
    """

    def __init__(self, cfg: Config, flat: FlatWeights, process: Process):
        self.cfg, self.flat, self.process = cfg, flat, process
        own_kernels = process.cuda and compiles(cfg, process)
        self.orthogonalise = torch.compile(newton_schulz, dynamic=False) if own_kernels else newton_schulz
        self.average = flat.weights.clone() if cfg.ema_enabled else None
        self.update = torch.zeros(flat.extent("matrix").stop, device=process.device, dtype=process.dtype)
        self.reset()

    def reset(self):
        """Fresh state, as before the first step."""
        cfg, flat, (rank, world) = self.cfg, self.flat, (self.process.rank, self.process.world)
        matrices, at = [span for span in flat.spans if span[0] == "matrix"], len(self.update)
        rows = sum(n * shape[0] for _, shape, _, n in matrices)  # of the sizes that MUON_BETA2 remembers, behind it
        self.momentum = flat.weights.new_zeros(at + rows * bool(cfg.muon_beta2))  # 0 in the shares of other ranks
        self.bad, self.parts, self.buckets = torch.zeros((), dtype=torch.int32, device=self.momentum.device), [], []
        for _, shape, begin, n in matrices:
            low, high = n * rank // world, n * (rank + 1) // world
            part = slice(begin + low * shape.numel(), begin + high * shape.numel())
            sizes, at = slice(at + low * shape[0], at + high * shape[0]), at + n * shape[0]
            self.parts += [part, sizes] if cfg.muon_beta2 else [part]
            share = [t[part].view(-1, *shape) for t in (flat.grads, self.momentum, self.update)] if low < high else []
            share += [self.momentum[sizes].view(-1, shape[0], 1) if cfg.muon_beta2 else None] * (low < high)
            self.buckets.append((slice(begin, begin + n * shape.numel()), share))  # share: each [n, rows, cols]
        embed_lr, groups = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, []
        for role, lr, decay in (("embed", embed_lr, cfg.adam_wd), ("head", cfg.head_lr, 0.0),
                                ("vector", cfg.scalar_lr, cfg.adam_wd)):
            weights = nn.Parameter(flat.weights[flat.extent(role)])
            weights.grad = flat.grads[flat.extent(role)]
            groups += [{"params": [weights], "lr": lr, "base_lr": lr, "weight_decay": decay}] if len(weights) else []
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, step: int, factor: float):
        """Update all weights at `factor` times their rates, and their average; `step` counts from 0 and sets Muon's
        momentum."""
        cfg, gathered = self.cfg, []
        warm = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
        finite = self.flat.clip_(cfg.grad_clip_norm)
        self.bad = torch.where(finite, 0, self.bad + 1)
        self.update.zero_()
        for part, share in self.buckets:  # each is gathered while the next is computed
            if share:
                grad, buffer, update, sizes = share
                buffer.mul_(torch.where(finite, momentum, 1.0)).add_(grad)
                nesterov = grad.add(buffer, alpha=momentum).to(update.dtype)
                stretch = max(1.0, grad.size(1) / grad.size(2)) ** 0.5
                turned = self.orthogonalise(nesterov, cfg.muon_backend_steps)
                if sizes is not None:
                    turned = even_rows(turned, sizes, torch.where(finite, 1 - cfg.muon_beta2, 0.0))
                update.copy_(turned * stretch)
            gathered.append(self.process.begin_sum_(self.update[part]))
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adam.found_inf = (~finite).float()  # where 1, the fused kernel leaves everything as it is
        self.adam.step()
        for wait in gathered:
            wait()
        rate = torch.where(finite, cfg.matrix_lr * factor, 0.0)
        matrices = self.flat.weights[: len(self.update)]
        matrices.mul_(1 - rate * cfg.muon_wd).addcmul_(self.update, rate, value=-1)
        if self.average is not None:
            self.average.lerp_(self.flat.weights, torch.where(finite, 1 - cfg.ema_decay, 0.0))

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, whole on every rank."""
        bits = self.process.sum_(self.momentum.view(torch.int32).clone())  # as integers, so that each bit survives
        average = {} if self.average is None else {"average": self.average}
        return {"weights": self.flat.weights, "momentum": bits.view(torch.float32), **average,
                **optimizer_tensors(self.adam)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]):
        """Put back what `tensors` gave, on any number of ranks."""
        self.flat.weights.copy_(tensors["weights"])
        for part in self.parts:
            self.momentum[part].copy_(tensors["momentum"][part])
        if self.average is not None:
            self.average.copy_(tensors.get("average", tensors["weights"]))
        restore_optimizer(self.adam, tensors)


# ==== Export: values rounded where it costs least, coded by their spread, in one file that rebuilds the model =========
#   bytes 0-7    magic "GPT16MB" and format version 3
#   bytes 8-11   length of the compressed header, little-endian
#   then         zstd(header): JSON {"config": {...}, "sides": compressed bytes of the next part, "tensors":
#                [[name, shape, kind, bits, offset], ...]}; offset: a tensor's first value of kinds rows and grid,
#                its first 16-bit word of kinds fp16 and fp32
#   then         zstd(sides): 16-bit words in the order of `side_parts`, int8 in pairs, the low bytes before the high
#   then         the int8 values of kinds rows and grid, as rANS words
#   last 32      sha256 of everything before

BALANCED_STEP = 0.0025  # what QUANT_BITS mean to "balanced": 6 for a matrix and 8 for an embedding cost alike
ARTIFACT_NAME, FLOAT_NAME, ARTIFACT_MAGIC = "final_model.int6.ptz", "final_model.float.ptz", b"GPT16MB\x03"
FILE_MOST, HEADER_MOST = 1 << 31, 1 << 20  # bytes of a file and of a header
CLASSES, PRECISION = 64, 14  # rANS tables, and the bits of their frequencies
GROUPS = ("bigram", "sidecar", "attn", "mlp", "embed")  # what has bits of its own: QUANT_BITS_<group>
AIMS, MOST_ATTEMPTS = (0.998, 0.95, 0.8, 0.3, 0.0), 14  # shares of the room to aim at, the next when it is late


@dataclass
class Stored:
    """A tensor as the file holds it: numbers (fp32, fp16) or int8 values with their steps: an fp16 a row (rows), or
    2**(k/8) of an int8 k a row and a column (grid)."""

    kind: str
    bits: float
    values: np.ndarray
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None

    def tensor(self) -> Tensor:
        """The fp32 values that the model computes with."""
        roots, values = np.array([2 ** (i / 8) for i in range(8)], np.float32), self.values.astype(np.float32)
        if self.kind == "grid":  # exact everywhere: a rounded root and a shift of the exponent
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


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [CLASSES, 256] as uint16 frequencies: 2**PRECISION in sum a table, at least 1 where any are."""
    result = np.zeros(counts.shape, np.int64)
    for row, count in zip(result, counts, strict=True):
        if total := count.sum():
            row[:] = np.where(count, np.maximum((count << PRECISION) // total, 1), 0)
            row[count.argmax()] += (1 << PRECISION) - row.sum()  # never below 1: at most 255 others were raised to 1
    return result.astype(np.uint16)


def rans_lanes(count: int) -> int:
    return max(min(count, max(count // 4096, 32)), 1)


def rans_encode(symbols: np.ndarray, table_of: np.ndarray, tables: np.ndarray) -> bytes:
    """uint8 symbols, each under its table of `tables` [CLASSES, 256], as uint16 words. Many interleaved states, one a
    lane, make each step a numpy operation. (ANS, https://arxiv.org/abs/1311.2540)"""
    n, lanes = len(symbols), rans_lanes(len(symbols))
    share, start = tables.astype(np.uint64).ravel(), (np.cumsum(tables, 1) - tables).astype(np.uint64).ravel()
    states, words, shift, half = np.full(lanes, 1 << 16, np.uint64), [], np.uint64(PRECISION), np.uint64(16)
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


def count_values(stored: dict[str, Stored]) -> tuple[dict[str, tuple], np.ndarray]:
    """For each quantised tensor its (log spreads, table of each value, counts [CLASSES, 256]), and all counts' sum."""
    parts, total = {}, np.zeros((CLASSES, 256), np.int64)
    for name, s in stored.items():
        if s.rows is not None:
            table_of = classes(*(spread := spreads(s.values)))
            index = table_of.astype(np.int32) * 256 + (s.values.ravel().astype(np.int32) + 128)
            parts[name] = spread, table_of, np.bincount(index, minlength=CLASSES * 256).reshape(CLASSES, 256)
            total += parts[name][2]
    return parts, total


def side_parts(tensors: list) -> list[tuple[tuple[str, str], int]]:
    """What the sides hold, in order, each ((tensor, part), words): all numbers, the steps of rows and then of columns
    (fp16 or int8), the int8 log spreads of rows and columns, and the frequencies of the values."""
    coded = [(name, shape, kind) for name, shape, kind, *_ in tensors if kind in ("rows", "grid")]
    parts = [((name, "values"), math.prod(shape) * (2 if kind == "fp32" else 1)) for name, shape, kind, *_ in tensors
             if kind in ("fp16", "fp32")]
    parts += [((name, "rows"), -(-shape[0] // 2) if kind == "grid" else shape[0]) for name, shape, kind in coded]
    parts += [((name, "cols"), -(-shape[1] // 2)) for name, shape, kind in coded if kind == "grid"]
    parts += [((name, f"spread{i}"), -(-shape[i] // 2)) for i in (0, 1) for name, shape, _ in coded]
    return parts + [(("", "tables"), CLASSES * 256)] * bool(coded)


def lay_out(cfg: Config, stored: dict[str, Stored]) -> tuple[int, bytes, np.ndarray, list[np.ndarray]]:
    """About how many bytes, to 0.1%, the file of these tensors has, by the counts of its values; what it holds before
    them; their tables [CLASSES, 256]; and which of these each value takes, a tensor after another."""
    config, table, ends = {f.name: getattr(cfg, f.name) for f in MODEL_FIELDS}, [], collections.Counter()
    for name, s in stored.items():
        table.append([name, list(s.values.shape), s.kind, round(s.bits, 3), ends[s.rows is None]])
        ends[s.rows is None] += s.values.size * (2 if s.kind == "fp32" else 1)
    parts, counts = count_values(stored)
    sides = {(name, what): getattr(s, what) for name, s in stored.items() for what in ("values", "rows", "cols")}
    sides |= {(name, f"spread{i}"): part[0][i] for name, part in parts.items() for i in (0, 1)}
    sides["", "tables"] = tables = frequencies(counts)
    words = [np.ascontiguousarray(sides[key]).ravel() for key, _ in side_parts(table)]
    words = np.concatenate([(np.pad(w, (0, len(w) % 2)) if w.dtype == np.int8 else w).view("<u2") for w in words])
    sides = zstandard.compress(words.view(np.uint8).reshape(-1, 2).T.tobytes(), 22 if parts else 3)  # floats: in haste
    header = {"config": config, "sides": len(sides), "tensors": table}
    header = zstandard.compress(json.dumps(header, separators=(",", ":")).encode(), 22)
    head = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + sides
    lanes = rans_lanes(counts.sum()) * bool(parts)
    values = (counts * (PRECISION - np.log2(np.maximum(tables, 1)))).sum() / 8
    values = 4 * lanes + max(values - lanes, 0)  # a lane ends in 4 bytes, which hold one of its values' on the average
    return len(head) + int(values) + 32, head, tables, [table_of for _, table_of, _ in parts.values()]


def pack(cfg: Config, stored: dict[str, Stored]) -> bytes:
    """A file's bytes from the model's settings and its tensors; the same give the same."""
    _, head, tables, table_of = lay_out(cfg, stored)
    symbols = [s.values.ravel().view(np.uint8) ^ 128 for s in stored.values() if s.rows is not None]  # as value + 128
    blob = head + (rans_encode(np.concatenate(symbols), np.concatenate(table_of), tables) if symbols else b"")
    return blob + hashlib.sha256(blob).digest()


def decompress(data: bytes, most: int, exact: bool = True) -> bytes:
    """One zstd frame of `most` bytes, or up to that, checked before any is allocated. Raises ValueError, ZstdError."""
    size = zstandard.frame_content_size(data)
    if not 0 <= size <= most or (exact and size != most):
        raise ValueError(f"a frame of {size} bytes for {most}")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=max(size, 1), allow_extra_data=False)


def check_header(header: dict, size: int) -> dict:
    """A header's configuration, checked like environment variables, and its tensors against it. Raises ValueError and
    what else a forged header can cause. `size`: the file's; beyond 64 M elements each must take a bit of it."""
    config = {f.name: check_value(f, header["config"][f.name]) for f in MODEL_FIELDS}
    cfg = Config(train_enabled=False, model_path="-", ttt_enabled=False, final_sliding_eval_enable=False, **config)
    if lines := conflicts(cfg, 1):
        raise ValueError(lines[0])
    wanted, ends = shapes_of(cfg), collections.Counter()
    for name, shape, kind, bits, offset in header["tensors"]:
        if wanted.pop(name, None) != tuple(shape):
            raise ValueError(f"{name} {shape} is not of the model that its header describes")
        plain = kind in ("fp16", "fp32")
        if not (plain or kind in ("rows", "grid") and len(shape) == 2) or offset != ends[plain] or not 0 <= bits <= 32:
            raise ValueError(f"{name} of kind {kind} at {offset} with {bits} bits")
        ends[plain] += math.prod(shape) * (2 if kind == "fp32" else 1)
    if wanted or ends.total() > 8 * size + (1 << 26):
        raise ValueError(f"{ends.total()} elements in {size} bytes, {len(wanted)} tensors missing")
    return config


def read_tensors(table: list, sides: bytes, values: bytes) -> dict[str, Stored]:
    """The tensors of a checked header. Raises ValueError or ZstdError where the parts have other sizes than it says."""
    layout, n = side_parts(table), sum(n for _, n in side_parts(table))
    words = np.frombuffer(decompress(sides, 2 * n), np.uint8).reshape(2, n).T.copy().view("<u2").ravel()
    parts = dict(zip((key for key, _ in layout), np.split(words, np.cumsum([n for _, n in layout])[:-1]), strict=True))
    coded, decoded = [t[:2] for t in table if t[2] in ("rows", "grid")], np.empty(0, np.int8)
    if coded:
        spread = [[parts[name, f"spread{i}"].view(np.int8)[: shape[i]] for i in (0, 1)] for name, shape in coded]
        tables = parts["", "tables"].reshape(CLASSES, 256)
        decoded = (rans_decode(values, np.concatenate([classes(*s) for s in spread]), tables) ^ 128).view(np.int8)
    elif values:
        raise ValueError("values that no tensor has")
    tensors = {}
    for name, shape, kind, bits, offset in table:
        form = {"fp32": "<f4", "fp16": "<f2", "rows": "<f2", "grid": np.int8}[kind]
        rows, cols, numbers = (parts.get((name, what)) for what in ("rows", "cols", "values"))
        rows, cols = (x if x is None else x.view(form)[:n] for x, n in zip((rows, cols), [*shape, 0, 0], strict=False))
        numbers = decoded[offset : offset + math.prod(shape)] if numbers is None else numbers.view(form)
        if kind != "grid" and not np.isfinite(numbers if rows is None else rows).all():
            raise ValueError(f"{name}: numbers that are not finite")
        tensors[name] = Stored(kind, float(bits), numbers.reshape(shape), rows, cols)
    return tensors


def read_file(path: str, variable: str = "") -> bytes:
    """The bytes of an artifact. Raises UserError for what is no file, cannot be read, or larger than any artifact."""
    shown = f"{variable}{path[:300]!r}"
    try:
        if Path(path).exists() and not (Path(path).is_file() and Path(path).stat().st_size <= FILE_MOST):
            raise UserError(f"{shown}: not an artifact of this script but a folder, a device or huge; "
                            f"give the {ARTIFACT_NAME} of a run")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: {getattr(error, 'strerror', error)}; give the path of an artifact") from None


def unpack(blob: bytes, source: str) -> tuple[dict, dict[str, Stored]]:
    """A file's header, with the model's settings in "config", and its tensors.

    Raises UserError, naming `source`, for all but a whole, consistent file.
    """
    magic, problem = ARTIFACT_MAGIC, ""
    if len(blob) < 44 or blob[:7] != magic[:7]:
        problem = f"not an artifact of this script; give the {ARTIFACT_NAME} of a run"
    elif blob[7] != magic[7]:
        problem = f"of format {blob[7]}, this script reads {magic[7]}; use its own script"
    elif hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        problem = "damaged, its checksum does not match; copy or export it again"
    try:
        if not problem:
            cut = 12 + struct.unpack("<I", blob[8:12])[0]
            header = json.loads(decompress(blob[12:cut], HEADER_MOST, exact=False))
            header["config"], end = check_header(header, len(blob)), cut + header["sides"]
            return header, read_tensors(header["tensors"], blob[cut:end], blob[end:-32])
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
            zstandard.ZstdError) as error:  # whatever a forged header can cause
        problem = f"its parts do not agree ({type(error).__name__}: {error})"[:400] + "; export it again"
    raise UserError(one_line(f"{source}: {problem}"))


def entropy(values: np.ndarray) -> float:
    """Order-0 entropy in bits a value of int8 `values`."""
    counts = np.bincount(values.ravel().view(np.uint8), minlength=256)
    shares = counts[counts > 0] / max(values.size, 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0


def inspect(path: str, limit: int) -> str:
    """--inspect: what a file holds, tensor by tensor. Raises UserError where it cannot be read.

    Bytes of a tensor: those of its values under their tables, and its share of the compressed sides.
    """
    blob = read_file(path)
    (header, stored), code = unpack(blob, path), SCRIPT.stat().st_size
    (parts, counts), words = count_values(stored), collections.Counter()
    cost = PRECISION - np.log2(np.maximum(frequencies(counts), 1))
    for (name, _), n in side_parts(header["tensors"]):
        words[name] += n * header["sides"] / sum(n for _, n in side_parts(header["tensors"]))
    lines = [" ".join(f"{n.upper()}={v}" for n, v in header["config"].items()), "",
             f"{'tensor':32}{'shape':>14}{'kind':>6}{'bits':>7}{'entropy':>9}{'bytes':>12}{'share':>8}"]
    for name, s in stored.items():
        order0 = f"{entropy(s.values):.3f}" if name in parts else ""
        size = words[name] + (float((parts[name][2] * cost).sum()) / 8 if name in parts else 0)
        shape = "x".join(map(str, s.values.shape))
        lines.append(f"{name:32}{shape:>14}{s.kind:>6}{s.bits:7.2f}{order0:>9}{size:12,.0f}{size / len(blob):8.2%}")
    total, coded = sum(s.values.size for s in stored.values()), [stored[name].values for name in parts]
    payload = len(blob) - 44 - header["sides"] - struct.unpack("<I", blob[8:12])[0]
    lines += ["", f"elements: {total:,}, {8 * len(blob) / total:.3f} bits each; tables {words['']:,.0f} bytes",
              f"values: {payload:,} bytes; their order-0 entropies are "
              f"{sum(entropy(v) * v.size / 8 for v in coded):,.0f}",
              f"file {len(blob):,} + code {code:,} = {len(blob) + code:,} bytes, "
              f"{limit - len(blob) - code:,} left of {limit:,}"]
    return "\n".join(lines)


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

    def feed_back(self, u: Tensor, cols: Tensor, low: int, high: int) -> Tensor:
        """Round each matrix of u [n, rows, cols] to integers column by column; the columns not yet rounded take up each
        one's error. `cols` [n, cols]: steps by which the columns were divided. (GPTQ, https://arxiv.org/abs/2210.17323)
        A block of columns lies transposed, so that each of all n is one operation: their number is the time on a GPU.
        On a CPU each matrix comes out as it would alone, to the last bit."""
        factor, order = self.factor / cols.gather(1, self.order)[:, None], self.order[:, None].expand_as(u)
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
            for rest, error, row in zip(u[:, :, end:], errors.mT, factor[:, begin:end, end:], strict=True):
                rest -= error @ row
        return torch.empty_like(values).scatter_(2, order, values)


def quantize(w: Tensor, cfg: Config, bits: float, embedding: bool, sensitivity: Sensitivity | None) -> list[Stored]:
    """Round matrices of one shape, [n, rows, cols], by the rule QUANT; one bit more halves every step.

    "balanced" makes the expected rise of the loss, G e^2 / 2 by Sensitivity, the same for every value of the model:
    coarse where a row or column matters little, which the coder then turns into bytes. Rows end at 8 bits a value.
    (A uniform step and an entropy coder are near the best: Gish and Pierce 1968; reverse water-filling.)
    "rowmax", the published rule, lays 2**bits values between a row's largest and its negative, and has a floor that
    gives every row of weights below 1 the same coarse step.
    """
    if cfg.quant == "balanced":
        weight, important = sensitivity.weight, sensitivity.factor.diagonal(dim1=1, dim2=2)
        weight = weight.clamp(min=1e-3 * weight.mean(1, keepdim=True) + 1e-20)
        wish = BALANCED_STEP * 2 ** (2 * embedding - bits) / weight.sqrt()
        cols = torch.empty_like(w[:, 0]).scatter_(1, sensitivity.order, important)
        cols = torch.maximum(cols, (w / wish[:, :, None]).square().mean(1).sqrt() * 4 / 127)  # 127 reach 4 deviations
        cols = (8 * cols.log2()).round().clamp(-128, 127)
        most = (w / 2 ** (cols / 8)[:, None]).abs().amax(2) / 127 + 1e-30
        rows = (8 * torch.maximum(wish, most).log2()).ceil().clamp(-128, 127)
        u = w / 2 ** (rows / 8)[:, :, None] / 2 ** (cols / 8)[:, None]
        values = sensitivity.feed_back(u, 2 ** (cols / 8), -127, 127)
        parts = (t.to(torch.int8).cpu().numpy() for t in (values, rows, cols))
        return [Stored("grid", bits, *matrix) for matrix in zip(*parts, strict=True)]
    top, low, high = 2 ** (bits - 1) - 1, max(-math.ceil(2 ** (bits - 1)), -127), math.ceil(2 ** (bits - 1)) - 1
    most = w.abs().amax(2)
    if embedding:  # in pieces, since torch.quantile takes at most 16 M values
        most = torch.cat([p.abs().quantile(0.9999984, dim=1) for p in w.flatten(0, 1).split(1024)]).view_as(most)
    steps = (most.clamp(min=1.0) / top).clamp(max=65504).half()  # for fp16
    values = (w / steps.float()[:, :, None]).round().clamp(low, high).to(torch.int8)
    return [Stored("rows", bits, *matrix) for matrix in zip(values.cpu().numpy(), steps.cpu().numpy(), strict=True)]


def calibrate(model: GPT, sequences: Tensor, size: int, may_go_on) -> tuple[dict[str, Sensitivity], int]:
    """Sensitivities of all matrices on training text [n, T + 1], and how many sequences time allowed, one at least.

    Embeddings look rows up, so their H only tells how the gradient is spread over the columns; a tied one is seen as
    the output layer. Layers that see the same input, as q, k and v do, share its H. Nothing is returned where the
    model's gradients are not finite.
    """
    inputs = collections.defaultdict(lambda: [0.0, 1e-30])  # H, and what it is divided by, of the first that sees it
    outputs, first, latest, hooks, used = collections.defaultdict(float), {}, ["", None], [], 0

    def watch(name: str, y: Tensor, x: Tensor, gain: Tensor | float = 1.0):
        if x is not latest[1]:
            latest[:], flat, entry = (name, x), x.detach().flatten(0, 1).float(), inputs[name]
            entry[:] = entry[0] + flat.T @ flat, entry[1] + len(flat)
        first[name] = latest[0]
        scale = gain.detach()[:, 0] ** 2 if isinstance(gain, Tensor) else gain**2  # from y back to the bare product

        def gradient(g: Tensor):
            outputs[name] = outputs[name] + g.flatten(0, 1).float().square().sum(0) * scale
        y.register_hook(gradient)

    def look_up(name: str, rows: int, ids: Tensor, y: Tensor):
        def gradient(g: Tensor):
            entry, squares = inputs[name], g.flatten(0, 1).float().square()
            entry[:] = entry[0] + squares.sum(0).diag(), entry[1] + squares.sum(0).mean()
            outputs[name] = outputs[name] + squares.new_zeros(rows).index_add_(0, ids.flatten(), squares.mean(1))
        first[name] = name
        y.register_hook(gradient)

    for name, module in model.named_modules():
        name = f"{name}.weight"
        if isinstance(module, Linear):
            hooks.append(module.register_forward_hook(lambda module, args, y, name=name: watch(name, y, *args)))
        elif isinstance(module, nn.Embedding) and not (name == "tok_emb.weight" and model.cfg.tie_embeddings):
            hooks.append(module.register_forward_hook(
                lambda module, args, y, name=name: look_up(name, len(module.weight), args[0], y)))
    model.watch_output = watch
    for part in sequences.split(size):
        model(part[:, :-1], part[:, 1:]).sum().backward()
        used += len(part)
        if part.is_cuda:
            torch.cuda.synchronize()  # else the guard would see the host's time alone
        if not may_go_on():
            break
    model.watch_output = None
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    tokens = used * (sequences.size(1) - 1)
    if not torch.stack([s.sum() for s in (*(h for h, _ in inputs.values()), *outputs.values())]).isfinite().all():
        return {}, used
    factors = {}
    for width in {len(h) for h, _ in inputs.values()}:
        names = [name for name, (h, _) in inputs.items() if len(h) == width]
        found = feedback_factors(torch.stack([inputs[name][0] / inputs[name][1] for name in names]))
        factors |= zip(names, zip(*found, strict=True), strict=True)
    return {name: Sensitivity(*factors[first[name]], g / tokens) for name, g in outputs.items()}, used


class Exporter:
    """Rounds a trained model so that its file keeps the limit: at the bits asked for where that fits (EXPORT_FILL=0),
    else with one common term to all of them. Runs on one rank.

    `room`: bytes that the file may take; `sequences` [n, T + 1]: training text, on which this calibrates; `seconds`:
    the guard, 0 for none. A search rounds (`rounded`), counts bytes (`lay_out`) and in the end codes once (`pack`).
    """

    def __init__(self, cfg: Config, log: Log, model: GPT, sequences: Tensor, size: int, room: int, seconds: float):
        self.cfg, self.log, self.room, self.guard, self.began = cfg, log, room, seconds, time.perf_counter()
        self.report = {"rule": cfg.quant, "attempts": 0, "tokens": sequences[:, 1:].numel()}
        self.weights = {name: p.detach().float() for name, p in model.named_parameters()}
        coarse = {n: (group_of(n), w.shape) for n, w in self.weights.items()
                  if is_quantised(n, w.shape, cfg.quant_min_numel)}
        alike, found = {kind: [n for n in coarse if coarse[n] == kind] for kind in coarse.values()}, {}
        self.groups = sorted({group for group, _ in alike})
        if cfg.quant == "balanced" and alike:
            found, used = calibrate(model, sequences, size, lambda: self.in_time(0.5))
            self.bite(f"calibration on {used} of {len(sequences)} sequences" if used < len(sequences) else "")
            if not found:
                log("export: gradients on training text are not finite; QUANT=rowmax, which needs none, takes over")
                self.cfg, self.report["rule"] = dataclasses.replace(cfg, quant="rowmax"), "rowmax"
        self.stacks = []  # (group, names, weights [n, rows, cols], their sensitivity)
        for (group, _), names in alike.items():
            parts = zip(*((found[n].factor, found[n].order, found[n].weight) for n in names if found), strict=True)
            costs = Sensitivity(*map(torch.stack, parts)) if found else None
            self.stacks.append((group, names, torch.stack([self.weights[n] for n in names]), costs))
        self.low, self.high = (0.0, 12.0) if self.cfg.quant == "balanced" else (2.0, 8.0)
        self.asked = {g: getattr(cfg, f"quant_bits_{g}") for g in self.groups}
        self.tried, self.coded = {}, set()  # bytes by common term, counted; those terms whose bytes are known
        self.kept, self.late, self.head, self.needs = (None, {}), 0, 0, 0.0  # kept: the best's term and its tensors

    def in_time(self, share: float = 1.0, needs: float = 0.0) -> bool:
        """Whether `needs` more seconds end within `share` of the guard."""
        return not self.guard or time.perf_counter() - self.began + needs < share * self.guard

    def bite(self, what: str):
        if what:
            self.log(f"export: EXPORT_MAX_SECONDS={self.guard:g} cut short: {what}")
            self.report["cut_short"] = [*self.report.get("cut_short", []), what]

    def bits(self, common: float) -> dict[str, float]:
        """The bits of each group, those asked for and a common term: by "balanced" values cost the same in all."""
        return {g: min(max(bits + common, self.low), self.high) for g, bits in self.asked.items()}

    def rounded(self, bits: dict[str, float]) -> dict[str, Stored]:
        """All tensors as the file holds them: the large ones rounded at their group's bits, the others in fp16."""
        coarse = {}
        for group, names, w, cost in self.stacks:
            coarse |= zip(names, quantize(w, self.cfg, bits[group], group in ("embed", "bigram"), cost), strict=True)
        return {n: coarse[n] if n in coarse else Stored(
            "fp16", 16, w.clamp(-65504, 65504).half().cpu().numpy()) for n, w in self.weights.items()}

    def best(self) -> float | None:
        """The common term of the largest file so far that keeps the room."""
        fits = [common for common, size in self.tried.items() if size <= self.room]
        return max(fits, key=self.tried.get, default=None)

    def attempt(self, common: float):
        """Round at a common term and count the bytes; the tensors of the largest file that fits are kept."""
        began = time.perf_counter()
        stored, counts = self.rounded(self.bits(common)), time.perf_counter()
        (size, head, *_), ended = lay_out(self.cfg, stored), time.perf_counter()
        self.tried[common], self.head = size, len(head)
        self.needs = ended - began + 3 * (ended - counts)  # seconds of one more and of coding, 2.5 times the counting's
        self.report["attempts"] += 1
        if self.best() == common:
            self.kept = common, stored

    def common_for(self, size: float) -> float:
        """The common term at which the file should have this size, by the latest one or two that were tried. At r bits
        a value one less saves a bit, and ever less as more values are 0: log2(4**r - 1) / 2 falls evenly."""
        def level(size: float) -> float:
            rate = max(8 * (size - self.head) / sum(weights.numel() for _, _, weights, _ in self.stacks), 1e-6)
            return rate + math.log2(1 - 4**-rate) / 2

        points = list(self.tried.items())[-2:]
        (latest, bytes_), slope = points[-1], 0.65 if self.cfg.quant == "balanced" else 1.0  # as trained models have it
        if len(points) > 1:
            slope = (level(bytes_) - level(points[0][1])) / (latest - points[0][0])
        common = latest + (level(size) - level(bytes_)) / min(max(slope, 0.3), 2.0)
        return min(max(common, self.low - max(self.asked.values())), self.high - min(self.asked.values()))

    def next_common(self) -> float | None:
        """The common term to try next; None where what fits is near enough, no time is left, or nothing to try.
        Where nothing fits yet and it is late, ever wider margins end the search in a few attempts more."""
        best, size = self.best(), self.tried.get(self.best(), 0)
        if not self.groups or size >= 0.995 * self.room or (best == 0 and not self.cfg.export_fill):
            return None
        in_time = self.in_time(needs=self.needs)
        self.bite("the search" if not in_time and not self.late else "")
        self.late += not in_time or self.report["attempts"] >= MOST_ATTEMPTS
        common = self.common_for(AIMS[min(self.late, len(AIMS) - 1)] * self.room)
        fits, over = ([c for c, size in self.tried.items() if (size <= self.room) == it] for it in (True, False))
        if fits and over and (self.report["attempts"] > 5 or not max(fits) < common < min(over)):
            common = (max(fits) + min(over)) / 2  # halves surely come nearer, where sizes do not follow a line
        return None if common in self.tried or (self.late and best is not None) else common

    def to_code(self) -> float | None:
        """The common term whose file is to be coded: the best, else the smallest if its count may be too high."""
        near = [common for common, size in self.tried.items() if size <= 1.001 * self.room]
        smallest = min(set(near) - self.coded, key=self.tried.get, default=None)
        return smallest if self.best() is None else self.best()

    def code(self, common: float) -> bytes | None:
        """The file at a common term that was tried, None where it is larger than was counted and breaks the limit."""
        blob = pack(self.cfg, self.kept[1] if self.kept[0] == common else self.rounded(self.bits(common)))
        self.tried[common] = len(blob)
        self.coded.add(common)
        return blob if len(blob) <= self.room else None

    def search(self) -> bytes | None:
        """The file, or None where no setting keeps it within `room`."""
        blob, common = None, 0.0
        while common is not None:
            self.attempt(common)
            common = self.next_common()
            while common is None and blob is None and (chosen := self.to_code()) is not None:
                blob = self.code(chosen)
                common = None if blob else self.next_common()  # with what is known now
        self.report |= {"bits": self.bits(chosen if blob else 0.0), "bytes_first": self.tried[0.0]}
        if blob and chosen:
            self.log(f"export: {chosen:+.2f} bits to all; {self.tried[0.0]} -> {len(blob)} bytes of {self.room}")
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
    caller gives), not from the batch or number of ranks. For the audit, the whole distribution of the targets in
    `probe` is kept too, and `peek` is the largest change of a loss when the inputs after its place are others.
    """

    made = 0  # how many there have been

    def __init__(self, cfg: Config, process: Process, forward, stream: Stream, stride: int, probe=()):
        self.cfg, self.process, self.forward, self.stream = cfg, process, forward, stream
        self.window, self.stride, self.started, self.batch = cfg.eval_len, stride, time.perf_counter(), 0
        self.nats = torch.zeros(stream.targets, device=process.device)
        self.count = torch.zeros(stream.targets, dtype=torch.int32, device=process.device)
        self.learnt = torch.zeros(stream.targets + 1, dtype=torch.int32, device=process.device)
        self.early = torch.zeros((), dtype=torch.int64, device=process.device)
        self.probe, self.distributions, self.peek = torch.tensor(list(probe), device=process.device), {}, 0.0
        Evaluator.made += 1

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
            self.batch = -(-n // -(-n // max(most, 1))) if n else 0
        for first in range(0, n, self.batch or 1):
            pick = torch.arange(first, first + self.batch, device=device)
            low, high, start = mine[:, pick.clamp(max=n - 1)]
            self.record(low, torch.where(pick < n, high, 0), start, self.window)
            if tick(min(first + self.batch, n) / n):
                return

    @torch.no_grad()
    def record(self, low: Tensor, high: Tensor, start: Tensor, window: int):
        """Score one batch of blocks; the places from `high` on are computed for the shape and not recorded."""
        tokens, last = self.stream.tokens, self.stream.targets - 1
        length = min(window, last + 1)  # of what there is
        inputs = tokens[(start[:, None] + torch.arange(length, device=low.device)).clamp(max=last)]
        targets = low[:, None] + torch.arange(self.stride, device=low.device)
        rows, scored = (targets - start[:, None]).clamp(max=length - 1), targets < high[:, None]
        targets = targets.clamp(max=last)
        nats = self.forward(inputs, tokens[targets + 1], rows, self.cfg.eval_len)
        for book, entry in ((self.nats, nats), (self.count, scored.int())):
            book.index_add_(0, targets.flatten(), torch.where(scored, entry, 0).flatten())
        self.early += torch.where(scored, self.learnt[targets + 1], 0).sum()
        if len(self.probe) and bool(scored.any()):
            slot = (low[:, None] // self.stride * 7919) % scored.sum(1, keepdim=True).clamp(min=1)  # one place a window
            later = torch.arange(length, device=low.device) > rows.gather(1, slot)
            other = torch.where(later, (inputs * 31 + 17) % self.cfg.vocab_size, inputs)
            change = (self.forward(other, tokens[targets + 1], rows, self.cfg.eval_len) - nats).abs()
            upto = scored & (torch.arange(self.stride, device=low.device) <= slot)
            self.peek = max(self.peek, float(change[upto].nan_to_num(torch.inf).max()) if upto.any() else 0.0)
            for at, slot in (torch.isin(targets, self.probe) & scored).nonzero().tolist():
                self._ask(inputs, rows, at, slot, int(targets[at, slot]))

    def _ask(self, inputs: Tensor, rows: Tensor, at: int, slot: int, target: int):
        """Keep the nats of every vocabulary entry at a target's place: the same batch is asked again with each entry
        in turn as the target, so that a score which is no probability shows."""
        place, vocab = rows[at, slot].expand_as(rows).contiguous(), self.cfg.vocab_size
        entries = torch.arange(-(-vocab // self.stride) * self.stride, device=inputs.device).clamp(max=vocab - 1)
        self.distributions[target] = torch.cat([
            self.forward(inputs, part.expand_as(rows).contiguous(), place, self.cfg.eval_len)[at] for part in
            entries.split(self.stride)])[:vocab].cpu()

    def lesson(self, positions: Tensor, who: Tensor | None = None) -> Tensor:
        """The tokens at `positions` [n, length], which an optimizer step is about to learn from: noted as such, in
        the rows where `who` [n] holds."""
        marks = torch.ones_like(positions, dtype=torch.int32) * (1 if who is None else who[:, None].int())
        positions = positions.clamp(max=self.stream.targets)
        self.learnt.index_add_(0, positions.flatten(), marks.flatten())
        return self.stream.tokens[positions]

    def books(self, shared: bool) -> dict[str, Tensor]:
        """What has been scored so far, to be kept: by all ranks when `shared`, else by this one."""
        mine = {"nats": self.nats, "count": self.count, "early": self.early}
        return {n: self.process.sum_(t.clone()) if shared else t for n, t in mine.items()} | {"learnt": self.learnt}

    def restore(self, books: dict[str, Tensor], seconds: float, shared: bool):
        """Go on with these books; shared ones are rank 0's."""
        for name in ("learnt", "nats", "count", "early") if self.process.main or not shared else ("learnt",):
            getattr(self, name).copy_(books[name])
        self.started = time.perf_counter() - seconds

    def running_bpb(self, shared: bool = True) -> float:
        """BPB of what all ranks, or this rank, have scored so far."""
        sums = torch.stack((self.nats.sum(), (self.count * self.stream.target_bytes).sum().float()))
        nats, scored = (self.process.sum_(sums) if shared else sums).tolist()
        return nats / math.log(2) / max(scored, 1)

    def result(self) -> Score:
        """Gather all ranks' books into the score. Call once, when everything has been scored."""
        nats, n = self.process.sum_(self.nats).cpu(), self.stream.targets
        odd, early = int((self.process.sum_(self.count) != 1).sum()), int(self.process.sum_(self.early))
        faults = [f"{odd} of {n} targets were not scored exactly once"] * (odd > 0)
        faults += [f"{early} optimizer steps had seen a target before its score"] * (early > 0)
        total = float(nats.double().sum())
        bpb, seconds = total / math.log(2) / (self.stream.bytes or math.nan), time.perf_counter() - self.started
        return Score(total / n, bpb, seconds, n, self.stream.bytes, faults, nats.numpy())


def evaluate(cfg: Config, process: Process, log: Log, forward, stream: Stream, stride: int, label: str,
             probe=()) -> Evaluator:
    """Score the whole stream, or until a signal that is held; stride = EVAL_SEQ_LEN gives non-overlapping windows."""
    evaluator = Evaluator(cfg, process, forward, stream, stride, probe)
    evaluator.score(0, stream.targets, lambda done: log.live(label, done, time.perf_counter() - evaluator.started) or
                    process.signals.caught)
    return evaluator


# ==== Test-time training: score a chunk for good, only then learn from it =============================================

LORA_CONTEXT = 64  # tokens before a chunk that go in when it is learnt: whole windows taught 0.001 BPB more, far slower


class Budget:
    """EVAL_MAX_SECONDS: for reading the artifact, compiling, and the evaluation that gives val_bpb; 0 is no limit."""

    def __init__(self, cfg: Config, spent: float = 0.0):
        self.limit, self.started = cfg.eval_max_seconds, time.perf_counter() - spent

    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.started


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
    """One walk of test-time training over a stream: its clock, its lines, when it must stop learning, and with
    `checkpoints` its states. In lora mode ranks walk apart and each keeps its own; else they walk in step and rank 0
    keeps one. `saved` is the state to go on from: facts and tensors."""

    counters = ("scoring", "work", "stopped", "chunks", "adapted", "undone", "said", "lesson")

    def __init__(self, cfg: Config, process: Process, log: Log, evaluator: Evaluator, budget: Budget,
                 checkpoints: Checkpoints | None = None):
        self.cfg, self.process, self.log, self.evaluator, self.budget = cfg, process, log, evaluator, budget
        self.scoring, self.work, self.total = 0.0, 0, 0  # seconds of the scoring that is done, its units, and all units
        self.lesson, self.lesson_began = 0.0, None  # seconds of the longest lesson; where one that goes on began
        self.pieces: collections.deque = collections.deque()  # of work, whose seconds are not known yet
        self.stopped, self.chunks, self.adapted, self.undone, self.said = False, 0, 0, 0, 0
        self.checkpoints, self.shared, self.saved, self.latest = checkpoints, cfg.ttt_mode == "full", None, None
        self.begun = budget.spent()
        if checkpoints:
            self._restore()
            self.kept = self._clock()[0]

    def _clock(self) -> tuple[float, int]:
        """Seconds of the budget and the signal caught; of rank 0 and of any rank where the ranks walk in step."""
        now = self.budget.spent()
        return self.process.heard(now) if self.shared else (now, self.process.signals.caught)

    def _key(self) -> str:
        """What a state must have been made with for this walk to go on from it."""
        settings = {n: v for n, v in self.cfg.settings().items() if n.startswith(("ttt_", "eval_s", "val_b", "comp"))}
        form = 2  # of the tensors, which the script before had otherwise
        where = [self.process.world, self.process.device.type, self.evaluator.stream.targets]
        return json.dumps([form, settings, self.checkpoints.about["artifact"], *where])

    def _restore(self):
        self.state = f"ttt_rank{0 if self.shared else self.process.rank}.npz"
        path, saved = self.checkpoints.folder / self.state, None
        try:
            if path.exists() and (self.process.main or not self.shared):
                saved = read_state(path)
                if saved[0].get("key") != self._key():
                    raise UserError(f"{path}: of another artifact, other settings or other ranks")
        except UserError as error:
            saved = None
            self.log(f"ttt: {error}; starting over")
        self.saved = saved = self.process.agree(saved) if self.shared else saved
        if saved:
            facts = saved[0]
            self.evaluator.restore(saved[1], facts["seconds"], self.shared)
            self.evaluator.batch = facts["batch"]
            for name in self.counters:
                setattr(self, name, facts[name])
            self.budget.started -= facts["seconds"]
            self.log(f"ttt: goes on from {facts['file']}, after {facts['chunks']} chunks and {facts['seconds']:.1f} s")

    def keep(self, tensors, **facts):
        """Between chunks: where CKPT_EVERY_SECONDS have passed or a signal was caught, keep the books, the tensors
        that tensors() gives, and the facts that say where the walk is. Raises Interrupted after a signal."""
        if not self.checkpoints:
            return
        (now, caught), self.latest = self._clock(), (tensors, facts)
        if caught:
            self.write()
            raise Interrupted(caught)
        if 0 < self.cfg.ckpt_every_seconds <= now - self.kept:
            self.write(wait=False)
            self.kept = now

    def write(self, wait: bool = True):
        """Write the latest state that `keep` was given."""
        if not self.latest:
            return
        self.end_lesson()
        self.settle(0)
        (tensors, facts), now, books = self.latest, self.budget.spent(), self.evaluator.books(self.shared)
        facts |= {name: getattr(self, name) for name in self.counters} | {
            "key": self._key(), "seconds": now - self.begun, "batch": self.evaluator.batch}
        if wait:
            self.checkpoints.wait()
        if self.process.main or not self.shared:
            self.checkpoints.save(self.state, books | tensors(), facts)
        if wait:
            self.checkpoints.wait()
            if self.shared:  # no rank leaves before rank 0 has written
                self.process.agree(None)

    def place(self):
        """Where the work is: the budget's seconds, or on a GPU a mark whose time is known once the device is there."""
        return self.process.mark() if self.process.cuda else self.budget.spent()

    def settle(self, most: int):
        """Count the seconds of the pieces of work, but for the newest `most`. On a GPU the latest of them is waited
        for, so that the host is never more than a turn ahead of it."""
        if self.process.cuda and len(self.pieces) > most:
            self.process.reached(self.pieces[-1 - most][1])
        while len(self.pieces) > most:
            begin, end, work = self.pieces.popleft()
            seconds = begin.elapsed_time(end) / 1000 if self.process.cuda else end - begin
            if work:
                self.scoring, self.work = self.scoring + seconds, self.work + work
            else:
                self.lesson = max(self.lesson, seconds)

    def end_lesson(self):
        """A lesson that has been going on is over."""
        if self.lesson_began is not None:
            self.pieces.append((self.lesson_began, self.place(), 0))
            self.lesson_began = None

    @contextlib.contextmanager
    def scored(self, work: int):
        """A piece of scoring of `work` units. The turn before it is waited for, this one only on a CPU."""
        self.end_lesson()
        begin = self.place()
        yield
        self.pieces.append((begin, self.place(), work))
        self.settle(1 if self.process.cuda else 0)

    def may_learn(self) -> bool:
        """Whether there is time for a lesson, with the rest left to score after it and a quarter for unevenness. Ranks
        that walk in step ask at the same place and hear rank 0's answer."""
        self.end_lesson()
        if self.shared:  # lessons follow each other
            self.settle(1 if self.process.cuda else 0)
        rest = self.total - self.work
        need = self.lesson + 1.25 * rest * self.scoring / max(self.work, 1)
        stop = self.stopped or 0 < self.budget.limit <= self.budget.spent() + need
        stop = self.process.agree(stop) if self.shared and self.budget.limit else stop
        if stop and not self.stopped:
            self.log(f"EVAL_MAX_SECONDS={self.budget.limit:g}: adaptation stops, the time left is for scoring")
        self.stopped, self.lesson_began = stop, None if stop else self.place()
        return not stop

    def line(self, i: int, n: int, rate: float):
        """Chunk i of n is done; in lora mode, where the BPB is of this rank's share, the i-th twentieth."""
        bpb = self.evaluator.running_bpb(self.shared)  # which waits for the device
        seconds = self.budget.spent() - self.begun
        self.log(f"ttt_chunk [{i}/{n}] bpb={bpb:.6f} rate={rate:.3g} time={seconds:.1f}s "
                 f"eta={seconds / i * (n - i):.1f}s")
        self.log.metric(ttt_chunk=i, chunks=n, running_bpb=bpb, rate=rate, ttt_seconds=seconds)

    def twentieths(self):
        """Say so where another twentieth of the work is done."""
        part = int(20 * self.work / max(self.total, 1))
        if self.log.main and part > self.said:
            self.said = part
            self.line(part, 20, self.cfg.ttt_lora_lr)


class FullAdapter:
    """TTT_MODE=full: the weights learn from one chunk after another; ranks share a step's sequences, and stay alike.

    After each chunk the weights go back a share TTT_PULL of their way from the artifact's: what helped once fades,
    what helps again stays (after dynamic evaluation, https://arxiv.org/abs/1709.07432).
    """

    def __init__(self, cfg: Config, process: Process, model: GPT, evaluator: Evaluator):
        self.cfg, self.process, self.evaluator, self.flat = cfg, process, evaluator, FlatWeights(model, process.device)
        self.origin = self.flat.weights.clone()
        for block in model.blocks[: cfg.ttt_freeze_blocks]:
            block.requires_grad_(False)
        adapted = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = (torch.optim.SGD(adapted, cfg.ttt_lr, cfg.ttt_momentum, weight_decay=cfg.ttt_wd)
                          if cfg.ttt_optimizer == "sgd" else
                          torch.optim.AdamW(adapted, cfg.ttt_lr, weight_decay=cfg.ttt_wd))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The nats of whole sequences, with RoPE as in the windows that are scored."""
        return self.evaluator.forward(ids, targets, None, self.cfg.eval_len)

    def learn(self, begin: int, end: int, rate: float, may_go_on) -> tuple[int, bool]:
        """TTT_EPOCHS passes over targets [begin, end), all of them scored. Returns the steps taken, and whether they
        had to be undone for a loss or weights that were not finite."""
        cfg, flat, world, rank = self.cfg, self.flat, self.process.world, self.process.rank
        length = min(cfg.train_seq_len, end)
        starts = torch.arange(begin, end, length, device=flat.weights.device).clamp(max=end - length)
        group, size = cfg.ttt_batch_seqs * world or len(starts), tokens_per_pass(cfg, self.process, True) // length
        per_epoch, before, bad, step = -(-len(starts) // group), flat.weights.clone(), flat.loss.new_zeros(()), 0
        while step < cfg.ttt_epochs * per_epoch and may_go_on():
            self.optimizer.param_groups[0]["lr"] = rate * ttt_factor(cfg, step, per_epoch)
            batch = starts[step % per_epoch * group :][:group]
            tokens = self.evaluator.lesson(batch[:, None] + torch.arange(length + 1, device=batch.device))
            flat.gather_gradients(self.forward, tokens[rank::world], max(size, 1), len(tokens), self.process)
            bad += ~flat.clip_(cfg.ttt_grad_clip)
            self.optimizer.step()
            step += 1
        with torch.no_grad():
            flat.weights.lerp_(self.origin, cfg.ttt_pull)
            # what has been scored proves the weights usable; a copy, as a view's strides would ask for another graph
            last = self.evaluator.stream.tokens[end - length : end + 1].clone()[None]
            bad += ~torch.isfinite(self.forward(last[:, :-1], last[:, 1:]).sum() + flat.weights.sum())
        if undone := bool(bad):
            flat.weights.copy_(before)
            self.optimizer.state.clear()
        return step, undone


def walk_full(walk: Walk, model: GPT):
    """Score and learn chunk by chunk."""
    cfg, evaluator, n = walk.cfg, walk.evaluator, walk.evaluator.stream.targets
    adapter, chunks, walk.total = FullAdapter(cfg, walk.process, model, evaluator), -(-n // cfg.ttt_chunk_tokens), n
    if walk.saved:
        adapter.flat.weights.copy_(walk.saved[1]["weights"])
        restore_optimizer(adapter.optimizer, walk.saved[1])
    for i in range(walk.chunks, chunks):
        begin, end = i * cfg.ttt_chunk_tokens, min((i + 1) * cfg.ttt_chunk_tokens, n)
        with walk.scored(end - begin):
            evaluator.score(begin, end)
        fall = 0.5 * (1 + math.cos(math.pi * i / max(chunks - 1, 1)))  # a cosine across chunks, to a share of the rate
        rate = cfg.ttt_lr * (cfg.ttt_lr_end + (1 - cfg.ttt_lr_end) * fall)
        if end < n and cfg.ttt_epochs and not walk.stopped:
            steps, undone = adapter.learn(begin, end, rate, walk.may_learn)
            walk.adapted, walk.undone = walk.adapted + (steps > 0), walk.undone + undone
            if undone:
                walk.log(f"ttt_chunk {i + 1}: its adaptation was not finite and is undone")
        walk.chunks = i + 1
        walk.line(walk.chunks, chunks, rate)
        walk.keep(lambda: {"weights": adapter.flat.weights} | optimizer_tensors(adapter.optimizer))


class LoraAdapters:
    """TTT_MODE=lora: low-rank adapters (https://arxiv.org/abs/2106.09685) on the matrices of the blocks, one set a
    document. A document's are one row of `weights` [documents, n], and so are their gradient and Adam's state: what
    is done row by row couples nothing. Nothing here waits for the device."""

    def __init__(self, cfg: Config, process: Process, model: GPT):
        rank, generator = min(cfg.ttt_lora_rank, cfg.model_dim), torch.Generator().manual_seed(0)
        self.cfg, self.dtype = cfg, model.requires_grad_(False).dtype
        self.layers = [m for name, m in model.named_modules() if isinstance(m, Linear) and name.startswith("blocks.")]
        self.shapes, parts = [], []
        for layer in self.layers:  # the first factor random, the second zero: no effect before the first step
            self.shapes += [(rank, layer.in_features), (layer.out_features, rank)]
            parts += [torch.randn(self.shapes[-2], generator=generator) / math.sqrt(layer.in_features),
                      torch.zeros(self.shapes[-1])]
        self.initial = torch.cat([p.flatten() for p in parts]).to(process.device)
        own_kernels = process.cuda and compiles(cfg, process)
        self.update = torch.compile(adam_rows, dynamic=False) if own_kernels else adam_rows
        self.undone = torch.zeros((), dtype=torch.int64, device=process.device)

    def reset(self, places: int):
        """Room for the adapters of this many documents at a time, and for Adam's state of each."""
        self.weights = self.initial.repeat(places, 1)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps = self.weights.new_zeros(places, 1)

    def renew(self, places: np.ndarray):
        """Fresh adapters and optimizer state in these places."""
        if len(places):
            places = to_device(places, self.weights.device)
            self.weights.index_copy_(0, places, self.initial.expand(len(places), -1))
            for state in (self.first, self.second, self.steps):
                state.index_fill_(0, places, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        return {"adapters": self.weights, "first": self.first, "second": self.second, "steps": self.steps,
                "undone": self.undone}

    def restore(self, tensors: dict[str, Tensor]):
        """Put back what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def attach(self, places: Tensor, times: int = 1):
        """Give the layers the adapters in `places`, a row of the next batch each, the whole repeated so many times."""
        everyone = len(places) == len(self.weights)
        self.leaf = (self.weights.detach() if everyone else self.weights[places]).requires_grad_()
        parts = self.leaf.to(self.dtype).repeat(times, 1) if times > 1 else self.leaf.to(self.dtype)
        parts = parts.split([math.prod(shape) for shape in self.shapes], dim=1)
        matrices = [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        for layer, down, up in zip(self.layers, matrices[::2], matrices[1::2], strict=True):
            layer.adapter = (down, up)

    def detach(self):
        for layer in self.layers:
            layer.adapter = None

    def step(self, nats: Tensor, places: Tensor, learns: Tensor):
        """An Adam step on the mean of each row of nats [rows, targets], for the attached `places` where `learns`
        [rows]. `undone` counts those that are left as they were, for a loss or gradient that was not finite."""
        grad, = torch.autograd.grad((nats.mean(1) * learns).sum(), self.leaf)
        norm = torch.linalg.vector_norm(grad, dim=1)
        finite = torch.isfinite(norm + nats.detach().sum(1))
        self.undone += (learns & ~finite).sum()
        if self.cfg.ttt_grad_clip:
            grad = grad * (self.cfg.ttt_grad_clip / (norm + 1e-6)).clamp(max=1.0)[:, None]
        whole = self.weights, self.first, self.second, self.steps
        everyone = len(places) == len(self.weights)
        mine = whole if everyone else [state[places] for state in whole]
        with torch.no_grad():
            self.update(*mine, grad, (learns & finite)[:, None], self.cfg.ttt_lora_lr)
        if not everyone:
            for state, rows in zip(whole, mine, strict=True):
                state.index_copy_(0, places, rows)


def adam_rows(weights: Tensor, first: Tensor, second: Tensor, steps: Tensor, grad: Tensor, learns: Tensor, rate: float):
    """An Adam step, in place, on the rows of weights [rows, n] where `learns` [rows, 1]; each row has its own moments
    and its own count of `steps` [rows, 1]. (https://arxiv.org/abs/1412.6980)"""
    beta1, beta2, epsilon = 0.9, 0.99, 1e-8
    grad = torch.where(learns, grad, 0.0)  # which may not be finite where a row does not learn
    steps.add_(learns)
    taken = steps.clamp(min=1.0)
    first.lerp_(grad, torch.where(learns, 1 - beta1, 0.0))
    second.lerp_(grad.square_(), torch.where(learns, 1 - beta2, 0.0))
    size = torch.where(learns, rate / (1 - beta1**taken), 0.0)
    scale = second.sqrt().mul_((1 - beta2**taken).rsqrt()).add_(epsilon)
    weights.addcdiv_(size * first, scale, value=-1)


def document_groups(cfg: Config, process: Process, stream: Stream, weights: int) -> list[tuple[int, int, np.ndarray]]:
    """This rank's documents by length: (window, places, documents [n, 2] as first target and end, longest first).

    A document is the targets from its BOS to the next; what comes before the first BOS is one too. A short one gets
    a shorter window: half or a quarter. `places` go through the model side by side, as many as the activations of the
    longest window and, with all that Adam needs, adapters of `weights` numbers leave room for; they are as many for
    every window, so that a compiled model learns in one shape.
    """
    starts = np.union1d([0], torch.nonzero(stream.tokens[:-1] == BOS_ID)[:, 0].cpu().numpy())
    documents = np.stack((starts, np.append(starts[1:], stream.targets)), axis=1)
    lengths, groups, chunk = documents[:, 1] - documents[:, 0], [], min(cfg.ttt_lora_chunk_tokens, cfg.eval_len)
    stride = min(cfg.eval_stride, chunk)
    windows = sorted({w for w in (cfg.eval_len, cfg.eval_len // 2, cfg.eval_len // 4) if w >= stride}, reverse=True)
    # a document's length must not show before its end: in the shorter windows all its blocks see its first token
    longest = {w: w if w % stride == chunk % stride == 0 else w - stride + 1 for w in windows[1:]}
    for window, shorter in zip(windows, [*windows[1:], None], strict=True):
        chosen = documents[(lengths <= longest.get(window, math.inf)) & (lengths > longest.get(shorter, 0))]
        if len(chosen):
            groups.append((window, chosen[np.argsort(chosen[:, 0] - chosen[:, 1], kind="stable")]))
    room = min(tokens_per_pass(cfg, process, True), cfg.val_batch_size // process.world) // cfg.eval_len
    room = min(room, process.memory()[0] // 8 // (32 * weights))
    most = max(-(-len(chosen) // process.world) for _, chosen in groups)
    return [(window, max(min(room, most), 1), chosen[process.rank :: process.world]) for window, chosen in groups]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of an array, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def walk_documents(walk: Walk, adapters: LoraAdapters, group: int, window: int, places: int, documents: np.ndarray,
                   fixed: bool):
    """Score and learn a group's documents chunk by chunk, `places` at a time; one that ends gives its place to the
    next. `fixed`: places without a document stay in the batch, so that a compiled model sees one shape.

    Which document is in which place, where it is and whether it learns is known on the host, which tells the device.
    """
    device, chunk = walk.process.device, min(walk.cfg.ttt_lora_chunk_tokens, walk.cfg.eval_len)
    queue = collections.deque(documents.tolist())
    begin, end, at = table = np.zeros((3, places), np.int64)  # of each place's document; its next target
    adapters.reset(places)
    if walk.saved and walk.saved[0]["group"] == group:
        table[:], queue = walk.saved[1]["places"].numpy(), collections.deque(walk.saved[0]["queue"])
        adapters.restore(walk.saved[1])
    while True:
        free = np.flatnonzero(at >= end)[: len(queue)]
        for place in free:
            begin[place], end[place] = queue.popleft()
            at[place] = begin[place]
        adapters.renew(free)
        left = end - at
        if not left.any():
            return
        active = np.arange(places) if fixed else np.flatnonzero(left)
        learners = active[fixed | (left[active] > chunk)]
        rows = to_device(np.stack((active, begin[active], at[active], end[active])), device)
        with walk.scored(window * int(np.minimum(left, chunk).sum())):
            reach = chunk if fixed else min(chunk, int(left.max()))
            score_documents(walk, adapters, window, chunk, reach, *rows)
        walk.chunks += int((left > 0).sum())
        if (left > chunk).any() and walk.may_learn():
            if len(learners) < len(active):
                rows = to_device(np.stack((learners, begin[learners], at[learners], end[learners])), device)
            learn_documents(walk, adapters, chunk, *rows)
            walk.adapted += int((left > chunk).sum())
        walk.twentieths()
        np.minimum(at + chunk, end, out=at)
        walk.keep(lambda: {"places": torch.from_numpy(table), **adapters.tensors()}, group=group, queue=list(queue))


def score_documents(walk: Walk, adapters: LoraAdapters, window: int, chunk: int, reach: int, places: Tensor,
                    first: Tensor, low: Tensor, end: Tensor):
    """Score the next `chunk` targets, from `low` on, of the documents [first, end) in `places`, a stride in each row
    of the batch; a window ends where its stride does and does not begin before the document. None of them has more
    than `reach` targets left in its chunk."""
    evaluator, stride = walk.evaluator, walk.evaluator.stride
    offsets = torch.arange(0, reach, stride, device=low.device)[:, None]
    strides = max(tokens_per_pass(walk.cfg, walk.process, False) // (window * len(places)), 1)
    for some in offsets.split(strides):
        adapters.attach(places, len(some))
        begins, ends = low + some, (low + (some + stride).clamp(max=chunk)).minimum(end)
        starts = (begins + stride - window).maximum(first)
        evaluator.record(begins.flatten(), ends.flatten(), starts.flatten(), window)


def learn_documents(walk: Walk, adapters: LoraAdapters, chunk: int, places: Tensor, first: Tensor, low: Tensor,
                    end: Tensor):
    """A step of each document on the chunk from `low` on, if that is not its last; no later token goes in, and of the
    earlier ones LORA_CONTEXT."""
    evaluator, length = walk.evaluator, min(walk.cfg.eval_len, chunk + LORA_CONTEXT)
    learns, start = low + chunk < end, (low + chunk - length).maximum(first)[:, None]
    inputs = (start + torch.arange(length, device=low.device)).minimum(low[:, None] + chunk - 1)
    targets = low[:, None] + torch.arange(chunk, device=low.device)
    tokens = evaluator.lesson(targets + 1, learns)
    adapters.attach(places)
    inputs = evaluator.stream.tokens[inputs.clamp(max=evaluator.stream.targets)]
    nats = evaluator.forward(inputs, tokens, targets - start, walk.cfg.eval_len)
    adapters.step(nats, places, learns)


def walk_lora(walk: Walk, model: GPT):
    """Each document from fresh adapters: score a chunk of it, learn from it, go on to its next one. Nothing carries
    over between documents, so they share batches and are shared out over the ranks."""
    process, adapters = walk.process, LoraAdapters(walk.cfg, walk.process, model)
    groups = document_groups(walk.cfg, process, walk.evaluator.stream, len(adapters.initial))
    walk.total = sum(window * int((documents[:, 1] - documents[:, 0]).sum()) for window, _, documents in groups)
    for i, group in enumerate(groups):
        if not walk.saved or walk.saved[0]["group"] <= i:
            walk_documents(walk, adapters, i, *group, walk.evaluator.forward is not model)
    adapters.detach()
    walk.end_lesson()
    walk.settle(0)
    walk.twentieths()
    try:
        process.heard(0.0)  # ranks that are done wait here for the others
    except PeerLost:  # which were interrupted
        walk.write()
        raise
    counts = torch.tensor((walk.adapted, int(adapters.undone), walk.chunks, walk.stopped), device=process.device)
    walk.adapted, walk.undone, walk.chunks, walk.stopped = process.sum_(counts).tolist()


def prime(cfg: Config, process: Process, log: Log, stream: Stream, tokenizer: Tokenizer):
    """Where forward passes are compiled, let an untrained model walk over random tokens, never validation text, in the
    shapes that `stream` will need: the walk that counts then meets no graph for the first time. Torch keeps compiled
    code for all models of one form, so this can be done before there is an artifact, and before training's clock."""
    if not compiles(cfg, process):
        return
    model = GPT(cfg, process.dtype).to(process.device)
    rng, starts, n = np.random.default_rng(0), [], min(2 * cfg.ttt_chunk_tokens, stream.targets)
    if cfg.ttt_mode == "lora":  # a whole batch for each length of window
        groups = document_groups(cfg, process, stream, len(LoraAdapters(cfg, process, model).initial))
        starts = np.cumsum([window + (window == cfg.eval_len) for window, places, _ in groups  # one more: it learns
                            for _ in range(places * process.world)])
        n, starts = int(starts[-1]), [0, *starts[:-1]]
    ids = rng.integers(BOS_ID + 1, max(cfg.vocab_size, BOS_ID + 2), n + 1)
    ids[starts] = BOS_ID
    cfg = dataclasses.replace(cfg, eval_max_seconds=0.0)
    test_time_train(cfg, process, log.silent(), model, Stream(ids, tokenizer, process.device))
    note_graphs(process, "")
    for graph in process.graphs:
        log(f"compile: {graph['graph']} {graph['shape']} {graph['seconds']:.1f} s")


def test_time_train(cfg: Config, process: Process, log: Log, model: GPT, stream: Stream, budget: Budget | None = None,
                    probe=(), checkpoints: Checkpoints | None = None) -> tuple[Evaluator, dict]:
    """Walk the stream once: score a chunk for good, learn from it, score the next. Changes `model` in full mode.
    Returns the books and what to report of the walk. With `checkpoints` states of it are kept and gone on from."""
    lora = cfg.ttt_mode == "lora"
    stride = min(cfg.eval_stride, cfg.ttt_lora_chunk_tokens, cfg.eval_len) if lora else cfg.eval_stride
    evaluator = Evaluator(cfg, process, compiled(model, cfg, process), stream, stride, probe)
    with process.signals.hold() if checkpoints else contextlib.nullcontext():
        walk = Walk(cfg, process, log, evaluator, budget or Budget(cfg), checkpoints)
        (walk_lora if lora else walk_full)(walk, model)
    if walk.undone:
        log(f"ttt: the adaptation of {walk.undone} chunks was not finite and is undone")
    return evaluator, {"chunks": walk.chunks, "mode": cfg.ttt_mode, "adapted_chunks": walk.adapted - walk.undone,
                       "undone_chunks": walk.undone, "stopped_by_budget": bool(walk.stopped)}


# ==== Audit: proof, on an excerpt, that the evaluation behind val_bpb is causal =======================================


def decoded_bytes(sp, ids: np.ndarray) -> int:
    """Canonical bytes of the targets ids[1:], counted without the table: from the text that the pieces spell, in
    which a space at the start of a document does not count."""
    mark, boundary = b"\xff\xfe\xff", [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(len(sp))]
    spelt = [mark if boundary[i] else bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("\u2581", " ").encode()
             for i, p in enumerate(map(sp.id_to_piece, range(len(sp))))]
    first = spelt[ids[0]]  # the context of the first target, itself not scored
    text = first + b"".join(map(spelt.__getitem__, ids[1:].tolist()))
    return len(text) - len(first) - text.count(mark + b" ") - len(mark) * text[len(first) :].count(mark)


def exact_audit(cfg: Config, process: Process) -> bool:
    """Whether honest runs agree bit for bit: not on a GPU, nor where a cut changes the batches of documents. Where
    they do not, the audit computes in fp32 and uncompiled, and allows for what is left."""
    return not process.cuda and not (cfg.ttt_enabled and cfg.ttt_mode == "lora")


def audit_length(cfg: Config) -> int:
    """Targets of the excerpt that the audit evaluates."""
    return max(cfg.audit_tokens, cfg.eval_len) if cfg.audit_tokens else 4 * cfg.eval_len


def audit(cfg: Config, process: Process, log: Log, trial, stream: Stream, sp) -> dict:
    """AUDIT=1: five checks of an evaluation, a black box: `trial(ids, probe, **changes)` evaluates any tokens with it
    and returns its Evaluator; `changes` are settings to change. `sp`: the SentencePiece model. Returns the summary's
    entry: ok, and for each check ok and detail."""
    rng, ids = np.random.default_rng(cfg.seed), stream.tokens.cpu().numpy()
    counted, ids = decoded_bytes(sp, ids), ids[: audit_length(cfg) + 1].copy()
    n = len(ids) - 1
    if n >= 16:  # several documents, to be kept apart
        ids[rng.integers(1, n, 4)] = BOS_ID
    starts = np.flatnonzero(ids[1:] == BOS_ID) + 1  # their ends are places worth cheating at
    cuts = sorted({*rng.integers(max(n // 3, 1), n + 1, 4).tolist(),
                   *rng.choice(starts, min(2, len(starts)), replace=False).tolist()})
    made = Evaluator.made
    honest = trial(ids, sorted({cut - 1 for cut in cuts} | set(rng.integers(0, n, 4).tolist())))
    walks, score, full = Evaluator.made - made, honest.result(), probed(process, honest)
    checks = {"causal": causal(cfg, process, trial, ids, cuts, honest, score, full, rng)}
    sums = [abs(float(nats.double().neg().exp().sum()) - 1) for nats in full.values()]
    gaps = [abs(float(nats[int(ids[at + 1])]) - float(score.nats[at])) for at, nats in full.items()]
    checks["normalised"] = bool(sums) and all(x <= 1e-4 for x in sums + gaps), (
        f"at {len(sums)} places the sum is off 1 by at most {max(sums):.2g}, the loss off -log of its entry by at most "
        f"{max(gaps):.2g}")
    least, most, early = int(honest.count.min()), int(honest.count.max()), int(honest.early)
    checks["one_pass"] = least == most == walks == 1, f"{n} targets, scored {least} to {most} times in {walks} walk(s)"
    checks["score_before_update"] = early == 0, (f"{early} optimizer steps had seen a target before its score; "
                                                 f"{int((honest.learnt > 0).sum())} tokens were learnt from")
    checks["bytes"] = counted == stream.bytes, f"{stream.bytes} by the table, {counted} by the decoded pieces"
    for name, (ok, detail) in checks.items():
        log(f"audit {name}: {'ok' if ok else 'FAILED'}, {detail}")
    return {"ok": all(ok for ok, _ in checks.values()), "seconds": 0.0,
            **{name: {"ok": ok, "detail": detail} for name, (ok, detail) in checks.items()}}


def probed(process: Process, evaluator: Evaluator) -> dict[int, Tensor]:
    """The probed distributions of all ranks, as nats by target."""
    return {at: nats for part in process.gather(evaluator.distributions) for at, nats in part.items()}


def causal(cfg: Config, process: Process, trial, ids: np.ndarray, cuts: list[int], honest: Evaluator, score: Score,
           full: dict[int, Tensor], rng) -> tuple[bool, str]:
    """Random tokens from a cut on must leave every loss before it as it was, and the distribution at it."""
    worst, noise, tolerance, learnt, peek = 0.0, 0.0, 0.0, [], max(process.gather(honest.peek))
    if not exact_audit(cfg, process):  # how far honest runs differ whose batches have other shapes
        noise = float(np.abs(trial(ids, val_batch_size=cfg.eval_len * process.world).result().nats - score.nats).max())
        tolerance = min(1e-3, 1e-5 + 4 * noise)
    for cut in cuts:  # tokens before position `cut` stay, so the losses of targets 0 to cut-2
        after = rng.integers(0, cfg.vocab_size, len(ids) - cut).astype(ids.dtype)
        other = trial(np.append(ids[:cut], after), [cut - 1])
        losses = np.abs(other.result().nats - score.nats)[: cut - 1]
        at_cut = (probed(process, other)[cut - 1].neg().exp() - full[cut - 1].neg().exp()).abs().numpy()
        worst = max(worst, float(np.nan_to_num(np.concatenate((losses, at_cut)), nan=np.inf).max()))
        learnt.append(int((process.sum_(other.learnt)[:cut] > 0).sum()))
    return worst <= tolerance and peek <= max(tolerance, 1e-5) and noise <= 1e-3, (
        f"cuts at {cuts} of {score.tokens}: what comes before differs by {worst:.3g}, allowed {tolerance:.3g} (a re-run"
        f": {noise:.3g}); other inputs after a place change its loss by {peek:.3g}; tokens learnt from before the cuts"
        f": {learnt}")


# ==== Training ========================================================================================================

NAN_MOST = 3  # steps in a row that NAN_POLICY=skip drops


def rate_factor(cfg: Config, step: int, seconds: float) -> float:
    """Learning rates at a step, as a share of their full values: 1, then a linear warmdown to 0.

    Under a wall-clock cap the warmdown is the time that WARMDOWN_ITERS steps take at the speed measured so far.
    """
    if cfg.warmdown_iters == 0:
        return 1.0
    if cfg.max_wallclock_seconds == 0:
        return min((cfg.iterations - step) / cfg.warmdown_iters, 1.0)
    warmdown = cfg.warmdown_iters * seconds / max(step, 1)
    left = max(cfg.max_wallclock_seconds - seconds, 0.0)
    return left / max(warmdown, 1e-9) if left <= warmdown else 1.0


class Trainer:
    """One rank's training: its share of each batch, the step and the clock."""

    def __init__(self, cfg: Config, process: Process, model: GPT):
        self.cfg, self.process, self.started, self._marks = cfg, process, 0.0, collections.deque()
        self.bad, self.dropped, self.fault = 0, 0, ""  # steps dropped in a row, in all, and the last one
        self.flat, self.forward = FlatWeights(model, process.device), compiled(model, cfg, process)
        self.optimizers = Optimizers(cfg, self.flat, process)
        self.share = cfg.train_batch_tokens // cfg.train_seq_len // process.world
        most = cfg.micro_batch_seqs or max(tokens_per_pass(cfg, process, True) // cfg.train_seq_len, 1)
        self.micro = max(n for n in range(1, self.share + 1) if self.share % n == 0 and n <= most)

    def step(self, tokens: Tensor, step: int, factor: float):
        """One update from this rank's tokens [sequences, seq_len + 1]; leaves the mean loss in `flat.loss`, and says
        in `bad`, `dropped` and `fault` what was dropped (on a GPU up to the step before, which is known by then)."""
        self.flat.gather_gradients(self.forward, tokens, self.micro, self.share * self.process.world, self.process)
        self.optimizers.step(step, factor)
        bad = self.optimizers.bad.to("cpu", non_blocking=True)
        self._marks.append((bad, self.process.mark(), step + 1, factor))
        if not self.process.cuda or len(self._marks) > 1:
            self._settle()

    def _settle(self):
        """Wait for the oldest step not waited for: the clock stays true and the device, one step ahead, never idles."""
        bad, mark, step, factor = self._marks.popleft()
        self.process.reached(mark)
        self.bad = int(bad)
        if self.bad:
            self.dropped += 1
            self.fault = (f"step {step}: the loss or a gradient is not finite, at rate {factor:.3g} x MATRIX_LR="
                          f"{self.cfg.matrix_lr:g}, SCALAR_LR={self.cfg.scalar_lr:g}")

    def warm_up(self):
        """Prime compilation on random tokens at rate 0, which leaves the weights as they are; start the clock."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.cfg.warmup_steps):
            tokens = torch.randint(self.cfg.vocab_size, (self.share, self.cfg.train_seq_len + 1), generator=generator)
            self.step(tokens.to(self.process.device, torch.int32), 0, 0.0)
        self.synchronize()
        self.optimizers.reset()
        self.started, self.bad, self.dropped = time.perf_counter(), 0, 0

    def synchronize(self):
        """Wait for all steps so far."""
        self.process.synchronize()
        while self._marks:
            self._settle()

    def state(self) -> dict[str, Tensor]:
        """All that the steps to come depend on, whole on every rank."""
        cuda = {"random_cuda": torch.cuda.get_rng_state()} if self.process.cuda else {}
        return self.optimizers.tensors() | cuda | {"random": torch.get_rng_state()}

    def restore(self, tensors: dict[str, Tensor], seconds: float):
        """Go on from what `state` gave, with the clock at `seconds`. UserError for what another model gave."""
        try:
            if odd := [n for n, x in tensors.items() if x.dtype not in (torch.float32, torch.uint8)]:
                raise TypeError(f"{odd[0]} is {tensors[odd[0]].dtype}")
            self.optimizers.restore(tensors)
            torch.set_rng_state(tensors["random"])
            if self.process.cuda and "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"])
        except (LookupError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"the checkpoint is of another model or device ({error}); start afresh", True) from None
        self.started = time.perf_counter() - seconds

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

    def keep(self, checkpoints: Checkpoints, step: int, seconds: float, last: bool):
        """Begin to write the state after `step` steps; the `last` one after waiting for the one before."""
        began, state = time.perf_counter(), self.state()
        if self.process.main:
            if last:
                checkpoints.wait()
            kept = checkpoints.save(f"step_{step:07d}.npz", state, {"step": step, "seconds": seconds,
                                                                    "dropped": self.dropped})
            said = "is being written" if kept else "left out, the one before is still being written"
            checkpoints.log(f"checkpoint of step {step} {said}; training waited "
                            f"{1000 * (time.perf_counter() - began):.0f} ms", console=False)

    def drop(self, ends: bool, checkpoints: Checkpoints, log: Log):
        """Say that a step was dropped. UserError where it `ends` the run."""
        if not ends:
            return log(f"{self.fault}; the step is dropped, {max(self.bad, 1)} in a row")
        newest = self.process.agree(self.process.main and (checkpoints.wait() or checkpoints.newest))
        skips = self.cfg.nan_policy == "skip"
        advice = f"see why {NAN_MOST} in a row were not enough" if skips else "set NAN_POLICY=skip"
        raise UserError(f"{self.fault}; the step is dropped and the run ends; lower the rates or {advice}; last good "
                        f"checkpoint: {newest or 'none'}", shared=True)


def train(cfg: Config, process: Process, log: Log, model: GPT, tokens: Tokens, stream: Stream,
          checkpoints: Checkpoints, saved: tuple[dict, dict[str, Tensor]] | None = None) -> dict:
    """Train `model` in place, from the start or from a `saved` state, and leave the averaged weights in it. Returns
    the summary's `train` entry.

    Raises UserError when a loss or gradient is not finite and NAN_POLICY does not let the step be dropped, and
    Interrupted after a signal, when the state is written.
    """
    if process.cuda:
        torch.cuda.reset_peak_memory_stats()  # what was compiled before has run too
    trainer, first, seconds = Trainer(cfg, process, model), 0, 0.0
    log(f"world_size:{process.world} grad_accum_steps:{trainer.share // trainer.micro} "
        f"micro_batch_seqs:{trainer.micro} compute_dtype:{str(process.dtype)[6:]} warmup_steps:{cfg.warmup_steps}")
    trainer.warm_up()
    if saved:
        first, seconds, trainer.dropped = (saved[0][name] for name in ("step", "seconds", "dropped"))
        trainer.restore(saved[1], seconds)
    loader, step, kept, caught, dropped = Loader(cfg, tokens, process, first), first, seconds, 0, trainer.dropped
    with process.signals.hold():
        while True:
            stop = ("wallclock_cap" if 0 < cfg.max_wallclock_seconds <= seconds else
                    "iterations" if step >= cfg.iterations else "")
            if stop:
                trainer.synchronize()
            failed = trainer.dropped > dropped and (cfg.nan_policy == "stop" or trainer.bad > NAN_MOST)
            last = bool(stop or caught or failed)
            if step > first and (last or 0 < cfg.ckpt_every_seconds <= seconds - kept):
                trainer.keep(checkpoints, step, seconds, last)
                kept = seconds
            if trainer.dropped > dropped:
                trainer.drop(failed, checkpoints, log)
            dropped = trainer.dropped
            if caught:
                process.agree(process.main and checkpoints.wait())  # no rank leaves before it is written
                raise Interrupted(caught)
            clock = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
            if (cfg.val_loss_every and step % cfg.val_loss_every == 0) or (stop and cfg.final_eval_enable):
                with trainer.off_the_clock():
                    evaluator = evaluate(cfg, process, log, trainer.forward, stream, cfg.eval_len, "validation")
                    if (caught := trainer.heard()[1]):
                        continue
                    raw = evaluator.result()
                log(f"step:{step}/{cfg.iterations} val_loss:{raw.val_loss:.4f} val_bpb:{raw.val_bpb:.4f} {clock}")
                log.metric(step=step, val_loss=raw.val_loss, val_bpb=raw.val_bpb, train_seconds=seconds)
            if stop:
                break
            factor = rate_factor(cfg, step, seconds)
            trainer.step(loader.next(), step, factor)
            step, (seconds, caught) = step + 1, trainer.heard()
            speed, done = step * cfg.train_batch_tokens / seconds, step / cfg.iterations
            done = max(done, seconds / (cfg.max_wallclock_seconds or math.inf))
            if cfg.train_log_every and (step <= first + 10 or step % cfg.train_log_every == 0 or done >= 1):
                process.synchronize()
                loss = trainer.flat.loss.item()
                log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
                    f"step_avg:{1000 * seconds / step:.2f}ms")
                log.metric(step=step, train_loss=loss if math.isfinite(loss) else None, train_seconds=seconds,
                           rate_factor=factor, tokens_per_second=speed)
            log.live(f"step {step}, loss {loss:.3f}, {speed:,.0f} tokens/s" if cfg.train_log_every else f"step {step}",
                     done, seconds, every=60.0)
    if stop == "wallclock_cap":
        log(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{cfg.iterations}")
    log(f"peak memory allocated: {process.memory()[1] // 2**20} MiB")
    if trainer.optimizers.average is not None:
        trainer.flat.weights.copy_(trainer.optimizers.average)
    if not bool(torch.isfinite(trainer.flat.weights).all()):
        raise UserError("training ended with weights that are not finite; lower the learning rates", shared=True)
    return {"steps": step, "tokens": step * cfg.train_batch_tokens, "seconds": seconds, "dropped_steps": dropped,
            "step_ms": 1000 * seconds / max(step, 1), "stop": stop}


# ==== Main: find a run to go on with, open and check, run the stages, leave a record ==================================

# What a run's continuation may change without a word; and what it may not, since the state hangs on it.
UNBOUND = {"run_id", "log_dir", "resume", "preset", "strict_env", "env_extra", "train_log_every", "nll_dump",
           "ckpt_every_seconds", "keep_ckpts", "nan_policy"}
BOUND = {f.name for f in MODEL_FIELDS} | {"muon_beta2", "seed", "shuffle", "train_batch_tokens", "train_enabled",
                                          "model_path"}
NO_ROOM_SECONDS = 900.0  # how long a run waits for room on the disk before it gives up what is kept nowhere else


def launcher() -> str:
    """What tells this launch from any other, and stays the same when torchrun restarts its workers."""
    began = ""
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {platform.node()} {os.getppid()} {began}"


def lock(folder: Path, patience: float = 0.0):
    """Lock a run's folder for as long as this process lives; the lock of a dead one is no obstacle. Returns the open
    file. UserError when a live run still has it after `patience` seconds."""
    file, began = open(folder / "lock", "a+"), time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            require(time.monotonic() - began <= patience, f"RUN_ID={folder.name}: a live run writes into {folder}; "
                    "wait for it or choose another RUN_ID")
            time.sleep(0.2)
        except OSError:  # a file system without locks
            break
    return file


def file_hash(path: Path) -> str:
    """sha256 of a file, empty where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def read_progress(folder: Path) -> dict:
    """The record of a run's finished stages; empty where there is none that can be read."""
    try:
        text, _, checksum = (folder / "progress.json").read_bytes().rpartition(b"\n")
        record = json.loads(text) if hashlib.sha256(text).hexdigest().encode() == checksum else {}
        if record:
            check_settings(record)
        return record
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def place_to_resume(cfg: Config, restart: bool) -> tuple[Path | None, dict, dict[str, Tensor]]:
    """The folder that RESUME or a restart means, None for a new one; and what the checkpoint holds that RESUME names.

    Raises UserError for a path that is no checkpoint and no run's folder.
    """
    path, folder = Path(cfg.resume), Path(cfg.log_dir, cfg.run_id) if cfg.run_id else None
    if cfg.resume == "0":  # a restart: the run that this launch began, refused where it began none
        runs = [folder] if folder else [p.parent for p in Path(cfg.log_dir).glob("*/progress.json")]
        return next((f for f in runs if launcher() in read_progress(f).get("launchers", ())), None), {}, {}
    if cfg.resume == "1":
        return folder, {}, {}
    if path.is_dir():
        require(any((path / name).exists() for name in ("progress.json", "summary.json", "checkpoints")),
                f"RESUME={path}: no run's folder; give LOG_DIR/RUN_ID or a file of its checkpoints")
        return path, {}, {}
    facts, tensors = read_state(path)
    require("step" in facts, f"RESUME={path}: a state of test-time training, which only RESUME=1 goes on from")
    around = path.absolute().parents  # LOG_DIR/RUN_ID/checkpoints, unless the file was moved
    inside = around[0].name == "checkpoints" and around[1].name == facts["run_id"] and "log_dir" not in cfg.explicit
    home = around[2] if inside else Path(cfg.log_dir)
    return home / facts["run_id"] if cfg.run_id in ("", facts["run_id"]) else None, facts, tensors


def find_run(cfg: Config, process: Process) -> tuple[dict | None, dict[str, Tensor]]:
    """What RESUME, or a restart by torchrun, asks to go on with: {"folder", "facts" of its newest good checkpoint,
    "notes" to log, and what is in its progress.json}; and that checkpoint's tensors. On rank 0, which locks the folder.

    Raises UserError for a live run, and for a path that is no checkpoint and no run.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if cfg.resume == "0" and not restart:
        return None, {}
    why, notes, later = "restart" if restart else f"RESUME={cfg.resume}", [], []
    folder, facts, tensors = place_to_resume(cfg, restart)
    if folder is None or not folder.is_dir():
        notes.append(f"{why}: " + ("a new run starts from it" if facts else "nothing to resume, starting afresh"))
        return {"folder": None, "facts": facts, "notes": notes, "summary": None, "nats": None}, tensors
    if (folder / "summary.json").exists() and not (folder / "progress.json").exists():
        require(not facts, f"{why}: the run in {folder} is finished; give a new RUN_ID to start from this checkpoint")
        return {"finished": str(folder / "summary.json")}, {}
    process.lock, states = lock(folder, 10.0 * restart), step_files(folder / "checkpoints")
    progress = read_progress(folder)
    if facts:  # that state and no later one; what was done after it is to be done again
        progress |= {"summary": None, "nats": None}
        later, states = [str(state) for state in states if int(state.stem[5:]) > facts["step"]], []
    while states and not facts:
        try:
            facts, tensors = read_state(states.pop())
        except UserError as error:
            notes.append(f"{why}: {error}; falling back to the one before")
    summary = progress.get("summary") or {}
    if artifact := summary.get("artifact"):
        scored = folder / ARTIFACT_NAME
        scored = scored if scored.exists() or not progress["settings"]["model_path"] else Path(artifact["path"])
        if artifact["sha256"] != file_hash(scored):
            notes.append(f"{why}: {scored} is not the artifact that this run scored; that is done again")
            summary["artifact"] = None
            summary["eval"] |= {"int6": None, "sliding": None, "ttt": None}
    if not facts and not summary.get("artifact"):
        notes.append(f"{why}: nothing to resume in {folder}, starting afresh there")
    found = {"folder": str(folder), "facts": facts, "notes": notes, "summary": None, "nats": None, "later": later}
    return found | progress, tensors


def continued(cfg: Config, found: dict, ranks: int) -> Config:
    """The settings of the run that was found, with what the environment sets anew. Raises UserError for a setting that
    its state cannot go on with; others that change are noted."""
    source, notes, summary = found if "settings" in found else found["facts"], found["notes"], found["summary"]
    stored = {f.name: source["settings"][f.name] for f in VARIABLES if f.name in source.get("settings", {})}
    changed = [n for n in sorted(cfg.explicit & stored.keys() - UNBOUND) if getattr(cfg, n) != stored[n]]
    for name in changed:
        require(name not in BOUND, f"{name.upper()}={getattr(cfg, name)}: the run to go on with has {stored[name]}; "
                "unset it, or start another run")
        notes.append(f"resumed with {name.upper()}={getattr(cfg, name)}, before {stored[name]}")
    if changed and summary:  # what hung on them is done again
        scores = all(n.startswith(("eval_", "val_", "final_", "ttt_", "audit")) for n in changed)
        summary |= {"eval": dict.fromkeys(summary["eval"]), "audit": None, "reasons": []}
        summary["artifact"] = summary["artifact"] if scores else None
    if stored.get("nll_dump") and "nll_dump" not in cfg.explicit:  # no file chooses where this process writes
        notes.append(f"NLL_DUMP={stored['nll_dump']} of the run so far is not taken over; give it again")
    if stored.get("preset", cfg.preset) != cfg.preset and "preset" in cfg.explicit:
        notes.append(f"PRESET={cfg.preset} is not taken over: the run was made with {stored['preset']}")
    own = {*cfg.explicit, "run_id", "log_dir", "resume", "nll_dump"} - {"preset"}
    kept = {n: v for n, v in stored.items() if n not in own}
    if found["folder"]:
        kept |= {"run_id": Path(found["folder"]).name, "log_dir": str(Path(found["folder"]).parent)}
    cfg = dataclasses.replace(cfg, **kept, explicit=cfg.explicit | set(source.get("explicit", ())) - {"nll_dump"})
    require(not (lines := conflicts(cfg, ranks)), "; ".join(lines))
    return cfg


class Run:
    """One run: what it reads, opened and checked when it is made; its stages, in order; the summary they fill."""

    def __init__(self, cfg: Config, process: Process, found: dict | None = None, tensors: dict | None = None):
        """Open MODEL_PATH, tokenizer and data, look at the output folders. UserError for the first that fails.
        `found` and `tensors` are `find_run`'s."""
        self.process, self.code, self.artifact, self.train_tokens = process, SCRIPT.read_bytes(), None, None
        self.read_seconds, self.nats, self.float, self.settings = 0.0, None, False, cfg.settings()
        self.found, self.tensors = found or {"folder": None, "facts": {}, "notes": [], "summary": None}, tensors or {}
        cfg, self.checkpoints = cfg if cfg.train_enabled else self.open_artifact(cfg), None
        if cfg.eval_max_seconds < 0:
            cfg = dataclasses.replace(cfg, eval_max_seconds=600.0 if process.cuda else 0.0)
        self.cfg = cfg
        self.open_data(find_path(cfg.data_path))
        run_folder, dump = Path(cfg.log_dir, cfg.run_id).absolute(), Path(cfg.nll_dump).absolute()
        require(not cfg.run_id or not run_folder.exists() or self.found["folder"], f"RUN_ID={cfg.run_id}: {run_folder} "
                "exists and no run is overwritten; choose another RUN_ID, or RESUME=1 if that run is to go on")
        here = next(p for p in (run_folder, *run_folder.parents) if p.exists())
        require(here.is_dir() and os.access(here, os.W_OK),
                f"LOG_DIR={cfg.log_dir}: {here} is not a folder that can be written to")
        replaceable = dump.is_file() or not dump.exists()  # a device or a folder is not
        require(not cfg.nll_dump or replaceable and dump.parent.is_dir() and os.access(dump.parent, os.W_OK),
                f"NLL_DUMP={cfg.nll_dump}: not a file in a folder that can be written to")
        weights, memory = sum(map(math.prod, shapes_of(cfg).values())), process.memory()[0]
        need = 4 * weights if not cfg.train_enabled else (
            20 * weights + 4 * cfg.train_batch_tokens // process.world + cfg.train_seq_len * activation_bytes(cfg))
        require(need <= memory, f"MODEL_DIM={cfg.model_dim}, NUM_LAYERS={cfg.num_layers}, TRAIN_SEQ_LEN="
                f"{cfg.train_seq_len}, TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: need about {need / 2**30:,.0f} GiB"
                f", this machine has {memory / 2**30:,.0f}; make them smaller")
        self.summary = {
            "run_id": cfg.run_id, "seed": cfg.seed, "preset": cfg.preset, "config": cfg.settings(),
            "overrides": cfg.overrides(), "hardware": process.hardware(), "train": None, "export": None,
            "artifact": None, "eval": {"float": None, "int6": None, "sliding": None, "ttt": None}, "audit": None,
            "val_bpb": None, "valid": False, "reasons": [], "caveats": [], "resumes": [],
            "seconds": {"read": self.read_seconds}}
        if record := self.found["summary"]:
            done = ("train", "export", "artifact", "eval", "audit", "reasons", "resumes", "seconds", "eval_clocks")
            self.summary |= {name: record[name] for name in done if name in record}
            self.summary["seconds"]["read"] += self.read_seconds
            self.nats = np.array(self.found["nats"], np.float32) if self.found["nats"] else None

    def open_data(self, folder: Path):
        """Open the tokenizer and the splits in `folder`. UserError for what is missing or does not fit."""
        cfg = self.cfg
        require(folder.is_dir(), f"DATA_PATH={folder}: no such folder; run ./run.sh data, or set DATA_PATH")
        path = Path(cfg.tokenizer_path or folder / "tokenizer.model")
        self.tokenizer_path = path if cfg.tokenizer_path or path.exists() else find_path(DEFAULT_TOKENIZER)
        self.tokenizer, cut_with = Tokenizer(self.tokenizer_path, cfg.vocab_size), None
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # data/prepare.py says what it cut with
            cut_with = json.loads((folder / "manifest.json").read_bytes())["tokenizer"]["sha256"]
        require(cut_with in (None, file_hash(self.tokenizer_path)), f"TOKENIZER_PATH={self.tokenizer_path}: not the "
                f"tokenizer that cut the data, by {folder / 'manifest.json'}; give that one")
        if cfg.train_enabled or (self.float and cfg.export_enabled):
            self.train_tokens = Tokens(folder, "train", cfg.vocab_size)
        self.stream = open_stream(Tokens(folder, "val", cfg.vocab_size), self.tokenizer, cfg.val_token_limit,
                                  self.process.device)
        count = len(self.train_tokens) if self.train_tokens else 0
        before = self.found["facts"].get("train_tokens", count)
        require(count == before, f"DATA_PATH={folder}: {count} training tokens where the run to go on with had {before}"
                "; give the same data")

    def open_artifact(self, cfg: Config) -> Config:
        """Read MODEL_PATH; returns the configuration with the artifact's model in it. Raises UserError."""
        began = time.perf_counter()
        blob = read_file(cfg.model_path, "MODEL_PATH=")
        header, tensors = unpack(blob, cfg.model_path)
        stored = header["config"]
        self.float = any(s.kind == "fp32" for s in tensors.values())  # weights to export, not an artifact to score
        for name in cfg.explicit & stored.keys():
            require(getattr(cfg, name) == stored[name], f"{name.upper()}={getattr(cfg, name)}: the artifact "
                    f"{cfg.model_path} was made with {stored[name]}; unset it")
        cfg = dataclasses.replace(cfg, **stored)
        self.artifact = blob, {name: s.tensor() for name, s in tensors.items()}
        self.read_seconds = time.perf_counter() - began
        require(not (lines := conflicts(cfg, 1)), "; ".join(lines))
        return cfg

    def check(self, ranks: int, step_ms: float) -> str:
        """What a run would do; UserError for more ranks than GPUs. The bytes are a guess before any search: a value
        takes about 1.6 bits less than its grid has, as in the run of record; other training will differ."""
        cfg, counts, (memory, _) = self.cfg, dict.fromkeys((*GROUPS, "fp16"), 0), self.process.memory()
        require(not self.process.cuda or ranks <= torch.cuda.device_count(), f"{ranks} ranks: this machine has "
                f"{torch.cuda.device_count()} GPUs; launch at most as many")
        for name, shape in shapes_of(cfg).items():
            counts[group_of(name) if is_quantised(name, shape, cfg.quant_min_numel) else "fp16"] += math.prod(shape)
        total, limit = sum(counts.values()), cfg.artifact_limit_bytes
        scored = (f"test-time training, {cfg.ttt_mode}" if cfg.ttt_enabled else f"sliding windows, stride "
                  f"{cfg.eval_stride}" if cfg.final_sliding_eval_enable and cfg.eval_stride else "windows side by side")
        bits = {g: getattr(cfg, f"quant_bits_{g}") - 1.6 for g in GROUPS} | {"fp16": 16}
        predicted = len(self.code) + int(sum(n * bits[g] / 8 for g, n in counts.items()))
        lines = [
            f"preset:     {cfg.preset} {json.dumps(cfg.overrides())}",
            f"machine:    {ranks} x {self.summary['hardware']['name']}, {str(self.process.dtype)[6:]}",
            f"tokenizer:  {self.tokenizer_path}, {cfg.vocab_size} pieces",
            f"validation: {self.stream.targets:,} targets, {self.stream.bytes:,} bytes of {cfg.data_path}",
            f"evaluation: {scored}, {f'within {cfg.eval_max_seconds:g} s' if cfg.eval_max_seconds else 'no time limit'}"
            f"{', then an audit' if cfg.audit else ''}",
            f"parameters: {total:,} ({', '.join(f'{n:,} {kind}' for kind, n in counts.items() if n)})",
            f"artifact:   about {predicted:,} bytes with code at first, limit {limit:,}; "
            + ("coarser values will be sought" if predicted > limit else "to be filled" if cfg.export_fill else "fits")]
        if cfg.train_enabled:
            tokens = cfg.micro_batch_seqs * cfg.train_seq_len or tokens_per_pass(cfg, self.process, True)
            tokens = min(max(tokens, cfg.train_seq_len), cfg.train_batch_tokens // ranks)
            need, cap = 20 * total + tokens * activation_bytes(cfg), cfg.max_wallclock_seconds
            cap -= cfg.export_seconds if cfg.export_enabled else 0
            steps = min(int(cap * 1000 / step_ms), cfg.iterations) if cap else cfg.iterations
            lines += [f"training:   {len(self.train_tokens):,} tokens in {len(self.train_tokens.paths)} shards",
                      f"memory:     about {need / 2**30:.1f} GiB of {memory / 2**30:.1f} GiB a rank",
                      f"steps:      {steps:,} of {cfg.train_batch_tokens:,} tokens"
                      + (f" in {cap:g} s at {step_ms:g} ms a step (--step-ms)" if cap else ", no time cap")]
        return "\n".join(lines)

    def start(self) -> Log:
        """Make LOG_DIR/RUN_ID, or take it up again, and write into its log what someone needs who reads it a year from
        now."""
        cfg, found, summary = self.cfg, self.found, self.summary
        name = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"_seed{cfg.seed}"
        if not cfg.run_id and Path(cfg.log_dir, name).exists():  # another run began in the same second
            name += f"_{os.getpid()}"
        self.folder = Path(cfg.log_dir) / (name := self.process.agree(name))
        self.process.together(self.make, main=True)
        self.log, summary["run_id"] = (log := Log(self.process, self.folder)), name
        self.launchers = sorted(set(self.process.gather(launcher())))
        about = {"run_id": name, "settings": self.settings, "explicit": sorted(cfg.explicit),
                 "train_tokens": len(self.train_tokens) if self.train_tokens else 0}
        self.checkpoints = Checkpoints(log, cfg.keep_ckpts, about, self.process.thread())
        self.checkpoints.newest = found["facts"].get("file", "")
        for note in found["notes"]:
            log(note)
        versions = {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
        if (code := hashlib.sha256(self.code).hexdigest()) != found.get("code"):
            log(self.code.decode() + "=" * 100, console=False)
        log(f"python {platform.python_version()} {versions}\nhardware {summary['hardware']}", console=False)
        log(f"config {json.dumps(cfg.settings())}", console=False)
        log(f"preset:{cfg.preset} seed:{cfg.seed} overrides:{json.dumps(cfg.overrides())}")
        log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={self.tokenizer_path}")
        if advice := attention_advice(self.process.device):
            log(advice)
        if self.train_tokens:
            log(f"train_loader:dataset:{Path(cfg.data_path).name} train_shards:{len(self.train_tokens.paths)} "
                f"tokens:{len(self.train_tokens)}")
        log(f"val_loader:tokens:{self.stream.targets} bytes:{self.stream.bytes}")
        scored, facts = [key for key, value in summary["eval"].items() if value], found["facts"]
        if facts or scored or summary["artifact"]:
            where = "its artifact" if summary["artifact"] else (
                f"step {facts['step']} in {facts['file']}" if facts else "its float weights")
            other = "" if code == found.get("code", code) else "; by another version of the script"
            summary["resumes"].append(f"resumed from {where}, scored so far: {', '.join(scored) or 'nothing'}{other}")
            log(summary["resumes"][-1])
        self.checkpoints.remove("*.partial")
        self.keep_progress()
        return log

    def make(self):
        """A new run's folder, locked; in an old one what comes after the chosen checkpoint is set aside."""
        for state in map(Path, self.found.get("later", ())):
            os.replace(state, state.with_suffix(".aside"))
        if not self.found["folder"]:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise UserError(f"RUN_ID={self.folder.name}: another launch has just begun it; take another") from None
            self.process.lock = lock(self.folder)

    def keep_progress(self):
        """Record the stages that are finished, so that they need not be repeated."""
        nats = self.nats[: audit_length(self.cfg)].tolist() if self.cfg.audit and self.nats is not None else []
        record = {"run_id": self.summary["run_id"], "settings": self.settings, "explicit": sorted(self.cfg.explicit),
                  "launchers": self.launchers, "code": hashlib.sha256(self.code).hexdigest(), "nats": nats,
                  "summary": self.summary}
        if self.process.main:
            try:
                text = json.dumps(record).encode()
                text += b"\n" + hashlib.sha256(text).hexdigest().encode()
                write_atomically(self.folder / "progress.json", text)
            except UserError as error:
                self.log(f"warning: {error}; the run goes on")

    def how_to_resume(self) -> str:
        """What to launch to go on after an end before the end."""
        if not self.checkpoints:
            return "nothing was done yet, launch it again"
        newest = self.checkpoints.wait() or self.checkpoints.newest
        where = f"LOG_DIR={shlex.quote(self.cfg.log_dir)} " if self.cfg.log_dir != Config.log_dir else ""
        if newest and self.folder / "checkpoints" != Path(newest).parent:
            return f"{where}RESUME={shlex.quote(newest)} goes on"
        does = "goes on" if newest or self.summary["artifact"] else "starts again, nothing is saved yet"
        problem = f"not saved: {self.checkpoints.problem}; " if self.checkpoints.problem else ""
        return f"{problem}{where}RUN_ID={shlex.quote(self.summary['run_id'])} RESUME=1 {does}"

    def stages(self):
        """Train, average, export, read back, evaluate, audit: each if its switch is on and it is not done yet."""
        cfg, summary = self.cfg, self.summary
        adapts = cfg.ttt_enabled and not summary["eval"]["ttt"]
        if adapts:  # first, while no clock runs; what it takes is counted where the evaluation's seconds are
            summary["seconds"].pop("compile", None)
            with self.timed("compile"):
                prime(cfg, self.process, self.log, self.stream, self.tokenizer)
        if self.artifact and not self.float:
            model = self.adopt(cfg.model_path, *self.artifact)
        elif summary["artifact"]:
            model = self.read_back()
        else:
            model = self.trained()
            if cfg.save_float:
                self.process.together(lambda: self.keep_float(model), main=True)
            if cfg.final_eval_enable:
                self.score("float", "final_float", model, cfg.eval_len)
            if cfg.export_enabled:
                model = self.export(model)
        self.keep_progress()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        if cfg.final_eval_enable and summary["artifact"]:
            self.score("int6", "final_int6_roundtrip", model, cfg.eval_len)
        if cfg.final_sliding_eval_enable and cfg.eval_stride:
            kind = "int6" if summary["artifact"] else "float"
            self.score("sliding", f"final_{kind}_sliding_window", model, cfg.eval_stride)
        before = summary["seconds"]["read"] + summary["seconds"].get("compile", 0.0)
        if adapts:
            self.checkpoints.about["artifact"] = (summary["artifact"] or {}).get("sha256", "float")
            evaluator, details = self.final(cfg, self.log, model, self.stream, Budget(cfg, before),
                                            checkpoints=self.checkpoints)
            self.report("ttt", "legal_ttt", evaluator.result(), **details)
        final = next((s for s in reversed(summary["eval"].values()) if s), None)
        summary["val_bpb"] = final and final["val_bpb"]
        if final and 0 < cfg.eval_max_seconds < before + final["seconds"]:
            summary["reasons"].append(f"evaluation took {before + final['seconds']:.0f} s, EVAL_MAX_SECONDS="
                                      f"{cfg.eval_max_seconds:g}")
        if cfg.nll_dump and self.nats is not None and len(self.nats) == self.stream.targets:
            np.save(buffer := io.BytesIO(), self.nats)
            self.process.together(lambda: write_atomically(Path(cfg.nll_dump), buffer.getvalue()), main=True)
        elif cfg.nll_dump:
            self.log(f"warning: NLL_DUMP={cfg.nll_dump} is not written, no evaluation of this launch has the losses")
        if cfg.audit and not summary["audit"]:
            self.audit(weights)

    def clocks(self):
        """Say how long test-time training took by both clocks of this field."""
        seconds = self.summary["seconds"]
        walk, read, compiling = seconds["ttt"], seconds["read"], seconds.get("compile", 0.0)
        self.summary["eval_clocks"] = {"all": walk + read + compiling, "without_compilation": walk + read}
        self.log(f"evaluation clocks: {walk + read + compiling:.1f} s with all inside (reading {read:.1f}, compiling "
                 f"{compiling:.1f}, walk {walk:.1f}), {walk + read:.1f} s with compilation outside; "
                 f"EVAL_MAX_SECONDS={self.cfg.eval_max_seconds:g} holds for the first")

    def trained(self) -> GPT:
        """The model with its averaged weights: read from a float file, else trained, which leaves the guard's seconds
        of MAX_WALLCLOCK_SECONDS to the export."""
        cfg = self.cfg
        if self.float:
            return build_model(cfg, self.artifact[1], self.process)
        torch.manual_seed(cfg.seed)
        model = GPT(cfg, self.process.dtype).to(self.process.device)
        self.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
        if cfg.export_enabled and cfg.max_wallclock_seconds:
            cfg = dataclasses.replace(cfg, max_wallclock_seconds=cfg.max_wallclock_seconds - cfg.export_seconds)
        saved = (self.found["facts"], self.process.agree(self.tensors)) if self.found["facts"] else None
        with self.timed("train"):
            self.summary["train"] = train(cfg, self.process, self.log, model, self.train_tokens, self.stream,
                                          self.checkpoints, saved)
        self.tensors = {}
        self.keep_progress()
        return model

    @contextlib.contextmanager
    def timed(self, name: str):
        begin = time.perf_counter()
        yield
        self.summary["seconds"][name] = self.summary["seconds"].get(name, 0.0) + time.perf_counter() - begin

    def export(self, model: GPT) -> GPT:
        """Write the artifact and read it back on every rank, from rank 0's disk: nodes need not share one."""
        if self.process.agree(self.process.together(lambda: self.encode(model), main=True)):
            return self.read_back()
        self.summary["reasons"].append(f"no setting fits ARTIFACT_LIMIT_BYTES={self.cfg.artifact_limit_bytes}")
        kept = self.cfg.model_path if self.float else self.folder / FLOAT_NAME
        self.log(f"export: no setting fits the limit; TRAIN_ENABLED=0 MODEL_PATH={kept} exports again")
        return model

    def encode(self, model: GPT) -> bool:
        """Round, code and write the artifact, and say whether one fits; else keep the float weights. On one rank."""
        cfg, room = self.cfg, self.cfg.artifact_limit_bytes - len(self.code)
        text, size = self.calibration_text()
        with self.timed("search"):
            exporter = Exporter(cfg, self.log, model, text, size, room, cfg.export_seconds)
            blob = exporter.search()
            seconds, self.summary["export"] = time.perf_counter() - exporter.began, exporter.report
            if cfg.export_seconds:
                self.log(f"export: took {seconds:.1f} s of the {cfg.export_seconds:g} s kept for it")
        with self.timed("export"):
            if blob:
                patience = 0.0 if self.float or self.checkpoints.wait() else NO_ROOM_SECONDS
                write_atomically(self.folder / ARTIFACT_NAME, blob, patience=patience, say=self.log)
            elif not self.float and not cfg.save_float:
                self.keep_float(model)
        return blob is not None

    def calibration_text(self) -> tuple[Tensor, int]:
        """Sequences spread evenly over the training split, [n, T + 1], and how many of them a forward pass takes."""
        tokens, length = self.train_tokens, self.cfg.train_seq_len
        count = min(max(self.cfg.calibration_tokens // length, 1), max(len(tokens) // length, 1))
        starts = [max(i * (len(tokens) - length) // count, 0) for i in range(count)]
        text = torch.from_numpy(np.stack([tokens.read(s, length + 1) for s in starts]).astype(np.int32))
        return text.to(self.process.device), max(tokens_per_pass(self.cfg, self.process, True) // length, 1)

    def keep_float(self, model: GPT):
        """Write the weights in fp32, to be exported again. On one rank."""
        weights = {n: Stored("fp32", 32, p.detach().float().cpu().numpy()) for n, p in model.named_parameters()}
        write_atomically(self.folder / FLOAT_NAME, pack(model.cfg, weights))

    def read_back(self) -> GPT:
        """The model of the artifact that this run wrote, now or before it was stopped."""
        path = os.path.join(self.cfg.log_dir, self.summary["run_id"], ARTIFACT_NAME)
        with self.timed("read"):
            blob = self.process.agree(self.process.together(lambda: read_file(path), main=True))
            return self.adopt(path, blob, {name: s.tensor() for name, s in unpack(blob, path)[1].items()})

    def adopt(self, path: str, blob: bytes, tensors: dict[str, Tensor]) -> GPT:
        """The model of an artifact. Its bytes are held against the limit; over it the run goes on, to end not valid."""
        code, limit = len(self.code), self.cfg.artifact_limit_bytes
        if self.artifact and not self.float and "artifact_limit_bytes" not in self.cfg.explicit:
            limit = Config.artifact_limit_bytes  # another run made it, maybe with another preset
        total = len(blob) + code
        self.log(f"Code size: {code} bytes\nSerialized model int6+zstd: {len(blob)} bytes")
        self.log(f"Total submission size int6+zstd: {total} bytes")
        if total > limit:
            self.summary["reasons"].append(f"artifact over the limit: {total} > {limit} bytes")
            self.log(f"over the limit by {total - limit} bytes; all files are kept, the score is not valid")
        self.summary["artifact"] = {"path": path, "bytes_model": len(blob), "bytes_code": code,
                                    "bytes_total": total, "limit": limit, "sha256": hashlib.sha256(blob).hexdigest()}
        return build_model(self.cfg, tensors, self.process)

    def score(self, key: str, tag: str, model: GPT, stride: int):
        """Evaluate, unless that was done before the run was stopped."""
        if not self.summary["eval"][key]:
            forward = compiled(model, self.cfg, self.process)
            evaluator = evaluate(self.cfg, self.process, self.log, forward, self.stream, stride, key)
            self.report(key, tag, evaluator.result(), **({"stride": stride} if key == "sliding" else {}))

    def report(self, key: str, tag: str, score: Score, **details):
        """Log a score in the field's form and put it into the summary. The last one is val_bpb's."""
        self.summary["eval"][key], self.nats = {**score.summary(), **details}, score.nats
        self.summary["seconds"][key] = score.seconds
        if key == "ttt":
            self.clocks()
        faults = score.faults + ["the score is not a finite number"] * (not math.isfinite(score.val_loss))
        self.summary["reasons"] += [f"{key}: {fault}" for fault in faults]
        more = "".join(f"{k}:{v} " for k, v in details.items())
        self.log(f"{tag} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} {more}"
                 f"eval_time:{1000 * score.seconds:.0f}ms")
        self.log(f"{tag}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
        self.keep_progress()

    def final(self, cfg: Config, log: Log, model: GPT, stream: Stream, budget=None, probe=(),
              checkpoints=None) -> tuple[Evaluator, dict]:
        """The evaluation behind val_bpb: test-time training, else sliding windows, else windows side by side."""
        if cfg.ttt_enabled:
            return test_time_train(cfg, self.process, log, model, stream, budget, probe, checkpoints)
        stride = cfg.eval_stride if cfg.final_sliding_eval_enable and cfg.eval_stride else cfg.eval_len
        return evaluate(cfg, self.process, log, compiled(model, cfg, self.process), stream, stride, "audit", probe), {}

    def audit(self, weights: dict[str, Tensor]):
        """AUDIT=1: try the evaluation behind val_bpb, on these weights, in chunks that leave room for updates."""
        began, cfg, tokens, summary = time.perf_counter(), self.cfg, audit_length(self.cfg), self.summary
        lora, chunk = cfg.ttt_enabled and cfg.ttt_mode == "lora", max(tokens // 16, 2 * cfg.eval_stride)
        small = {"eval_max_seconds": 0.0, "ttt_chunk_tokens": max(tokens // 12, cfg.eval_stride, 1),
                 "ttt_lora_chunk_tokens": max(min(cfg.ttt_lora_chunk_tokens, chunk), 1)}
        if lora:  # two places, so that documents follow each other
            small["val_batch_size"] = 2 * cfg.eval_len * self.process.world

        def trial(ids: np.ndarray, probe=(), **changes) -> Evaluator:
            exact = exact_audit(cfg, self.process)
            own = dataclasses.replace(cfg, **small | ({} if exact else {"use_compile": "0"}) | changes)
            model = build_model(own, weights, self.process)
            model.dtype = self.process.dtype if exact else torch.float32  # bf16 rounds more than a leak may show
            return self.final(own, self.log.silent(), model, Stream(ids, self.tokenizer, self.process.device), None,
                              probe)[0]

        seed = int((summary["artifact"] or {"sha256": f"{cfg.seed:x}"})["sha256"][:8], 16)  # not to be chosen
        result = audit(dataclasses.replace(cfg, seed=seed), self.process, self.log, trial, self.stream,
                       self.tokenizer.sp)
        if self.nats is not None and not (summary["eval"]["ttt"] or {}).get("stopped_by_budget"):
            ids, real = self.stream.tokens[: tokens + 1].cpu().numpy(), {name: getattr(cfg, name) for name in small}
            same = min(len(ids) - 1, cfg.ttt_chunk_tokens if cfg.ttt_mode == "full" else tokens)
            nats = trial(ids, **real | {"eval_max_seconds": 0.0}).result().nats[:same]  # what was tried is what was run
            gap = abs(float(np.mean(nats.astype(np.float64) - self.nats[:same])))  # the mean: rounding cancels out
            said = f"the mean of {same} losses differs by {gap:.3g} nats between the run and a trial, allowed 0.01"
            self.log(f"audit causal: {'ok' if gap <= 0.01 else 'FAILED'}, {said}")
            result["causal"]["detail"] += f"; {said}"
            result["causal"]["ok"] &= gap <= 0.01
            result["ok"] &= result["causal"]["ok"]
        summary["reasons"] += [f"audit: {name} failed, {check['detail']}" for name, check in result.items()
                               if isinstance(check, dict) and not check["ok"]]
        result["seconds"] = summary["seconds"]["audit"] = time.perf_counter() - began
        summary["audit"] = result

    def judge(self) -> int:
        """Fill `valid`, `reasons` and `caveats`. Returns the exit code: 1 if a check failed."""
        summary, hardware, data, cap = self.summary, self.summary["hardware"], Path(self.cfg.data_path).name, (
            self.cfg.max_wallclock_seconds)
        train, changed = summary["train"] or {}, [note for note in self.found["notes"] if "resumed with" in note]
        spent = train["seconds"] + summary["seconds"].get("search", 0.0) if train else 0.0  # both are training time
        reasons = summary["reasons"] = list(dict.fromkeys(summary["reasons"]))  # a resumed run may have met one twice
        failed = bool(reasons)
        if summary["artifact"] is None and not self.cfg.export_enabled:
            reasons.append("EXPORT_ENABLED=0: no artifact, the scores are of float weights")
        caveats = [  # (holds, what is said)
            (summary["val_bpb"] is None, "no final evaluation ran"),
            (cap and spent > 1.01 * cap, f"training and export took {spent:.0f} s of MAX_WALLCLOCK_SECONDS"),
            (not self.stream.complete, f"partial split: its first {self.stream.targets} targets"),
            (not data.startswith("fineweb10B"), f"not the challenge's data: {data}"),
            (summary["resumes"], f"resumed {len(summary['resumes'])} times; what was lost in between is not in its "
             "seconds"),
            (changed, "; ".join(changed)),
            (train.get("dropped_steps"), "steps that were not finite were dropped"),
            (hardware["world_size"] != 8 or "H100" not in hardware["name"],
             f"not 8 x H100: {hardware['world_size']} x {hardware['name']}")]
        summary["caveats"], summary["valid"] = [text for holds, text in caveats if holds], not reasons
        return int(failed)

    def finish(self, started: float) -> int:
        """Judge the run, write summary.json, and remove what only a resumption needs. Returns the exit code."""
        code, summary = self.judge(), self.summary
        summary["memory_peak_bytes"] = self.process.memory()[1]
        summary["seconds"]["total"] = summary["seconds"].get("total", 0.0) + time.perf_counter() - started
        self.log(self.table())
        text = re.sub(r"(?<=: )(NaN|-?Infinity)(?=,?\n)", "null", json.dumps(summary, indent=1)) + "\n"  # not JSON
        self.process.together(lambda: write_atomically(self.folder / "summary.json", text.encode()), main=True)
        self.checkpoints.wait()
        self.checkpoints.remove("ttt_*")
        if self.process.main:
            if not self.cfg.ckpt_every_seconds:
                self.checkpoints.remove("step_*")
            for name in ("progress.json", "lock"):
                (self.folder / name).unlink(missing_ok=True)
        return code

    def table(self) -> str:
        """The result in one short table."""
        names = {"float": "float, averaged", "int6": "int6, read back", "sliding": "sliding window",
                 "ttt": "test-time training"}
        lines = ["", f"{'score':20}{'nats/token':>12}{'BPB':>10}{'tokens':>12}{'seconds':>10}"]
        lines += [f"{names[key]:20}{s['val_loss']:12.4f}{s['val_bpb']:10.4f}{s['tokens']:12,}{s['seconds']:10.1f}"
                  for key, s in self.summary["eval"].items() if s]
        if a := self.summary["artifact"]:
            lines.append(f"bytes: {a['bytes_total']:,} of {a['limit']:,} ({a['bytes_total'] / a['limit']:.1%}): model "
                         f"{a['bytes_model']:,} + code {a['bytes_code']:,}")
        if t := self.summary["train"]:
            lines.append(f"trained: {t['steps']:,} steps, {t['tokens']:,} tokens, {t['step_ms']:.1f} ms a step")
        lines.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in self.summary["seconds"].items()))
        lines.append("valid: yes" if self.summary["valid"] else "valid: NO, " + "; ".join(self.summary["reasons"]))
        return "\n".join(lines + [f"note: {caveat}" for caveat in self.summary["caveats"]])


def main(cfg: Config, options: argparse.Namespace, signals: Signals) -> int:
    """One launch on one rank. Returns the exit code; raises UserError, Interrupted and PeerLost."""
    started = time.perf_counter()
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode must not end a run
    if options.inspect is not None:
        own = cfg.artifact_limit_bytes if "artifact_limit_bytes" in cfg.explicit else Config.artifact_limit_bytes
        show(inspect(options.inspect, own))
        return 0
    process = Process(cfg.compute_dtype, signals)
    found, tensors = process.together(lambda: find_run(cfg, process), main=True) or (None, {})
    found = process.agree(found)
    if found and "finished" in found:
        if process.main:
            show(f"nothing to do: the run is finished, see {found['finished']}")
        return 0
    if found:
        cfg = process.together(lambda: continued(cfg, found, process.world))
        process.compute_in(cfg.compute_dtype)
    run = process.together(lambda: Run(cfg, process, found, tensors))
    if options.check:
        if process.main:
            show(run.check(options.ranks, options.step_ms))
        return 0
    try:
        log = run.start()
        run.stages()
        code = run.finish(started)
    except Interrupted as stop:
        stop.args = (f"interrupted by {stop}; {run.how_to_resume()}",)
        raise
    except UserError as error:
        raise UserError(f"{error}; {run.how_to_resume()}", error.shared) from None
    except PeerLost:
        signals.held = True
        run.how_to_resume()  # what is being written is finished
        raise
    log(f"summary: {log.folder / 'summary.json'}")
    return process.agree(code)  # no rank leaves before rank 0 has written


if __name__ == "__main__":
    second, caught = os.environ.get("RANK", "0") != "0", Signals(listens=True)
    try:
        leave(main(*LAUNCH, caught))
    except UserError as problem:
        leave(2, f"error: {one_line(problem)}", silent=problem.shared and second)
    except (Interrupted, KeyboardInterrupt) as problem:
        said = str(problem) if "interrupted" in str(problem) else f"interrupted {problem}"
        leave(128 + getattr(problem, "number", signal.SIGINT), "" if second else said)
    except PeerLost as problem:  # the lost rank says why, and the launcher ends this one
        caught.held, patience = True, time.monotonic() + 10
        while not caught.caught and time.monotonic() < patience:
            time.sleep(0.1)
        said = f"error: rank {os.environ['RANK']}: another rank is gone, see its message ({problem})"
        leave(128 + caught.caught if caught.caught else 1, "" if caught.caught else said)
    except OSError as problem:
        leave(2, f"error: {problem.filename or 'output'}: {problem.strerror}; mend the path or make room")
    except Exception as problem:
        if "an't allocate memory" in str(problem) or isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
            leave(2, "error: out of memory; lower MICRO_BATCH_SEQS, VAL_BATCH_SIZE or the model's size")
        traceback.print_exc()
        leave(1)
