#!/usr/bin/env bash
# Triton's interpreter multiplies the bit patterns of bf16 values in tl.dot: the identity times a matrix of twos is
# not a matrix of twos, as it is in fp16. It is 266338304 = 16256 * 16384, and 0x3F80 = 16256 is 1.0 in bf16, 0x4000
# = 16384 is 2.0. Way round it: x.to(tl.float32) before tl.dot.
. "$(dirname "$0")/environment.sh" torch==2.13.0 triton==3.7.1 numpy==2.4.6

observe <<'EOF'
import os
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
import torch
import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


print("triton", version("triton"))
for dtype in (torch.float16, torch.bfloat16):
    eye, x = torch.eye(16, dtype=dtype), torch.full((16, 16), 2.0, dtype=dtype)
    found = torch.zeros(16, 16)
    product[(1,)](eye, x, found, SIZE=16)
    print(dtype, "eye @ 2 =", found.unique().tolist())
EOF
expect <<'EOF'
triton 3.7.1
torch.float16 eye @ 2 = [2.0]
torch.bfloat16 eye @ 2 = [266338304.0]
EOF
