"""The vocabulary cut by tokens: embedding table, output projection and cross-entropy, without all logits anywhere.

A rank has as many tokens as every other; where the vocabulary does not divide, the last ranks have padding, to which no
probability goes. The loss takes two rounds, as a share among columns on shards does (classic/scatter_gather.py): the
largest logit of each token, then the sums of exponentials that need it, with the logit of the target.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilib.model.ops import IGNORED
from minilib.parallel.tensor_parallel.linear import Leave, column_parallel, product_dtype
from minilib.parallel.tensor_parallel.stream import Replicated, Stream
from minilib.ranks.agreement import RanksDiffer
from minilib.ranks.collectives import Communicator


class VocabularyParallelEmbedding(nn.Module):
    """Token ids (…) int64 → the stream; each rank looks up its own tokens.

    Args:
        weight: (this rank's tokens, hidden_size).
        vocab_size: tokens of all ranks, without padding.
        stream: where the output goes.

    Raises:
        IndexError: for an id that is no token; from forward.

    Cost: on the wire what the stream's `leave` takes.
    """

    def __init__(self, weight: nn.Parameter, vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.weight, self.vocab_size, self.stream = weight, vocab_size, stream

    def forward(self, token_ids: Tensor) -> Tensor:
        if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < self.vocab_size:
            raise IndexError(f"token ids are 0 … {self.vocab_size - 1}, got {token_ids.min()} … {token_ids.max()}")
        self.stream.begin(token_ids.shape)
        ids = token_ids - self.stream.comm.rank * len(self.weight)
        elsewhere = (ids < 0) | (ids >= len(self.weight))
        x = F.embedding(ids.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return Leave.apply(x, self.stream)


class VocabularyParallelLinear(nn.Module):
    """Features (…, hidden_size) of all tokens → logits (…, vocab_size) on every rank, for whoever samples from them.

    Args:
        weight: (this rank's tokens, hidden_size).
        vocab_size: tokens of all ranks, without padding.
        stream: whose features they are.

    Cost: 1/n of the product; an all-gather of the logits.
    """

    def __init__(self, weight: nn.Parameter, vocab_size: int, stream: Stream) -> None:
        super().__init__()
        self.weight, self.vocab_size, self.stream = weight, vocab_size, stream

    def forward(self, x: Tensor) -> Tensor:
        return _GatherColumns.apply(own_logits(x, self.weight, self.stream), self.stream.comm)[..., : self.vocab_size]


def own_logits(features: Tensor, weight: Tensor, stream: Stream) -> Tensor:
    """Logits of this rank's tokens of the vocabulary, (…, this rank's tokens), padding included.

    What ranks know of the gradient of features has to be summed: here, unless `Enter` does so where it gathered them.
    """
    if isinstance(stream, Replicated):
        return column_parallel(features, weight, None, stream)
    dtype = product_dtype(features)
    return F.linear(features.to(dtype), weight.to(dtype))


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, comm: Communicator) -> Tensor:
    """Mean cross-entropy in nats, the same on every rank. A collective.

    Args:
        logits: (…, this rank's tokens), as `own_logits` has them.
        targets: (…) int64, the same on every rank; `IGNORED` ones do not count, as in torch's cross_entropy.
        vocab_size: tokens of all ranks, without padding.
        comm: between the ranks.

    Raises:
        RanksDiffer: if a target is neither a token nor `IGNORED`, or ranks have other targets.

    Cost: two all-reduces, of 1 and of 3 numbers a token.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _CrossEntropy.apply(logits.flatten(0, -2).to(wide), targets.flatten(), vocab_size, comm)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, vocab_size: int, comm: Communicator) -> Tensor:
        first = comm.rank * logits.shape[1]
        real = min(logits.shape[1], max(0, vocab_size - first))  # the others are padding
        largest = logits[:, :real].amax(-1) if real else logits.new_full((len(logits),), -torch.inf)
        comm.all_reduce(largest, "max")
        shifted = logits - largest[:, None]
        shifted[:, real:] = -torch.inf
        own = targets - first
        rows = ((own >= 0) & (own < real)).nonzero()[:, 0]
        columns = own[rows]
        sums = logits.new_zeros(3, len(targets))
        sums[1, rows] = shifted[rows, columns]
        sums[2, rows] = 1
        sums[2, targets == IGNORED] = comm.world_size + 1  # no sum of owners is as large: all ranks must agree
        sums[0] = shifted.exp_().sum(-1)
        comm.all_reduce(sums)
        total, target, owners = sums
        counted = owners == 1
        wrong = ~counted & (owners != comm.world_size * (comm.world_size + 1))
        if wrong.any():
            raise RanksDiffer(
                f"{int(wrong.sum())} of {len(targets)} targets are no token of the {vocab_size} of the vocabulary (and "
                f"not {IGNORED}, which is ignored), or are not the same on all ranks; pass the same tokens on all ranks"
            )
        ctx.save_for_backward(shifted.div_(total[:, None]), rows, columns, counted)
        return (total.log() - target)[counted].mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, rows, columns, counted = ctx.saved_tensors
        scale = torch.where(counted, grad / counted.sum(), 0)
        out = probabilities * scale[:, None]
        out[rows, columns] -= scale[rows]
        return out, None, None, None


class _GatherColumns(torch.autograd.Function):
    """(…, columns of this rank) → (…, those of all ranks); backward takes this rank's from a gradient that all have."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm, ctx.columns = comm, x.shape[-1]
        everything = x.new_empty(comm.world_size, *x.shape)
        everything[comm.rank] = x
        comm.all_gather(everything)
        return everything.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.comm.rank * ctx.columns, ctx.columns), None
