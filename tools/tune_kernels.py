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

from minilib.kernels.flash_attention import attention, forward
from minilib.kernels.matmul import dense, grouped
from minilib.mechanisms.basics.format import si
from minilib.numbers.measure import measure
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
    return lambda tile: dense.matmul(a, b, tile=tile), dense.CANDIDATES, dense.cost(n, n, n).flops


def _grouped_matmul(sizes: Sizes) -> tuple[Callable[[dict], object], list[dict], float]:
    rows, hidden = shares(sizes.rows, sizes.experts[0], even=False), sizes.hidden
    x, weight = sizes.random(sizes.rows, hidden), sizes.random(len(rows), hidden, hidden, seed=1)
    ends = torch.tensor(rows, device=sizes.device).cumsum(0).int()
    flops = grouped.cost(rows, hidden, hidden).flops
    return lambda tile: grouped.grouped_matmul(x, weight, ends, tile=tile), grouped.CANDIDATES, flops


def _attention(sizes: Sizes) -> tuple[Callable[[dict], object], list[dict], float]:
    (batch, tokens), heads, head_dim = sizes.attention[-1], sizes.heads[0][0], sizes.head_dim
    q, k, v = (sizes.random(batch, tokens, heads, head_dim, seed=seed) for seed in range(3))
    problem = attention.Problem(
        batch, heads, heads, head_dim, tokens, tokens, tokens, tokens, causal=True, scale=head_dim**-0.5, varlen=False
    )
    flops = attention.cost(batch, heads, heads, tokens, tokens, head_dim).flops
    return (
        lambda tile: forward.attend(problem, q, k, v, None, None, tile),
        forward.CANDIDATES,
        flops,
    )


OPS = {"matmul": _matmul, "grouped_matmul": _grouped_matmul, "attention": _attention}

if __name__ == "__main__":
    sys.exit(main())
