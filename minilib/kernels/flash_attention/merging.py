"""Attention over disjoint sets of keys, combined into attention over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both: associative, in any order.

    Args:
        out_a, out_b: results, (batch, q_len, num_heads, head_dim) or (total_q, num_heads, head_dim).
        lse_a, lse_b: their logarithms, as `flash_attention` returns them; -inf where no key was seen.

    Returns:
        out, out_a's dtype, and lse: both what `flash_attention` makes of all the keys.

    Raises:
        ValueError: if shapes do not belong together.

    Cost: reads two results and writes one. Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    heads_last = lse_a.transpose(-1, -2).shape
    if not (out_a.shape == out_b.shape and lse_a.shape == lse_b.shape and out_a.shape[:-1] == heads_last):
        got = f"out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and {tuple(lse_b.shape)}"
        raise ValueError(f"merge wants two results of one shape (…, tokens, heads, dim), lse (…, heads, tokens): {got}")
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0)  # neither saw a key: -inf - -inf is NaN
    share_a, share_b = (lse_a - top).exp(), (lse_b - top).exp()
    nothing = share_a + share_b == 0
    total = (share_a + share_b).masked_fill(nothing, 1)
    a, b = ((share / total).transpose(-1, -2).unsqueeze(-1) for share in (share_a, share_b))
    return (a * out_a + b * out_b).to(out_a.dtype), (top + total.log()).masked_fill(nothing, -math.inf)
