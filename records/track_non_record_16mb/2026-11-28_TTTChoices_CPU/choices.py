#!/usr/bin/env python3
"""Try forms of test-time training with adapters on one artifact, and print a table of several.

    git show a546cca:train_gpt.py > before.py          the script whose walk is used, and whose form "before" is
    python choices.py run before.py small.ptz --targets 262144 --out small.csv
    python choices.py run before.py old.ptz --targets 262144 --out old.csv --only before 'new, rank 64'
    python choices.py table small.csv old.csv

Each choice replaces the script's adapters and their step by one of the two forms below; the walk over the documents,
the windows and the books are the script's. DATA_PATH says where the shards and their tokenizer.model lie. Seconds are
those of the one thread that is used. A choice that stands in the file already is not run again.
"""

import argparse
import csv
import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


@dataclasses.dataclass
class Choice:
    """What is tried. The defaults are the form of the script of before, with chunks of 64."""

    form: str = "both"  # "both": both factors learn, by Adam; "second": the first is fixed, the second learns
    layers: str = "blocks"  # a pattern that the names of the adapted matrices hold
    frozen: str = "^$"  # and one of those whose adapters do not learn
    head: int = 0  # rank of an adapter on the output layer
    rate_head: float = 1.0  # of that one, as a multiple of the others'
    rank: int = 32
    rate: float = 0.004  # second: divided by the square root of the rank
    rate_first: float = 1.0  # of the first factor, as a multiple of that
    size_first: float = 1.0  # of the first factor's numbers
    beta1: float = 0.9
    beta2: float = 0.99
    decay: float = 0.0  # towards the start, times the rate
    clip: float = 1.0
    basis: str = "random"  # the first factor: random, orthogonal, or strongest: the matrix's right singular vectors
    size_of: str = "direction"  # second: by the root mean square of what gradients a step is divided, number or matrix
    chunk: int = 64
    context: int = 64  # tokens before a chunk that go in when it is learnt
    replay: float = 0.0  # weight of their targets, which are learnt again
    power: float = 0.0  # the rate falls with a document's chunks i = 1, 2, ... as i to the minus this
    block: int = 0  # so many documents, in the order of the stream, before the next ones begin; 0: all, by length
    hand_on: float = 0.0  # share of their mean with which the next ones begin
    in_order: bool = False  # documents begin in the order of the stream, with a share of what those that ended left


NEW = {"form": "second", "layers": "mlp", "head": 1, "basis": "strongest", "rank": 128, "rate": 0.012, "beta1": 0.0}
# The numbers of its authors in the measures of `Choice`: alpha / rank = 1.8 is taken into the second factor's rate, and
# the first factor's is 1 / 1.8 of that; its numbers are uniform; weight decay goes to the start and not to zero.
PUBLISHED = {"beta1": 0.0, "rank": 80, "head": 80, "frozen": r"attn\.k", "rate": 1.44e-4, "rate_first": 0.556,
             "size_first": 0.577, "decay": 1.1, "clip": 0.0, "chunk": 48, "context": 464}
CHOICES = {
    "before": {},
    "before, chunk 128": {"chunk": 128},
    "beta1 0": {"beta1": 0.0},
    "beta1 0, beta2 0.999": {"beta1": 0.0, "beta2": 0.999},
    "beta1 0, weight decay 1": {"beta1": 0.0, "decay": 1.0},
    "beta1 0, rank 80, rate 0.0025": {"beta1": 0.0, "rank": 80, "rate": 0.0025},
    "beta1 0, alpha: first factor at a quarter of the rate": {"beta1": 0.0, "rate_first": 0.25},
    "beta1 0, without keys": {"beta1": 0.0, "frozen": r"attn\.k"},
    "beta1 0, MLPs only": {"beta1": 0.0, "layers": "mlp"},
    "beta1 0, output layer too": {"beta1": 0.0, "head": 32},
    "beta1 0, MLPs and output layer": {"beta1": 0.0, "layers": "mlp", "head": 32},
    "beta1 0, MLPs and output layer, rate 0.002": {"beta1": 0.0, "layers": "mlp", "head": 32, "rate": 0.002},
    "beta1 0, MLPs and output layer, rate 0.001": {"beta1": 0.0, "layers": "mlp", "head": 32, "rate": 0.001},
    "as published (PR 2135), but for what it hands on": PUBLISHED,
    "the same at 10 times the rate": PUBLISHED | {"rate": 1.44e-3, "decay": 0.11},
    "new": NEW,
    "new, without the output layer": NEW | {"head": 0},
    "new, MLPs' second matrices and output layer": NEW | {"layers": r"mlp\.proj"},
    "new, attention's output too": NEW | {"layers": r"mlp|attn\.proj"},
    "new, basis orthogonal": NEW | {"basis": "orthogonal"},
    "new, a size for each number": NEW | {"size_of": "number"},
    "new, a size for each matrix": NEW | {"size_of": "matrix"},
    "new, rate 0.008": NEW | {"rate": 0.008},
    "new, rate 0.018": NEW | {"rate": 0.018},
    "new, rate 0.018, of the output layer 0.009": NEW | {"rate": 0.018, "rate_head": 0.5},
    "new, rate 0.018, of the output layer 0.036": NEW | {"rate": 0.018, "rate_head": 2.0},
    "new, rate 0.024": NEW | {"rate": 0.024},
    "new, rate 0.032": NEW | {"rate": 0.032},
    "new, rate 0.024 falling as chunk^-0.2": NEW | {"rate": 0.024, "power": 0.2},
    "new, rate 0.032 falling as chunk^-0.2": NEW | {"rate": 0.032, "power": 0.2},
    "new, rate 0.05 falling as chunk^-0.5": NEW | {"rate": 0.05, "power": 0.5},
    "new, rate 0.08 falling as chunk^-0.5": NEW | {"rate": 0.08, "power": 0.5},
    "new, rank 32": NEW | {"rank": 32},
    "new, rank 64": NEW | {"rank": 64},
    "new, rank 256": NEW | {"rank": 256},
    "new, beta1 0.9": NEW | {"beta1": 0.9},
    "new, beta2 0.9": NEW | {"beta2": 0.9},
    "new, weight decay 2": NEW | {"decay": 2.0},
    "new, chunk 24, rate 0.0073": NEW | {"chunk": 24, "rate": 0.0073},
    "new, chunk 32, rate 0.0085": NEW | {"chunk": 32, "rate": 0.0085},
    "new, chunk 48, rate 0.0104": NEW | {"chunk": 48, "rate": 0.0104},
    "new, chunk 128, rate 0.017": NEW | {"chunk": 128, "rate": 0.017},
    "new, learnt with 0 tokens before": NEW | {"context": 0},
    "new, learnt with 192 tokens before": NEW | {"context": 192},
    "new, the 64 before learnt again at half weight": NEW | {"replay": 0.5},
    "new, the 64 before learnt again": NEW | {"replay": 1.0},
    "new, the 64 before learnt again, rate 0.009": NEW | {"replay": 1.0, "rate": 0.009},
    "new, 192 tokens before learnt again at half weight": NEW | {"context": 192, "replay": 0.5},
    "new, chunk 48, rate 0.0104, the 64 before learnt again": NEW | {"chunk": 48, "rate": 0.0104, "replay": 1.0},
    "new, blocks of 16 documents, nothing handed on": NEW | {"block": 16},
    "new, blocks of 16 documents, 0.3 handed on": NEW | {"block": 16, "hand_on": 0.3},
    "new, blocks of 16 documents, 0.6 handed on": NEW | {"block": 16, "hand_on": 0.6},
    "new, in the order of the stream, nothing handed on": NEW | {"in_order": True},
    "new, in the order of the stream, 0.05 handed on": NEW | {"in_order": True, "hand_on": 0.05},
    "new, in the order of the stream, 0.15 handed on": NEW | {"in_order": True, "hand_on": 0.15},
    "new, in the order of the stream, 0.15 handed on, gradients not clipped":
        NEW | {"in_order": True, "hand_on": 0.15, "clip": 0.0},
    "new, in the order of the stream, 0.3 handed on": NEW | {"in_order": True, "hand_on": 0.3},
}


def load(path: str):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("script_of_before", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def first_factor(basis: str, weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """[rank, n_in] for a matrix [n_out, n_in], rows of about length 1."""
    n_in = weight.size(1)
    if basis == "strongest":
        found = torch.linalg.svd(weight.float(), full_matrices=False).Vh[:rank]
        return torch.nn.functional.pad(found, (0, 0, 0, rank - len(found)))
    if basis == "orthogonal":
        return torch.nn.init.orthogonal_(torch.empty(rank, n_in), generator=generator)
    return torch.randn((rank, n_in), generator=generator) / math.sqrt(n_in)


class Adapters:
    """Either form, in the place of the script's LoraAdapters. A document's numbers are a row of `weights`."""

    def __init__(self, choice: Choice, cfg, process, model):
        self.choice, self.model, self.dtype = choice, model.requires_grad_(False), model.dtype
        self.learns_first = choice.form == "both"
        rank, generator = min(choice.rank, cfg.model_dim), torch.Generator().manual_seed(0)
        named = [(name, m) for name, m in model.named_modules()
                 if name.startswith("blocks.") and hasattr(m, "adapter") and re.search(choice.layers, name)]
        self.layers = [m for _, m in named]
        matrices = [(m.weight, rank, float(not re.search(choice.frozen, name))) for name, m in named]
        if choice.head:
            matrices.append((model.tok_emb.weight, rank if choice.form == "second" else choice.head,
                             choice.rate_head))
        self.shapes, self.fixed, start, rates = [], [], [], []
        for weight, r, rate in matrices:
            first = choice.size_first * first_factor(choice.basis, weight, r, generator)
            second = torch.zeros(weight.size(0), r)
            if self.learns_first:
                self.shapes.append(first.shape)
                start.append(first.flatten())
                rates.append(torch.full((first.numel(),), choice.rate_first * rate))
            else:
                self.fixed.append(first.to(self.dtype))
            self.shapes.append(second.shape)
            start.append(second.flatten())
            rates.append(torch.full((second.numel(),), rate))
        self.initial, self.rates = torch.cat(start), torch.cat(rates) / (1 if self.learns_first else rank**0.5)

    def reset(self, places: int):
        self.weights = self.initial.repeat(places, 1)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps = torch.zeros(places, 1)

    def renew(self, places: np.ndarray):
        places = torch.from_numpy(places)
        if self.choice.in_order:  # who has ended began before all that begin now
            for ended in places[self.steps[places, 0] > 0]:
                self.initial = self.initial.lerp(self.weights[ended], self.choice.hand_on)
        self.weights[places] = self.initial
        for state in (self.first, self.second, self.steps):
            state[places] = 0.0

    def split(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split([math.prod(shape) for shape in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def attach(self, places: Tensor, times: int = 1):
        self.leaf = self.weights[places].requires_grad_()
        parts = self.split(self.leaf.to(self.dtype).repeat(times, 1))
        pairs = list(zip(parts[::2], parts[1::2], strict=True)) if self.learns_first else list(
            zip(self.fixed, parts, strict=True))
        for layer, pair in zip(self.layers, pairs, strict=False):
            layer.adapter = pair
        if self.choice.head:
            down, up = pairs[-1]
            self.model.watch_output = lambda logits, x: logits.baddbmm_(x @ down.mT, up.mT)

    def detach(self):
        for layer in self.layers:
            layer.adapter = None
        self.model.watch_output = None

    def mean_squares(self, grad: Tensor) -> Tensor:
        """Squares of the gradients, by their mean over what is to have one size."""
        square, of = grad.square(), self.choice.size_of
        if self.learns_first or of == "number":
            return square
        over = 1 if of == "direction" else (1, 2)
        means = [part.mean(over, keepdim=True).expand_as(part).flatten(1) for part in self.split(square)]
        return torch.cat(means, 1)

    @torch.no_grad()
    def update(self, grad: Tensor, w: Tensor, m: Tensor, v: Tensor, steps: Tensor, on: Tensor):
        """A step in place on the rows that are `on`."""
        c = self.choice
        if c.clip:
            grad = grad * (c.clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        steps.add_(on)
        taken = steps.clamp(min=1.0)
        m.lerp_(grad, torch.where(on, 1 - c.beta1, 0.0))
        v.lerp_(self.mean_squares(grad), torch.where(on, 1 - c.beta2, 0.0))
        rate = torch.where(on, c.rate * taken**-c.power, 0.0)
        w.lerp_(self.initial.expand_as(w), (rate * c.decay).expand_as(w))
        scale = (v / (1 - c.beta2**taken)).sqrt() + 1e-8
        w.addcdiv_(rate / (1 - c.beta1**taken) * m * self.rates, scale, value=-1)

    def step(self, nats: Tensor, places: Tensor, learns: Tensor):
        grad, = torch.autograd.grad((nats.mean(1) * learns).sum(), self.leaf)
        whole = self.weights, self.first, self.second, self.steps
        mine = [state[places] for state in whole]
        self.update(grad, *mine, learns[:, None])
        for state, rows in zip(whole, mine, strict=True):
            state[places] = rows


def learn(choice: Choice, walk, adapters, chunk: int, places, first, low, end):
    """`learn_documents` of the script, with another context and, with `replay`, its targets too."""
    evaluator, length = walk.evaluator, min(walk.cfg.eval_len, chunk + choice.context)
    learns, start = low + chunk < end, (low + chunk - length).maximum(first)[:, None]
    inputs = (start + torch.arange(length)).minimum(low[:, None] + chunk - 1)
    targets = low[:, None] + torch.arange(chunk)
    evaluator.lesson(targets + 1, learns)
    if choice.replay:
        before = low[:, None] - torch.arange(length - chunk, 0, -1)
        weight = torch.cat((choice.replay * (before >= start), torch.ones(targets.shape)), 1)
        targets = torch.cat((before.maximum(start), targets), 1)
    adapters.attach(places)
    tokens, last = evaluator.stream.tokens, evaluator.stream.targets
    nats = evaluator.forward(tokens[inputs.clamp(max=last)], tokens[(targets + 1).clamp(max=last)], targets - start,
                             walk.cfg.eval_len)
    if choice.replay:
        nats = nats * weight * nats.size(1) / weight.sum(1, keepdim=True)
    adapters.step(nats, places, learns)


def walk_all(script, choice: Choice, walk, model):
    """All documents by length, or in the order of the stream, there also block by block."""
    adapters = Adapters(choice, walk.cfg, walk.process, model)
    groups = script.document_groups(walk.cfg, walk.process, walk.evaluator.stream, len(adapters.initial))
    walk.total = sum(window * int((d[:, 1] - d[:, 0]).sum()) for window, _, d in groups)
    if choice.in_order:
        (window, places, _), *_ = groups
        documents = sorted(d for *_, ds in groups for d in ds.tolist())
        script.walk_documents(walk, adapters, window, places, np.array(documents), fixed=False)
    elif not choice.block:
        for group in groups:
            script.walk_documents(walk, adapters, *group, fixed=False)
    documents = sorted((*d, window) for window, _, ds in groups for d in ds.tolist())
    for i in range(0, len(documents) if choice.block else 0, choice.block or 1):
        some, ends = documents[i : i + choice.block], []
        for size in sorted({window for *_, window in some}):
            chosen = np.array([d for *d, window in some if window == size])
            script.walk_documents(walk, adapters, size, len(chosen), chosen, fixed=False)
            ends.append(adapters.weights)
        mean = torch.cat(ends).mean(0)
        adapters.initial = adapters.initial.lerp(mean, choice.hand_on)
    adapters.detach()


class Quiet:
    """A log that says nothing."""

    main = False

    def __call__(self, *said):
        pass

    progress = metric = __call__


def run_choice(script, settings: dict | None, base, weights, process, stream):
    """The score of one choice, of plain sliding windows where it is None."""
    if settings is None:
        model = script.build_model(base, weights, process)
        return script.evaluate(base, process, Quiet(), model, stream, base.eval_stride, "").result()
    choice = Choice(**settings)
    cfg = dataclasses.replace(base, ttt_mode="lora", ttt_lora_chunk_tokens=choice.chunk, eval_max_seconds=0.0)
    script.learn_documents = lambda *given: learn(choice, *given)
    script.walk_lora = lambda walk, model: walk_all(script, choice, walk, model)
    model = script.build_model(cfg, weights, process)
    return script.test_time_train(cfg, process, Quiet(), model, stream)[0].result()


def run(options):
    script = load(options.script)
    header, stored = script.unpack(Path(options.artifact).read_bytes(), options.artifact)
    names = {f.name for f in script.VARIABLES}
    base = script.Config(**{k: v for k, v in header["config"].items() if k in names})
    process, weights = script.Process("auto"), {name: s.tensor() for name, s in stored.items()}
    if not os.environ.get("DATA_PATH"):
        sys.exit("error: DATA_PATH is not set; give the folder of the shards and their tokenizer.model")
    data = Path(os.environ["DATA_PATH"])
    tokenizer = script.Tokenizer(data / "tokenizer.model", base.vocab_size)
    tokens = script.Tokens(data, "val", base.vocab_size)
    stream = script.open_stream(tokens, tokenizer, options.targets, process.device)
    choices = {"sliding windows": None} | CHOICES
    if unknown := set(options.only or ()) - set(choices):
        sys.exit(f"error: {', '.join(sorted(unknown))}: no such choice; the names are those of CHOICES in this script")
    for name, settings in choices.items():
        done = read(options.out)
        if name in done or (options.only and name not in options.only):
            continue
        began = time.process_time()
        score = run_choice(script, settings, base, weights, process, stream)
        assert not score.faults, score.faults
        row = {"choice": name, "targets": score.tokens, "bytes": score.bytes, "bpb": f"{score.val_bpb:.6f}",
               "seconds": f"{time.process_time() - began:.1f}"}
        with open(options.out, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not done:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)


def read(path: str) -> dict[str, dict]:
    if not Path(path).exists():
        return {}
    with open(path, newline="") as file:
        return {row["choice"]: row for row in csv.DictReader(file)}


def table(options):
    """Gain over sliding windows, and seconds as a multiple of "before", for each file."""
    found = {Path(path).stem: read(path) for path in options.files}
    print("| choice | " + " | ".join(f"{name}: BPB | gain | seconds" for name in found) + " |")
    print("|---|" + "---|---|---|" * len(found))
    for name in ["sliding windows", *CHOICES]:
        cells = []
        for rows in found.values():
            if row := rows.get(name):
                gain = float(rows["sliding windows"]["bpb"]) - float(row["bpb"])
                cells += [f"{float(row['bpb']):.4f}", f"{gain:.4f}", f"{float(row['seconds']):.0f}"]
            else:
                cells += ["", "", ""]
        if any(cells):
            print(f"| {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("run")
    one.add_argument("script")
    one.add_argument("artifact")
    one.add_argument("--targets", type=int, default=262144)
    one.add_argument("--out", required=True)
    one.add_argument("--only", nargs="*", metavar="CHOICE")
    one.set_defaults(do=run)
    two = kinds.add_parser("table")
    two.add_argument("files", nargs="+")
    two.set_defaults(do=table)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
