"""What matrix products share, dense and grouped: one tile of a product, the order of tiles, and how large they are."""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.kernels.workbench.dispatch import jit, triton
from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two

if triton:
    import triton.language as tl

GROUP = 8  # rows of tiles that are walked together: their A and one column of B stay in L2
INTERPRETED_PROGRAMS = 3  # of a persistent grid where no multiprocessors are to be counted


@jit
def tile_at(number, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of tiles of the `number`-th: GROUP_M rows of tiles are walked together, column by column."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = number // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    within = number % (GROUP_M * columns)
    return first + within % height, within // height


@jit
def multiply_tile(
    a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, tile_row, tile_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of C, from its rows of A and its columns of B."""
    # Addresses are 64-bit: a matrix may hold more than 2³¹ values, along either side. What all values of a tile share
    # is added to the pointer first: as a part of each address it would cost registers, of which there are none left.
    row, column, step = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptr += (tile_row * BLOCK_M).to(tl.int64) * stride_am
    b_ptr += (tile_column * BLOCK_N).to(tl.int64) * stride_bn
    a_at = a_ptr + row.to(tl.int64)[:, None] * stride_am + step[None, :] * stride_ak
    b_at = b_ptr + step[:, None] * stride_bk + column.to(tl.int64)[None, :] * stride_bn
    row, column = tile_row * BLOCK_M + row, tile_column * BLOCK_N + column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        there, begin64 = begin + tl.arange(0, BLOCK_K) < k, tl.cast(begin, tl.int64)
        a_mask, b_mask = (row < m)[:, None] & there[None, :], there[:, None] & (column < n)[None, :]
        a = tl.load(a_at + begin64 * stride_ak, mask=a_mask, other=0.0)
        b = tl.load(b_at + begin64 * stride_bk, mask=b_mask, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    out_at = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out_at, total, mask=(row < m)[:, None] & (column < n)[None, :])


def choose_tile(
    m: int, n: int, dtype: torch.dtype, aligned: bool = True, multiprocessors: int = 132, target: str = "sm_80"
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages and maxnreg for a product of this size.

    The larger the tile, the fewer bytes per FLOP; what bounds it is the accumulator, 128 registers a thread for
    128 × 256 and 8 warps, and the operands in flight, 24 KiB a stage of 32 columns. Hopper multiplies from shared
    memory, which leaves registers for stages of 64, and half as many rounds that wait for copies. gfx942 has 64 KiB of
    shared memory, fp32 no tensor cores on NVIDIA, and operands that are not `aligned` come value by value, each with an
    address of its own: smaller tiles. A product with fewer tiles than the GPU has multiprocessors is cut finer, down to
    64 × 64.
    """
    small = dtype == torch.float32 or not aligned
    block_m, block_n = (64, 64) if small else (128, 128 if target == "gfx942" else 256)
    block_m, block_n = (max(16, min(block, next_power_of_two(size))) for block, size in ((block_m, m), (block_n, n)))
    while max(block_m, block_n) > 64 and ceil_div(m, block_m) * ceil_div(n, block_n) < multiprocessors:
        block_m, block_n = (block_m, block_n // 2) if block_n >= block_m else (block_m // 2, block_n)
    deep = {"gfx942": (64, 2), "sm_80": (32, 4)}  # with a BLOCK_K of 64 an A100 spills
    block_k, stages = (16, 3) if small else deep.get(target, (64, 3))
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": GROUP}
    wide = block_m * block_n >= (64 * 64 if small else 128 * 64)
    tile |= {"num_warps": 8 if wide else 4, "num_stages": stages}
    # Left alone, NVIDIA's assembler aims at more programs at a time than there are registers for, and spills a few.
    # Two programs of 8 warps may have 128 each. That is too few without tensor cores, with an address a value, or for 4
    # warps that copy blocks of 64: as many registers leave room for two of those.
    ample = small or block_m * block_n > 128 * 128 or (not wide and block_k == 64 and target != "gfx942")
    return tile | {"maxnreg": 255 if ample else 128}


def fit_to_version(tile: dict[str, int], version: str) -> dict[str, int]:
    """The tile as one of VERSIONS launches it."""
    if version == "tiled":
        return tile | {"GROUP_M": 1}
    # A persistent program has a multiprocessor to itself: there is nobody to leave registers to.
    return tile | {"maxnreg": 255} if version == "persistent" else tile


def vectorises(x: Tensor) -> bool:
    """True if a program reads 16 bytes of this matrix at a time: rows or columns without gaps, all multiples of 16."""
    inner = 0 if x.stride(0) == 1 else 1
    multiples = (x.shape[inner], x.stride(1 - inner), x.data_ptr())
    return x.stride(inner) == 1 and not any(number % 16 for number in multiples)


def multiprocessors(x: Tensor) -> int:
    """How many the GPU has on which x lies: programs of a persistent grid."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else INTERPRETED_PROGRAMS
