"""When a gang that waits will start at the latest, and which GPUs are kept for it until then.

    running jobs end, by their estimates, one after the other, until the gang at the head of the line has room
    → its time, and its GPUs

Who goes ahead of the head either ends before that time, or stays off those GPUs: so nobody who goes ahead delays it,
and a large gang starts although small jobs keep coming. This is backfill as EASY has it, with GPUs instead of a count.

Source: Lifka, "The ANL/IBM SP Scheduling System", 1995; Mu'alem and Feitelson, "Utilization, Predictability, Workloads,
and User Runtime Estimates in Scheduling the IBM SP2 with Backfilling", IEEE TPDS 2001.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.gangs.fitting import best_placement, fit_of
from minilib.operations.placement.gangs.job import GangJob


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


def reserve(job: GangJob, free: FreeGpus, ends: Iterable[tuple[float, str]], now: float) -> Reservation | None:
    """The earliest time at which a job has room; None if it has none even after all others have ended.

    Args:
        job: which does not fit now.
        free: who has which GPU.
        ends: (time, name) of the jobs that run, by their estimates.
        now: the time; estimates that have passed count as now.
    """
    fit = fit_of(job, free.cluster.largest_host)
    trial = free.scratch(fit)
    for end, name in sorted(ends):
        trial.give_back(name)
        if trial.index(fit).total >= job.gpus and (placement := best_placement(job, trial)) is not None:
            return Reservation(job.name, max(now, end), frozenset(placement.gpus))
    return None
