"""When a gang that waits will start at the latest, and which GPUs are kept for it until then.

    running jobs end, by their estimates, one after the other, until the gang at the head of the line has room
    → its time, and its GPUs

Who goes ahead of the head either ends before that time, or stays off those GPUs: so nobody who goes ahead delays it,
and a large gang starts although small jobs keep coming. This is backfill as EASY has it, with GPUs instead of a count.

Source: Lifka, "The ANL/IBM SP Scheduling System", 1995; Mu'alem and Feitelson, "Utilization, Predictability, Workloads,
and User Runtime Estimates in Scheduling the IBM SP2 with Backfilling", IEEE TPDS 2001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.gangs.fitting import Placer, fit_of
from minilib.operations.placement.gangs.job import GangJob

KEPT = ("kept for the head of the line",)  # an owner that no job can be, since their names are strings


class Reservation(NamedTuple):
    """What is kept for the head of the line.

    Args:
        name: of the job.
        time: when it starts at the latest, if estimates are upper bounds and nothing fails.
        gpus: that are kept for it.
    """

    name: str
    time: float
    gpus: frozenset[int]


class HeadRoom:
    """What is kept for the first job in line that does not fit now.

    Args:
        place: chooses the GPUs.

    Attributes:
        reservation: None if nobody waits, or those who wait need a repair.
    """

    def __init__(self, place: Placer) -> None:
        self.place = place
        self.reservation: Reservation | None = None
        self._await_repair: set[str] = set()  # jobs that do not fit into what is in use, whoever ends

    def keep(self, job: GangJob, free: FreeGpus, ends: Callable[[], Iterable[tuple[float, str]]], now: float) -> bool:
        """Keep room for a job that does not fit now; False if no room will do before a repair.

        What is kept stays kept until its time, so that a job's latest start is never put off.
        """
        kept = self.reservation
        if job.name in self._await_repair:
            return False
        if kept is None or kept.name != job.name or kept.time < now:
            self.reservation = reserve(job, free, ends(), now, self.place)
            if self.reservation is None:
                self._await_repair.add(job.name)
        return self.reservation is not None

    def hold(self, hold: bool, free: FreeGpus, beside: Iterable[int] = ()) -> bool:
        """Take the GPUs that are kept away from everybody as long as something is decided, or give them back.

        Args:
            hold: which of the two.
            free: who has which GPU.
            beside: GPUs that may be had all the same.

        Returns:
            `hold`.
        """
        if free.owned(KEPT):
            free.give_back(KEPT)
        if hold and self.reservation is not None:
            kept = self.reservation.gpus.difference(beside)
            if gpus := [gpu for gpu in kept if free.is_free(gpu)]:
                free.take(KEPT, gpus)
        return hold

    def forget(self, gpus: Iterable[int]) -> None:
        """These GPUs went elsewhere: what was kept is kept no more if one of them was among it."""
        if self.reservation is not None and not self.reservation.gpus.isdisjoint(gpus):
            self.reservation = None

    def drop(self, name: str) -> None:
        """A job has gone, or needs other room than before."""
        self._await_repair.discard(name)
        if self.reservation is not None and self.reservation.name == name:
            self.reservation = None

    def repaired(self) -> None:
        """GPUs are in use again: who waited for a repair may fit."""
        self._await_repair.clear()


def reserve(
    job: GangJob, free: FreeGpus, ends: Iterable[tuple[float, str]], now: float, place: Placer
) -> Reservation | None:
    """The earliest time at which a job has room; None if it has none even after all others have ended.

    Args:
        job: which does not fit now.
        free: who has which GPU.
        ends: (time, name) of the jobs that run, by their estimates.
        now: the time; estimates that have passed count as now.
        place: chooses the GPUs.
    """
    fit = fit_of(job, free.cluster.largest_host)
    trial = free.scratch(fit)
    for end, name in sorted(ends):
        trial.give_back(name)
        if trial.index(fit).total >= job.gpus and (placement := place(job, trial)) is not None:
            return Reservation(job.name, max(now, end), frozenset(placement.gpus))
    return None
