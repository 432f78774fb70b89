"""The residual stream of a decoder whose layers are cut, and the collectives where it enters and leaves a layer.

                       ┌ columns of qkv ─ heads ─ rows of project ┐
    stream ── enter ───┤                                          ├─── leave ── stream
                       └ … of another rank                        ┘
    `Replicated`            every rank has all tokens    enter: nothing              leave: all-reduce
    sequence_parallel.py    … 1/n of the tokens          enter: all-gather           leave: reduce-scatter

Backward goes the other way: what is nothing in forward is an all-reduce in backward, and all-gather and reduce-scatter
change places. So a layer, which the stream enters and leaves twice, takes 2 all-reduces in forward and 2 in backward,
or an all-gather and a reduce-scatter for each: as many bytes.

Collectives go on in the background while products are computed that do not need them: in backward the gradient of the
weights; where tokens are gathered, the product of the rank's own; where a layer's products are summed, the next chunk.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minilib.ranks.collectives import Communicator


class Stream(Protocol):
    """How the residual stream lies on ranks. Rows are (tokens, features); what communicates is a collective."""

    comm: Communicator
    collectives: Counter[str]
    regather: bool

    def begin(self, shape: torch.Size) -> None:
        """Tokens of this shape, (…), go through the model next."""

    def num_tokens(self, x: Tensor) -> int:
        """Tokens of all ranks in the forward under way; x are this rank's rows of the stream."""

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows of all tokens in the tokens' shape, (…, features); x is this rank's part of the stream."""

    def of_stream(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows of this rank's part of the stream in its shape; x has all tokens, (…, features)."""

    def begin_gather(self, x: Tensor, tokens: int) -> Callable[[], Tensor]:
        """Begin to gather so many tokens from this rank's rows and those of others; gives them when called."""

    def gather_and_multiply(self, x: Tensor, weight: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """So many tokens from this rank's rows and those of others, and each times a weight (features, out)."""

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rows of this rank's part of the stream: all tokens times a weight (features, out), summed over ranks."""

    def begin_reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        """Begin to sum what ranks have for all tokens, and may overwrite it; gives this rank's part when called."""

    def reduce(self, partial: Tensor) -> Tensor:
        """The same, done when it returns."""


class Replicated:
    """Every rank has the whole stream.

    Args:
        comm: between the ranks that share each layer.
        chunks: of tokens, in which a layer's products are computed and summed; more than 1 overlaps the two.

    Attributes:
        collectives: how many have been called, by name.
    """

    regather = False

    def __init__(self, comm: Communicator, chunks: int = 1) -> None:
        self.comm, self.chunks = comm, chunks
        self.collectives: Counter[str] = Counter()

    def begin(self, shape: torch.Size) -> None:
        """See `Stream`; any number of tokens will do."""

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(*x.shape[:-1], rows.shape[-1])

    of_stream = all_tokens

    def num_tokens(self, x: Tensor) -> int:
        return len(x)

    def begin_gather(self, x: Tensor, tokens: int) -> Callable[[], Tensor]:
        return lambda: x

    def gather_and_multiply(self, x: Tensor, weight: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return x, x @ weight

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.chunks == 1:  # nothing else to do meanwhile
            return self.reduce(x @ weight)
        out = x.new_empty(len(x), weight.shape[1])
        waits = []
        for rows, part in zip(x.tensor_split(self.chunks), out.tensor_split(self.chunks), strict=True):
            torch.mm(rows, weight, out=part)
            waits.append(self.begin_reduce(part))
        for wait in waits:
            wait()
        return out

    def reduce(self, partial: Tensor) -> Tensor:
        self.collectives["all_reduce"] += 1
        self.comm.all_reduce(partial)
        return partial

    def begin_reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        self.collectives["all_reduce"] += 1
        pending = self.comm.all_reduce(partial, async_op=True)

        def result() -> Tensor:
            pending.wait()
            return partial

        return result
