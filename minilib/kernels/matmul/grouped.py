"""Grouped matrix product: rows sorted by group, each group times a matrix of its own, in one launch.

A mixture of experts needs it: how many tokens an expert gets is known on the device alone, and differs at every step. A
persistent grid walks the tiles of all groups. A program finds the group of a tile in the running number of tiles, which
it derives from the offsets itself, so that nothing waits for the GPU, and no group is padded to the length of another.

Sources: Gale, Narayanan, Young and Zaharia 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", for
the product without padding and its three passes; Triton's tutorial 08, "Group GEMM", for the persistent grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from minilib.kernels.matmul import dense
from minilib.kernels.matmul import grouped_torch as in_torch
from minilib.kernels.matmul.tiles import fit_to_version, multiply_tile, multiprocessors, tile_at, vectorises
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
from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

LAYOUTS = {  # which strides are 1; T: the operand is a transposed view, as weight is in dx, and x in dweight
    "NN": ("stride_xk", "stride_wn"), "NT": ("stride_xk", "stride_wk"), "TN": ("stride_xk", "stride_gn"),
}  # fmt: skip
MANY = 256  # groups of a build that shows what the search among so many takes
CANDIDATES = dense.CANDIDATES  # for python -m tools.tune_kernels; none spills on an H100, on an A100 five do


def reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_matmul` in plain torch, a product a group: the oracle, and what runs where there is no GPU.

    It computes in fp32, in fp64 for fp64 tensors, which only it takes, and waits for a GPU to see the offsets.
    Differentiable as often as you like; each product writes into its place in one result or gradient.
    """
    return _Product.apply(x, weight, offsets, in_torch.ends_of(offsets, len(x)), None)


def grouped_matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, interpret: bool = False, tile: dict[str, int] | None = None
) -> Tensor:
    """x_g weight[g] for the rows x_g of each group g, accumulated in fp32; fp32 products are fp32 ones, never TF32.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable as often as you like: dx is the same product with
    weight[g]ᵀ, which moves nothing, and dweight[g] = x_gᵀ dy_g is a second kernel, whose sum is as long as the group.
    Both are deterministic, no two programs write to one place. Autocast does not reach inside.

    Nothing here waits for the GPU, so that what offsets hold is checked on the CPU alone. On a GPU, offsets that
    descend or pass the end make wrong results, but no access outside of x, weight or the result.

    Args:
        x: (tokens, K) fp32, fp16 or bf16, of any strides: the rows of group 0, then those of group 1, and so on.
        weight: (groups, K, N), x's dtype, of any strides, such as `.mT` of (groups, N, K).
        offsets: (groups,) int32 on x's device: the row at which each group ends; it begins where the one before ends.
            A group may be empty. Rows from offsets[-1] on belong to nobody.
        interpret: run the kernel in Triton's interpreter, on the CPU.
        tile: what to use instead of `choose_tile`'s in all passes, such as one of CANDIDATES.

    Returns:
        (tokens, N), x's dtype, contiguous; 0 in rows that belong to nobody, whose gradient is 0, too, as is that of the
        weight of an empty group.

    Raises:
        TypeError: for another dtype, or two dtypes of x and weight.
        ValueError: for shapes that do not fit, two devices, or if the interpreter is not on; on the CPU also for
            offsets that descend or end after the last row.

    Cost: see `cost`, and `tile_traffic` for what the tiles load. Source: see above.
    """
    check_floats("grouped_matmul", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}: flatten or transpose"
        raise ValueError(f"grouped_matmul wants x (tokens, K) and weight (groups, K, N), got {got}")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets must be a tensor of torch.int32, got {got}: convert it with .int()")
    if offsets.shape != weight.shape[:1] or offsets.device != x.device:
        got = f"shape {tuple(offsets.shape)} on {offsets.device}: one end for each group, without a leading 0"
        raise ValueError(f"offsets must have shape ({len(weight)},) on {x.device}, got {got}")
    if not runs_kernel(x, interpret):
        return reference(x, weight, offsets)
    if not x.is_cuda:
        in_torch.ends_of(offsets, len(x))
    return _Product.apply(x, weight, offsets.contiguous(), None, tile)


def cost(rows: Sequence[int], n: int, k: int, dtype: str = "bf16", backward: bool = False) -> Cost:
    """2 n k FLOPs a row of any group; rows are read once and written once, weights of groups that have some read once.

    Backward: both gradients, twice the FLOPs; dx reads dy and those weights, dweight reads x and dy and is written for
    every group. `rows` are those of each group; rows that belong to nobody are not counted, nor are offsets.
    """
    size, total, used = BYTES[dtype], sum(rows), sum(count > 0 for count in rows)
    moved = total * (k + n) + used * k * n
    if backward:
        moved += total * (k + n) + len(rows) * k * n
    return Cost(flops=(2 + 2 * backward) * total * n * k, bytes=size * moved, calls=1 + backward, dtype=dtype)


def tile_traffic(rows: Sequence[int], n: int, k: int, BLOCK_M: int, BLOCK_N: int, dtype: str = "bf16") -> int:
    """Bytes of x and weight that all tiles load: for each group what the tiles of a product of its size load.

    For dweight a group is a product of (k, rows) and (rows, n): `dense.tile_traffic(k, n, rows, …)`, summed.
    """
    return sum(dense.tile_traffic(count, n, k, BLOCK_M, BLOCK_N, dtype) for count in rows)


class _Product(torch.autograd.Function):
    """out_g = x_g weight[g]; by the kernel if there are no `ends`, else in plain torch, which knows them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor, ends: list[int] | None, tile: dict | None) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.ends, ctx.tile = ends, tile
        return _multiply(x, weight, offsets, tile) if ends is None else in_torch.multiply(x, weight, ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, offsets), dx, dweight = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = _Product.apply(grad, weight.mT, offsets, ctx.ends, ctx.tile)
        if ctx.needs_input_grad[1] and weight.mT.is_contiguous():  # laid out as weight is, else somebody copies it
            dweight = _WeightGradient.apply(grad, x, offsets, ctx.ends, ctx.tile).mT
        elif ctx.needs_input_grad[1]:
            dweight = _WeightGradient.apply(x, grad, offsets, ctx.ends, ctx.tile)
        return dx, dweight, None, None, None


class _WeightGradient(torch.autograd.Function):
    """out[g] = x_gᵀ grad_g, contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor, offsets: Tensor, ends: list[int] | None, tile: dict | None) -> Tensor:
        ctx.save_for_backward(x, grad, offsets)
        ctx.ends, ctx.tile = ends, tile
        return _reduce(x, grad, offsets, tile) if ends is None else in_torch.reduce(x, grad, ends)

    @staticmethod
    def backward(ctx, second: Tensor) -> tuple[Tensor | None, ...]:
        x, grad, offsets = ctx.saved_tensors
        dx = _Product.apply(grad, second.mT, offsets, ctx.ends, ctx.tile) if ctx.needs_input_grad[0] else None
        dgrad = _Product.apply(x, second, offsets, ctx.ends, ctx.tile) if ctx.needs_input_grad[1] else None
        return dx, dgrad, None, None, None


@jit
def rows_of(offsets_ptr, group, groups, tokens):
    """First row and number of rows of a group, or of each of several; what belongs to nobody is one more group.

    Whatever the offsets say, rows are rows of x, and of the groups from 0 to `groups` each row is in one at least.
    """
    begin = tl.load(offsets_ptr + group - 1, mask=(group > 0) & (group <= groups), other=0)
    end = tl.load(offsets_ptr + group, mask=group < groups, other=tokens)
    begin, end = tl.minimum(tl.maximum(begin, 0), tokens), tl.minimum(tl.maximum(end, 0), tokens)
    return begin, tl.where(group <= groups, tl.maximum(end - begin, 0), 0)


@jit
def product(
    x_ptr, weight_ptr, offsets_ptr, out_ptr, groups, tokens, n, k, stride_xm, stride_xk, stride_wg, stride_wk,
    stride_wn, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of x_g weight[g], group after group; GROUPS is a power of two above `groups`."""
    _, counts = rows_of(offsets_ptr, tl.arange(0, GROUPS), groups, tokens)
    tiles = tl.cdiv(counts, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    ends = tl.cumsum(tiles, 0)  # the number at which each group's tiles end
    for number in tl.range(tl.program_id(0), tl.sum(tiles), tl.num_programs(0), disable_licm=True):
        group = tl.sum((ends <= number).to(tl.int32))
        begin, rows = rows_of(offsets_ptr, group, groups, tokens)
        within = number - tl.max(tl.where(ends <= number, ends, 0))
        tile_row, tile_column = tile_at(within, rows, n, BLOCK_M, BLOCK_N, GROUP_M)
        begin = begin.to(tl.int64)
        # Rows that belong to nobody are a product with no steps: zeros.
        multiply_tile(
            x_ptr + begin * stride_xm, weight_ptr + group.to(tl.int64) * stride_wg, out_ptr + begin * n,
            rows, n, tl.where(group < groups, k, 0), stride_xm, stride_xk, stride_wk, stride_wn, tile_row, tile_column,
            BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip


@jit
def weight_gradient(
    x_ptr, grad_ptr, offsets_ptr, out_ptr, groups, tokens, n, k, stride_xm, stride_xk, stride_gm, stride_gn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of x_gᵀ grad_g: (k, n) for each group, summed over its rows; of no rows, zeros."""
    tiles = tl.cdiv(k, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for number in tl.range(tl.program_id(0), groups * tiles, tl.num_programs(0), disable_licm=True):
        group = number // tiles
        begin, rows = rows_of(offsets_ptr, group, groups, tokens)
        tile_row, tile_column = tile_at(number % tiles, k, n, BLOCK_M, BLOCK_N, GROUP_M)
        begin = begin.to(tl.int64)
        multiply_tile(
            x_ptr + begin * stride_xm, grad_ptr + begin * stride_gm, out_ptr + group.to(tl.int64) * k * n,
            k, n, rows, stride_xk, stride_xm, stride_gm, stride_gn, tile_row, tile_column,
            BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip


def choose_tile(
    m: int, n: int, groups: int, dtype: torch.dtype, aligned: bool = True, multiprocessors: int = 132,
    target: str = "sm_80",
) -> dict[str, int]:  # fmt: skip
    """`dense.choose_tile` for products of m × n, one a group on average, each on its share of the multiprocessors.

    m is the mean number of rows, tokens over groups. How many each group has, the GPU alone knows, and a launch that
    waited for it would leave the GPU idle, so one launch has one tile: a hot group's is no larger than a cold one's. A
    second, larger tile in the same kernel would be a second loop of products, and give every thread its registers. What
    a hot group loses is bounded: its many tiles are walked in `tile_at`'s order, so that what a small tile reads more
    (see `tile_traffic`) comes from L2 rather than from memory. A `tile` of the caller's own is the way out.
    """
    share = ceil_div(multiprocessors, max(1, groups))
    return fit_to_version(dense.choose_tile(m, n, dtype, aligned, share, target), "persistent")


def lanes(groups: int) -> int:
    """GROUPS for so many: a power of two, at least 32, with room for the rows that belong to nobody."""
    return max(32, next_power_of_two(groups + 1))


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: both kernels in each dtype, in dx's layout, at odd sizes, for many groups.

    Every: all tiles of groups of a few rows to thousands, with weights of 64 rows and columns and more.
    """
    half = torch.bfloat16
    large = {dtype: choose_tile(8192, 8192, 8, dtype, target=target) for dtype in DTYPES}
    odd = choose_tile(8192, 8192, 8, half, aligned=False, target=target)
    if not every:
        return [
            *(_build(kernel, dtype, large[dtype]) for dtype in DTYPES for kernel in (product, weight_gradient)),
            _build(product, half, large[half], "NT"),
            _build(product, half, large[half], groups=MANY),
            _build(product, half, odd, "NT", aligned=False),
            _build(weight_gradient, half, odd, aligned=False),
        ]
    found, sizes = [_build(product, dtype, large[dtype], groups=MANY) for dtype in DTYPES], [64 << i for i in range(8)]
    for dtype, aligned in itertools.product(DTYPES, (True, False)):
        shapes = itertools.product([16, 32, *sizes], sizes, (1, 8, 64, 128))
        for tile in sorted({tuple(choose_tile(*shape, dtype, aligned, target=target).items()) for shape in shapes}):
            found += [_build(product, dtype, dict(tile), layout, aligned) for layout in ("NN", "NT")]
            if dict(tile)["BLOCK_M"] >= sizes[0]:
                found.append(_build(weight_gradient, dtype, dict(tile), "TN", aligned))
    return found


def _build(kernel, dtype: torch.dtype, tile: dict, layout: str = "", aligned: bool = True, groups: int = 8) -> Build:
    layout = layout or ("NN" if kernel is product else "TN")
    words = ["product" if kernel is product else "weight gradient", DTYPES[dtype], layout]
    words += [f"{groups} groups", *["odd sizes"] * (not aligned)]
    words += [" × ".join(str(tile[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))]
    strides = [name for name in kernel.arg_names if name.startswith("stride")]
    types = dict.fromkeys(("x_ptr", "weight_ptr", "grad_ptr", "out_ptr"), f"*{DTYPES[dtype]}") | {"offsets_ptr": "*i32"}
    types |= dict.fromkeys(("groups", "tokens", "n", "k", *strides), "i32")
    constants = {"UPCAST": False} | ({"GROUPS": lanes(groups)} if kernel is product else {})
    return Build.of(
        kernel,
        ", ".join(words),
        types,
        tile | constants | dict.fromkeys(LAYOUTS[layout], 1),
        dots=0 if dtype == torch.float32 else 1,
        unaligned=() if aligned else tuple(strides),
        aligned=("n", "k") if aligned else (),
    )


def _multiply(x: Tensor, weight: Tensor, offsets: Tensor, tile: dict[str, int] | None) -> Tensor:
    (tokens, k), (groups, _, n) = x.shape, weight.shape
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not out.numel() or not weight.numel():
        return out.zero_()
    programs = multiprocessors(x)
    if tile is None:
        aligned = vectorises(x) and vectorises(weight[0]) and not weight.stride(0) % 16
        tile = choose_tile(ceil_div(tokens, groups), n, groups, x.dtype, aligned, programs, target_of(x))
    # Every group but one may end in a tile that is not full, and so may the rows that belong to nobody.
    most = (ceil_div(tokens, tile["BLOCK_M"]) + groups) * ceil_div(n, tile["BLOCK_N"])
    launch(
        product, min(programs, most), x, weight, offsets, out, groups, tokens, n, k, *x.stride(), *weight.stride(),
        GROUPS=lanes(groups), UPCAST=upcasts(x.dtype), **fit_to_version(tile, "persistent"),
    )  # fmt: skip
    return out


def _reduce(x: Tensor, grad: Tensor, offsets: Tensor, tile: dict[str, int] | None) -> Tensor:
    (tokens, k), n, groups = x.shape, grad.shape[1], len(offsets)
    out = torch.empty((groups, k, n), dtype=x.dtype, device=x.device)
    if not out.numel() or not tokens:
        return out.zero_()
    programs = multiprocessors(x)
    if tile is None:
        aligned = vectorises(x) and vectorises(grad)
        tile = choose_tile(k, n, groups, x.dtype, aligned, programs, target_of(x))
    tiles = groups * ceil_div(k, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"])
    launch(
        weight_gradient, min(programs, tiles), x, grad, offsets, out, groups, tokens, n, k, *x.stride(), *grad.stride(),
        UPCAST=upcasts(x.dtype), **fit_to_version(tile, "persistent"),
    )  # fmt: skip
    return out
