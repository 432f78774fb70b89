"""Rotary position embeddings: turn the pairs (i, i + head_dim/2) of each head, forward, and back in the backward pass.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
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

TILE = 2048  # pairs that a program turns


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary` in plain torch, computed in fp32 (fp64 stays fp64): the oracle, and what runs without a GPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, cos, sin = x.to(wide), cos.to(wide), sin.to(wide)
    return (x_wide * cos + x_wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interpret: bool = False) -> Tensor:
    """x · cos + roll(x, head_dim / 2) · sin, for each head of each token.

    A Triton kernel on a GPU, elsewhere `reference`. Differentiable in x, once: the gradient is turned back.

    Args:
        x: (..., heads, head_dim) fp32, fp16 or bf16; heads cut out of a fused projection are read where they lie.
        cos: (..., 1, head_dim), x's dtype; leading dimensions as x's.
        sin: like cos, with the sign of its first half turned.
        interpret: run the kernel in Triton's interpreter, on the CPU.

    Returns:
        Contiguous, x's shape and dtype.

    Raises:
        TypeError: for another dtype, or several.
        ValueError: for shapes or devices that do not fit together, an odd head_dim, angles that want a gradient, or if
            the interpreter is not on.

    Cost: see `cost`. Source: see above.
    """
    check_floats("rotary", x=x, cos=cos, sin=sin)
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"rotary wants x (..., heads, head_dim) with an even head_dim, got {tuple(x.shape)}")
    wanted = (*x.shape[:-2], 1, x.shape[-1])
    if cos.shape != wanted or sin.shape != wanted:
        raise ValueError(
            f"cos and sin must be {wanted} for x {tuple(x.shape)}, got {tuple(cos.shape)} and {tuple(sin.shape)}: "
            "expand them to x's leading dimensions"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rotary has no gradient for cos and sin: give it cos.detach() and sin.detach()")
    return _Rotary.apply(x, cos, sin, interpret) if runs_kernel(x, interpret) else reference(x, cos, sin)


def cost(tokens: int, heads: int, head_dim: int, dtype: str = "bf16") -> Cost:
    """3 FLOPs a value (·, ·, +); each is read and written once, and so are one cosine and one sine a token's value."""
    size = BYTES[dtype]
    moved = 2 * size * tokens * (heads + 1) * head_dim
    return Cost(flops=3 * tokens * heads * head_dim, bytes=moved, calls=1, dtype="fp32")


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interpret: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _turn(grad, *ctx.saved_tensors, back=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    heads, cos, sin = as_heads(x), as_rows(cos), as_rows(sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, tile = x.shape[:-1].numel(), choose_tile(x.shape[-1])
    if out.numel():
        launch(
            turn, ceil_div(num_rows, tile["BLOCK_M"]), heads, cos, sin, out, num_rows, *heads.shape[1:3],
            *heads.stride()[:3], cos.stride(0), sin.stride(0), **tile, BACK=back,
        )  # fmt: skip
    return out


@jit
def turn(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, tokens, heads,
    stride_batch, stride_token, stride_head, stride_cos, stride_sin,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_M heads. The matrix of the turn takes value i to i and i + HALF; BACK is its transpose."""
    row, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    there = (row < num_rows)[:, None] & (column < HALF)
    x = x_ptr + head_offsets(row, tokens, heads, stride_batch, stride_token, stride_head)[:, None] + column
    token = (row // heads).to(tl.int64)[:, None]  # heads of one token share their angles: the cache serves them
    cos, sin = cos_ptr + token * stride_cos + column, sin_ptr + token * stride_sin + column
    first = tl.load(x, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    cos_first = tl.load(cos, mask=there, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + HALF, mask=there, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + (HALF if BACK else 0), mask=there, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + (0 if BACK else HALF), mask=there, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + column
    tl.store(out, first * cos_first + second * sin_first, mask=there)
    tl.store(out + HALF, second * cos_second + first * sin_second, mask=there)


def choose_tile(head_dim: int) -> dict[str, int]:
    """The kernel's constants and num_warps for heads of this size: 16 pairs a thread."""
    width = next_power_of_two(head_dim // 2)
    return {"HALF": head_dim // 2, "BLOCK_M": max(1, TILE // width), "BLOCK_N": width, "num_warps": 4}


def builds(target: str, every: bool = False) -> list[Build]:
    """What is compiled ahead of time: the usual heads there and back, and one whose halves are no power of two."""
    chosen = (("bf16", 128, False), ("bf16", 128, True), ("fp16", 96, True), ("fp32", 64, False))
    if every:
        chosen = itertools.product(DTYPES.values(), (16, 32, 64, 80, 96, 128, 192, 256), (False, True))
    found = []
    for dtype, head_dim, back in chosen:
        strides = [f"stride_{name}" for name in ("batch", "token", "head", "cos", "sin")]
        types = dict.fromkeys(("num_rows", "tokens", "heads", *strides), "i32")
        types |= dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), f"*{dtype}")
        what = f"{'backward' if back else 'forward'}, {dtype}, head_dim {head_dim}"
        found.append(Build.of(turn, what, types, choose_tile(head_dim) | {"BACK": back}))
    return found
