"""What an iteration of test-time training (TTT_MODE=lora) would move and compute on an H100, counted without one, and
what the walk over the challenge's whole validation split would take on eight. From the project's folder:

    python records/track_non_record_16mb/2026-11-28_TTTChoices_CPU/walk_cost.py --data FOLDER [VARIABLE=VALUE ...]

The script's own score_documents and learn_documents run on fake tensors. What they compile is lowered as by
tools/step_cost.py, the adapters being inputs of the graph. An operation outside of a graph is one launch. A product
that adds to a tensor first copies that tensor within a graph: its library does so. A launch takes the longest of its
bytes, its operations (of attention half, the rest is masked) and --launch. FOLDER has shards fineweb_val_*.bin: the
lengths of their documents, repeated up to the split's targets, give the iterations of eight ranks. Not in it: what the
host does meanwhile, and what happens between documents. Internals of torch 2.13, as in step_cost.py.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import measure_stages  # noqa: E402
import numpy  # noqa: E402
import step_cost  # noqa: E402
import torch  # noqa: E402
import torch._inductor.compile_fx as compile_fx  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch._functorch.aot_autograd import aot_function  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

MEMORY = 85_017_493_504  # bytes of the H100 that was measured
NEEDED = ("load_config", "Evaluator", "LoraAdapters", "lora_places", "score_documents", "learn_documents")
RATES = (("bandwidth", 2.7e12, "bytes a second"), ("rate", 6e14, "operations a second of products"),
         ("attention", 3.3e14, "operations a second of attention"), ("launch", 5.0, "microseconds a launch, at least"))


def read_arguments() -> argparse.Namespace:
    parser = step_cost.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="the trainer (%(default)s)")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="of validation shards")
    for name, value, text in RATES:
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text} ({value:g})")
    parser.add_argument("--json", action="store_true", help="print the exact figures as one JSON object, no table")
    parser.add_argument("variables", nargs="*", metavar="VARIABLE=VALUE")
    options = parser.parse_intermixed_args()
    for wrong in (pair for pair in options.variables if "=" not in pair):
        step_cost.fail(f"{wrong}: not of the form VARIABLE=VALUE; write it like TTT_LORA_RANK=64")
    for wrong in (name for name, *_ in RATES if not getattr(options, name) > 0):
        step_cost.fail(f"--{wrong} {getattr(options, wrong):g}: must be above 0")
    if not Path(options.script).is_file():
        step_cost.fail(f"{options.script}: no such file; give the path of a trainer with --script")
    options.variables = dict(pair.split("=", 1) for pair in options.variables) | {"TTT_MODE": "lora"}
    return options


class Device(TorchDispatchMode):
    """Stands for the GPU: notes what it would launch, under the `stage` that is set, unless `quiet`."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.stage, self.quiet, self.kernels, self.figures = fake, "", True, [], step_cost.kernel

    def note(self, kind: str, moved: int, what: str):
        self.kernels.append(step_cost.Kernel(self.stage, kind, moved, 0, 0, [what]))

    def __torch_dispatch__(self, operation, kinds, args=(), named=None):
        """An operation outside of a graph."""
        result = operation(*args, **(named or {}))
        if not self.quiet and operation.namespace == "aten" and not operation.is_view:
            tensors = [x for x in tree_leaves((args, named, result)) if isinstance(x, torch.Tensor)]
            self.note("outside", sum(x.numel() * x.itemsize for x in tensors), str(operation))
        return result

    def launched(self, node, stage: str) -> step_cost.Kernel:
        """A node of Inductor's scheduler."""
        kernel = self.figures(node, stage)
        if kernel.kind != "None":  # one of several results of a call
            self.kernels.append(dataclasses.replace(kernel, stage=self.stage))
        if "addbmm" in kernel.kind or "addmm" in kernel.kind:
            size = math.prod(map(int, node.node.get_size())) * node.node.get_dtype().itemsize
            self.note("copies", 2 * size, kernel.kind)
        return kernel

    def compiled(self, function, *given):
        """function(*given) as torch.compile would run it. The graph of its gradient follows when that is asked for. A
        tensor that it changes in place its graph returns instead, at the same bytes."""
        def keep(stage, module, inputs):
            if stage == "alone":  # without gradients
                compile_fx._recursive_joint_graph_passes(module)

            def run(*values):
                with mock.patch.object(self, "quiet", True), mock.patch.object(step_cost, "kernel", self.launched):
                    result = module(*values)
                    step_cost.lower(stage, module, inputs, self.fake, False)  # which changes the module
                    return result
            return make_boxed_func(run)

        def partition(joint, *more, **named):
            compile_fx._recursive_joint_graph_passes(joint)
            return min_cut_rematerialization_partition(joint, *more, compiler="inductor", **named)

        alone, forward, backward = (functools.partial(keep, stage) for stage in ("alone", "forward", "backward"))
        traced = aot_function(function, forward, backward, partition, select_decomp_table(), inference_compiler=alone)
        with mock.patch.object(self, "quiet", True):
            return traced(*given)


def adapters_of(script, model, places: int):
    """The script's LoraAdapters, as its __init__ would make them but for their numbers."""
    adapters, cfg = object.__new__(script.LoraAdapters), model.cfg
    adapters.cfg, adapters.device, adapters.dtype = cfg, torch.device("cpu"), model.dtype
    adapters.layers = [layer for block in model.blocks for layer in (block.mlp.fc, block.mlp.proj)]
    adapters.layers.append(model.tok_emb if model.lm_head is None else model.lm_head)
    adapters.sizes, adapters.rate = [len(m.weight) for m in adapters.layers], cfg.ttt_lora_lr
    adapters.downs = [torch.zeros(cfg.lora_rank, m.weight.size(1), dtype=model.dtype) for m in adapters.layers]
    adapters.ups = torch.zeros(places, sum(adapters.sizes), cfg.lora_rank)
    adapters.squares = torch.zeros(places, len(adapters.layers), cfg.lora_rank)
    adapters.steps = torch.zeros(places)
    return adapters


def forward_of(model, adapters, device: Device):
    """The model's forward pass with the adapters that are attached, for what `compiled` of the script gives."""
    names, weights = zip(*model.named_parameters(), *model.named_buffers(), strict=True)

    def forward(ids, targets, rows, window):
        pairs = [factor for layer in adapters.layers for factor in layer.adapter]

        def nats(ids, targets, rows, tables, *given):
            for i, layer in enumerate(adapters.layers):
                layer.adapter = given[2 * i : 2 * i + 2]
            state = dict(zip(names, given[len(pairs) :], strict=True))
            return torch.func.functional_call(model, state, (ids, targets, rows, 0, tables))

        with mock.patch.object(device, "quiet", True):  # RoPE's tables are kept
            tables = model.rope(ids.size(1), window)
        return device.compiled(nats, ids, targets, rows, tables, *pairs, *weights)

    return forward


def iterate(script, model, adapters, process, chunk: int, device: Device):
    """Score a chunk of as many documents as there are adapters, and learn from it."""
    cfg = model.cfg
    text = types.SimpleNamespace(tokens=torch.zeros(cfg.eval_len + 1, dtype=torch.int32), targets=cfg.eval_len)
    forward, stride = forward_of(model, adapters, device), min(cfg.eval_stride, chunk)
    walk = types.SimpleNamespace(cfg=cfg, process=process,
                                 evaluator=script.Evaluator(cfg, process, forward, text, stride))
    rows = torch.arange(len(adapters.ups)), *torch.zeros(3, len(adapters.ups), dtype=torch.int64)  # first, next, end

    def update(*given):
        device.stage, tensors = "optimizer", [x for x in given if isinstance(x, torch.Tensor)]
        device.compiled(lambda *tensors: script.descend_directions(*tensors, *given[len(tensors) :]), *tensors)

    adapters.update, device.quiet, device.stage = update, False, "score"
    script.score_documents(walk, adapters, chunk, *rows)
    device.stage = "learn"
    script.learn_documents(walk, adapters, chunk, *rows)


def count(options: argparse.Namespace) -> tuple[list[step_cost.Kernel], measure_stages.Walk]:
    """The launches of an iteration, and the walk of eight ranks."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with step_cost.loaded(Path(options.script)) as script, mock.patch.object(measure_stages, "t", script):
        if missing := [name for name in NEEDED if not hasattr(script, name)]:
            step_cost.fail(f"{options.script}: has no {', '.join(missing)}; give another with --script")
        model, _ = step_cost.fake_model(script, options.variables, options.script, 0, fake)
        cfg, device = model.requires_grad_(False).cfg, Device(fake)
        wanted = measure_stages.measure_book.fineweb(cfg.vocab_size) + 1
        process = types.SimpleNamespace(cuda=True, device=torch.device("cpu"), dtype=model.dtype, world=1, rank=0,
                                        memory=lambda: (MEMORY, 0))
        try:
            tokens = script.Tokens(Path(options.data), "val", cfg.vocab_size)
        except script.UserError as problem:
            step_cost.fail(str(problem))
        ids = numpy.resize(tokens.read(0, min(len(tokens), wanted)), wanted)
        walk = measure_stages.walk_of_eight(cfg, process, ids)
        with fake:
            adapters = adapters_of(script, model, math.ceil(walk.together / measure_stages.RANKS))
        with step_cost.as_for_a_hopper(), fake, device:
            iterate(script, model, adapters, process, walk.chunk, device)
    return device.kernels, walk


def milliseconds(kernel: step_cost.Kernel, options: argparse.Namespace) -> float:
    return max(options.launch / 1000, 1000 * kernel.moved / options.bandwidth, 1000 * kernel.work / options.rate,
               500 * kernel.attention / options.attention)


def sums(kernels: list[step_cost.Kernel], options: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Of each stage by kind: launches, bytes, operations, milliseconds. Narrow: a product that waits for its bytes."""
    found = {}
    for k in kernels:
        kind = k.kind if k.kind in ("copies", "outside") else k.group
        if kind == "products" and k.moved / options.bandwidth > k.work / options.rate:
            kind = "narrow products"
        for name in (kind, "all"):
            kinds = found.setdefault(k.stage, {})
            figures = 1, k.moved, k.work + k.attention // 2, milliseconds(k, options)
            kinds[name] = [a + b for a, b in zip(kinds.get(name, (0, 0, 0, 0)), figures, strict=True)]
    return found


def main():
    options = read_arguments()
    kernels, walk = count(options)
    found = sums(kernels, options)
    times = measure_stages.eight(walk, sum(kinds["all"][-1] for kinds in found.values()))
    if options.json:
        rates = {name: getattr(options, name) for name, *_ in RATES}
        print(json.dumps({"script": options.script, "variables": options.variables, "rates": rates, "eight": times,
                          "columns": ["launches", "bytes", "operations", "ms"], "stages": found}))
        return
    for stage, kinds in found.items():
        for kind, (n, moved, work, took) in sorted(kinds.items(), key=lambda item: item[0] == "all"):
            print(f"{stage:11}{kind:16}{n:5} launches{moved / 1e9:8.3f} GB{work / 1e12:8.3f} TF{took:8.2f} ms")
    print(f"scoring, learning and the step, iterations by the lengths of documents: {times['arithmetic']}")


if __name__ == "__main__":
    main()
