"""The residual stream of a decoder whose layers are cut, and the collectives where it enters and leaves a layer.

                       ┌ columns of qkv ─ heads ─ rows of project ┐
    stream ── enter ───┤                                          ├─── leave ── stream
                       └ … of another rank                        ┘
    `Replicated`            every rank has all tokens    enter: nothing              leave: all-reduce
    `SequenceParallel`      … 1/n of the tokens          enter: all-gather           leave: reduce-scatter

Backward goes the other way: what is nothing in forward is an all-reduce in backward, and all-gather and reduce-scatter
change places. So a layer, which the stream enters and leaves twice, takes 2 all-reduces in forward and 2 in backward,
or an all-gather and a reduce-scatter for each: as many bytes.

Collectives go on in the background while products are computed that do not need them: in backward the gradient of the
weights; where tokens are gathered, the product of the rank's own; where a layer's products are summed, the next chunk.

Sources: Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models", section 4.2 (sequence parallelism).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minilib.ranks.collectives import Communicator


class Stream(Protocol):
    """How the residual stream lies on ranks; all methods on (tokens, features) and collectives where they say so."""

    comm: Communicator
    collectives: Counter[str]

    def begin(self, shape: torch.Size) -> None:
        """Tokens of this shape, (…), go through the model next."""

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows of all tokens in these tokens' shape (…, features); x is this rank's part of the stream."""

    def of_stream(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows of this rank's part of the stream in its shape; x has all tokens, (…, features)."""

    def gather(self, x: Tensor) -> Tensor:
        """All tokens of the stream."""

    def gather_and_multiply(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of the stream, and each times a weight (features, out)."""

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's part of the stream, from x (all tokens, features) times a weight (features, out), summed."""

    def reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        """Begin to sum what ranks have for all tokens, (tokens, features), which may be overwritten.

        Returns:
            What gives, when called, this rank's part of the stream.
        """

    def reduce_now(self, partial: Tensor) -> Tensor:
        """The same, done when it returns."""


class Replicated:
    """Every rank has the whole stream.

    Args:
        comm: between the ranks that share each layer.
        chunks: of tokens, in which a layer's products are computed and summed; more than 1 overlaps the two.

    Attributes:
        collectives: how many have been called, by name.
    """

    def __init__(self, comm: Communicator, chunks: int = 1) -> None:
        self.comm, self.chunks = comm, chunks
        self.collectives: Counter[str] = Counter()

    def begin(self, shape: torch.Size) -> None:
        """See `Stream`; any number of tokens will do."""

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(*x.shape[:-1], -1)

    of_stream = all_tokens

    def gather(self, x: Tensor) -> Tensor:
        return x

    def gather_and_multiply(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x, x @ weight

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.chunks == 1:  # nothing else to do meanwhile
            return self.reduce_now(x @ weight)
        out = x.new_empty(len(x), weight.shape[1])
        waits = []
        for rows, part in zip(x.tensor_split(self.chunks), out.tensor_split(self.chunks), strict=True):
            torch.mm(rows, weight, out=part)
            waits.append(self.reduce(part))
        for wait in waits:
            wait()
        return out

    def reduce_now(self, partial: Tensor) -> Tensor:
        self.collectives["all_reduce"] += 1
        self.comm.all_reduce(partial)
        return partial

    def reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        self.collectives["all_reduce"] += 1
        pending = self.comm.all_reduce(partial, async_op=True)

        def result() -> Tensor:
            pending.wait()
            return partial

        return result


class SequenceParallel:
    """Every rank has a part of the tokens: as many as the others, the last ones padded with zeros.

    The stream is (tokens of this rank, features) whatever shape the token ids had.

    Args:
        comm: between the ranks that share each layer.
        chunks: of a rank's tokens, in which a layer's products are computed and summed.

    Attributes:
        collectives: how many have been called, by name.
    """

    def __init__(self, comm: Communicator, chunks: int = 1) -> None:
        self.comm, self.chunks = comm, chunks
        self.collectives: Counter[str] = Counter()
        self._shape = torch.Size()

    def begin(self, shape: torch.Size) -> None:
        """See `Stream`."""
        self._shape = shape

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(*self._shape, -1)

    def of_stream(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows

    def gather(self, x: Tensor) -> Tensor:
        full = self._room_for_all(x)
        self.comm.all_gather(full)
        return full[: self._shape.numel()]

    @property
    def _own(self) -> slice:
        """This rank's rows among those of all."""
        rows = self._rows
        return slice(self.comm.rank * rows, (self.comm.rank + 1) * rows)

    @property
    def _rows(self) -> int:
        """Of each rank, padding included."""
        return -(-self._shape.numel() // self.comm.world_size)

    def gather_and_multiply(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        own, tokens = self._own, self._shape.numel()
        full = self._room_for_all(x)
        pending = self.comm.all_gather(full, async_op=True)
        out = x.new_empty(len(full), weight.shape[1])
        torch.mm(x, weight, out=out[own])
        pending.wait()
        for others in (slice(own.start), slice(own.stop, None)):
            torch.mm(full[others], weight, out=out[others])
        return full[:tokens], out[:tokens]

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """A chunk is a part of every rank's rows."""
        if self.chunks == 1:
            return self.reduce_now(x @ weight)
        out, waits = x.new_empty(self._rows, weight.shape[1]), []
        for first, last in _edges(self._rows, self.chunks):
            part = x.new_zeros(self.comm.world_size, last - first, weight.shape[1])
            for rank, rows in enumerate(part):
                mine = x[rank * self._rows + first : rank * self._rows + last]
                torch.mm(mine, weight, out=rows[: len(mine)])
            waits.append((self._reduce_scatter(part), out[first:last]))
        for wait, place in waits:
            place.copy_(wait())
        return out

    def reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        return self._reduce_scatter(self._padded(partial))

    def reduce_now(self, partial: Tensor) -> Tensor:
        self.collectives["reduce_scatter"] += 1
        return self.comm.reduce_scatter(self._padded(partial)).view(self._rows, -1).clone()

    def _padded(self, partial: Tensor) -> Tensor:
        padding = self._rows * self.comm.world_size - len(partial)
        return torch.cat((partial, partial.new_zeros(padding, partial.shape[1]))) if padding else partial

    def _reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        """Of rows of all ranks, equally many; the result is a copy."""
        self.collectives["reduce_scatter"] += 1
        pending = self.comm.reduce_scatter(full, async_op=True)

        def result() -> Tensor:
            pending.wait()
            return full.view(self.comm.world_size, -1, full.shape[-1])[self.comm.rank].clone()

        return result

    def _room_for_all(self, x: Tensor) -> Tensor:
        """Rows of all ranks, with this rank's in their place, to be gathered."""
        self.collectives["all_gather"] += 1
        full = x.new_empty(len(x) * self.comm.world_size, x.shape[1])
        full[self._own] = x
        return full


def _edges(rows: int, chunks: int) -> list[tuple[int, int]]:
    edges = [rows * number // chunks for number in range(chunks + 1)]
    return list(zip(edges, edges[1:], strict=False))
