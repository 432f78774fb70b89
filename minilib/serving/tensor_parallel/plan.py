"""What rank 0 tells the others before each step: how pages move, and what the step computes.

    rank 0    scheduler ─ page tables ─ plan ─┬─ forward ─ logits ─ tokens
    rank 1                                    └─ forward                       pages of its heads, by the same numbers

Only rank 0 decides, so nothing that differs between processes, such as clocks, random seeds or the order of arrivals,
can make ranks do different things. In production: vLLM's scheduler sends its `SchedulerOutput` to all workers so.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minilib.mechanisms.paging import Copy, PageTable
from minilib.ranks.collectives import Communicator
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import Work
from minilib.serving.sequence import Sequence, flat_batch


class SentTable(NamedTuple):
    """What attention reads of a page table, on a rank that has none."""

    frames: list[int]
    length: int
    page_size: int


@dataclass(frozen=True)
class StepPlan:
    """One step, or none.

    Args:
        moves: of pages since the step before, in order: "copy", "swap_out" or "swap_in", and which pages.
        token_ids: of all sequences, one after another.
        tables: of each sequence, as attention reads it.
        counts: tokens of each sequence that the step computes, the last ones of its table.
        logits_indices: tokens whose logits are computed, counted through all of the step.
    """

    moves: list[tuple[str, list[Copy]]]
    token_ids: list[int]
    tables: list[SentTable]
    counts: list[int]
    logits_indices: list[int]

    @classmethod
    def of(cls, moves: list[tuple[str, list[Copy]]], work: list[tuple[Sequence, int]]) -> StepPlan:
        """The plan of a step that the scheduler has made."""
        token_ids, _, last = flat_batch(work)
        tables = [SentTable(s.table.frames, s.table.length, s.table.page_size) for s, _ in work]
        return cls(moves, token_ids, tables, [count for _, count in work], last)

    @property
    def positions(self) -> list[int]:
        """Of the tokens, each in its own sequence."""
        pairs = zip(self.tables, self.counts, strict=True)
        return [position for table, count in pairs for position in range(table.length - count, table.length)]

    @property
    def work(self) -> list[Work]:
        """As attention wants it."""
        return [Work(table, count) for table, count in zip(self.tables, self.counts, strict=True)]


class RecordedPages(PagedCache):
    """The pages of one rank, which writes down how they move for the other ranks to do the same."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.moves: list[tuple[str, list[Copy]]] = []

    def copy(self, copies: list[Copy]) -> None:
        super().copy(copies)
        if copies:
            self.moves.append(("copy", copies))

    def swap_out(self, table: PageTable) -> int:
        return self._moved("swap_out", table)

    def swap_in(self, table: PageTable) -> int:
        return self._moved("swap_in", table)

    def _moved(self, kind: str, table: PageTable) -> int:
        before = table.present()
        count = getattr(super(), kind)(table)
        self.moves.append((kind, [Copy(*pair) for pair in zip(before, table.present(), strict=True)]))
        return count


def broadcast(message: object, comm: Communicator) -> object:
    """What rank 0 has to say, on every rank; what others pass is ignored."""
    content = pickle.dumps(message) if comm.rank == 0 else b""
    size = torch.tensor([len(content)], device=comm.device)
    comm.broadcast(size)
    if comm.rank:
        content = bytes(int(size))
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(comm.device)
    comm.broadcast(buffer)
    return message if comm.rank == 0 else pickle.loads(buffer.cpu().numpy().tobytes())
