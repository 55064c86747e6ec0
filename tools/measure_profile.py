"""Where a training step's time goes: a trace of torch.profiler, summed by kernel and by class."""

import collections
import json
import re
from pathlib import Path

DEVICE = {"kernel": "", "gpu_memcpy": "copies", "gpu_memset": "copies"}  # of a trace's categories
CLASSES = ["attention", "products", "fused", "optimizer", "other", "copies", "idle"]
TOP = 25
# The first that matches a kernel's name, or on a CPU an operator's.
NAMES = [("products", r"^triton_tem_|squared_relu_product"),  # our kernel does a product and what follows it
         ("fused", r"^triton_|CompiledFxGraph"),  # before attention: it may be in the name of what was fused around it
         ("attention", r"flash|fmha|sdpa|attention|cudnn_generated_fort_native|cudnn::fusion"),
         ("products", r"gemm|nvjet|cublas|cutlass|xmma|splitk|aten::(mm|bmm|addmm|baddbmm)_?$"),
         ("copies", r"^memcpy|^memset|aten::(copy_|fill_|zero_|clone|contiguous|cat)$")]
ATTENTION = [("FlashAttention-3", r"FlashAttn(Fwd|Bwd)Sm90|flash_attn_3|flash::FlashAttn"),
             ("cuDNN", r"cudnn"), ("flash", r"flash_(fwd|bwd)"), ("memory-efficient", r"fmha|efficient")]


def class_of(name: str, category: str) -> str:
    """The class of a piece of work outside the optimizers."""
    found = next((kind for kind, pattern in NAMES if re.search(pattern, name, re.I)), "other")
    return DEVICE.get(category) or found


def operators(events: list[dict]) -> list[dict]:
    """On a CPU the work is what each operator does itself, without the time of those that it calls."""
    threads = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(dict(event))
    for line in threads.values():
        line.sort(key=lambda event: (event["ts"], -event["dur"]))
        around = []  # the operators that have not ended
        for event in line:
            event["end"] = event["ts"] + event["dur"]
            while around and around[-1]["end"] <= event["ts"]:
                around.pop()
            if around:
                around[-1]["dur"] -= event["end"] - event["ts"]
            around.append(event)
    return [event for line in threads.values() for event in line]


def busy(work: list[dict]) -> tuple[float, float]:
    """Microseconds from the first to the last, and of these the ones in which something ran."""
    total, last = 0.0, -1.0
    for event in sorted(work, key=lambda event: event["ts"]):
        end = event.get("end", event["ts"] + event["dur"])
        total, last = total + max(end - max(event["ts"], last), 0.0), max(last, end)
    return last - min(event["ts"] for event in work), total


def summed(path: Path, steps: int) -> dict:
    """Milliseconds a step of each class, of which idle is the time without any work; the kernels by their time; and
    whose attention ran. On a GPU the work is kernels and copies, put down to the optimizers where these launched it."""
    events = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event.get("ph") == "X"]
    work = [event for event in events if event.get("cat") in DEVICE] or operators(events)
    if not work:
        raise ValueError("the profiler saw no work")
    launched = {event["args"]["correlation"]: event["ts"] for event in events if event.get("cat") in
                ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})}
    ranges = [(event["ts"], event["ts"] + event["dur"]) for event in events
              if event["name"] == "optimizers" and event.get("cat") == "user_annotation"]
    classes, kernels = dict.fromkeys(CLASSES, 0.0), collections.defaultdict(lambda: [0.0, 0])
    for event in work:
        asked = launched.get(event.get("args", {}).get("correlation"), event["ts"])
        inside = any(low <= asked <= high for low, high in ranges)
        kind = "optimizer" if inside else class_of(event["name"], event["cat"])
        classes[kind] += event["dur"] / 1000 / steps
        entry = kernels[kind, event["name"]]
        entry[0], entry[1] = entry[0] + event["dur"] / 1000 / steps, entry[1] + 1
    whole, used = busy(work)
    classes["idle"] = (whole - used) / 1000 / steps
    rows = [{"ms": ms, "calls": calls / steps, "class": kind, "name": name[:200]}
            for (kind, name), (ms, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])]
    names = " ".join(name for kind, name in kernels if kind == "attention")
    backend = next((who for who, pattern in ATTENTION if re.search(pattern, names)), None)
    device = any(event.get("cat") in DEVICE for event in work)
    return {"kernels_seen": device, "steps": steps, "ms_a_step": whole / 1000 / steps,
            "classes": classes, "attention": backend if device else None, "kernels": rows}


def regrouped(result: dict) -> dict:
    """The classes and the longest kernels of a profile that was summed by an earlier form of NAMES."""
    classes = dict.fromkeys(CLASSES, 0.0) | {"idle": result["classes"]["idle"]}
    for row in result["kernels"]:
        if row["class"] != "optimizer":
            row["class"] = class_of(row["name"], "")
        classes[row["class"]] += row["ms"]
    return {"classes_ms": classes, "kernels": result["kernels"][:TOP]}
