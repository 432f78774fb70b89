"""Ring attention: keys and values travel from rank to rank, and every rank merges what its queries see of them.

    round 0     rank r has its own keys       computes their tiles while the keys go to rank r + 1
    round s     rank r has those of r - s     … and so n - 1 times

Backward the keys and values travel again, and the sums of their gradients behind them, one round later and one round
more: what they end up with returns to the rank that they came from. Only this rank's queries, keys, values and result
are kept from forward to backward.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilib.parallel.context_parallel.layout import Documents, TokenLayout
from minilib.parallel.context_parallel.tile_attention import PartialAttention, tile_gradients, wide
from minilib.ranks.collectives import Communicator, Pending


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, comm: Communicator, layout: TokenLayout,
    documents: Documents | None = None, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of this rank's queries over all ranks' keys. A collective, forward and backward; differentiable once.

    Args:
        q: (batch, tokens of a rank, num_heads, head_dim).
        k, v: (batch, tokens of a rank, num_kv_heads, head_dim).
        comm: between the ranks that share the rows.
        layout: who has which tokens.
        documents: see `TokenLayout.tiles`.
        causal: each query sees keys up to its own place.

    Returns:
        q's shape and dtype.

    Cost: see `traffic.ring_bytes`.
    """
    return _Ring.apply(q, k, v, comm, layout, documents, causal)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, comm, layout, documents, causal) -> Tensor:
        n, rank = comm.world_size, comm.rank
        partial, kv = PartialAttention(q), torch.stack([k, v])
        for step in range(n):
            source = (rank - step) % n
            passing = Passing(kv, comm) if step < n - 1 else None
            partial.see(q, *kv, layout.tiles(rank, source, documents, causal))
            kv = passing.wait() if passing else kv
        ctx.save_for_backward(q, k, v, partial.out, partial.lse)
        ctx.comm, ctx.layout, ctx.documents, ctx.causal = comm, layout, documents, causal
        return partial.out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        comm, n, rank = ctx.comm, ctx.comm.world_size, ctx.comm.rank
        dq, kv = torch.zeros_like(out), torch.stack([k, v])
        grad, sums = grad.to(wide(grad.dtype)), None
        for step in range(n):
            source = (rank - step) % n
            passing = Passing(kv, comm) if step < n - 1 else None
            tiles = ctx.layout.tiles(rank, source, ctx.documents, ctx.causal)
            dq_part, dkv = tile_gradients(grad, out, lse, q, *kv, tiles)
            dq += dq_part
            if sums is not None:
                dkv += sums.wait()
            sums = Passing(dkv, comm) if n > 1 else None
            kv = passing.wait() if passing else kv
        dkv = sums.wait() if sums is not None else dkv
        return dq.to(q.dtype), *dkv.to(k.dtype), None, None, None, None


class Passing:
    """A tensor on its way to the next rank, and one of its shape from the rank before: an all-to-all with one part.

    A collective, so it travels in the background while tiles are computed, and over any communicator, on GPUs too;
    `PointToPoint` does neither.

    Args:
        tensor: contiguous; it must not change until `wait` returns.
        comm: of two ranks or more.
    """

    def __init__(self, tensor: Tensor, comm: Communicator) -> None:
        self.received, nothing = torch.empty_like(tensor), tensor.new_empty(0)
        inputs, outputs = [nothing] * comm.world_size, [nothing] * comm.world_size
        inputs[(comm.rank + 1) % comm.world_size] = tensor
        outputs[(comm.rank - 1) % comm.world_size] = self.received
        self._pending: Pending = comm.all_to_all(outputs, inputs, async_op=True)

    def wait(self) -> Tensor:
        """What came from the rank before."""
        self._pending.wait()
        return self.received
