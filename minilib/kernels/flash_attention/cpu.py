"""Attention on a CPU by torch's own fused kernel, which keeps no score, where it computes what `flash_attention` does.

Torch's kernel has two masks: none, and a diagonal from the top left corner, where query t sees keys 0 … t. Causal
attention here has its diagonal end in the bottom right corner, so a call is cut into pieces that torch's kernel knows:
queries that see no key, all queries against the keys that each of them sees, and a square with a diagonal.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilib.kernels.flash_attention.merging import merge

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # F.scaled_dot_product_attention keeps the lse
_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Result and logarithms of `flash_attention` for sequences of one length, differentiable once in both.

    Args:
        q: (batch, q_len, num_heads, head_dim), fp32, fp16 or bf16, on the CPU.
        k, v: (batch, k_len, num_kv_heads, head_dim).
        causal, scale: as in `flash_attention`.

    Returns:
        out: q's shape and dtype, contiguous. lse: (batch, num_heads, q_len) fp32. Both are computed in fp32, as
        `reference` does; no tensor of q_len × k_len is held.
    """
    blind = max(0, q.shape[1] - k.shape[1]) if causal else 0
    wide, shared = [x.float() for x in (q[:, blind:], k, v)], max(0, k.shape[1] - q.shape[1])
    if causal and shared and q.shape[1] > 1:
        out, lse = _attend_trapezoid(*wide, shared, scale)
    else:  # a single query that sees all keys needs no mask
        out, lse = _Fused.apply(*wide, causal and not shared, scale)
    if blind:
        out = torch.cat([out.new_zeros((len(q), blind, *q.shape[2:])), out], dim=1)
        lse = torch.cat([lse.new_full((len(q), q.shape[2], blind), -math.inf), lse], dim=2)
    return out.to(q.dtype).contiguous(), lse


def suits(q: Tensor, k: Tensor) -> bool:
    """False where a score may be NaN: a few keys whose scores all are, torch's kernel takes for hidden ones."""
    return bool((q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32)).isfinite())


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend_dense` of one sequence after another: out (total_q, num_heads, head_dim), lse (num_heads, total_q)."""
    outs, lses = [q[:0]], [q.new_empty((q.shape[1], 0), dtype=torch.float32)]
    spans = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    for (begin, end), (k_begin, k_end) in zip(*spans, strict=True):
        out, lse = attend_dense(q[None, begin:end], k[None, k_begin:k_end], v[None, k_begin:k_end], causal, scale)
        outs, lses = [*outs, out[0]], [*lses, lse[0]]
    return torch.cat(outs), torch.cat(lses, dim=1)


def _attend_trapezoid(q: Tensor, k: Tensor, v: Tensor, shared: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention to the first `shared` keys, which all queries see, merged with that to as many as queries."""
    rectangle = _Fused.apply(q, k[:, :shared], v[:, :shared], False, scale)
    return merge(*rectangle, *_Fused.apply(q, k[:, shared:], v[:, shared:], True, scale))


class _Fused(torch.autograd.Function):
    """Torch's kernel, which takes no empty tensors, and whose own graph passes nothing on from the logarithms."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.numel() and k.numel():
            out, lse = _attend(q, k, v, 0.0, causal, scale=scale)
        else:
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.set_materialize_grads(False)
        return out.transpose(1, 2), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        seen = q.numel() and k.numel()
        if seen and grad is not None:
            dq, dk, dv = _gradients(grad.transpose(1, 2), q, k, v, out, lse, 0.0, ctx.causal, scale=ctx.scale)
        if seen and grad_lse is not None:
            # dlse/dS = P, so that dQ gains scale · dlse · (P K), attention with K for V, and dK gains Pᵀ (scale · dlse
            # · Q), which is dV for the gradient scale · dlse · Q of the result.
            factor = (ctx.scale * grad_lse).unsqueeze(-1)
            mean_of_keys, _ = _attend(q, k, k, 0.0, ctx.causal, scale=ctx.scale)
            _, _, of_keys = _gradients(factor * q, q, k, v, out, lse, 0.0, ctx.causal, scale=ctx.scale)
            dq, dk = dq + factor * mean_of_keys, dk + of_keys
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None
