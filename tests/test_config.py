"""Configuration: what is accepted, what is refused, and how it is said."""

import subprocess
import sys

import pytest
from conftest import SCRIPT, TINY, clean_environment

import train_gpt


def problems(**variables) -> list[str]:
    return train_gpt.load_config(TINY | {k: str(v) for k, v in variables.items()})[1]


def test_what_makes_some_versions_of_torch_slow_on_a_gpu_is_switched_off():
    """By default, and before the compiler reads it. A process of its own sees each version."""
    name, slow = "TORCHINDUCTOR_MIX_ORDER_REDUCTION", {"2.10.0", "2.11.0+cu130", "2.12.1"}
    code = ("import os, runpy, sys, torch\n"
            "for version in ('2.1.0', '2.9.1+cu128', '2.10.0', '2.11.0+cu130', '2.12.1', '2.13.0', '3.0.0'):\n"
            "    for given in (None, '1'):\n"
            f"        os.environ.pop({name!r}, None)\n"
            f"        os.environ.update({{{name!r}: given}} if given else {{}})\n"
            "        torch.__version__ = version\n"
            f"        runpy.run_path({str(SCRIPT)!r})\n"
            f"        print(version, given, os.environ.get({name!r}))\n"
            "assert 'torch._inductor.config' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 14
    for version, given, found in rows:
        assert found == ("1" if given == "1" else "0" if version in slow else "None"), version


def test_a_bound_may_be_excluded():
    for name, low, high in (("ADAM_EPS", "0", "1e-9"), ("EMA_DECAY", "1", "0.999")):
        assert len(problems(**{name: low})) == 1 and problems(**{name: high}) == []
    assert problems(EMA_DECAY=0) == problems(ADAM_WD=0) == []


def test_published_defaults():
    cfg = train_gpt.load_config({"PRESET": "seed"})[0]
    published = {  # FIELD's published model and training
        "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0, "vocab_size": 1024,
        "train_seq_len": 2048, "bigram_vocab_size": 2048, "bigram_dim": 96, "rope_dims": 16, "qk_gain_init": 1.5,
        "logit_softcap": 30.0, "train_batch_tokens": 786432, "iterations": 9000, "warmdown_iters": 3000,
        "max_wallclock_seconds": 596.0, "warmup_steps": 20, "matrix_lr": 0.025, "tied_embed_lr": 0.035,
        "scalar_lr": 0.025, "muon_momentum": 0.99, "muon_momentum_warmup_start": 0.92, "beta2": 0.95,
        "muon_momentum_warmup_steps": 1500, "muon_wd": 0.04, "adam_wd": 0.04, "grad_clip_norm": 0.3,
        "ema_decay": 0.997, "eval_stride": 64, "seed": 1337, "sparse_sites": (8, 9, 10), "sparse_hidden_dim": 48,
        "artifact_limit_bytes": 16_000_000,
    }
    assert {name: getattr(cfg, name) for name in published} == published


def test_explicit_variables_win_over_the_preset():
    cfg = train_gpt.load_config({"PRESET": "demo", "NUM_LAYERS": "7"})[0]
    assert (cfg.num_layers, cfg.model_dim) == (7, train_gpt.PRESETS["demo"]["model_dim"])


def test_all_bad_values_are_reported_at_once():
    env = clean_environment() | {"SEED": "x", "EMA_DECAY": "1.0", "TTT_OPTIMIZER": "adm", "TIE_EMBEDDINGS": "yes",
                                 "MLP_MULT": "nan", "TRAIN_SEQ_LEN": "", "VOCAB_SIZ": "9", "SWA_ENABLED": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 8, done.stderr
    for name, word in (("SEED", "0..4294967295"), ("EMA_DECAY", "0..<1"), ("TTT_OPTIMIZER", "adamw|sgd"),
                       ("TIE_EMBEDDINGS", "0|1"), ("MLP_MULT", "0.01..64"), ("TRAIN_SEQ_LEN", "int"),
                       ("VOCAB_SIZ:", "VOCAB_SIZE"), ("SWA_ENABLED", "not implemented")):
        assert any(line.startswith(f"error: {name}") and word in line for line in lines), (name, lines)


@pytest.mark.parametrize("variables, options, word", [
    ({"WORLD_SIZE": "abc"}, [], "WORLD_SIZE"), ({"RANK": "0", "LOCAL_RANK": ""}, [], "LOCAL_RANK"),
    ({}, ["--check", "--ranks", "0"], "--ranks"), ({}, ["ITERATIONS=5"], "variables come first"),
    ({}, ["--chek"], "--chek; there are --help, and --check"), ({}, ["--tim"], "--tim"),
    ({"RANK": "x"}, ["--check"], "RANK='x'"), ({"WORLD_SIZE": "2"}, ["--check"], "launch with torchrun"),
    ({"MODEL_PATH": "x.ptz"}, [], "only TRAIN_ENABLED=0 starts from it"),
])
def test_odd_launches_are_one_line(launch, variables, options, word):
    launch(options=options, **variables).refused(word)


def test_only_rank_0_speaks(launch):
    run = launch(SEED="x", RANK=1, WORLD_SIZE=2)
    assert (run.code, run.out, run.err) == (2, "", "")


@pytest.mark.parametrize(
    "name, near",
    [("TTT_LERNING_RATE", "one of TTT_*"), ("MATRIX_RL", "MATRIX_LR"), ("ITERATION", "ITERATIONS"), ("Seed", "SEED"),
     ("EVAL_STIDE", "EVAL_STRIDE"), ("SPARSE_FOO", "one of SPARSE_*"), ("QUANT_BITS_EVERYWHERE", "one of QUANT_*"),
     ("VOCABSIZE", "VOCAB_SIZE"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"), ("RUNID", "RUN_ID"), ("MODEL_DIMS", "MODEL_DIM"),
     ("MAX_WALCLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"), ("GRAD_CLIP_NROM", "GRAD_CLIP_NORM"),
     ("RESUME_FROM", "RESUME"), ("WARMUP_ITERS", "WARMUP_STEPS"), ("TIED_EMBEDDINGS", "TIE_EMBEDDINGS")],
)
def test_typos_name_the_nearest_variable(name, near):
    (line,) = problems(**{name: "1"})
    assert line.startswith(f"{name}: ") and f"did you mean {near}" in line


@pytest.mark.parametrize("name, near", [
    ("WARMDOWN", "WARMDOWN_ITERS"), ("EMA", "EMA_ENABLED"), ("TTT", "TTT_ENABLED"), ("VOCAB", "VOCAB_SIZE"),
    ("LR", "MATRIX_LR"), ("MAX_STEPS", "ITERATIONS"), ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"), ("WEIGHT_DECAY", "MUON_WD"),
    ("GRAD_CLIP", "GRAD_CLIP_NORM"), ("QK_GAIN", "QK_GAIN_INIT"), ("TOKENIZER", "TOKENIZER_PATH"), ("lr", "MATRIX_LR"),
    ("HEADS", "NUM_HEADS"), ("LAYERS", "NUM_LAYERS"), ("SEQ_LEN", "TRAIN_SEQ_LEN"), ("MICRO_BATCH_SIZE", "MICRO_BATCH"),
    ("BATCHSIZE", "TRAIN_BATCH_TOKENS"), ("TRAIN_BATCH_SIZE", "TRAIN_BATCH_TOKENS"), ("LEARNINGRATE", "MATRIX_LR"),
    ("N_LAYER", "NUM_LAYERS"), ("N_EMBD", "MODEL_DIM"), ("EPOCHS", "ITERATIONS"), ("EVAL", "EVAL_STRIDE")])
def test_bare_words_and_names_of_other_scripts_name_what_is_meant(name, near):
    """Whatever their value."""
    for value in ("0", "3", "x"):
        (line,) = problems(**{name: value})
        assert line.startswith(f"{name}: no such variable; did you mean {near}")


def test_every_beginning_of_a_variable_stops_a_run_or_is_known_elsewhere():
    ours = {f.name.upper() for f in train_gpt.VARIABLES}
    heads = {name[:i] for name in ours for i, sign in enumerate(name) if sign == "_"} - ours
    assert {name for name in heads if not problems(**{name: "1"})} == set(train_gpt.BARE_ELSEWHERE)
    for our, names in train_gpt.CALLED_ELSEWHERE.items():
        others = names.split()
        assert our in ours and ours.isdisjoint(others)
        assert [train_gpt.meant(name) for name in others] == [our] * len(others)


def test_a_warmdown_in_steps_wins_over_the_presets_share():
    """As a variable does over a preset; where both are given the share wins, as --help says."""
    for given, expected in (({}, 0.85), ({"WARMDOWN_ITERS": "9"}, 0.0),
                            ({"WARMDOWN_ITERS": "9", "WARMDOWN_FRAC": "0.5"}, 0.5)):
        assert train_gpt.load_config({"PRESET": "frontier"} | given)[0].warmdown_frac == expected


@pytest.mark.parametrize("name, our", [
    ("LOOP_AT", "one of LOOP_*"), ("LOOP_COUNT", "NUM_LOOPS"), ("MIN_LEARNING_RATE", "MIN_LR"),
    ("COOLDOWN_FRAC", "WARMDOWN_FRAC"), ("EMBED_WEIGHT_DECAY", "EMBED_WD"), ("SMEAR_ENABLED", "SMEAR_GATE_ENABLED"),
    ("PARALLEL_RESIDUAL_FROM", "PARALLEL_RESIDUAL_START"), ("SKIP_GATE", "SKIP_GATES_ENABLED")])
def test_other_names_of_the_frontiers_switches(name, our):
    (line,) = problems(**{name: "1"})
    assert line.startswith(f"{name}: no such variable; did you mean {our}?"), line


def test_rates_above_10_are_refused():
    rates = [f.name.upper() for f in train_gpt.VARIABLES if f.name.endswith(("_lr", "_wd", "_lr_min"))]
    rates = [name for name in rates if name not in ("MIN_LR", "EMBED_WD")]  # a share, and one that may be -1
    assert len(rates) == 11
    for name in rates:
        (line,) = problems(**{name: "11"})
        assert line.startswith(f"{name}='11': accepts float 0..10") and problems(**{name: "10"}) == []


def test_nominal_bits_are_those_that_a_rule_takes():
    """What a search may come to can be asked for."""
    for name in (f"QUANT_BITS_{group.upper()}" for group in train_gpt.GROUPS):
        for least, most, rule in ((0, 12, "balanced"), (2, 8, "rowmax")):
            assert train_gpt.NOMINAL_BITS[rule] == (least, most)
            assert problems(**{name: least, "QUANT": rule}) == problems(**{name: most, "QUANT": rule}) == []
            assert len(problems(**{name: most + 1, "QUANT": rule})) == 1
        (line,) = problems(**{name: 9, "QUANT": "rowmax"})
        assert line == "QUANT=rowmax: takes QUANT_BITS_* of 2 to 8"


def test_names_of_others_pass():
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG",
               "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "PATH", "HOME", "TERM", "EDITOR", "LD_PRELOAD",
               "MODULEPATH", "ARTIFACT_DIR", "TOKENIZERS_PARALLELISM", "DATA", "DATA_DIR", "LOG_LEVEL", "NUM_THREADS",
               "MODEL", "OUTPUT_DIR", "ENV", "USE", "WANDB_MODE", "SM_MODEL_DIR", "NUM_WORKERS", "MAX_JOBS", "LOGNAME",
               "LAUNCHED_BY", "MODEL_DIR", "MODEL_ID", "MODELS_DIR", "LMOD_DIR", "NODE_PATH", "DD_TRACE_ENABLED",
               "CI_RUN_ID", "RUN_UUID", "RUNNER_ID", "PBS_LOG_DIR", "LOCK_DIR", "DATABASE_PATH", "DATASET_PATH",
               "WANDB_ENABLED", "TLS_ENABLED", "DEBUG_ENABLED", "MODEL_URI", "TOKENIZER_NAME", "HEAD_PORT",
               "COMPUTE_MODE", "RAY_TRAIN_V2_ENABLED", "ATP_ENABLED", "MATRIX_OS", "CODE_PATH", "OPTIMIZER",
               "MODEL_BASE_PATH")
    assert problems(**dict.fromkeys(foreign, "1")) == []


def test_a_name_can_be_let_pass():
    assert problems(ENV_EXTRA="TTT_LERNING, OTHER", TTT_LERNING="1") == []


def test_unimplemented_switches_pass_when_off():
    off = {"SWA_ENABLED": 0, "SWA_EVERY": 200, "QAT_ENABLED": 0, "LATE_QAT": 0, "QAT_THRESHOLD": 0.1,
           "MTP_NUM_HEADS": 0, "MTP_LOSS_WEIGHT": 0.2, "VE_LAST_N": 0, "MUON_BETA2": 0}
    assert problems(**off) == []
    for name in ("PARALLEL_START_LAYER", "COMPRESSOR", "DROPOUT", *train_gpt.NOT_IMPLEMENTED):  # of other scripts
        assert problems(**{name: 0}) == []
        (line,) = problems(**{name: 1})
        assert name in line and "not implemented" in line


@pytest.mark.parametrize(
    "variables, name",
    [({"NUM_HEADS": 5, "NUM_KV_HEADS": 5}, "MODEL_DIM"), ({"NUM_KV_HEADS": 3}, "NUM_KV_HEADS"),
     ({"MODEL_DIM": 36}, "MODEL_DIM"),
     ({"NUM_LOOPS": 1, "LOOP_END": 3}, "NUM_LOOPS=1: needs LOOP_START=1 <= LOOP_END=3 < NUM_LAYERS=3"),
     ({"NUM_LOOPS": 1, "LOOP_END": 0}, "NUM_LOOPS"), ({"ENABLE_LOOPING_AT": 1}, "ENABLE_LOOPING_AT"),
     ({"ROPE_DIMS": 10}, "ROPE_DIMS"), ({"ROPE_DIMS": 3}, "ROPE_DIMS"),
     ({"BIGRAM_VOCAB_SIZE": 1}, "BIGRAM_VOCAB_SIZE"),
     ({"EVAL_STRIDE": 33}, "EVAL_STRIDE"), ({"RESUME": 1}, "RESUME"),
     ({"TRAIN_BATCH_TOKENS": 250}, "TRAIN_BATCH_TOKENS"),
     ({"MICRO_BATCH_SEQS": 3}, "MICRO_BATCH_SEQS"), ({"TRAIN_ENABLED": 0}, "MODEL_PATH"),
     ({"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 4}, "TTT_CHUNK_TOKENS"), ({"RUN_ID": "a/b"}, "RUN_ID"),
     ({"RUN_ID": ".."}, "RUN_ID"),
     ({"RUN_ID": "\udcff"}, "RUN_ID='\\udcff': not UTF-8 text in this locale; set PYTHONUTF8=1"),
     ({"LOG_DIR": "a\nb"}, "LOG_DIR"),
     ({"TRAIN_BATCH_TOKENS": 10**30}, "TRAIN_BATCH_TOKENS"),
     ({"MATRIX_LR": "inf"}, "MATRIX_LR"), ({"MATRIX_LR": "-1"}, "MATRIX_LR"), ({"SEED": "1.5"}, "SEED")],
)
def test_values_that_cannot_work(variables, name):
    (line,) = problems(**variables)
    assert line.startswith(name), line


def test_world_size_must_divide_the_sequences():
    assert train_gpt.load_config(TINY, ranks=4)[1] == []
    (line,) = train_gpt.load_config(TINY, ranks=3)[1]
    assert line.startswith("WORLD_SIZE=3") and "8 sequences" in line


def test_sidecar_sites():
    def sites(**v):
        return train_gpt.load_config({"PRESET": "seed"} | {k: str(x) for k, x in v.items()})[0].sparse_sites

    assert sites() == (8, 9, 10)
    assert sites(SPARSE_END_LAYER=99) == (8, 9, 10) and sites(SPARSE_END_LAYER=9) == (8, 9)
    assert sites(SPARSE_START_LAYER=0, SPARSE_EVERY=4) == (0, 4, 8) and sites(SPARSE_MAX_SITES=2) == (8, 9)
    assert sites(SPARSE_START_LAYER=-1) == () == sites(SPARSE_HIDDEN_DIM=0)


def test_help_lists_every_variable_without_importing_torch(tmp_path):
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('torch must not be imported for --help')")
    env = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for f in train_gpt.VARIABLES:
        assert f"  {f.name.upper()} " in done.stdout and f.metadata["text"] in done.stdout
    for line in ("MLP_SLOPE                  0.0 (frontier: 0.3);", "EXPORT_FILL                1 (seed: 0);",
                 "WARMUP_STEPS               20 (demo: 0);", "3000 (demo: 400);"):
        assert line in done.stdout, line


@pytest.mark.parametrize("later", [{"TRAIN_ENABLED": "0", "MODEL_PATH": "a.ptz"}, {"RESUME": "1", "RUN_ID": "a"}])
def test_what_the_artifact_or_the_run_brings_is_not_judged_by_the_preset(later):
    for given in ({"EVAL_STRIDE": "500"}, {"TTT_MODE": "full", "TTT_FREEZE_BLOCKS": "6"}, {"TTT_LORA_RANK": "200"}):
        assert problems(**given | {"TTT_ENABLED": "1"}) != []
        assert problems(**given | {"TTT_ENABLED": "1"} | later) == []


def test_resume_is_a_switch_and_needs_the_name_of_the_run():
    (line,) = problems(RESUME="1", EVAL_STRIDE="500")
    assert line.startswith("RESUME=1: needs the RUN_ID")
    (line,) = problems(RESUME="logs/a/checkpoints/step_0000001.npz", RUN_ID="a")
    assert line.startswith("RESUME='logs/a/") and "0|1" in line
    assert problems(RESUME="1", RUN_ID="a") == [] == problems(RESUME="0")


def test_what_was_removed_says_what_took_its_place():
    words = {"AUDIT": "./run.sh audit", "AUDIT_TOKENS": "--tokens", "MUON_BETA2": "MUON_ROW_NORMALIZE",
             "NAN_POLICY": "ends the run", "SAVE_FLOAT": "CKPT_EVERY_SECONDS", "SHUFFLE": "order of the shards",
             "STRICT_ENV": "ENV_EXTRA", "VE_LAST_N": "value embeddings"}
    assert words.keys() == train_gpt.REMOVED.keys()
    for name, word in words.items():
        (line,) = problems(**{name: 1})
        assert line.startswith(f"{name}='1': ") and word in line and "unset it or set it to 0" in line
        assert problems(**{name: 0}) == [] == problems(**{name: ""})
    (line,) = problems(QUANT="gptq")
    assert line == "QUANT='gptq': accepts str balanced|rowmax"


@pytest.mark.parametrize("package", ["sentencepiece", "zstandard"])
def test_a_package_that_is_missing_is_one_line(tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name={package!r})")
    env = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    for options in ([], ["--check"]):
        done = subprocess.run([sys.executable, str(SCRIPT), *options], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {package} is not installed for ") and "./run.sh" in done.stderr


def test_import_has_no_side_effects(tmp_path):
    env = clean_environment() | {"PYTHONPATH": str(SCRIPT.parent), "CUDA_VISIBLE_DEVICES": "", "SEED": "not read"}
    command = [sys.executable, "-c", "import train_gpt"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


@pytest.mark.parametrize("name, value", [("VE_ENABLED", "1"), ("VE_LAYERS", "9,10")])
def test_other_scripts_value_embeddings_are_not_silently_ignored(name, value):
    _, problems, _ = train_gpt.load_config({"PRESET": "demo", name: value})
    assert len(problems) == 1 and problems[0].startswith(name)
