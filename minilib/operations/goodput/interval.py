"""How often to save: the classic intervals, and the exact expectation that they approximate.

    costs = CheckpointCosts(save=30, restart=600, mtbf=11134)     seconds
    daly_interval(costs)                                          work between two saves
    expected_goodput(interval, costs)                             useful share of the wall clock

An interval W is the work between two saves, in seconds; a save adds the time C that steps wait for it. With
asynchronous saves C is that stall alone, and the write goes on behind the steps for another `write` seconds. A failure
then costs the work since the newest *durable* checkpoint, and the next save cannot begin before the write ends, so
W ≥ write.

Exact, for failures that come at a constant rate 1/M: a life of the job lasts X, exponential with mean M, and makes
N = ⌊(X − write) / (W + C)⌋ checkpoints durable, so

    E[N] = exp(−write/M) / (exp((W + C)/M) − 1)                   goodput = W · E[N] / (M · exp(R/M))

where M · exp(R/M) is a life and the restarts until one is not itself interrupted, or M + R where none is. Its maximum
over W needs neither R nor the time to write.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


class ImpossibleCosts(ValueError):
    """Times of a job that no job can have."""


class ImpossibleInterval(ValueError):
    """An interval at which saves cannot be made."""


@dataclass(frozen=True)
class CheckpointCosts:
    """What saves and failures cost a job, in seconds.

    Args:
        save: that steps wait for a save: all of a synchronous one, the stall of an asynchronous one.
        restart: from a failure to the first new step: detection, replacement, start and load.
        mtbf: mean time between failures of the whole job, while it runs.
        write: from the end of the stall until an asynchronous save is durable.
        failing_restarts: whether failures come during restarts, too, which then begin again.

    Raises:
        ImpossibleCosts: if a time is negative, not finite, or the job never runs.
    """

    save: float
    restart: float
    mtbf: float
    write: float = 0.0
    failing_restarts: bool = True

    def __post_init__(self) -> None:
        for name in ("save", "restart", "write"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ImpossibleCosts(f"{name} is a time in seconds, 0 or more and finite; got {value!r}")
        if not 0 < self.mtbf < math.inf:
            raise ImpossibleCosts(f"mtbf is a time in seconds, more than 0 and finite; got {self.mtbf!r}")


def young_interval(costs: CheckpointCosts) -> float:
    """√(2CM): balances the saves with half an interval lost at each failure.

    Source: Young 1974, "A first order approximation to the optimum checkpoint interval".
    """
    return _writable(math.sqrt(2 * costs.save * costs.mtbf), costs)


def daly_interval(costs: CheckpointCosts) -> float:
    """Young's with two more terms of the series, for saves that are not short against M.

    Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", equation 37.
    """
    save, mtbf = costs.save, costs.mtbf
    if save >= 2 * mtbf:
        return _writable(mtbf, costs)
    ratio = save / (2 * mtbf)
    return _writable(math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save, costs)


def availability_interval(costs: CheckpointCosts) -> float:
    """The interval of the largest (1 − C/P) · M/(M + R + P/2), where the period P = W + C has the save in it.

    Source: NVIDIA 2024, arXiv 2410.18124, which gives P = C + √(2(M + R)C + C²).
    """
    return _writable(math.sqrt(2 * (costs.mtbf + costs.restart) * costs.save + costs.save**2), costs)


def best_interval(costs: CheckpointCosts) -> float:
    """The interval of the largest expected goodput: exp((W + C)/M) · (1 − W/M) = 1.

    With saves that cost nothing it is 0, or the time to write. Solved by bisection in x = W/M.
    """
    save = costs.save / costs.mtbf
    low, high = 0.0, 1.0
    for _ in range(52):  # halvings until 1 − x is the smallest that a double has
        middle = (low + high) / 2
        low, high = (middle, high) if math.log1p(-middle) + middle + save > 0 else (low, middle)
    return _writable(low * costs.mtbf, costs)


def first_order_overhead(interval: float, costs: CheckpointCosts) -> float:
    """C/W + (W/2 + write + R)/M: time beside the useful, as a share of the useful time.

    Raises:
        ImpossibleInterval: if it is not positive, or shorter than the time to write.
    """
    _check_interval(interval, costs)
    return costs.save / interval + (interval / 2 + costs.write + costs.restart) / costs.mtbf


def expected_segment_seconds(interval: float, costs: CheckpointCosts) -> float:
    """Expected wall-clock seconds for one interval of work to be done, saved and durable, whatever fails meanwhile.

    Raises:
        ImpossibleInterval: if it is not positive, or shorter than the time to write.
    """
    _check_interval(interval, costs)
    try:
        restarts = costs.mtbf * math.expm1(costs.restart / costs.mtbf) if costs.failing_restarts else costs.restart
        durable_per_life = math.exp(-costs.write / costs.mtbf) / math.expm1((interval + costs.save) / costs.mtbf)
        return (costs.mtbf + restarts) / durable_per_life
    except (OverflowError, ZeroDivisionError):
        return math.inf  # no life is long enough


def expected_goodput(interval: float, costs: CheckpointCosts) -> float:
    """Useful share of the wall clock over a long run.

    Raises:
        ImpossibleInterval: if it is not positive, or shorter than the time to write.
    """
    return interval / expected_segment_seconds(interval, costs)


def _writable(interval: float, costs: CheckpointCosts) -> float:
    return max(interval, costs.write)


def _check_interval(interval: float, costs: CheckpointCosts) -> None:
    if not 0 < interval < math.inf:
        raise ImpossibleInterval(f"the work between two saves is positive and finite, in seconds; got {interval!r}")
    if interval < costs.write:
        raise ImpossibleInterval(
            f"a save every {interval:g} s of work, and each takes {costs.write:g} s to write: save at most every "
            f"{costs.write:g} s, or write faster"
        )
