"""Which host fails when, and for how long: a list, or drawn without end."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_quantity, check_whole

HOUR = 3600.0


@dataclass(frozen=True)
class HostFailure:
    """A host is lost with all of its GPUs, and comes back.

    Args:
        at: seconds on the simulated clock.
        host: its number.
        repair_seconds: until its GPUs are in use again.

    Raises:
        ValueError: if one of them is none.
    """

    at: float
    host: int
    repair_seconds: float

    def __post_init__(self) -> None:
        check_quantity("time of a failure", self.at)
        check_whole("number of a host", self.host)
        check_quantity("repair_seconds", self.repair_seconds)


def drawn_failures(hosts: int, per_host_hour: float, repair_seconds: float, seed: int = 0) -> Iterator[HostFailure]:
    """Failures in order of time, without end: each host fails at a constant rate while it is in use.

    Args:
        hosts: how many.
        per_host_hour: failures of one host in an hour of use; 0 for none.
        repair_seconds: of each failure.
        seed: of all times.

    Raises:
        ValueError: if a number is none.
    """
    check_whole("hosts", hosts, 1)
    check_quantity("failures per host-hour", per_host_hour)
    check_quantity("repair_seconds", repair_seconds)
    return _drawn(hosts, per_host_hour / HOUR, repair_seconds, random.Random(f"failures {seed}"))


def _drawn(hosts: int, rate: float, repair_seconds: float, chance: random.Random) -> Iterator[HostFailure]:
    def life() -> int:
        return 1 + int(chance.expovariate(rate))  # whole seconds keep all sums exact

    coming = [(life(), host) for host in range(hosts)] if rate else []
    heapq.heapify(coming)
    while coming:
        at, host = coming[0]
        yield HostFailure(at, host, repair_seconds)
        heapq.heapreplace(coming, (at + repair_seconds + life(), host))
