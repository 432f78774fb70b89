"""FlashAttention: exact attention whose scores never leave the chip, forward and backward.

A program holds a tile of queries and takes the keys block by block; the softmax's maximum, its sum and the result so
far are corrected whenever a block brings a larger maximum (online softmax). Memory grows with the length, not with its
square. The kernels are in forward.py and backward.py.

Sources: Dao et al. 2022, "FlashAttention: fast and memory-efficient exact attention with IO-awareness"; Dao 2023,
"FlashAttention-2: faster attention with better parallelism and work partitioning".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilib.kernels.flash_attention import cpu
from minilib.kernels.flash_attention.backward import gradients
from minilib.kernels.flash_attention.forward import attend
from minilib.kernels.flash_attention.tiles import HEAD_DIMS, Problem
from minilib.kernels.workbench.dispatch import check_floats, runs_kernel
from minilib.numbers.price import BYTES, Cost


def reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attention` in plain torch, with all scores in memory: the oracle of every other way.

    It computes in float32, in float64 for float64 tensors, which only it takes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_q is None:
        out, lse = _dense(q, k, v, causal, scale)
    else:
        starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        out, lse = q.new_empty(0, *q.shape[1:]), q.new_empty(q.shape[1], 0, dtype=_wide(q))
        for i in range(len(starts) - 1):
            tokens, keys = slice(starts[i], starts[i + 1]), slice(k_starts[i], k_starts[i + 1])
            part, part_lse = _dense(q[None, tokens], k[None, keys], v[None, keys], causal, scale)
            out, lse = torch.cat([out, part[0]]), torch.cat([lse, part_lse[0]], dim=1)
    return (out, lse) if return_lse else out


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, return_lse: bool = False, interpret: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale · q kᵀ) v for each head, over the keys that each query sees.

    Triton kernels on a GPU, on a CPU torch's fused attention, or `reference` if q or k hold what is no finite number.
    Neither kernel stores the scores. Differentiable once, in `lse` too; a GPU's gradients are the same bits each time.
    Nothing here waits for the GPU: what cu_seqlens hold is checked on the CPU alone, and values out of range are an
    illegal access on a GPU. A query that sees no key gets 0, the logarithm -inf, and passes no gradient on.

    Args:
        q: (batch, q_len, num_heads, head_dim) fp32, fp16 or bf16; of variable length (total_q, num_heads, head_dim),
            the sequences one after another. head_dim is 16, 32, 64 or 128; strides are free but for the last, 1.
        k, v: (batch, k_len, num_kv_heads, head_dim) or (total_k, num_kv_heads, head_dim), q's dtype; num_heads is a
            multiple of num_kv_heads, and head h uses kv head h // (num_heads // num_kv_heads).
        causal: query t of a sequence sees keys 0 … k_len - q_len + t: the last query sees all. Otherwise all see all.
        scale: factor on the scores, above 0; head_dim ** -0.5 if left out.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32, of variable length only: where each sequence's tokens begin,
            from 0 to total_q and total_k.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence, or more; needed with cu_seqlens.
        return_lse: also return the logarithms, with which `merge` combines results over different keys.
        interpret: run the kernels in Triton's interpreter, on the CPU.

    Returns:
        out: q's shape and dtype, contiguous. With return_lse also lse, the natural logarithm of each row's sum of
        exponentials: (batch, num_heads, q_len) or (num_heads, total_q), fp32.

    Raises:
        TypeError, ValueError: tensors or options that do not fit; on the CPU also the values of cu_seqlens.

    Cost: see `cost`. Source: see above.
    """
    check_floats("flash_attention", q=q, k=k, v=v)
    problem = _problem(q, k, v, causal, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if runs_kernel(q, interpret):
        out, lse = _FlashAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, problem)
    elif not cpu.suits(q, k):
        out, lse = reference(q, k, v, causal, problem.scale, cu_seqlens_q, cu_seqlens_k, return_lse=True)
    elif problem.varlen:
        out, lse = cpu.attend_packed(q, k, v, causal, problem.scale, cu_seqlens_q, cu_seqlens_k)
    else:
        out, lse = cpu.attend_dense(q, k, v, causal, problem.scale)
    return (out, lse) if return_lse else out


def cost(
    batch: int, num_heads: int, num_kv_heads: int, q_len: int, k_len: int, head_dim: int, causal: bool = True,
    dtype: str = "bf16", backward: bool = False,
) -> Cost:  # fmt: skip
    """4 · head_dim FLOPs per visible pair and head forward, 10 · head_dim backward; each tensor is moved once.

    Forward multiplies twice: scores and result. Backward multiplies five times: the scores once more, then the
    gradients of the probabilities, of v, of q and of k; that is how attention is usually counted. The kernels here
    multiply seven times, 14 · head_dim FLOPs: to go without atomics, dQ is summed in one kernel and dK and dV in
    another, and each computes the scores and the probabilities' gradients for itself.
    """
    size, seen = BYTES[dtype], min(q_len, k_len)
    pairs = seen * (k_len - seen) + seen * (seen + 1) // 2 if causal else q_len * k_len
    queries, keys = batch * q_len * num_heads, batch * k_len * num_kv_heads
    if backward:  # q, k, v, out, dout and lse in; dq, dk and dv out
        moved = size * head_dim * (4 * queries + 4 * keys) + 4 * queries
    else:
        moved = size * head_dim * (2 * queries + 2 * keys) + 4 * queries
    flops = (10 if backward else 4) * head_dim * batch * num_heads * pairs
    return Cost(flops, moved, calls=3 if backward else 1, dtype=dtype)


def materialised_cost(
    batch: int, num_heads: int, num_kv_heads: int, q_len: int, k_len: int, head_dim: int, causal: bool = True,
    dtype: str = "bf16", backward: bool = False,
) -> Cost:  # fmt: skip
    """What attention costs that stores its scores S and probabilities P: product, softmax, product, each its own call.

    All pairs are computed and moved, the hidden ones too, so `causal` changes nothing. Forward S is written and read,
    then P. Backward does four products (no recomputation): P is read twice, dP and dS are written, dP read, dS twice.
    """
    size, pairs = BYTES[dtype], batch * num_heads * q_len * k_len
    tensors = cost(batch, num_heads, num_kv_heads, q_len, k_len, head_dim, causal, dtype, backward).bytes
    tensors -= 4 * batch * q_len * num_heads  # lse: P is kept instead
    if backward:
        tensors -= size * head_dim * batch * q_len * num_heads  # out: the softmax's gradient is taken from P
    flops, passes, calls = (8, 7, 5) if backward else (4, 4, 3)
    return Cost(flops * head_dim * pairs, tensors + passes * size * pairs, calls=calls, dtype=dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    wide_q, wide_k, wide_v = (x.to(_wide(x)).transpose(1, 2) for x in (q, k, v))
    wide_k, wide_v = wide_k.repeat_interleave(group, dim=1), wide_v.repeat_interleave(group, dim=1)
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    hidden = hidden.triu(offset + 1) if causal else ~hidden
    blind = hidden.all(-1)  # softmax of a row that sees nothing is NaN, and so is its gradient
    scores = (wide_q @ wide_k.transpose(-1, -2) * scale).masked_fill(hidden, -math.inf)
    scores = scores.masked_fill(blind[:, None], 0)
    weights = scores.softmax(dim=-1).masked_fill(hidden, 0)
    out = (weights @ wide_v).transpose(1, 2).to(q.dtype).contiguous()
    return out, scores.logsumexp(dim=-1).masked_fill(blind, -math.inf)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, problem: Problem) -> tuple[Tensor, Tensor]:
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        out, lse = attend(problem, q, k, v, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 6
        grad = torch.zeros_like(out) if grad is None else grad
        return *gradients(ctx.problem, grad, grad_lse, q, k, v, out, lse, cu_q, cu_k), None, None, None


def _problem(q, k, v, causal, scale, cu_q, cu_k, max_q, max_k) -> Problem:
    """Check all that can be checked without waiting for a GPU, and what only a CPU tells at once."""
    varlen, scale = cu_q is not None, q.shape[-1] ** -0.5 if scale is None and q.dim() else scale
    if varlen != (cu_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: give both, or neither for (batch, tokens, …)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        wanted = "(total tokens, heads, head_dim) with" if varlen else "(batch, tokens, heads, head_dim) without"
        if x.dim() != (3 if varlen else 4):
            raise ValueError(f"{name} must be {wanted} cu_seqlens, got shape {tuple(x.shape)}: .view() mends it")
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension, got {x.stride()}: call .contiguous()")
    (num_heads, head_dim), num_kv_heads = q.shape[-2:], k.shape[-2]
    if k.shape != v.shape or head_dim != k.shape[-1] or (not varlen and len(q) != len(k)):
        got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"k and v must have one shape, with q's head_dim and batch, got {got}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}: pad with zeros, and give the scale")
    if not num_kv_heads or not num_heads or num_heads % num_kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {num_heads} and {num_kv_heads}: repeat some")
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(f"scale must be a number above 0, got {scale!r}: to turn the sign, negate q")
    if varlen:
        _check_sequences("q", q, cu_q, max_q)
        _check_sequences("k", k, cu_k, max_k)
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of one length, got {len(cu_q)} and {len(cu_k)}")
    elif max_q is not None or max_k is not None:
        raise ValueError("max_seqlen_q and max_seqlen_k go with cu_seqlens: leave them out, the shapes tell")
    batch, q_len, k_len = len(cu_q) - 1 if varlen else len(q), q.shape[-3], k.shape[-3]
    longest = (max_q, max_k) if varlen else (q_len, k_len)
    sizes = (batch, num_heads, num_kv_heads, head_dim, q_len, k_len)
    return Problem(*sizes, *longest, causal=bool(causal), scale=float(scale), varlen=varlen)


def _check_sequences(of: str, x: Tensor, cu: Tensor, longest: int | None) -> None:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        got = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
        raise TypeError(f"cu_seqlens_{of} must be a tensor of torch.int32, got {got}: convert it with .to()")
    if cu.dim() != 1 or not len(cu) or cu.stride(0) != 1 or cu.device != x.device:
        got = f"shape {tuple(cu.shape)}, strides {cu.stride()} on {cu.device}"
        raise ValueError(f"cu_seqlens_{of} must be contiguous, (sequences + 1,), on {x.device}, got {got}")
    if not isinstance(longest, int) or longest < 0:
        raise ValueError(f"max_seqlen_{of} must be a whole number with cu_seqlens, got {longest!r}: give the longest")
    starts = [0, len(x)] if cu.is_cuda else cu.tolist()
    if starts[0] != 0 or sorted(starts) != starts or starts[-1] != len(x):
        raise ValueError(f"cu_seqlens_{of} must climb from 0 to the {len(x)} tokens of {of}, got {starts}")
    lengths = [0] if cu.is_cuda else [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
    if longest < max(lengths, default=0) or longest * (len(cu) - 1) < len(x):
        raise ValueError(f"max_seqlen_{of} = {longest} is less than the longest sequence: give that, or more")
