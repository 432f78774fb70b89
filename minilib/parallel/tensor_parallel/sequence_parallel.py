"""Sequence parallelism: between layers each rank has a part of the tokens, so that norms and sums keep a part of them.

                     │ tokens of rank 0 │ of rank 1 │ of rank 2 │ of rank 3 · │        · padding
    enter a layer    all-gather       all tokens to every rank
    leave it         reduce-scatter   sums over ranks, of its own tokens to each

A rank may keep for backward all tokens that enter a layer's products, or its own alone and gather the others again: one
more all-gather for each product by columns, for (n-1)/n of these activations.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2, where
ranks gather again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.ranks.collectives import Communicator


class SequenceParallel:
    """A `Stream` of which every rank has as many tokens as the others, the last ones padded with zeros.

    It is (tokens of this rank, features), whatever shape the token ids had.

    Args:
        comm: between the ranks that share each layer.
        chunks: of a rank's tokens, in which a layer's products are computed and summed.
        regather: keep a rank's own tokens for backward, and gather the others again.

    Attributes:
        collectives: how many have been called, by name.
    """

    def __init__(self, comm: Communicator, chunks: int = 1, regather: bool = False) -> None:
        self.comm, self.chunks, self.regather = comm, chunks, regather
        self.collectives: Counter[str] = Counter()
        self._shape = torch.Size()

    def begin(self, shape: torch.Size) -> None:
        """See `Stream`; backward asks for no shape, so that forwards may follow each other before it."""
        self._shape = shape

    def num_tokens(self, x: Tensor) -> int:
        return self._shape.numel()

    def all_tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(*self._shape, rows.shape[-1])

    def of_stream(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows

    def begin_gather(self, x: Tensor, tokens: int) -> Callable[[], Tensor]:
        full, wait = self._begin_gather(x)

        def result() -> Tensor:
            wait()
            return full[:tokens]

        return result

    def gather_and_multiply(self, x: Tensor, weight: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        full, wait = self._begin_gather(x)
        out = x.new_empty(len(full), weight.shape[1])
        first, last = self.comm.rank * len(x), (self.comm.rank + 1) * len(x)
        torch.mm(x, weight, out=out[first:last])
        wait()
        for others in (slice(first), slice(last, None)):
            torch.mm(full[others], weight, out=out[others])
        return full[:tokens], out[:tokens]

    def multiply_and_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Stream`; a chunk is a part of every rank's rows."""
        if self.chunks == 1:  # nothing else to do meanwhile
            return self.reduce(x @ weight)
        n = self.comm.world_size
        of_ranks = ceil_div(len(x), n)
        out, waits = x.new_empty(of_ranks, weight.shape[1]), []
        for first, last in pairwise(of_ranks * number // self.chunks for number in range(self.chunks + 1)):
            part = x.new_zeros(n, last - first, weight.shape[1])
            for rank, rows in enumerate(part):
                mine = x[rank * of_ranks + first : rank * of_ranks + last]
                torch.mm(mine, weight, out=rows[: len(mine)])
            waits.append((self._begin_reduce(part), out[first:last]))
        for wait, place in waits:
            place.copy_(wait())
        return out

    def begin_reduce(self, partial: Tensor) -> Callable[[], Tensor]:
        return self._begin_reduce(self._padded(partial))

    def reduce(self, partial: Tensor) -> Tensor:
        self.collectives["reduce_scatter"] += 1
        full = self._padded(partial)
        return self.comm.reduce_scatter(full).view(full.shape[1:]).clone()

    def _padded(self, partial: Tensor) -> Tensor:
        """With rows of zeros, equally many for each rank: (ranks, rows, features)."""
        n = self.comm.world_size
        padding = ceil_div(len(partial), n) * n - len(partial)
        if padding:
            partial = torch.cat((partial, partial.new_zeros(padding, partial.shape[1])))
        return partial.view(n, -1, partial.shape[1])

    def _begin_reduce(self, full: Tensor) -> Callable[[], Tensor]:
        """Of (ranks, rows, features) this rank's rows, a copy."""
        self.collectives["reduce_scatter"] += 1
        pending = self.comm.reduce_scatter(full, async_op=True)

        def result() -> Tensor:
            pending.wait()
            return full[self.comm.rank].clone()

        return result

    def _begin_gather(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Rows of all ranks, padding included, which are all there after a call of what comes along."""
        self.collectives["all_gather"] += 1
        full = x.new_empty(self.comm.world_size, *x.shape)
        full[self.comm.rank] = x
        return full.flatten(0, 1), self.comm.all_gather(full, async_op=True).wait
