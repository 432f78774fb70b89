"""One clock for all ranks: how far each rank's clock is from that of rank 0, with a bound on the error.

    rank r   t0 ────────────────→         t3          θ = clock of rank 0 − clock of rank r
                     ping ↘     ↗ pong                t1 ≥ t0 + θ,  t3 + θ ≥ t2,  so  t2 − t3 ≤ θ ≤ t1 − t0
    rank 0               t1 → t2                      estimate: the middle; bound: half the round trip

Of many exchanges the one with the shortest round trip counts. Two of them, before and after what is traced, give the
drift: between them the offset lies on a line, and its error is at most the larger bound.

Source: Cristian 1989, "Probabilistic clock synchronization"; Mills 1991, "Internet time synchronization" (the four
times).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minilib.mechanisms.basics.checks import check_whole

ROUNDS = 32


@dataclass(frozen=True)
class TimestampExchange:
    """The four times of a ping and its pong, in ns.

    Args:
        sent, returned: on the asking clock.
        received, answered: on the reference clock.

    Raises:
        ValueError: if a clock went back.
    """

    sent: int
    received: int
    answered: int
    returned: int

    def __post_init__(self) -> None:
        if self.returned < self.sent or self.answered < self.received:
            raise ValueError(f"a clock of an exchange never goes back, got {self}")

    @property
    def round_trip_ns(self) -> int:
        """Time on the way, there and back; negative only if clocks run at different speeds."""
        return self.returned - self.sent - (self.answered - self.received)


@dataclass(frozen=True)
class ClockOffset:
    """What to add to a clock to get the reference, at one time.

    Args:
        at_ns: the time, on the clock itself.
        offset_ns: reference − clock.
        bound_ns: the true offset is no further away.
    """

    at_ns: int
    offset_ns: int
    bound_ns: int


@dataclass(frozen=True)
class ClockLine:
    """A clock that drifts against the reference at a constant rate.

    Args:
        first: offset before what is traced.
        last: offset after it; the same as `first` if there is no other.

    Raises:
        ValueError: if the last is earlier than the first.
    """

    first: ClockOffset
    last: ClockOffset

    def __post_init__(self) -> None:
        if self.last.at_ns < self.first.at_ns:
            raise ValueError(f"the last offset is later than the first, got {self.first} and then {self.last}")

    @property
    def drift(self) -> float:
        """Seconds that the reference gains on the clock in a second of the clock."""
        if self.last.at_ns == self.first.at_ns:
            return 0.0
        return (self.last.offset_ns - self.first.offset_ns) / (self.last.at_ns - self.first.at_ns)

    def to_reference(self, clock_ns: int) -> int:
        """A time of the clock on the reference."""
        return clock_ns + self.first.offset_ns + round(self.drift * (clock_ns - self.first.at_ns))

    def bound_ns(self, clock_ns: int) -> float:
        """Largest error of `to_reference`; between the offsets at most the larger bound, and growing outside."""
        span = self.last.at_ns - self.first.at_ns
        share = (clock_ns - self.first.at_ns) / span if span else 0.0
        both = abs(1 - share) * self.first.bound_ns + abs(share) * self.last.bound_ns
        return both * (1 + abs(self.drift)) + 1


SAME_CLOCK = ClockLine(ClockOffset(0, 0, 0), ClockOffset(0, 0, 0))


def offset_of(exchanges: Sequence[TimestampExchange]) -> ClockOffset:
    """The offset by the exchange with the shortest round trip.

    Raises:
        ValueError: without an exchange.
    """
    if not exchanges:
        raise ValueError("an offset needs at least one exchange of timestamps, got none")
    best = min(exchanges, key=lambda exchange: exchange.round_trip_ns)
    twice = best.received - best.sent + best.answered - best.returned
    return ClockOffset((best.sent + best.returned) // 2, twice // 2, abs(best.round_trip_ns) // 2 + 2)


def exchange_clocks(
    rounds: int = ROUNDS, clock: Callable[[], int] = time.monotonic_ns, group: dist.ProcessGroup | None = None
) -> ClockOffset:
    """This rank's offset from rank 0's clock; a collective: every rank of the group calls it.

    Args:
        rounds: exchanges of each rank with rank 0, one rank after the other.
        clock: the one that the rank's trace uses, in ns.
        group: of ranks, with a backend that sends from the CPU; all of them if left out.

    Cost: 2 · rounds messages of at most 16 bytes for each rank but rank 0.

    Raises:
        ValueError: if rounds is below 1.
    """
    check_whole("rounds", rounds, 1)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank == 0:
        for peer in range(1, world_size):
            _answer(peer, rounds, clock, group)
        return ClockOffset(clock(), 0, 0)
    return offset_of([_ask(clock, group) for _ in range(rounds)])


def _answer(peer: int, rounds: int, clock: Callable[[], int], group: dist.ProcessGroup | None) -> None:
    ping = torch.zeros(1, dtype=torch.int64)
    for _ in range(rounds):
        dist.recv(ping, group=group, group_src=peer)
        received = clock()
        pong = torch.tensor([received, 0])
        pong[1] = clock()
        dist.send(pong, group=group, group_dst=peer)


def _ask(clock: Callable[[], int], group: dist.ProcessGroup | None) -> TimestampExchange:
    ping, pong = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sent = clock()
    dist.send(ping, group=group, group_dst=0)
    dist.recv(pong, group=group, group_src=0)
    returned = clock()
    received, answered = pong.tolist()
    return TimestampExchange(sent, received, answered, returned)
