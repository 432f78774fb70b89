"""Paged attention's default tiles, and the cases that are compiled ahead of time with them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from minilib.kernels.workbench.dispatch import DTYPES

HEAD_DIMS = (16, 32, 64, 128, 256)
GROUPS = (1, 4, 7, 8, 16, 32, 64, 128)  # query heads to a kv head: what models have, and all heads to one
PROGRAMS_PER_SM = 4  # short tiles at a time: what the shared memory of an H200 holds of their 54 KiB each


class Case(NamedTuple):
    """What one compiled kernel is for: 1 query token a sequence or many, sharing the keys out or not, and sizes."""

    q_len: int
    split: bool
    head_dim: int
    dtype: torch.dtype
    group: int


def max_group(head_dim: int, dtype: torch.dtype) -> int:
    """Query heads to a kv head at most: rows of the tallest tile whose accumulator still fits the registers."""
    return 128 if head_dim * min(dtype.itemsize, 4) <= 256 else 64


def choose_tile(head_dim: int, dtype: torch.dtype, group: int, q_len: int, target: str = "sm_80") -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages and, if any, maxnreg of `attend` for sequences of about `q_len` queries.

    Short, for decode: what counts is bytes on their way. 8 KiB of K and of V a round with 4 stages are 48 KiB, and four
    such programs fit a multiprocessor: up to 192 KiB, where 4.8 TB/s × 1 µs is 36 KB on each of an H200's 132.
    Tall, for prefill: what counts is arithmetic per byte, so as many rows as leave the accumulator in registers.
    """
    short = max(16, 1 << (group - 1).bit_length())  # tl.dot wants 16 rows
    full = dtype == torch.float32  # no tensor cores multiply in full precision: a tall tile would spill
    decode = q_len * group <= short or full
    block_m = short if decode else max(short, 128 if head_dim <= 128 else 64)
    stretch = 8192 if decode else 16384
    if full and short == 128:  # so many rows leave few registers for scores
        stretch = 4096
    elif target == "sm_80" and head_dim == 128:  # and wgmma, which takes K and V from shared memory, is Hopper's
        stretch = 8192
    block_n = min(64, max(16, stretch // (head_dim * dtype.itemsize)))
    # gfx942 has 64 KiB of shared memory where an A100 has 164: a deeper pipeline leaves room for one program.
    stages = 4 if decode and not full and target != "gfx942" else 2
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_stages": stages}
    if not decode:  # without wgmma the operands lie in registers, too: more than the assembler allots by itself
        return tile | {"num_warps": 8} | ({"maxnreg": 255} if target == "sm_80" else {})
    warps = 4 if short < 128 and short * head_dim * dtype.itemsize <= 8192 else 8
    # Registers for PROGRAMS_PER_SM programs of 16 rows; taller tiles, and float32, need all that a thread may have.
    crowded = short == 16 and not full
    return tile | {"num_warps": warps, "maxnreg": 65536 // (128 * PROGRAMS_PER_SM) if crowded else 255}


# All that is compiled ahead of time; in float32 decode and prefill are the same.
EVERY_CASE = tuple(
    Case(q_len, split, head_dim, dtype, group)
    for q_len, split, head_dim, dtype, group in itertools.product((1, 512), (False, True), HEAD_DIMS, DTYPES, GROUPS)
    if group <= max_group(head_dim, dtype) and not (q_len == 1 and dtype == torch.float32)
)
# What every test run compiles of it.
CASES = (
    Case(1, False, 128, torch.bfloat16, 4),
    Case(1, True, 64, torch.float16, 8),
    Case(512, False, 128, torch.bfloat16, 4),
    Case(512, True, 256, torch.bfloat16, 4),
    Case(512, False, 128, torch.float32, 4),
    # with other tiles these spilled
    Case(1, False, 64, torch.bfloat16, 8),
    Case(512, True, 128, torch.bfloat16, 4),
    Case(512, False, 128, torch.float32, 1),
)
