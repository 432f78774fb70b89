"""A list of jobs given to a scheduler on a clock that stands still while the scheduler decides: who runs, and when.

Standard library only: Ray's worker imports it in an environment that has Ray alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ListedJob:
    """One job of a list.

    Args:
        name: no other job has it.
        arrival: minutes.
        workers: how many, all at once or none.
        gpus: of each worker, which lie on one host.
        minutes: how long it runs; schedulers that ask for a limit are told the same.
    """

    name: str
    arrival: float
    workers: int
    gpus: int
    minutes: float


class Scheduler(Protocol):
    """What runs jobs, or says that it would."""

    def submit(self, job: ListedJob, now: float) -> None:
        """A job arrives."""

    def finish(self, name: str, now: float) -> None:
        """A job that ran has ended."""

    def decide(self, now: float) -> dict[str, list[str]]:
        """Hosts of each job that runs, once nothing more starts."""


@dataclass(frozen=True)
class Moment:
    """What runs after the events of one instant.

    Args:
        now: minutes.
        running: hosts of each job's workers.
        waiting: jobs that have come and do not run, in order of arrival.
    """

    now: float
    running: dict[str, list[str]]
    waiting: list[str]


def trace(scheduler: Scheduler, jobs: Sequence[ListedJob]) -> list[Moment]:
    """Every instant at which a job comes or ends: first those end that end then, in order, then others come."""
    left = sorted(jobs, key=lambda job: job.arrival)  # stable: equal arrivals keep the order of the list
    here: list[ListedJob] = []
    ends: dict[str, float] = {}
    found: list[Moment] = []
    while left or ends:
        now = min([*ends.values(), *(job.arrival for job in left[:1])])
        for name in sorted(name for name, end in ends.items() if end == now):
            scheduler.finish(name, now)
            del ends[name]
            here = [job for job in here if job.name != name]
        while left and left[0].arrival == now:
            here.append(left.pop(0))
            scheduler.submit(here[-1], now)
        running = scheduler.decide(now)
        ends |= {job.name: now + job.minutes for job in here if job.name in running and job.name not in ends}
        found.append(Moment(now, running, [job.name for job in here if job.name not in running]))
    return found
