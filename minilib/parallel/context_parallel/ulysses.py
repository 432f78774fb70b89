"""Ulysses: an all-to-all turns a part of the tokens and all heads into all tokens and a part of the heads, and back.

    rank 0: tokens 0 1, heads a b ┐            ┌ heads a, tokens 0 1 2 3 ┐            ┌ tokens 0 1, heads a b
    rank 1: tokens 2 3, heads a b ┴ all-to-all ┴ heads b, tokens 0 1 2 3 ┴ all-to-all ┴ tokens 2 3, heads a b

Between the two, attention knows nothing of other ranks. With fewer heads of keys and values than ranks, each is sent to
all the ranks whose queries it serves.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses".
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minilib.parallel.context_parallel.layout import Documents, TokenLayout
from minilib.parallel.context_parallel.tile_attention import attention_with_lse
from minilib.parallel.rows import exchange_rows
from minilib.ranks.collectives import Communicator


class HeadsDoNotDivide(ValueError):
    """Heads that cannot be dealt to ranks evenly."""


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, layout: TokenLayout,
    documents: Documents | None = None, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of this rank's queries over all ranks' keys. A collective, forward and backward.

    Arguments and result are those of `ring_attention`.

    Raises:
        HeadsDoNotDivide: if num_heads is no multiple of the ranks, or num_kv_heads neither a multiple nor a divisor.

    Cost: see `traffic.ulysses_bytes`.
    """
    n, heads, kv_heads = comm.world_size, q.shape[2], k.shape[2]
    if heads % n or (kv_heads % n and n % kv_heads):
        raise HeadsDoNotDivide(
            f"{heads} query heads and {kv_heads} heads of keys and values cannot be dealt to {n} ranks: the first must "
            "be a multiple of the ranks, the second a multiple or a divisor; a ring asks for neither"
        )
    copies = max(1, n // kv_heads)
    order = layout.order().to(q.device)
    q, k, v = (
        _tokens_together(x, comm).index_select(1, order.argsort())
        for x in (q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2))
    )
    mixed = _of_documents(q, k, v, documents, causal)
    return _heads_together(mixed.index_select(1, order), comm)


def _of_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, causal: bool) -> Tensor:
    """Attention within each document of each row."""
    if documents is None:
        return attention_with_lse(q, k, v, causal)[0]
    rows = []
    for row, starts in enumerate(documents):
        one = slice(row, row + 1)
        spans = [slice(*span) for span in pairwise(starts)]
        rows.append(
            torch.cat([attention_with_lse(*(x[one, span] for x in (q, k, v)), causal)[0] for span in spans], dim=1)
        )
    return torch.cat(rows)


def _tokens_together(x: Tensor, comm: Communicator) -> Tensor:
    """(batch, tokens of a rank, heads, dim) → (batch, all tokens rank after rank, heads of a rank, dim)."""
    n, (batch, tokens, heads, dim) = comm.world_size, x.shape
    rows = x.view(batch, tokens, n, heads // n, dim).permute(2, 0, 1, 3, 4).reshape(n * batch * tokens, -1)
    each = [batch * tokens] * n
    arrived = exchange_rows(rows, each, each, comm).view(n, batch, tokens, heads // n, dim)
    return arrived.transpose(0, 1).reshape(batch, n * tokens, heads // n, dim)


def _heads_together(x: Tensor, comm: Communicator) -> Tensor:
    """The inverse of `_tokens_together`."""
    n, (batch, tokens, heads, dim) = comm.world_size, x.shape
    rows = x.view(batch, n, tokens // n, heads, dim).transpose(0, 1).reshape(batch * tokens, -1)
    each = [batch * tokens // n] * n
    arrived = exchange_rows(rows, each, each, comm).view(n, batch, tokens // n, heads, dim)
    return arrived.permute(1, 2, 0, 3, 4).reshape(batch, tokens // n, n * heads, dim)
