"""A job of a trace: when it comes, how long it runs, and how long its owner says that it will run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from minilib.mechanisms.basics.checks import check_quantity
from minilib.operations.placement.gangs.job import GangJob


@dataclass(frozen=True)
class TracedJob:
    """A job that comes at a time.

    Args:
        job: what it asks for; `job.seconds` is the estimate that backfill relies on.
        arrival: seconds on the simulated clock.
        seconds: how long its work takes on its GPUs, without what it loses; 0 for a job that ends as it starts.

    Raises:
        ValueError: if a time is no finite number ≥ 0.
    """

    job: GangJob
    arrival: float
    seconds: float

    def __post_init__(self) -> None:
        check_quantity(f"arrival of {self.job.name}", self.arrival)
        check_quantity(f"seconds of {self.job.name}", self.seconds)


def with_estimates(trace: Iterable[TracedJob], factor: float) -> list[TracedJob]:
    """The same jobs, whose owners say that they run so many times as long as they do.

    Args:
        trace: the jobs.
        factor: 1 for exact estimates. A job of 0 seconds keeps its estimate, since an estimate is above 0.

    Raises:
        ValueError: if the factor is not a finite number > 0.
    """
    check_quantity("factor of estimates", factor, above_zero=True)
    return [
        replace(each, job=replace(each.job, seconds=factor * each.seconds)) if each.seconds else each for each in trace
    ]
