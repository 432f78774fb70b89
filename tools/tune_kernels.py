"""Try the tiles that the kernels' CANDIDATES list, on a GPU, and print them from the quickest to the slowest.

Usage: python -m tools.tune_kernels [matmul|grouped_matmul|attention]

What is best goes into the kernels' choose_tile by hand, together with a build that compiles it for every GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm

from minilib.format import si
from minilib.kernels import flash_attention, flash_attention_forward, grouped_matmul, matmul
from minilib.measure import measure
from tools.kernel_jobs import Sizes, shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", choices=OPS, help="one of them; all if left out")
    op = parser.parse_args().op
    if not torch.cuda.is_available():
        parser.error("tiles are tried on a GPU, and torch sees none")
    for name in [op] if op else OPS:
        print(name)
        for seconds, flops_per_second, tile in tune(*OPS[name](Sizes())):
            print(f"  {si(seconds, 's')}  {flops_per_second / 1e12:6.1f} TFLOP/s  {tile}")
    return 0


def tune(
    call: Callable[[dict], object], candidates: Iterable[dict], flops: float, budget: float = 0.3
) -> list[tuple[float, float, dict]]:
    """(seconds, FLOP/s, tile) of each candidate that runs, the quickest first; one that does not fit is left out."""
    found = []
    for tile in tqdm(list(candidates), leave=False):
        try:
            seconds = measure(lambda tile=tile: call(tile), budget=budget).seconds
        except Exception as error:  # too much shared memory, or whatever else a compiler raises
            tqdm.write(f"  {tile}: {type(error).__name__}")
            continue
        found.append((seconds, flops / seconds, tile))
    return sorted(found, key=lambda row: row[0])


def _matmul(sizes: Sizes) -> tuple[Callable[[dict], object], list[dict], float]:
    n = sizes.product
    a, b = sizes.random(n, n), sizes.random(n, n, seed=1)
    return lambda tile: matmul.matmul(a, b, tile=tile), matmul.CANDIDATES, matmul.cost(n, n, n).flops


def _grouped_matmul(sizes: Sizes) -> tuple[Callable[[dict], object], list[dict], float]:
    rows, hidden = shares(sizes.rows, sizes.experts[0], even=False), sizes.hidden
    x, weight = sizes.random(sizes.rows, hidden), sizes.random(len(rows), hidden, hidden, seed=1)
    ends = torch.tensor(rows, device=sizes.device).cumsum(0).int()
    flops = grouped_matmul.cost(rows, hidden, hidden).flops
    return lambda tile: grouped_matmul.grouped_matmul(x, weight, ends, tile=tile), grouped_matmul.CANDIDATES, flops


def _attention(sizes: Sizes) -> tuple[Callable[[dict], object], list[dict], float]:
    (batch, tokens), heads, head_dim = sizes.attention[-1], sizes.heads[0][0], sizes.head_dim
    q, k, v = (sizes.random(batch, tokens, heads, head_dim, seed=seed) for seed in range(3))
    problem = flash_attention.Problem(
        batch, heads, heads, head_dim, tokens, tokens, tokens, tokens, causal=True, scale=head_dim**-0.5, varlen=False
    )
    flops = flash_attention.cost(batch, heads, heads, tokens, tokens, head_dim).flops
    return (
        lambda tile: flash_attention_forward.attend(problem, q, k, v, None, None, tile),
        flash_attention_forward.CANDIDATES,
        flops,
    )


OPS = {"matmul": _matmul, "grouped_matmul": _grouped_matmul, "attention": _attention}

if __name__ == "__main__":
    sys.exit(main())
