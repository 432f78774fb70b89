"""The GPU's pointer chase without a GPU: followed by Triton's interpreter, and compiled ahead of time."""

import os
import platform
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

INTERPRETED = """
import torch
from minilib.numbers.probes.chase_kernel import walk
for lines, steps in [(2, 1), (3, 4), (100, 100), (257, 300)]:
    order = torch.randperm(lines)
    ring = torch.zeros(lines * 16, dtype=torch.int64)
    ring[order * 16] = torch.roll(order, -1) * 16
    at = 0
    for _ in range(steps):
        at = int(ring[at])
    last = torch.full((1,), -1, dtype=torch.int64)
    walk[(1,)](ring, last, steps)
    assert int(last) == at, (lines, steps, int(last), at)
"""


def test_the_interpreter_follows_the_chain_as_python_does():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=env, check=True, timeout=120)


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_it_compiles_with_no_gpu_there(backend, arch, warp):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minilib.numbers.probes.chase_kernel import walk

    source = ASTSource(walk, signature={"ring_ptr": "*i64", "last_ptr": "*i64", "steps": "i32"})
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options={"num_warps": 1})
    code = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    loads = re.findall(r"\bld\.global|\b(?:global|buffer|flat|s)_load_dwordx2", code)
    assert len(loads) >= 2  # the first one and the loop's: the chain is there, not optimised away
