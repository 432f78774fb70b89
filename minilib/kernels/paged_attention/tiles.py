"""Paged attention's default tiles, and the cases that are compiled ahead of time with them."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from minilib.kernels.workbench.dispatch import DTYPES
from minilib.mechanisms.basics.arithmetic import next_power_of_two

HEAD_DIMS = (16, 32, 64, 128, 256)
GROUPS = (1, 4, 7, 8, 16, 32, 64, 128)  # query heads to a kv head: what models have, and all heads to one
MAX_SPLITS = 64  # that share the keys of one tile: `merge` holds (splits, head_dim) in registers
SPLIT_KEYS = (256, 1024)  # fewer cost more in partial results than another program brings; more leave programs unequal
PARTIAL_BYTES = 64 * 2**20  # that all partial results take
PROGRAMS_PER_SM = 4  # short tiles at a time: what the shared memory of an H200 holds of their 54 KiB each


class PagedCase(NamedTuple):
    """What one compiled kernel is for: 1 query token a sequence or many, sharing the keys out or not, and sizes."""

    q_len: int
    split: bool
    head_dim: int
    dtype: torch.dtype
    group: int


def max_group(head_dim: int, dtype: torch.dtype) -> int:
    """Query heads to a kv head at most: rows of the tallest tile whose accumulator still fits the registers."""
    return 128 if head_dim * min(dtype.itemsize, 4) <= 256 else 64


def takes_short_tile(dtype: torch.dtype, group: int, q_len: int) -> bool:
    """True if sequences of about `q_len` queries are worked on in tiles as short as can be, as for decode."""
    return q_len * group <= _short_rows(group) or dtype == torch.float32  # in full precision a tall tile would spill


def choose_split(capacity: int, tiles: int, processors: int, short: bool, partial_bytes: int) -> int:
    """Keys that a program takes of a sequence, the same for all, so that a long one has more programs than a short one.

    Args:
        capacity: keys that a row of the block table has room for; lengths are not known here.
        tiles: programs of a launch without splits.
        processors: multiprocessors of the GPU.
        short: whether the tile is a short one. A tall one has partial results as large as its keys and values, and
            enough work as a rule: it is split to fill the GPU, no further.
        partial_bytes: size of one split's partial results.
    """
    # What fills the GPU, were all sequences as long as can be.
    fill = math.ceil(capacity / max(1, round(PROGRAMS_PER_SM * processors / tiles)))
    fewest, most = SPLIT_KEYS
    splits = max(1, min(MAX_SPLITS, PARTIAL_BYTES // max(1, partial_bytes)))
    return max(fewest, min(fill, most) if short else fill, math.ceil(capacity / splits))


def choose_tile(head_dim: int, dtype: torch.dtype, group: int, q_len: int, target: str = "sm_80") -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages and, if any, maxnreg of `attend` for sequences of about `q_len` queries.

    Short, for decode: what counts is bytes on their way. 8 KiB of K and of V a round with 4 stages are 48 KiB, and four
    such programs fit a multiprocessor: up to 192 KiB, where 4.8 TB/s × 1 µs is 36 KB on each of an H200's 132.
    Tall, for prefill: what counts is arithmetic per byte, so as many rows as leave the accumulator in registers.
    """
    short, full = _short_rows(group), dtype == torch.float32
    decode = takes_short_tile(dtype, group, q_len)
    block_m = short if decode else max(short, 128 if head_dim <= 128 else 64)
    stretch = 8192 if decode else 16384
    if full and short == 128:  # so many rows leave few registers for scores
        stretch = 4096
    elif (target == "sm_80" and head_dim >= 128) or (target == "gfx942" and head_dim == 128):
        stretch = 8192  # wgmma, which takes K and V from shared memory, is Hopper's
    block_n = min(64, max(16, stretch // (head_dim * dtype.itemsize)))
    # With 3 stages, not with 2, the next block is on its way while one is multiplied. gfx942 has 64 KiB of shared
    # memory where an A100 has 164: a deeper pipeline leaves room for one program.
    stages = 2 if full or target == "gfx942" else 4 if decode else 3
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_stages": stages}
    if not decode:  # without wgmma the operands lie in registers, too: more than the assembler allots by itself
        return tile | {"num_warps": 8} | ({"maxnreg": 255} if target == "sm_80" else {})
    warps = 4 if short < 128 and short * head_dim * dtype.itemsize <= 8192 else 8
    # Registers for PROGRAMS_PER_SM programs of 16 rows; taller tiles, and float32, need all that a thread may have.
    crowded = short == 16 and not full
    return tile | {"num_warps": warps, "maxnreg": 65536 // (128 * PROGRAMS_PER_SM) if crowded else 255}


def _short_rows(group: int) -> int:
    return max(16, next_power_of_two(group))  # tl.dot wants 16 rows


# All that is compiled ahead of time; in float32 decode and prefill are the same.
EVERY_CASE = tuple(
    PagedCase(q_len, split, head_dim, dtype, group)
    for q_len, split, head_dim, dtype, group in itertools.product((1, 512), (False, True), HEAD_DIMS, DTYPES, GROUPS)
    if group <= max_group(head_dim, dtype) and not (q_len == 1 and dtype == torch.float32)
)
# What every test run compiles of it.
CASES = (
    PagedCase(1, False, 128, torch.bfloat16, 4),
    PagedCase(1, True, 64, torch.float16, 8),
    PagedCase(512, False, 128, torch.bfloat16, 4),
    PagedCase(512, True, 256, torch.bfloat16, 4),
    PagedCase(512, False, 128, torch.float32, 4),
    # with other tiles these spilled
    PagedCase(1, False, 64, torch.bfloat16, 8),
    PagedCase(512, True, 128, torch.bfloat16, 4),
    PagedCase(512, False, 128, torch.float32, 1),
)
