"""Matrix product, four ways that compute the same: row by row, in tiles, in an order that reuses L2, persistently.

Source: Tillet, Kung and Cox 2019, "Triton"; its tutorials 03 and 09 for the grouped order and the persistent grid.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from minilib.kernels.matmul.tiles import (
    GROUP,
    choose_tile,
    fit_to_version,
    multiply_tile,
    multiprocessors,
    tile_at,
    vectorises,
)
from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import (
    DTYPES,
    check_floats,
    jit,
    launch,
    runs_kernel,
    target_of,
    triton,
    upcasts,
)
from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

VERSIONS = ("naive", "tiled", "grouped", "persistent")
LAYOUTS = {  # which strides are 1; T: the operand is a transposed view
    "NN": ("stride_ak", "stride_bn"), "NT": ("stride_ak", "stride_bk"), "TN": ("stride_am", "stride_bn"),
}  # fmt: skip
NAIVE_N, NAIVE_K = 64, 32
CANDIDATES = [  # for python -m tools.tune_kernels; none spills on an H100, on an A100 four do
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": GROUP, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
        (128, 128, 32, 4, 4), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4),
    )
]  # fmt: skip


def reference(a: Tensor, b: Tensor) -> Tensor:
    """`matmul` in plain torch, computed in fp32 (fp64 stays fp64): the oracle, and what runs where there is no GPU."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def matmul(
    a: Tensor, b: Tensor, version: str = "persistent", interpret: bool = False, tile: dict[str, int] | None = None
) -> Tensor:
    """A B, accumulated in fp32; fp32 products are fp32 ones, never TF32.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable: dA = dC Bᵀ and dB = Aᵀ dC are two more products,
    whose transposes are strides and move nothing.

    Args:
        a: (M, K) fp32, fp16 or bf16, of any strides.
        b: (K, N), a's dtype, of any strides.
        version: "naive": a program computes a piece of one row, without tensor cores. "tiled": a tile, tiles in row
            order. "grouped": tiles in an order that reuses what is in L2. "persistent": as many programs as the GPU
            has multiprocessors, each for many tiles.
        interpret: run the kernel in Triton's interpreter, on the CPU.
        tile: what to use instead of `choose_tile`'s, such as one of CANDIDATES; not for "naive".

    Returns:
        (M, N), a's dtype, contiguous.

    Raises:
        TypeError: for another dtype, or two dtypes.
        ValueError: for shapes that do not fit, two devices, an unknown version, or if the interpreter is not on.

    Cost: see `cost`, and `tile_traffic` for what the tiles load. Source: see above.
    """
    check_floats("matmul", a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul wants (M, K) @ (K, N), got {tuple(a.shape)} @ {tuple(b.shape)}: flatten or transpose")
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return _Matmul.apply(a, b, version, tile) if runs_kernel(a, interpret) else reference(a, b)


def cost(m: int, n: int, k: int, dtype: str = "bf16") -> Cost:
    """2 m n k FLOPs; A and B are read once, C is written once."""
    moved = BYTES[dtype] * (m * k + k * n + m * n)
    return Cost(flops=2 * m * n * k, bytes=moved, calls=1, dtype=dtype)


def tile_traffic(m: int, n: int, k: int, BLOCK_M: int, BLOCK_N: int, dtype: str = "bf16") -> int:
    """Bytes that all tiles load: A once for each column of tiles, B once for each row of them.

    L2 serves what neighbours load; only the rest comes from memory. For "naive", BLOCK_M is 1.
    """
    return BYTES[dtype] * (m * k * ceil_div(n, BLOCK_N) + k * n * ceil_div(m, BLOCK_M))


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, version: str, tile: dict[str, int] | None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.version, ctx.tile = version, tile
        return _multiply(a, b, version, tile)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors
        da = _multiply(grad, b.T, ctx.version, ctx.tile) if ctx.needs_input_grad[0] else None
        db = _multiply(a.T, grad, ctx.version, ctx.tile) if ctx.needs_input_grad[1] else None
        return da, db, None, None


@jit
def naive(
    a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N values of one row of C: B is read anew for every row of A, and no tensor core has work."""
    per_row = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    column = (tl.program_id(0) % per_row * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, k, BLOCK_K):
        at = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(a_ptr + row * stride_am + at * stride_ak, mask=at < k, other=0.0).to(tl.float32)
        there = (at < k)[:, None] & (column < n)[None, :]
        b = tl.load(b_ptr + at[:, None] * stride_bk + column[None, :] * stride_bn, mask=there, other=0.0)
        total += tl.sum(a[:, None] * b.to(tl.float32), 0)
    tl.store(out_ptr + row * n + column, total, mask=column < n)


@jit
def tiled(
    a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile a program; with GROUP_M = 1 in row order."""
    tile_row, tile_column = tile_at(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    multiply_tile(
        a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, tile_row, tile_column,
        BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
    )  # fmt: skip


@jit
def persistent(
    a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile: programs start once, and none waits for a wave of others to end."""
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    # What the compiler would move out of this loop would hold registers that the tile's own loop needs.
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        tile_row, tile_column = tile_at(number, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        multiply_tile(
            a_ptr, b_ptr, out_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, tile_row, tile_column,
            BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: the default of each dtype, the steps before it, and some of its hard cases.

    Every: all tiles of products of 64 rows and columns up to a vocabulary's, and of batches of 16 and 32 tokens.
    """
    half, whole = torch.bfloat16, torch.float32
    large = {dtype: choose_tile(8192, 8192, dtype, target=target) for dtype in DTYPES}
    odd = {dtype: choose_tile(8192, 8192, dtype, aligned=False, target=target) for dtype in DTYPES}
    if not every:
        return [
            *(_build("persistent", dtype, large[dtype]) for dtype in DTYPES),
            _build("persistent", half, large[half], "TN"),
            _build("persistent", half, odd[half], aligned=False),
            _build("tiled", half, large[half]),
            _build("naive", half),
            # with other tiles these spilled
            _build("tiled", half, choose_tile(1024, 1024, half, target=target)),
            _build("persistent", whole, large[whole], "NT"),
            _build("persistent", whole, odd[whole], "NT", aligned=False),
        ]
    found, sizes = [_build("naive", dtype) for dtype in DTYPES], [*(64 << i for i in range(8)), 28_672, 128_256]
    for dtype, aligned in itertools.product(DTYPES, (True, False)):
        shapes = itertools.product([16, 32, *sizes], sizes)
        tiles = {tuple(choose_tile(m, n, dtype, aligned, target=target).items()) for m, n in shapes}
        for tile, layout in itertools.product(sorted(tiles), LAYOUTS):
            found += [_build(version, dtype, dict(tile), layout, aligned) for version in ("tiled", "persistent")]
    return found


def _build(
    version: str, dtype: torch.dtype, tile: dict | None = None, layout: str = "NN", aligned: bool = True
) -> Build:
    tile = fit_to_version(tile, version) | {"UPCAST": False} if tile else {"BLOCK_N": NAIVE_N, "BLOCK_K": NAIVE_K}
    words = [version, DTYPES[dtype], layout, *["odd sizes"] * (not aligned)]
    words += [" × ".join(str(tile[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if key in tile)]
    strides = ("stride_am", "stride_ak", "stride_bk", "stride_bn")
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), f"*{DTYPES[dtype]}") | dict.fromkeys(("m", "n", "k"), "i32")
    return Build.of(
        {"naive": naive, "tiled": tiled, "persistent": persistent}[version],
        ", ".join(words),
        types | dict.fromkeys(strides, "i32"),
        tile | dict.fromkeys(LAYOUTS[layout], 1),
        dots=0 if dtype == torch.float32 or version == "naive" else 1,
        unaligned=() if aligned else strides,
        aligned=("m", "n", "k") if aligned else (),
    )


def _multiply(a: Tensor, b: Tensor, version: str, tile: dict[str, int] | None) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if not out.numel():
        return out
    arguments = (a, b, out, m, n, k, *a.stride(), *b.stride())
    if version == "naive":
        launch(naive, m * ceil_div(n, NAIVE_N), *arguments, BLOCK_N=NAIVE_N, BLOCK_K=NAIVE_K)
        return out
    programs = multiprocessors(a)
    aligned = vectorises(a) and vectorises(b)
    tile = tile or choose_tile(m, n, a.dtype, aligned, programs, target_of(a))
    tiles = ceil_div(m, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"])
    kernel = persistent if version == "persistent" else tiled
    programs = min(programs, tiles) if version == "persistent" else tiles
    launch(kernel, programs, *arguments, UPCAST=upcasts(a.dtype), **fit_to_version(tile, version))
    return out
