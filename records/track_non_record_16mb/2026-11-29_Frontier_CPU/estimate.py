"""What PRESET=frontier would do on eight H100: an estimate on paper, each part of it shown. Nothing of it was measured.

    python records/track_non_record_16mb/2026-11-29_Frontier_CPU/estimate.py

A training step: what tools/step_cost.py counts, before the loops (counts_before.json) and with them
(counts_looped.json), at the rates that one H100 reached on the published model (counts_measured.json counts the script
that it ran). BPB: a published entry of nearly the same model, and published or measured differences to it, added up.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPU = HERE.parents[1] / "gpu" / "2026-11-28_NVIDIA_H100_80GB_HBM3_second" / "measure.json"
RANKS, LINK, SECONDS, TOKENS = 8, 450e9, 584.08, 786432
MATRICES, PARAMETERS = 31_719_424, 35_944_536  # of Muon, and all
CODE = 223_102  # bytes of the script of commit d60ff82
# (difference in BPB: the least gain, the likely one, the most; what it is, and who says so)
BASE = 1.0827, "PR 1493, three seeds, in sliding windows without test-time training; 4,550 steps"
CHANGES = [
    (0.0, -0.0007, -0.0007, "slope 0.3 in place of 0.5: PR 1948, five runs of one seed, after test-time training"),
    (0.0, -0.0005, -0.0010, "rates that end at a tenth, over 85%: PR 1787's four changes together, 0.0017; PR 1855"),
    (+0.0002, +0.0002, 0.0, "QK gain 5 in place of 5.25: PR 1953, one run"),
    (+0.0005, -0.0010, -0.0025, "other steps in the time (below): PR 1530 gives 0.0008 for 215 steps"),
    (-0.0030, -0.0070, -0.0100, "rounding: PR 1493 loses 0.012; ours lost a fifth as much on a small model"),
    (0.0, -0.0030, -0.0060, "test-time training over sliding windows: 0.003 PR 1530 (0.008 nats), 0.004 PR 1354"),
]


def read(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def total(counts: dict, group: str, what: str) -> float:
    return sum(counts[stage][group][what] for stage in ("forward", "backward"))


def main():
    step = json.loads(GPU.read_text(encoding="utf-8"))["stages"]["step"]["figures"]
    classes, before = step["classes_ms"], read("counts_measured.json")
    fused = total(before, "fused", "bytes") / classes["fused"]
    products = total(before, "products", "operations") / classes["products"]
    attention = classes["attention"] / total(before, "attention", "operations")
    rest = classes["other"] + classes["copies"] + classes["idle"]
    print(f"rates on one H100: fused kernels {fused / 1e9:.2f} TB/s, products {products / 1e9:.0f} TFLOP/s, attention "
          f"{1e-9 / attention:.0f} TFLOP/s with its mask, all else {rest:.2f} ms for 11 layers")
    others = PARAMETERS - MATRICES
    exchange = 1000 * (RANKS - 1) / RANKS * (4 * MATRICES + 8 * others + 2 * MATRICES) / LINK
    optimizer = classes["optimizer"] * MATRICES / step["muon_parameters"]
    steps = {}
    for name, layers in (("before", 11), ("looped", 17)):
        counts = read(f"counts_{name}.json")
        parts = {"fused": total(counts, "fused", "bytes") / fused,
                 "products": total(counts, "products", "operations") / products,
                 "attention": total(counts, "attention", "operations") * attention, "optimizer": optimizer,
                 "else": rest * layers / 11, "exchange": exchange}
        steps[name] = sum(parts.values())
        shown = " + ".join(f"{part} {ms:.1f}" for part, ms in parts.items())
        print(f"a step {name}: {shown} = {steps[name]:.1f} ms; kept {counts['kept_bytes'] / 1e9:.1f} GB")
    n = 1000 * SECONDS * (0.35 / steps["before"] + 0.65 / steps["looped"])
    print(f"{SECONDS:.2f} s, 35% of them before the loops: {n:,.0f} steps, {n * TOKENS / 1e9:.2f} G tokens, "
          f"{1000 * SECONDS / n:.1f} ms each")
    print("published: 95 and 141 ms, 4,931 steps in 600 s (PR 1855); 4,550 in 588 s (PR 1493), both with "
          "FlashAttention-3")
    bits = 8 * (16e6 - CODE) / PARAMETERS
    print(f"bytes: (16,000,000 - {CODE:,}) x 8 / {PARAMETERS:,} = {bits:.2f} bits a parameter")
    value, source = BASE
    print(f"BPB: {value:.4f}, {source}")
    for least, likely, most, text in CHANGES:
        print(f"  {likely:+.4f} ({least:+.4f} to {most:+.4f}): {text}")
    least, likely, most = (value + sum(change[i] for change in CHANGES) for i in range(3))
    spread = math.sqrt(sum((change[0] - change[2]) ** 2 for change in CHANGES)) / 2
    print(f"estimate: {likely:.4f}; {most:.4f} to {least:.4f} if all is as good or as bad as said, about "
          f"+-{spread:.4f} if that is independent")
    for bpb, name in ((1.0565, "PR 2135"), (1.0611, "PR 1855"), (1.0810, "PR 1493")):
        print(f"  {likely - bpb:+.4f} to {name}, {bpb:.4f}")


if __name__ == "__main__":
    main()
