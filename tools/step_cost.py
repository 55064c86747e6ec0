#!/usr/bin/env python3
"""What a training step would move and compute on a Hopper GPU, counted without one.

    python tools/step_cost.py                                   the published model: two minutes of one core
    python tools/step_cost.py --tokens 49152 NUM_LAYERS=4       another model, fewer tokens
    python tools/step_cost.py --json > cost.json                the exact figures, for other programs
    python tools/step_cost.py --script other/train_gpt.py       another script of this field

The model's forward and backward pass (bf16, one micro-batch) is traced with fake tensors and lowered by Inductor to
Triton kernels as for a device of 132 multiprocessors; nothing is run or allocated. Printed: fused kernels and the bytes
that they read and write, matrix products with their operations, attention, what is kept for the backward pass, and
milliseconds at the stated rates: an estimate of the order of things, exact in the counts. Inductor does not count the
operations of attention, so the table has 0 for them; --json has those of its products by their shapes, of which the
causal mask leaves half. Not in it: optimizers, communication, launches, and RoPE's tables, which train_gpt.py makes
outside the graph that it compiles; here too they are inputs of the graph. Nor do reductions over rows join those over
columns, as on a real GPU they may.

VARIABLE=VALUE sets a variable of train_gpt.py, under PRESET=seed or the PRESET given; the environment's variables have
no say. With NUM_LOOPS the pass is one with its loops: count NUM_LOOPS=0 too, for the part of training before them.
Another script (--script), which has Hyperparameters in place of load_config and imports FlashAttention, is counted in
the same way, under bf16 autocast as it runs, its variables from the environment and its RoPE within the graph.
It relies on the script's names GPT, GPT.rope, load_config, attend and fuses, and on internals of torch 2.13; on a real
GPU, trust the profiler. The MLP's own kernel, which only a GPU runs, is not in it: its plain form is counted.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock  # sets a thing for a while; an error where there is no such thing

import numpy

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13"  # whose internals these are
MULTIPROCESSORS = 132  # of an H100 or H200, by which Inductor splits reductions
NEEDED = ("GPT", "attend", "fuses")  # of a script with load_config


@dataclasses.dataclass
class Kernel:
    """One launch: a fused kernel of Inductor's, or a call of a library."""

    stage: str  # forward or backward
    kind: str  # "fused", or the name of the library's operation
    moved: int  # bytes, read and written
    work: int  # operations as Inductor counts them, which are those of matrix products
    attention: int  # operations of attention, which it does not count
    origins: list[str]  # the tensor operations that it does

    @property
    def group(self) -> str:
        if self.kind == "fused":
            return "fused"
        return "attention" if self.attention else "products" if self.work else "other"


def fail(problem: str):
    sys.stderr.write("error: " + " ".join(problem.split()) + "\n")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str):
        fail(f"{message}; --help says how")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; `variables` becomes a dictionary."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="the trainer (%(default)s)")
    parser.add_argument("--tokens", type=int, default=98304,
                        help="of one forward pass; %(default)s is an eighth of the published step")
    parser.add_argument("--bandwidth", type=float, default=2.7e12,
                        help="bytes a second that fused kernels reach (2.7e12)")
    parser.add_argument("--rate", type=float, default=6e14,
                        help="operations a second that matrix products reach (6e14)")
    parser.add_argument("--top", type=int, default=12, help="largest fused kernels to list (%(default)s)")
    parser.add_argument("--code", metavar="FOLDER", help="folder for the generated code")
    parser.add_argument("--json", action="store_true", help="print the exact figures as one JSON object, no table")
    parser.add_argument("variables", nargs="*", metavar="VARIABLE=VALUE")
    options = parser.parse_intermixed_args(argv)
    for pair in options.variables:
        if "=" not in pair or not pair.partition("=")[0].isidentifier():
            fail(f"{pair}: not of the form VARIABLE=VALUE; write it like NUM_LAYERS=4")
    options.variables = dict(pair.split("=", 1) for pair in options.variables)
    for name in ("tokens", "bandwidth", "rate"):
        if not getattr(options, name) > 0:
            fail(f"--{name} {getattr(options, name):g}: must be above 0")
    if not Path(options.script).is_file():
        fail(f"{options.script}: no such file; give the path of a trainer with --script")
    return options


# ---- the script and its model ----------------------------------------------------------------------------------------


def flash_attention(q, k, v, **_):
    """Causal attention as one operation, which is what FlashAttention is to the compiler. [B, T, H, D]"""
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].transpose(1, 2)


@contextlib.contextmanager
def loaded(path: Path):
    """The script as a module, which finds its neighbours, and the stand-in where it asks for FlashAttention."""
    loader = importlib.machinery.SourceFileLoader("counted_script", str(path))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    modules = {"flash_attn_interface": types.SimpleNamespace(flash_attn_func=flash_attention),
               loader.name: script}  # where dataclasses look for it
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:  # no bytecode: nothing is left beside another's script
        with mock.patch.multiple(sys, path=[str(path.resolve().parent), *sys.path], dont_write_bytecode=True):
            try:
                loader.exec_module(script)
            except (Exception, SystemExit) as problem:
                fail(f"{path}: cannot be imported, {type(problem).__name__}: {problem}; mend it or install its needs")
            yield script
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def our_model(script, variables: dict[str, str], path: str):
    """The model of train_gpt.py's configuration, and its sequence length."""
    import torch

    missing = [name for name in NEEDED if not hasattr(script, name)]
    if missing or not hasattr(script.GPT, "rope"):
        fail(f"{path}: has load_config but no {', '.join(missing) or 'GPT.rope'}, which this count relies on; give "
             "another with --script")
    cfg, problems, _ = script.load_config({"PRESET": "seed"} | variables)
    if problems:
        fail("; ".join(problems))
    script.attend, script.fuses = flash_attention, lambda x: True
    return script.GPT(cfg, torch.bfloat16), cfg.train_seq_len


def other_model(script, variables: dict[str, str], path: str):
    """The model of another script: small tensors in fp32, embeddings and the like in bf16, as it trains them."""
    if variables:
        fail(f"{next(iter(variables))}: {path} reads its variables from the environment; set it there")
    cfg = script.Hyperparameters()
    wanted = [name for name in inspect.signature(script.GPT.__init__).parameters if name != "self"]
    model = script.GPT(**{n: getattr(cfg, n, getattr(cfg, f"{n}_enabled", None)) for n in wanted}).bfloat16()
    for name, p in model.named_parameters():
        p.data = p.data.float() if name.endswith("_bank") else p.data
    for module in model.modules():
        if isinstance(module, script.CastedLinear):
            module.float()
    script.restore_low_dim_params_to_fp32(model)
    rotary = script.Rotary.forward

    def uncached(self, *more):  # else what one tracing pass keeps would be a constant of the next
        self._seq_len_cached, self._cos_cached, self._sin_cached = 0, None, None
        return rotary(self, *more)

    script.Rotary.forward = uncached
    return model, cfg.train_seq_len


def fake_model(script, variables: dict[str, str], path: str, tokens: int, fake):
    """The model with fake weights, and its sequence length, of which `tokens` must be a multiple."""
    import torch

    ours = hasattr(script, "load_config")
    if not ours and not hasattr(script, "Hyperparameters"):
        fail(f"{path}: has neither load_config nor Hyperparameters; give a trainer of this field with --script")
    with torch.device("meta"):  # no weight is drawn
        model, length = (our_model if ours else other_model)(script, variables, path)
    if tokens % length:
        near = max(round(tokens / length), 1) * length
        fail(f"--tokens {tokens}: no multiple of the sequence length {length} (TRAIN_SEQ_LEN); give {near}")
    with fake:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
            for name, x in module._buffers.items():
                if x is not None:
                    module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
    return model, length


# ---- the compiler ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_for_a_hopper():
    """Let Inductor lower for the CPU, which is all that is here, as it would for a GPU."""
    import torch
    import torch._inductor.config as config
    import torch._inductor.ir as ir
    import torch._inductor.lowering as lowering
    import torch._inductor.runtime.hints as hints
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as triton

    settings = {
        "cpu_backend": "triton",  # C++ is fused by other rules
        "compile_threads": 1,  # nothing is compiled, so no pool of workers is started
        "triton.descriptive_names": "original_aten",  # names of kernels in --code, without those of modules
    }
    attributes = [
        # A hash of Triton goes into the code, and Triton need not be installed here.
        (triton, "triton_hash_with_backend", lambda: "none"),
        # What is read often or takes many operations is stored, else computed anew; a GPU stores later than a CPU.
        (ir, "is_cpu", lambda x: False),
        # Loops are reordered and reindexed, so that kernels fuse, on a GPU alone.
        (scheduler.BaseSchedulerNode, "is_cpu", lambda self: False),
        # Reductions are split by the number of multiprocessors.
        (hints.DeviceProperties, "create", staticmethod(hopper_properties(hints.DeviceProperties.create))),
        # On a GPU a concatenation may be one kernel, fused with what reads it; on a CPU each part is copied. The
        # function asks for the device in its middle, so it is defined anew without that, and put back at the end.
        (lowering, "cat", lowering.cat),
    ]
    asks, source = 'inputs[0].get_device().type == "cpu"', inspect.getsource(lowering.cat)
    if asks not in source:
        raise AttributeError("torch._inductor.lowering.cat no longer asks for the device as it did")
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(settings))
        for change in attributes:
            stack.enter_context(mock.patch.object(*change))
        stack.enter_context(mock.patch.dict(lowering.lowerings))
        del lowering.lowerings[torch.ops.aten.cat.default]  # else the function would not register itself anew
        exec(compile(source.replace(asks, "False"), "cat", "exec"), vars(lowering))
        yield


def hopper_properties(plain):
    """What gives a device's properties, with the multiprocessors of a Hopper GPU."""
    return lambda device: plain(device)._replace(multi_processor_count=MULTIPROCESSORS)


def trace(model, length: int, tokens: int, ours: bool, fake) -> dict[str, tuple]:
    """The graphs of the forward and the backward pass as torch.compile would cut them, each with its inputs."""
    import torch
    import torch._inductor.compile_fx as compile_fx
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs = {}

    def keep(stage):
        def compiler(module, inputs):
            graphs[stage] = module, inputs
            return make_boxed_func(module)
        return compiler

    def partition(joint, *more, **named):
        compile_fx._recursive_joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, *more, compiler="inductor", **named)

    def loss(ids, targets, tables, *weights):
        given = (ids, targets, None, 0, tables) if ours else (ids, targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=not ours):
            return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), given).mean()

    with fake:
        text = torch.zeros(tokens // length, length + 1, dtype=torch.int32 if ours else torch.int64)
        names, weights = zip(*model.named_parameters(), *model.named_buffers(), strict=True)
        traced = aot_function(loss, fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition,
                              decompositions=select_decomp_table())
        traced(text[:, :-1], text[:, 1:], model.rope(length) if ours else (), *weights).backward()
    return graphs


def kept_bytes(forward) -> int:
    """Bytes that the forward pass's graph keeps for the backward pass, without weights and other inputs."""
    outputs = forward.graph.find_nodes(op="output")[0].args[0][1:]  # the loss is the first
    tensors = {node: node.meta["val"] for node in outputs if node is not None and node.op != "placeholder"}
    return sum(x.numel() * x.element_size() for x in tensors.values() if hasattr(x, "numel"))


def elements(accesses: list, whole: int) -> int:
    """Numbers of a buffer of `whole` that a kernel's accesses touch together. Where several touch a part each, what
    they touch in the first two steps of their outer loops stands for all."""
    import sympy
    from torch.utils._sympy.functions import Identity

    def alone(access) -> int:
        indirect = access.index.free_symbols - set(access.var_names)  # a place that another buffer holds
        return math.prod(n for var, n in access.ranges.items() if indirect or var in access.index.free_symbols)

    numbers = [alone(access) for access in accesses]
    outer = [max(access.var_names, key=access.index.coeff, default=None) for access in accesses]
    steps = {access.ranges.get(var) for access, var in zip(accesses, outer, strict=True)}
    if len(accesses) == 1 or max(numbers) >= whole or len(steps) > 1 or len(set(numbers)) > 1:
        return min(sum(numbers), whole)
    touched, functions = set(), {"ModularIndexing": lambda x, by, n: x // by % n}
    for access, var in zip(accesses, outer, strict=True):
        sizes = [2 if v == var else n for v, n in access.ranges.items()]
        index = access.index.replace(Identity, lambda x: x)
        place = sympy.lambdify(list(access.ranges), index, [functions, "numpy"])
        touched.update(place(*numpy.indices(sizes)).flatten().tolist())
    return len(touched) * steps.pop() // 2


def bytes_moved(node) -> int:
    """Bytes that a fused kernel reads and writes; of a buffer of which it touches a part, that part. Inductor's own
    count, which this begins with, takes such a buffer whole."""
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.virtualized import V

    total = 0
    for name, moved in node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).items():
        accesses = [a for a in node.read_writes.reads | node.read_writes.writes if a.name == name]
        size = V.graph.try_get_buffer(name).maybe_get_size()
        if size and all(isinstance(a, MemoryDep) for a in accesses):
            number = elements(accesses, math.prod(int(n) for n in size))
            moved = min(moved, int(number) * V.graph.get_dtype(name).itemsize)
        total += moved
    return total


def kernel(node, stage: str) -> Kernel:
    """The figures of a node of the scheduler's."""
    import torch._inductor.scheduler as scheduler

    kind, work, attention = "fused", 0, 0
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        call = node.node
        kind = str(getattr(call, "op_overload", None) or getattr(call, "python_kernel_name", "other"))
        work = node.estimate_flops() or 0
        if "flash_attention" in kind:  # two products with each score forward and five backward, where one is not masked
            backward = "backward" in kind
            batch, heads, queries, width = (int(n) for n in call.inputs[backward].get_size())  # the gradient is first
            attention = (5 if backward else 2) * batch * heads * queries * queries * width
    origins = {str(o.target) for n in node.get_nodes() if n.node is not None for o in n.node.get_origins()}
    names = sorted({name.split(".")[-2] if "." in name else name for name in origins})
    moved = bytes_moved(node) if kind == "fused" else node.get_read_write_buffers_sizes()
    return Kernel(stage, kind, moved, work, attention, names)


def lower(stage: str, module, inputs, fake, with_code: bool) -> tuple[list[Kernel], str]:
    """The kernels that Inductor makes of a graph, and their code, which takes a third of the time, where wanted."""
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.scheduler as scheduler
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(fake):
        compile_fx._recursive_post_grad_passes(module, is_inference=False)
        graph = GraphLowering(module, example_inputs=inputs, is_backward=stage == "backward", is_inference=False,
                              shape_env=None)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            code = ""
            if with_code:
                code = graph.codegen()[0].value
            else:  # what codegen begins with: the scheduler fuses, and by then the figures stand
                graph.init_wrapper_code()
                graph._update_scheduler()
            nodes = [n for n in graph.scheduler.nodes if not isinstance(n, scheduler.NopKernelSchedulerNode)]
            return [kernel(node, stage) for node in nodes], code


def count(script: str, tokens: int, variables: dict[str, str],
          with_code: bool = False) -> tuple[list[Kernel], int, dict[str, str]]:
    """All kernels of a forward and a backward pass, the bytes that one keeps for the other, and each pass's code where
    wanted."""
    kernels, kept, code = [], 0, {}
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode

        fake = FakeTensorMode(allow_non_fake_inputs=True)  # a script may keep tensors of its own
        with loaded(Path(script)) as module:
            model, length = fake_model(module, variables, script, tokens, fake)
            with as_for_a_hopper():  # late: its imports take seconds, and what is wrong is said by now
                graphs = trace(model, length, tokens, hasattr(module, "load_config"), fake)
                kept = kept_bytes(graphs["forward"][0])
                for stage, graph in graphs.items():
                    found, code[stage] = lower(stage, *graph, fake, with_code)
                    kernels += found
    except Exception as problem:
        version = str(getattr(sys.modules.get("torch"), "__version__", "(not installed)"))
        if version.startswith(f"{TORCH}."):
            raise
        fail(f"torch {version}: {type(problem).__name__}: {problem}; this count relies on internals of torch {TORCH}, "
             "so install that (requirements.txt)")
    return kernels, kept, code


# ---- the figures -----------------------------------------------------------------------------------------------------


def largest(kernels: list[Kernel], top: int) -> list[Kernel]:
    """The fused kernels that move most, first."""
    return sorted((k for k in kernels if k.kind == "fused"), key=lambda k: -k.moved)[: max(top, 0)]


def estimates(kernels: list[Kernel], options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds at the stated rates."""
    moved, work = sum(k.moved for k in kernels if k.kind == "fused"), sum(k.work for k in kernels)
    return {"fused_ms": 1000 * moved / options.bandwidth, "products_ms": 1000 * work / options.rate}


def table(kernels: list[Kernel], kept: int, options: argparse.Namespace) -> str:
    """The sums by kind, the largest fused kernels, and the totals as a line of JSON."""
    sums = collections.defaultdict(lambda: [0, 0, 0])
    for k in kernels:
        entry = sums[k.stage, k.kind]
        entry[:] = entry[0] + 1, entry[1] + k.moved, entry[2] + k.work
    lines = []
    for (stage, kind), (n, moved, work) in sorted(sums.items(), key=lambda item: -item[1][1]):
        seconds = moved / options.bandwidth if kind == "fused" else work / options.rate
        lines.append(f"{stage:9}{kind:62}{n:5} kernels{moved / 1e9:8.2f} GB{work / 1e12:7.2f} TF"
                     f"{1000 * seconds:7.1f} ms")
    lines.append(f"the {options.top} largest fused kernels, GB:")
    lines += [f"  {k.stage:9}{k.moved / 1e9:7.3f}  {', '.join(k.origins)[:100]}" for k in largest(kernels, options.top)]
    fused, times = [k for k in kernels if k.kind == "fused"], estimates(kernels, options)
    totals = {"tokens": options.tokens, "variables": options.variables, "fused_kernels": len(fused),
              "fused_gb": round(sum(k.moved for k in fused) / 1e9, 2), "fused_ms": round(times["fused_ms"], 1),
              "products_tf": round(sum(k.work for k in kernels) / 1e12, 2),
              "products_ms": round(times["products_ms"], 1), "kept_gb": round(kept / 1e9, 2)}
    return "\n".join([*lines, json.dumps(totals)])


def figures(kernels: list[Kernel], kept: int, options: argparse.Namespace) -> dict:
    """The exact figures: kernels, bytes and operations of each pass by group, what is kept between them, and the
    estimates."""
    result = {"tokens": options.tokens, "variables": options.variables, "kept_bytes": kept}
    for stage in ("forward", "backward"):
        result[stage] = {}
        for group in ("fused", "products", "attention", "other"):
            found = [k for k in kernels if (k.stage, k.group) == (stage, group)]
            result[stage][group] = {"kernels": len(found), "bytes": sum(k.moved for k in found),
                                    "operations": sum(k.work + k.attention for k in found)}
    result["estimates"] = {"bandwidth": options.bandwidth, "rate": options.rate, **estimates(kernels, options)}
    result["largest"] = [{"pass": k.stage, "bytes": k.moved, "origins": k.origins}
                         for k in largest(kernels, options.top)]
    return result


def write_code(folder: str, code: dict[str, str]):
    """Make the folder, and in it a file of each pass."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for stage, text in code.items():
            (Path(folder) / f"{stage}.py").write_text(text, encoding="utf-8")
    except OSError as problem:
        fail(f"--code {folder}: {problem.strerror}; give a folder that can be written to")


def main(argv: list[str] | None = None):
    options = read_arguments(argv)
    if options.code:
        write_code(options.code, {})  # what is wrong is said before the minutes that the count takes
    kernels, kept, code = count(options.script, options.tokens, options.variables, bool(options.code))
    if options.code:
        write_code(options.code, code)
    print(json.dumps(figures(kernels, kept, options)) if options.json else table(kernels, kept, options))


if __name__ == "__main__":
    main()
