"""Context parallelism: ranks share the tokens of every sequence, and meet in attention alone.

    cp = ContextParallel(comm)                             among ranks that have the same rows
    loss = cp.loss(model, tokens, targets, documents)      this rank's tokens; every other layer is as on one process
    loss.backward()                                        then average gradients over these ranks, as over replicas

Every token but for attention is its own business, so the model is untouched: attention is passed in. Each rank's loss
is the mean over its tokens, of which all have as many, so DataParallel or Zero over the ranks of dp and cp together,
`mesh.comm("dp", "cp")`, takes the step of one process.

In production: Megatron-LM's --context-parallel-size, torch's experimental context_parallel, DeepSpeed-Ulysses. Llama 3
gathers all keys and values instead of passing them round (Llama team 2024, section 3.3.2).
"""

from __future__ import annotations

import copy
from functools import lru_cache

from torch import Tensor

from minilib.model.decoder import Attention, Decoder
from minilib.parallel.context_parallel.layout import Documents, TokenLayout, positions_in
from minilib.parallel.context_parallel.ring import ring_attention
from minilib.parallel.context_parallel.ulysses import ulysses_attention
from minilib.ranks.collectives import Communicator

METHODS = {"ring": ring_attention, "ulysses": ulysses_attention}


class ContextParallel:
    """Deals tokens to ranks, and makes the attention that a decoder is called with.

    Args:
        comm: between the ranks that share the same rows.
        method: one of METHODS.
        balanced: deal each rank a head and a tail of every row.

    Raises:
        ValueError: for another method.
    """

    def __init__(self, comm: Communicator, method: str = "ring", balanced: bool = True) -> None:
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}")
        self.comm, self.method, self.balanced = comm, method, balanced

    def layout(self, num_tokens: int) -> TokenLayout:
        """Who has which tokens of rows of this length.

        Raises:
            LengthDoesNotDivide: if they cannot be dealt evenly.
        """
        return _layout(num_tokens, self.comm.world_size, self.balanced)

    def split(self, rows: Tensor) -> Tensor:
        """This rank's tokens of whole rows: (batch, tokens, …) → (batch, tokens / ranks, …)."""
        places = self.layout(rows.shape[1]).places(self.comm.rank)
        return rows.index_select(1, places.to(rows.device))

    def gather(self, own: Tensor) -> Tensor:
        """Whole rows on every rank, in order, from each rank's tokens: the inverse of `split`. A collective."""
        n = self.comm.world_size
        everything = own.new_empty(n, *own.shape)
        everything[self.comm.rank] = own
        self.comm.all_gather(everything)
        rows = everything.transpose(0, 1).flatten(1, 2)
        return rows.index_select(1, self.layout(rows.shape[1]).order().argsort().to(rows.device))

    def attention(self, num_tokens: int, documents: Documents | None = None, causal: bool = True) -> Attention:
        """Attention over whole rows, to be called with each rank's tokens. The calls are collectives.

        Args:
            num_tokens: of a row, all ranks together.
            documents: for each row where its documents begin, from 0 to num_tokens; they do not see each other.
            causal: each token sees those before it.
        """
        layout, attend = self.layout(num_tokens), METHODS[self.method]

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layout.check_documents(documents, len(q))
            return attend(q, k, v, self.comm, layout, documents, causal)

        return attention

    def apply(self, model: Decoder, num_tokens: int) -> None:
        """Make this the attention of a model that is called without one, such as in a pipeline's stages.

        Args:
            model: whose `loss` then takes this rank's tokens, positions and targets, as `split` deals them.
            num_tokens: of a row, all ranks together; each row is one document.
        """
        model.ops = copy.copy(model.ops)
        model.ops.causal_attention = self.attention(num_tokens)

    def loss(self, model: Decoder, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Mean cross-entropy over this rank's tokens; the mean of that over ranks is the loss of the whole rows.

        Args:
            model: as on one process.
            tokens, targets: (batch, tokens) of whole rows, the same on every rank.
            documents: see `attention`; positions are counted from each document's beginning.
        """
        batch, length = tokens.shape
        self.layout(length).check_documents(documents, batch)
        positions = positions_in(documents, batch, length).to(tokens.device)
        own = (self.split(x) for x in (tokens, positions, targets))
        return model.loss(*own, attention=self.attention(length, documents))


_layout = lru_cache(TokenLayout)
