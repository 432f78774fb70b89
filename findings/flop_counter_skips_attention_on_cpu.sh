#!/usr/bin/env bash
# FlopCounterMode counts no FLOPs at all for scaled_dot_product_attention on a CPU, nor for a matrix times a vector,
# and says nothing about it. The same attention written as two products is counted. Utilisation from these counts is
# too low.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
from importlib.metadata import version

import torch
from torch.utils.flop_counter import FlopCounterMode


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


q, k, v = (torch.ones(1, 2, 64, 16) for _ in range(3))
matrix, vector = torch.ones(64, 16), torch.ones(16)
print("torch", version("torch").partition("+")[0])
print("attention as two products:", count(lambda: (q @ k.mT).softmax(-1) @ v))
print("attention as one function:", count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)))
print("matrix times column:", count(lambda: matrix @ vector[:, None]))
print("matrix times vector:", count(lambda: matrix @ vector))
EOF
expect <<'EOF'
torch 2.13.0
attention as two products: 524288
attention as one function: 0
matrix times column: 2048
matrix times vector: 0
EOF
