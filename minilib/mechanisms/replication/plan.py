"""Replication and reduction by plan. A plan is data: rounds of transfers, each (src, dst, chunk, copy or reduce).

The same plan is drawn (minilib/book/plot_plans.py), priced (`seconds`), simulated with the provenance of every chunk
(`simulate`) and run on tensors (minilib/ranks/collectives.py) or on a log between processes
(minilib/classic/log/replicated_log.py). Which plans there are is in minilib/mechanisms/replication/plans.py.

In a round each rank sends at most one message and receives at most one, both at once. What it sends is what it had when
the round began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

COLLECTIVES = ("broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather", "all_to_all")


class PlanError(ValueError):
    """A plan that does not do what its collective promises; the message says where it goes wrong."""


class NothingToSend(PlanError):
    """A rank is to send a chunk that it does not have."""


class CountedTwice(PlanError):
    """A reduction would add some rank's contribution a second time."""


class ContributionLost(PlanError):
    """When the plan is done, a rank lacks a contribution that it should have."""


class LinkLike(Protocol):
    """What a price needs to know of a way from one rank to another."""

    latency: float  # α, seconds for an empty message
    bandwidth: float  # 1/β, bytes/s


@dataclass(frozen=True)
class Transfer:
    """One message.

    Args:
        src, dst: ranks.
        chunk: number of the first chunk that it carries.
        reduce: True if dst adds it to what it has, False if dst takes it over.
        count: how many chunks travel in this message.
        stride: from the number of one of them to the next.
    """

    src: int
    dst: int
    chunk: int
    reduce: bool = False
    count: int = 1
    stride: int = 1

    @property
    def chunks(self) -> range:
        """Numbers of the chunks that it carries."""
        return range(self.chunk, self.chunk + self.count * self.stride, self.stride)


@dataclass(frozen=True)
class Plan:
    """Who sends what to whom, round by round.

    Args:
        name: such as "ring".
        collective: one of COLLECTIVES: what must be true in the end.
        world_size: ranks.
        num_chunks: pieces of about equal size that the data is cut into. For "reduce_scatter" and "all_gather" rank r
            owns chunk r of world_size; for "all_to_all" chunk src · world_size + dst goes from src to dst.
        rounds: transfers that happen at the same time, round after round.
        root: for "broadcast" and "reduce".

    Raises:
        PlanError: if a rank or chunk does not exist, or a rank would send or receive twice in a round.
    """

    name: str
    collective: str
    world_size: int
    num_chunks: int
    rounds: tuple[tuple[Transfer, ...], ...] = field(repr=False, hash=False)  # thousands of them, at every lookup
    root: int = 0

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise PlanError(f"collective is one of {', '.join(COLLECTIVES)}; got {self.collective!r}")
        if self.world_size < 1 or self.num_chunks < 1 or not 0 <= self.root < self.world_size:
            raise PlanError(f"needs ranks, chunks and a root among the ranks, got {self!r}")
        among = range(self.world_size)
        for number, transfers in enumerate(self.rounds, 1):
            for side in ("src", "dst"):
                ranks = [getattr(transfer, side) for transfer in transfers]
                if len(set(ranks)) < len(ranks):
                    twice = max(ranks, key=ranks.count)
                    raise PlanError(f"round {number}: rank {twice} is {side} of {ranks.count(twice)} messages at once")
            for t in transfers:
                between_ranks = t.src in among and t.dst in among and t.src != t.dst
                full = t.count > 0 and t.stride > 0
                if not between_ranks or not full or t.chunk < 0 or t.chunks[-1] >= self.num_chunks:
                    raise PlanError(f"round {number}: {t} is not between two of {self.world_size} ranks and "
                                    f"{self.num_chunks} chunks")  # fmt: skip

    def starts_with(self, rank: int) -> frozenset[int]:
        """Chunks that a rank has before the first round."""
        everything = range(self.num_chunks)
        if self.collective == "broadcast":
            return frozenset(everything if rank == self.root else ())
        if self.collective == "all_gather":
            return frozenset(self._owned_by(rank))
        if self.collective == "all_to_all":
            return frozenset(range(rank * self.world_size, (rank + 1) * self.world_size))
        return frozenset(everything)

    def promises(self, rank: int) -> dict[int, frozenset[int]]:
        """Chunk → whose contributions it must hold on a rank in the end; chunks left out may hold anything."""
        everybody, everything = frozenset(range(self.world_size)), range(self.num_chunks)
        if self.collective == "broadcast":
            return dict.fromkeys(everything, frozenset({self.root}))
        if self.collective == "reduce":
            return dict.fromkeys(everything if rank == self.root else (), everybody)
        if self.collective == "all_reduce":
            return dict.fromkeys(everything, everybody)
        if self.collective == "reduce_scatter":
            return dict.fromkeys(self._owned_by(rank), everybody)
        if self.collective == "all_gather":
            return {chunk: frozenset({owner}) for owner in everybody for chunk in self._owned_by(owner)}
        return {src * self.world_size + rank: frozenset({src}) for src in everybody}

    def messages(self, rank: int) -> int:
        """Messages that a rank sends."""
        return sum(transfer.src == rank for transfers in self.rounds for transfer in transfers)

    def bytes_sent(self, rank: int, chunk_bytes: Sequence[int]) -> int:
        """Bytes that a rank sends, if chunk c has chunk_bytes[c]."""
        return sum(_size(t, chunk_bytes) for transfers in self.rounds for t in transfers if t.src == rank)

    def _owned_by(self, rank: int) -> range:
        each = self.num_chunks // self.world_size
        return range(rank * each, (rank + 1) * each)


def pack_rounds(transfers: Iterable[Transfer]) -> tuple[tuple[Transfer, ...], ...]:
    """Put transfers, given in an order in which they could happen one by one, into as early a round as can be.

    A transfer waits for what its sender must have received, for whoever reads what it overwrites, and for a round in
    which its sender does not send and its receiver does not receive. Cost: O(transfers · chunks in each).
    """
    rounds: list[list[Transfer]] = []
    written: dict[tuple[int, int], int] = {}  # (rank, chunk) → first round in which its last value can be sent
    unread: dict[tuple[int, int], int] = {}  # (rank, chunk) → first round in which it may be overwritten
    busy: set[tuple[str, int, int]] = set()
    for t in transfers:
        at = 0
        for c in t.chunks:
            at = max(at, written.get((t.src, c), 0), written.get((t.dst, c), 0), unread.get((t.dst, c), 0))
        while ("out", t.src, at) in busy or ("in", t.dst, at) in busy:
            at += 1
        busy |= {("out", t.src, at), ("in", t.dst, at)}
        rounds += [[] for _ in range(at + 1 - len(rounds))]
        rounds[at].append(t)
        for c in t.chunks:
            written[t.dst, c] = at + 1
            unread[t.src, c] = max(unread.get((t.src, c), 0), at + 1)
    return tuple(tuple(group) for group in rounds)


def simulate(
    plan: Plan, look: Callable[[int, list[dict[int, frozenset[int]]]], None] = lambda number, state: None
) -> list[dict[int, frozenset[int]]]:
    """Run a plan on chunks that know whose contributions they hold.

    Args:
        plan: what to run.
        look: called with (0, state) before the first round and (k, state) after the k-th; copy what you keep of it.

    Returns:
        For each rank, chunk → ranks whose contributions it holds.

    Raises:
        NothingToSend, CountedTwice, ContributionLost: where the plan is wrong.

    Cost: O(transfers · chunks in each · world_size).
    """
    state = [dict.fromkeys(plan.starts_with(rank), frozenset({rank})) for rank in range(plan.world_size)]
    look(0, state)
    for number, transfers in enumerate(plan.rounds, 1):
        sent = []
        for t in transfers:
            missing = [c for c in t.chunks if c not in state[t.src]]
            if missing:
                raise NothingToSend(f"round {number}: rank {t.src} has no chunk {missing[0]} to send to rank {t.dst}")
            sent.append([state[t.src][c] for c in t.chunks])
        for t, values in zip(transfers, sent, strict=True):
            for c, value in zip(t.chunks, values, strict=True):
                state[t.dst][c] = _merge(number, t, c, state[t.dst].get(c, frozenset()), value)
        look(number, state)
    for rank, holds in enumerate(state):
        for chunk, wanted in plan.promises(rank).items():
            found = holds.get(chunk, frozenset())
            if found != wanted:
                lost = sorted(wanted - found)
                raise ContributionLost(f"{plan.name}: rank {rank}, chunk {chunk} holds {sorted(found)}, lacks {lost}")
    return state


def seconds(
    plan: Plan,
    chunk_bytes: Sequence[int],
    link: LinkLike | Callable[[int, int], LinkLike],
    reduce_rate: float = float("inf"),
    bus: LinkLike | None = None,
) -> float:
    """Predicted time: the sum over rounds of the slowest message, α + bytes · β.

    Args:
        plan: what to price.
        chunk_bytes: bytes of each chunk.
        link: α and β of every way, or a function of (src, dst) for links that differ, such as within and between hosts.
        reduce_rate: bytes/s at which a receiver adds what came to what it has.
        bus: what all messages of a round get one after another, where ranks share a host's cores or a switch.

    Source: Hockney 1994 for α and β; Thakur, Rabenseifner and Gropp 2005 for the collectives.
    """
    way = link if callable(link) else lambda src, dst: link
    total = 0.0
    for transfers in plan.rounds:
        slowest = together = 0.0
        for t in transfers:
            size = _size(t, chunk_bytes)
            if size:
                own = way(t.src, t.dst)
                adding = size / reduce_rate if t.reduce else 0.0
                slowest = max(slowest, own.latency + size / own.bandwidth + adding)
                if bus:
                    together += bus.latency + size / bus.bandwidth
        total += max(slowest, together)
    return total


def _merge(number: int, t: Transfer, chunk: int, old: frozenset[int], new: frozenset[int]) -> frozenset[int]:
    if not t.reduce:
        return new
    if old & new:
        raise CountedTwice(
            f"round {number}: rank {t.dst} would count rank {min(old & new)} twice in chunk {chunk}, "
            f"adding {sorted(new)} from rank {t.src} to {sorted(old)}"
        )
    return old | new


def _size(transfer: Transfer, chunk_bytes: Sequence[int]) -> int:
    return sum(chunk_bytes[c] for c in transfer.chunks)
