"""Attention over one tile after another, merged; and its gradients, from nothing but the merged result."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from minilib.kernels.flash_attention import HEAD_DIMS, flash_attention, merge, reference
from minilib.parallel.context_parallel.layout import Tile


class PartialAttention:
    """The result so far of queries that have seen some of their keys.

    Args:
        q: (batch, tokens, num_heads, head_dim).

    Attributes:
        out: (batch, tokens, num_heads, head_dim), in fp32 or wider.
        lse: (batch, num_heads, tokens), the logarithms of the sums of exponentials; -inf before any key is seen.
    """

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros_like(q, dtype=wide(q.dtype))
        self.lse = self.out.new_full((len(q), q.shape[2], q.shape[1]), -math.inf)

    def see(self, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile]) -> None:
        """Let the queries see the tiles' keys, which they have not seen before."""
        for rows, queries, keys, causal in tiles:
            part, part_lse = attention_with_lse(q[rows, queries], k[rows, keys], v[rows, keys], causal)
            out, lse = self.out[rows, queries], self.lse[rows, :, queries]
            self.out[rows, queries], self.lse[rows, :, queries] = merge(out, lse, part, part_lse)


def tile_gradients(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile]
) -> tuple[Tensor, Tensor]:
    """What some tiles contribute to the gradients of the queries, and of the keys and values.

    The result is the mean of all tiles' results by their shares exp(lse of the tile - lse), so each tile's gradients
    follow from its own result and logarithms, which are computed again here.

    Args:
        grad: of the result, its shape.
        out, lse: see `PartialAttention`, when all keys have been seen.
        q: the queries.
        k, v: (batch, tokens, num_kv_heads, head_dim).

    Returns:
        Gradients of q, and of k and v as one, (2, *k.shape), in fp32 or wider.

    Cost: forward and backward of each tile. A kernel that is given lse, as ring-flash-attention gives it to
    FlashAttention's backward, saves the forward: 2 of 7 products.
    """
    dq, dkv = torch.zeros_like(out), torch.zeros((2, *k.shape), dtype=out.dtype, device=out.device)
    for rows, queries, keys, causal in tiles:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q[rows, queries], k[rows, keys], v[rows, keys])]
            part, part_lse = attention_with_lse(*inputs, causal)
        share = (part_lse.detach() - lse[rows, :, queries]).exp()
        grad_part = grad[rows, queries] * share.transpose(1, 2).unsqueeze(-1)
        grad_lse = (grad_part * (part.detach() - out[rows, queries])).sum(-1).transpose(1, 2)
        got = torch.autograd.grad((part, part_lse), inputs, (grad_part.to(part.dtype), grad_lse.to(part_lse.dtype)))
        dq[rows, queries] += got[0]
        dkv[0, rows, keys] += got[1]
        dkv[1, rows, keys] += got[2]
    return dq, dkv


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of this dtype are made in."""
    return torch.promote_types(dtype, torch.float32)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Result and logarithms of `flash_attention`; by `reference` what its kernels do not take."""
    takes = q.dtype != torch.float64 and q.shape[-1] in HEAD_DIMS
    return (flash_attention if takes else reference)(q, k, v, causal=causal, return_lse=True)
