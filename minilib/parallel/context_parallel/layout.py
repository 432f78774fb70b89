"""Which tokens of a sequence each rank has, and which of its queries see which keys of another rank.

    4 ranks, balanced     chunk   0 1 2 3 4 5 6 7       head and tail: rank r has chunks r and 2n-1-r
                          rank    0 1 2 3 3 2 1 0

A causal query sees the keys before it, so with one chunk each the last rank would compute 2n - 1 times what the first
one does. With a head and a tail, every rank sees as many pairs of query and key, and in each round of a ring, too.

Chunks are runs of tokens, so of two different chunks only one document can have tokens in both: the one that the
earlier chunk ends with and the later one begins with. What a rank's queries see of another rank's keys is therefore a
few rectangles (`Tile`), and triangles where a chunk meets itself.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Brandon et al. 2023, "Striped Attention", for
the imbalance; head and tail as in Megatron-LM and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minilib.mechanisms.basics.checks import check_whole, is_whole


class LengthDoesNotDivide(ValueError):
    """A sequence that cannot be dealt to ranks in chunks of one length."""


class Tile(NamedTuple):
    """Queries of a rank that see all of some keys, or each those up to its own place.

    Args:
        rows: of the batch.
        queries: tokens of the rank that has the queries, counted from its first.
        keys: tokens of the rank that has the keys.
        causal: True where the keys are the queries' own tokens and each query sees those up to itself.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one row."""
        queries, keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return queries * (queries + 1) // 2 if self.causal else queries * keys


Documents = Sequence[Sequence[int]]  # for each row where its documents begin, from 0 to its length


@dataclass(frozen=True)
class TokenLayout:
    """Who has which tokens of rows of one length.

    Args:
        num_tokens: of a row, all ranks together.
        world_size: ranks.
        balanced: a head and a tail for each rank instead of one run of tokens.

    Raises:
        LengthDoesNotDivide: if there are no tokens or no ranks, or tokens are no multiple of the number of chunks.
    """

    num_tokens: int
    world_size: int
    balanced: bool = True

    def __post_init__(self) -> None:
        check_whole("world_size", self.world_size, 1, LengthDoesNotDivide)
        check_whole("num_tokens", self.num_tokens, 0, LengthDoesNotDivide)
        if not self.num_tokens or self.num_tokens % self.num_chunks:
            kind = "a head and a tail" if self.balanced else "a chunk"
            raise LengthDoesNotDivide(
                f"{self.num_tokens} tokens cannot be dealt to {self.world_size} ranks, {kind} each: "
                f"pad or cut rows to a multiple of {self.num_chunks}"
            )

    @property
    def num_chunks(self) -> int:
        """Runs of tokens that a row is cut into."""
        return self.world_size * (2 if self.balanced else 1)

    def chunks(self, rank: int) -> list[range]:
        """The runs of tokens that a rank has, in order.

        Raises:
            IndexError: if there is no such rank; so do all methods that take one.
        """
        if not is_whole(rank, 0) or rank >= self.world_size:
            raise IndexError(f"rank {rank!r} is none of the {self.world_size} ranks")
        size = self.num_tokens // self.num_chunks
        numbers = [rank, self.num_chunks - 1 - rank] if self.balanced else [rank]
        return [range(number * size, (number + 1) * size) for number in numbers]

    def places(self, rank: int) -> Tensor:
        """Where a rank's tokens stand in the row, (tokens of a rank,) int64."""
        return torch.tensor([place for chunk in self.chunks(rank) for place in chunk])

    def order(self) -> Tensor:
        """The places of all ranks' tokens, rank after rank: row[order] is what they have one after another."""
        return torch.cat([self.places(rank) for rank in range(self.world_size)])

    def tiles(self, rank: int, source: int, documents: Documents | None = None, causal: bool = True) -> list[Tile]:
        """What a rank's queries see of the keys of another rank, or of its own.

        Args:
            rank: has the queries.
            source: has the keys.
            documents: texts that do not see each other; each row is one if left out.
            causal: a query sees keys up to its own place; otherwise all of its document.
        """
        rows = [(slice(None), (0, self.num_tokens))] if documents is None else [
            (slice(row, row + 1), starts) for row, starts in enumerate(documents)
        ]  # fmt: skip
        found = []
        for row, starts in rows:
            for at, mine in _numbered(self.chunks(rank)):
                for there, theirs in _numbered(self.chunks(source)):
                    if causal and theirs.start > mine.start:
                        continue
                    for begin, end in pairwise(starts):
                        queries, keys = _within(mine, begin, end), _within(theirs, begin, end)
                        if queries and keys:
                            places = _shifted(queries, at - mine.start), _shifted(keys, there - theirs.start)
                            found.append(Tile(row, *places, causal and mine == theirs))
        return found

    def check_documents(self, documents: Documents | None, num_rows: int) -> None:
        """Refuse documents that do not cover each row; see `check_documents`."""
        check_documents(documents, num_rows, self.num_tokens)


def check_documents(documents: Documents | None, num_rows: int, num_tokens: int) -> None:
    """Refuse documents that do not cover each row.

    Raises:
        ValueError: which says which row, and what came.
    """
    if documents is None:
        return
    found = len(documents) if hasattr(documents, "__len__") else repr(documents)
    if found != num_rows:
        raise ValueError(f"documents has one list for each of {num_rows} rows, got {found}")
    for row, starts in enumerate(documents):
        given = list(starts) if hasattr(starts, "__iter__") else [starts]
        climbing = all(map(is_whole, given)) and all(one < other for one, other in pairwise(given))
        if not climbing or given[:1] != [0] or given[-1:] != [num_tokens]:
            raise ValueError(f"documents[{row}] must climb from 0 to the {num_tokens} tokens of a row, got {given}")


def positions_in(documents: Documents | None, num_rows: int, num_tokens: int) -> Tensor:
    """Each token's place in its own document, (rows, tokens) int64.

    Raises:
        ValueError: as `check_documents`.
    """
    row = torch.arange(num_tokens)
    check_documents(documents, num_rows, num_tokens)
    if documents is None or not num_rows:
        return row.expand(num_rows, -1)
    starts = [torch.as_tensor(begins[:-1]).repeat_interleave(torch.as_tensor(begins).diff()) for begins in documents]
    return torch.stack([row - start for start in starts])


def _numbered(chunks: Sequence[range]) -> list[tuple[int, range]]:
    """Chunks with the number of tokens before each, all of one length."""
    return [(number * len(chunk), chunk) for number, chunk in enumerate(chunks)]


def _within(chunk: range, begin: int, end: int) -> range:
    return range(max(chunk.start, begin), min(chunk.stop, end))


def _shifted(places: range, by: int) -> slice:
    return slice(places.start + by, places.stop + by)
