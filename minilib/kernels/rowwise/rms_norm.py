"""RMSNorm over the last dimension, forward and backward, with the addition to the residual stream before it fused in.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilib.kernels.workbench.compiled import Build
from minilib.kernels.workbench.dispatch import (
    DTYPES,
    as_heads,
    as_rows,
    check_floats,
    head_offsets,
    jit,
    launch,
    runs_kernel,
    triton,
)
from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two
from minilib.numbers.price import BYTES, Cost

if triton:
    import triton.language as tl

ONE_PASS = 16384  # widest row that a program keeps in registers; wider ones are read twice, block by block
ONE_PASS_BACKWARD = 32768  # in bytes: the gradient keeps x and dy as they are stored, beside an fp32 row of sums
TILE = 2048  # values that a program of narrow rows takes at a time
BLOCK = 4096  # and of a row that is read in blocks
PREFETCHED = 16384  # bytes of the widest tile of which the backward pass has two more on their way: x, dy, dh of each
# Rows that models have, of which all kernels are compiled ahead of time.
WIDTHS = (64, 128, 256, 512, 1024, 2048, 2560, 4096, 5120, 8192, 16384, 20_000)


def reference(x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6):
    """`rms_norm` in plain torch, computed in fp32 (fp64 stays fp64): the oracle, and what runs without a GPU."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6, interpret: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last dimension; of h = x + residual, where there is a residual.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable, once. h is rounded to x's dtype before it is
    normalised. Programs sum the weight's gradient in fp32, each over its own rows: no atomics, so every run agrees.

    Args:
        x: (..., columns) fp32, fp16 or bf16; heads cut out of a fused projection are read where they lie.
        weight: (columns,), x's dtype.
        residual: x's shape and dtype, or None.
        eps: added to the mean square.
        interpret: run the kernel in Triton's interpreter, on the CPU.

    Returns:
        The normalised values, contiguous, x's shape and dtype; with a residual (these, h).

    Raises:
        TypeError: for another dtype, or several.
        ValueError: for shapes or devices that do not fit together, or if the interpreter is not on.

    Cost: see `cost`. Source: see above.
    """
    check_floats("rms_norm", x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    if not x.dim() or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm wants x (..., columns) and weight (columns,); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}: expand it")
    if not runs_kernel(x, interpret):
        return reference(x, weight, residual, eps)
    y, h = _RMSNorm.apply(x, weight, residual, eps)
    return y if residual is None else (y, h)


def cost(rows: int, columns: int, dtype: str = "bf16", residual: bool = False) -> Cost:
    """4 FLOPs a value (², Σ, · rstd, · weight), 5 with a residual; each tensor read or written once, and rstd."""
    size = BYTES[dtype]
    passes, flops = (4, 5) if residual else (2, 4)
    moved = size * (passes * rows * columns + columns) + 4 * rows
    return Cost(flops=flops * rows * columns, bytes=moved, calls=1, dtype="fp32")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float):
        heads, weight = as_heads(x), weight.contiguous()
        added = heads if residual is None else as_rows(residual)  # a pointer that is not followed, if there is none
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        h = None if residual is None else torch.empty_like(y)
        num_rows, tile = x.shape[:-1].numel(), choose_tile(x.shape[-1])
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        if y.numel():
            launch(
                forward, ceil_div(num_rows, tile["BLOCK_M"]), heads, added, weight, y, y if h is None else h, rstd,
                num_rows, *heads.shape[1:3], *heads.stride()[:3], added.stride(0), eps,
                **tile, RESIDUAL=residual is not None,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(heads if h is None else h, weight, rstd)
        ctx.residual = residual is not None
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dh: Tensor | None):
        x, weight, rstd = ctx.saved_tensors
        heads, columns, num_rows = as_heads(x), x.shape[-1], len(rstd)
        if dy is None:  # only the sum was used
            dy = torch.zeros_like(dh)
        grad = as_rows(dy)
        added = grad if dh is None else as_rows(dh)
        dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
        tile = choose_tile(columns, x.element_size(), backward=True)
        programs = min(ceil_div(num_rows, tile["BLOCK_M"]), _programs(x, tile))
        allocate = torch.empty if tile["ONE_PASS"] else torch.zeros  # what is summed block by block is added to
        partial = allocate(programs, columns, dtype=torch.float32, device=x.device)
        if dx.numel():
            launch(
                backward, programs, heads, weight, rstd, grad, added, dx, partial,
                num_rows, *heads.shape[1:3], *heads.stride()[:3], grad.stride(0), added.stride(0),
                **tile, RESIDUAL=dh is not None,
            )  # fmt: skip
        return dx, partial.sum(0).to(weight.dtype), dx if ctx.residual else None, None


@jit
def _load(x_row, residual_row, column, there, RESIDUAL: tl.constexpr):
    """The values to normalise: x, or its sum with the residual, rounded as it is stored."""
    x = tl.load(x_row[:, None] + column, mask=there, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_row[:, None] + column, mask=there, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@jit
def forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, num_rows, tokens, heads,
    stride_batch, stride_token, stride_head, stride_residual, eps,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_M rows; with ONE_PASS they fit BLOCK_N columns, else they are read twice, block by block."""
    row, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_row = x_ptr + head_offsets(row, tokens, heads, stride_batch, stride_token, stride_head)
    residual_row, flat = residual_ptr + row.to(tl.int64) * stride_residual, row.to(tl.int64) * COLUMNS
    if ONE_PASS:
        there = (row < num_rows)[:, None] & (column < COLUMNS)[None, :]
        x = _load(x_row, residual_row, column, there, RESIDUAL)
        if RESIDUAL:
            tl.store(h_ptr + flat[:, None] + column, x, mask=there)
        wide = x.to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(wide * wide, 1) / COLUMNS + eps)
        weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        tl.store(y_ptr + flat[:, None] + column, wide * rstd[:, None] * weight, mask=there)
    else:
        total = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, COLUMNS, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < COLUMNS)[None, :]
            x = _load(x_row, residual_row, begin + column, there, RESIDUAL)
            if RESIDUAL:
                tl.store(h_ptr + flat[:, None] + begin + column, x, mask=there)
            wide = x.to(tl.float32)
            total += tl.sum(wide * wide, 1)
        rstd = 1 / tl.sqrt(total / COLUMNS + eps)
        for begin in range(0, COLUMNS, BLOCK_N):
            there = (row < num_rows)[:, None] & (begin + column < COLUMNS)[None, :]
            wide = _load(x_row, residual_row, begin + column, there, RESIDUAL).to(tl.float32)
            weight = tl.load(weight_ptr + begin + column, mask=begin + column < COLUMNS, other=0.0).to(tl.float32)
            tl.store(y_ptr + flat[:, None] + begin + column, wide * rstd[:, None] * weight, mask=there)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@jit
def backward(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dh_ptr, dx_ptr, partial_ptr, num_rows, tokens, heads,
    stride_batch, stride_token, stride_head, stride_dy, stride_dh,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr, RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """With n = x · rstd and g = dy · weight: dx = (g − n · mean(g · n)) · rstd + dh, and this program's Σ dy · n.

    A program takes every num_programs-th block of rows, so that few partial sums of the weight's gradient are left.
    With STAGES > 1 it reads the weight once, and the next STAGES - 1 blocks are on their way while it works on one.
    """
    column, inside = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N) < COLUMNS
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    if ONE_PASS:
        dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if STAGES > 1:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_M, num_rows, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_M)
        x_row = x_ptr + head_offsets(row, tokens, heads, stride_batch, stride_token, stride_head)
        dy_row, dh_row = dy_ptr + row.to(tl.int64) * stride_dy, dh_ptr + row.to(tl.int64) * stride_dh
        dx_row = dx_ptr + row.to(tl.int64) * COLUMNS
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        if ONE_PASS:
            there = (row < num_rows)[:, None] & inside[None, :]
            if STAGES == 1:  # the widest rows leave no registers in which to keep it
                weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x_row[:, None] + column, mask=there, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_row[:, None] + column, mask=there, other=0.0).to(tl.float32)
            if RESIDUAL:  # read now: read last, it takes more registers than a thread of 16 warps has
                through = tl.load(dh_row[:, None] + column, mask=there, other=0.0).to(tl.float32)
            dweight += dy * normed
            mean = tl.sum(dy * weight * normed, 1) / COLUMNS
            dx = (dy * weight - normed * mean[:, None]) * rstd
            if RESIDUAL:
                dx += through
            tl.store(dx_row[:, None] + column, dx, mask=there)
        else:
            total = tl.zeros((BLOCK_M,), tl.float32)
            for begin in range(0, COLUMNS, BLOCK_N):
                there = (row < num_rows)[:, None] & (begin + column < COLUMNS)[None, :]
                weight = tl.load(weight_ptr + begin + column, mask=begin + column < COLUMNS, other=0.0).to(tl.float32)
                normed = tl.load(x_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32) * rstd
                dy = tl.load(dy_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
                total += tl.sum(dy * weight * normed, 1)
            for begin in range(0, COLUMNS, BLOCK_N):
                there = (row < num_rows)[:, None] & (begin + column < COLUMNS)[None, :]
                weight = tl.load(weight_ptr + begin + column, mask=begin + column < COLUMNS, other=0.0).to(tl.float32)
                normed = tl.load(x_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32) * rstd
                dy = tl.load(dy_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
                dx = (dy * weight - normed * (total / COLUMNS)[:, None]) * rstd
                if RESIDUAL:
                    dx += tl.load(dh_row[:, None] + begin + column, mask=there, other=0.0).to(tl.float32)
                tl.store(dx_row[:, None] + begin + column, dx, mask=there)
                so_far = tl.load(partial + begin + column, mask=begin + column < COLUMNS, other=0.0)
                so_far += tl.sum(dy * normed, 0)
                tl.store(partial + begin + column, so_far, mask=begin + column < COLUMNS)
            tl.debug_barrier()  # the next row reads the sums that other threads may have written
    if ONE_PASS:
        tl.store(partial + column, tl.sum(dweight, 0), mask=inside)


def choose_tile(columns: int, size: int = 2, backward: bool = False) -> dict[str, int | bool]:
    """The kernels' constants and num_warps for rows of this width, values of `size` bytes: at most 32 a thread.

    The width is one of them: a model has few, and each is compiled without the masks and the arithmetic it can spare.
    """
    width = max(16, next_power_of_two(columns))
    one_pass = width <= ONE_PASS and not (backward and size * width > ONE_PASS_BACKWARD)
    width = width if one_pass else BLOCK
    warps = min(16, max(4, width // 512))
    tile = {"COLUMNS": columns, "BLOCK_M": max(1, TILE // width), "BLOCK_N": width, "ONE_PASS": one_pass}
    if backward:
        tile["STAGES"] = 3 if one_pass and size * max(TILE, width) <= PREFETCHED else 1
    tile |= {"num_warps": warps}
    # Left alone, NVIDIA's assembler aims at 64 registers for these, and spills some; 512 threads may have 128 each.
    return tile | {"maxnreg": 128} if backward and (warps == 16 or not one_pass) else tile


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: both kernels with a residual, for heads, for wide rows and for blocks."""
    chosen = (
        (forward, "bf16", 128, True), (forward, "fp32", 16384, True), (forward, "fp16", 20_000, True),
        (backward, "bf16", 128, True), (backward, "bf16", 16384, True), (backward, "fp32", 8192, True),
        (backward, "fp16", 20_000, True),
        # with other tiles these spilled
        (backward, "fp16", 16384, True), (backward, "bf16", 8192, False), (backward, "bf16", 20_000, True),
    )  # fmt: skip
    if every:
        chosen = itertools.product((forward, backward), DTYPES.values(), WIDTHS, (True, False))
    found = []
    for kernel, dtype, columns, residual in chosen:
        names = ("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "h_ptr", "dy_ptr", "dh_ptr", "dx_ptr")
        strides = (f"stride_{name}" for name in ("batch", "token", "head", "residual", "dy", "dh"))
        types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("num_rows", "tokens", "heads", *strides), "i32")
        types |= {"rstd_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
        tile = choose_tile(columns, BYTES[dtype], kernel is backward) | {"RESIDUAL": residual}
        name = "forward" if kernel is forward else "backward"
        what = f"{name}, {dtype}, {columns} columns{', residual' * residual}"
        found.append(Build.of(kernel, what, types, tile))
    return found


def _programs(x: Tensor, tile: dict[str, int | bool]) -> int:
    """Programs of the backward pass that a GPU holds at a time: half of the 64 warps that a processor has room for.

    Programs that prefetch have 96 KiB of shared memory for 16 warps, which is what an A100's processor holds once.
    """
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return processors * max(1, (32 if tile["STAGES"] == 1 else 16) // tile["num_warps"])
