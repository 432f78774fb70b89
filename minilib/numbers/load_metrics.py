"""How even loads are, how much is dropped where there is no room, and how long requests waited."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from minilib.mechanisms.sharding import imbalance


def max_over_mean(loads: Iterable[float]) -> float:
    """The largest load divided by the mean load; 1.0 if every load is 0.

    A step in which all targets wait for the slowest takes this many times as long as a balanced step.

    Args:
        loads: one number per target; the elements of an array are converted to float.

    Raises:
        ValueError: if there is no target.
    """
    return imbalance([float(load) for load in loads])


def coefficient_of_variation(loads: Iterable[float]) -> float:
    """Standard deviation of the loads over their mean; 0.0 is even, and so are no loads at all.

    Raises:
        ValueError: if there is no target.
    """
    values = [float(load) for load in loads]
    if not values:
        raise ValueError("needs the load of one target or more, got none")
    mean = statistics.fmean(values)
    return statistics.pstdev(values, mean) / mean if mean else 0.0


def drop_rate(offered: Sequence[float], capacity: float | Sequence[float]) -> float:
    """Share of what is offered that finds no room, 0 to 1; 0.0 if nothing is offered.

    Args:
        offered: load that each target is to take.
        capacity: what one can take, or what each can.

    Raises:
        ValueError: if there are more capacities than targets, or fewer.
    """
    rooms = [capacity] * len(offered) if isinstance(capacity, int | float) else list(capacity)
    if len(rooms) != len(offered):
        raise ValueError(f"one capacity for all targets or one each, got {len(rooms)} for {len(offered)}")
    total = float(sum(offered))
    dropped = sum(max(0.0, float(load) - float(room)) for load, room in zip(offered, rooms, strict=True))
    return dropped / total if total else 0.0


def quantile(values: Collection[float], share: float) -> float:
    """The value that a share of all do not exceed, interpolated between neighbours as numpy.quantile does.

    Args:
        values: one or more.
        share: 0 to 1, such as 0.99.

    Raises:
        ValueError: if there is no value, or the share is none.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"needs one value or more and a share from 0 to 1, got {len(values)} values and {share!r}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (place - math.floor(place)) * (above - below)


@dataclass(frozen=True)
class Delay:
    """How long requests took, or waited, in seconds.

    Args:
        mean: over all requests.
        p50: half of them took no longer.
        p90: nine of ten took no longer.
        p99: all but one of a hundred took no longer.
    """

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Collection[float]) -> Delay:
        """Sum up the delays of one request or more.

        Raises:
            ValueError: if there is none.
        """
        mean = statistics.fmean(seconds) if seconds else 0.0
        return cls(mean, *(quantile(seconds, share) for share in (0.5, 0.9, 0.99)))
