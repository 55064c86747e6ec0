"""The count of a step's kernels: what follows from the shapes by hand, and one line for each thing that is wrong."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPT

sys.path.insert(0, str(ROOT / "tools"))
import step_cost  # noqa: E402

import train_gpt as t  # noqa: E402

TOOL = ROOT / "tools" / "step_cost.py"
LAYERS, WIDTH, KEYS, HIDDEN, VOCABULARY, LENGTH = 2, 64, 32, 128, 256, 64  # KEYS: the width of all keys
SMALL = {
    "NUM_LAYERS": LAYERS, "MODEL_DIM": WIDTH, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MLP_MULT": HIDDEN // WIDTH,
    "VOCAB_SIZE": VOCABULARY, "TRAIN_SEQ_LEN": LENGTH, "ROPE_DIMS": 8, "BIGRAM_VOCAB_SIZE": 0, "SPARSE_HIDDEN_DIM": 0,
}
SMALL = {name: str(value) for name, value in SMALL.items()}
# Inputs and outputs of each product: queries, keys and values, projection and the MLP of each layer, then the logits.
MATRICES = LAYERS * [(WIDTH, WIDTH + 2 * KEYS), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
MATRICES += [(WIDTH, VOCABULARY)]
WEIGHTS = sum(k * n for k, n in MATRICES)


def options_for(tokens: int, *more: str):
    return step_cost.read_arguments(["--tokens", str(tokens), *more, *(f"{n}={v}" for n, v in SMALL.items())])


def check_products(found: dict, tokens: int):
    """A product of [m, k] and [k, n] takes 2 m k n operations and moves its three matrices in bf16. Backward it becomes
    two of that size: each input comes from a weight, the embedding at the latest, so no input's gradient is spared."""
    work = sum(2 * tokens * k * n for k, n in MATRICES)
    moved = sum(2 * (tokens * k + k * n + tokens * n) for k, n in MATRICES)
    for stage, times in (("forward", 1), ("backward", 2)):
        assert found[stage]["products"] == {"kernels": times * len(MATRICES), "bytes": times * moved,
                                            "operations": times * work}


def check_attention(found: dict, tokens: int):
    """One operation a layer. Under the causal mask a product with the scores takes half of 2 x tokens x length x width;
    there are two forward and five backward. Queries and the result are of WIDTH, keys and values of KEYS;
    forward, values are counted with the queries and keys of before RoPE, beside which they lie."""
    half = tokens * LENGTH * WIDTH
    own, beside = (LAYERS * 2 * tokens * width for width in (2 * WIDTH + 2 * KEYS, WIDTH + KEYS))
    for stage, products, times in (("forward", 2, 1), ("backward", 5, 2)):
        attention = found[stage]["attention"]
        assert attention["kernels"] == LAYERS and attention["operations"] == LAYERS * products * half
        read = times * own + beside * (stage == "forward")
        assert read <= attention["bytes"] < 1.05 * read  # and the sums of the scores


def check_fused(found: dict, tokens: int):
    """At least: fp32 weights are read and written in bf16 (backward: gradients the other way); what goes into a product
    or into attention is written, and what comes out of a product is read; what passes between those two is left out. At
    most: 1.36 and 2.31 times that were counted, and a copy of the logits in fp32 would add half to the first."""
    layer = 2 * WIDTH + HIDDEN + WIDTH + KEYS  # into products but from attention; queries and keys into attention
    layer += WIDTH + KEYS + WIDTH + HIDDEN + WIDTH  # out of products but values
    least = (4 + 2) * WEIGHTS + 2 * tokens * (LAYERS * layer + WIDTH + VOCABULARY)
    for stage, most in (("forward", 1.5), ("backward", 2.5)):
        assert least <= found[stage]["fused"]["bytes"] <= most * least


def check_parts(kernels: list, tokens: int):
    """Of the product that holds queries, keys and values a kernel reads the queries or the keys, once, though from
    three places for RoPE, and writes as many; with a scale in fp32 for each head, RoPE's three tables, and for queries
    a gain a head. The weights of a layer's product are put side by side in one kernel."""
    fused = [k for k in kernels if k.kind == "fused" and k.stage == "forward"]
    tables = 3 * LENGTH * 32 * 2
    queries, keys = (4 * tokens * heads * 32 + 4 * tokens * heads + tables for heads in (2, 1))
    turned = [k.moved for k in fused if {"rsqrt", "index"} <= set(k.origins)]
    assert turned == LAYERS * [queries + 4 * 2, keys]
    assert sum("cat" in k.origins for k in fused) == LAYERS


def check_growth(small: dict, large: dict):
    """Twice the tokens move twice as much, but for the weights, which are read and written once more or less often."""
    for stage in ("forward", "backward"):
        once, twice = (found[stage]["fused"]["bytes"] for found in (small, large))
        assert (4 + 2) * WEIGHTS <= 2 * once - twice <= 3 * (4 + 2) * WEIGHTS
        assert small[stage]["fused"]["kernels"] == large[stage]["fused"]["kernels"]


def test_counts_follow_by_hand(monkeypatch, capsys):
    """One test, so that the two counts, most of its time, are taken once."""
    counts, found = {}, {}
    for tokens in (1024, 2048):
        options = options_for(tokens)
        counts[tokens] = step_cost.count(options.script, tokens, options.variables)
        found[tokens] = step_cost.figures(*counts[tokens][:2], options)
        check_products(found[tokens], tokens)
        check_attention(found[tokens], tokens)
        check_fused(found[tokens], tokens)
    check_growth(found[1024], found[2048])
    kernels, *_ = counts[1024]
    check_parts(kernels, 1024)
    done = {name for kernel in kernels for name in kernel.origins}
    assert {"tanh", "rsqrt", "cat"} <= done and not {"cos", "sin"} & done  # RoPE turns, by tables from outside
    assert "flash_attn_interface" not in sys.modules and "counted_script" not in sys.modules

    monkeypatch.setattr(step_cost, "count", lambda script, tokens, variables, with_code: counts[tokens])
    given = [f"{name}={value}" for name, value in SMALL.items()]
    step_cost.main(["--tokens", "1024", "--json", "--bandwidth", "1e9", "--rate", "1e9", "--top", "3", *given])
    printed = json.loads(capsys.readouterr().out)
    fused = sum(found[1024][stage]["fused"]["bytes"] for stage in ("forward", "backward"))
    work = sum(found[1024][stage]["products"]["operations"] for stage in ("forward", "backward"))
    assert printed["estimates"]["fused_ms"] == pytest.approx(fused / 1e6)
    assert printed["estimates"]["products_ms"] == pytest.approx(work / 1e6)
    assert all(printed[part] == found[1024][part] for part in ("tokens", "variables", "forward", "backward"))
    assert len(printed["largest"]) == 3

    step_cost.main(["--tokens", "1024", *given])
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("forward  aten.mm.out") and f"{len(MATRICES)} kernels" in line for line in lines)
    assert json.loads(last)["fused_kernels"] == sum(k.kind == "fused" for k in kernels)


# Two layers of the published widths, all parts in them, as they were counted on 2026-11-28.
COUNTED = [
    ({"SPARSE_START_LAYER": "1"}, {"kernels": 93, "gb": 2.008}, {"kernels": 36, "operations": 527475671040}, 1.79),
    ({"PRESET": "frontier", "LOOP_START": "1", "LOOP_END": "1", "PARALLEL_RESIDUAL_START": "1"},
     {"kernels": 103, "gb": 4.766}, {"kernels": 51, "operations": 1546188226560}, 1.98),
]


@pytest.mark.skipif(not torch.__version__.startswith(f"{step_cost.TORCH}."), reason="counted with another torch")
@pytest.mark.parametrize("variables, fused, products, room", COUNTED)
def test_counts_do_not_rise(variables, fused, products, room):
    """By more than 5%; and no product is added or grows. Lower the figures when a change lowers the counts. What is
    kept for the backward pass is within what a run reckons with, `room` times as much (of eleven layers 1.45 times)."""
    kernels, kept, _ = step_cost.count(str(SCRIPT), 16384, {"NUM_LAYERS": "2"} | variables)
    cfg, _, _ = t.load_config({"PRESET": "seed", "NUM_LAYERS": "2", "USE_COMPILE": "1"} | variables)
    reckoned = 16384 * t.activation_bytes(cfg, SimpleNamespace(dtype=torch.bfloat16, cuda=True))
    assert reckoned / kept == pytest.approx(room, rel=0.05)
    moved = [k.moved for k in kernels if k.group == "fused"]
    assert len(moved) <= 1.05 * fused["kernels"] and sum(moved) <= 1.05e9 * fused["gb"], (len(moved), sum(moved))
    work = [k.work for k in kernels if k.group == "products"]
    assert {"kernels": len(work), "operations": sum(work)} == products
    assert not any(k.moved for k in kernels if k.group == "other")  # no scatter that is not fused


EMPTY, LEAN, BROKEN = "x = 1\n", "def load_config(environ): ...\nclass GPT: ...\n", "import no_such_module\n"


@pytest.mark.parametrize("source, arguments, says", [
    (None, ["--script", "missing.py"], ["missing.py: no such file", "--script"]),
    (EMPTY, [], ["given.py: has neither load_config nor Hyperparameters", "--script"]),
    (LEAN, [], ["given.py", "attend, fuses", "--script"]),
    (BROKEN, [], ["given.py: cannot be imported", "no_such_module"]),
    (None, ["NUM_LAYERS"], ["NUM_LAYERS: not of the form VARIABLE=VALUE"]),
    (None, ["NUM_LAYERS=x"], ["NUM_LAYERS='x'", "accepts int"]),
    (None, ["NUM_LAYRES=4", "MODEL_DIM=-1"], ["NUM_LAYRES: no such variable; did you mean NUM_LAYERS?", "MODEL_DIM"]),
    (None, ["--tokens", "5000"], ["--tokens 5000", "no multiple", "TRAIN_SEQ_LEN", "2048", "give 4096"]),
    (None, ["--tokens", "0"], ["--tokens 0", "above 0"]),
    (None, ["--tokens", "many"], ["--tokens", "'many'", "--help"]),
    (None, ["--code", "/dev/null/folder"], ["--code /dev/null/folder", "Not a directory"]),
])
def test_what_is_wrong_is_one_line(launch, tmp_path, source, arguments, says):
    if source is not None:
        (tmp_path / "given.py").write_text(source)
        arguments = ["--script", "given.py", *arguments]
    launch(script=TOOL, options=arguments).refused(*says)


def test_another_torch_is_one_line(tmp_path):
    """It is the one that Python finds, a package without the internals."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '9.9.0'\n")
    done = subprocess.run([sys.executable, str(TOOL)], env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert all(word in done.stderr for word in ("error: torch 9.9.0", "torch 2.13", "requirements.txt"))


def test_what_was_put_aside_is_put_back():
    """Whoever imports the tool goes on with Inductor as it was."""
    import torch._inductor.config as config
    from torch._inductor import ir, lowering, scheduler
    from torch._inductor.runtime import hints

    def now():
        return (ir.is_cpu, lowering.cat, lowering.lowerings[torch.ops.aten.cat.default],
                scheduler.BaseSchedulerNode.is_cpu, vars(hints.DeviceProperties)["create"], config.cpu_backend)

    before = now()
    with step_cost.as_for_a_hopper():
        assert all(a != b for a, b in zip(before, now(), strict=True))
    assert now() == before


def test_the_script_is_beside_the_tool():
    assert step_cost.read_arguments([]).script == str(SCRIPT)
