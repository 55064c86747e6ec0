"""Compile the MLP's kernel for an sm_90 GPU, without one, and print what it takes. From the project's folder:

    python records/track_non_record_16mb/2026-11-28_StepBytes_CPU/compile_kernel.py     # needs triton
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, os.getcwd())
import train_gpt as t  # noqa: E402

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
kernel = t.squared_relu_product
for slope in (0.0, 0.5):
    for backward in (False, True):
        constants = {"slope": slope, "backward": backward, "rows": t.TILE, "cols": t.TILE, "depth": 64, "group": 8}
        constants["b_step_n" if backward else "b_step_k"] = 1  # as at a launch, where b lies by rows or by columns
        signature = {name: "constexpr" if name in constants else "*bf16" if name.endswith("ptr") else "i32"
                     for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            command = [tools / "cuobjdump", "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        print(f"slope {slope}, {'backward' if backward else 'forward'}: {done.metadata.shared} bytes of shared memory, "
              f"{found}, wgmma {len(re.findall('wgmma.mma_async', done.asm['ptx']))}, "
              f"asynchronous copies {len(re.findall(r'cp.async', done.asm['ptx']))}")
