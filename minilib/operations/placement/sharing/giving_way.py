"""Which gangs give way so that another fits, so that the fewest GPU-seconds are lost.

A gang gives way as a whole, or shrinks where it can go on with fewer GPUs. Sets of them are searched depth first, those
that lose least for each GPU before others; a set is left out if what it lacks would cost more than the best set so far.

What is guaranteed: the set loses the least of all (`exact`), where nobody shrinks or workers may lie anywhere. With
meshes that shrink, it is the least of those that `best_placement` settles, the newcomer first. After LIMIT sets the
search ends with the best so far (not `exact`): nobody in it gives way without need.

Kubernetes' rule (classic/pod_scheduler/preemption.py) looks at priorities and counts victims; it knows no checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.gangs.fitting import best_placement, fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.sharing.lost_work import GangRun, shrink_sizes

LIMIT = 2_000  # sets that a search looks at after it found one


class GivesWay(NamedTuple):
    """A gang that makes room.

    Args:
        run: of the gang.
        keeps: GPUs with which it goes on; 0 if it gives way as a whole.
        lost: GPU-seconds.
    """

    run: GangRun
    keeps: int
    lost: float

    @property
    def name(self) -> str:
        """Of the gang."""
        return self.run.job.name

    @property
    def frees(self) -> int:
        """GPUs that it gives."""
        return self.run.job.gpus - self.keeps


@dataclass(frozen=True)
class GangPreemption:
    """Who makes room for a gang.

    Args:
        placement: of the gang.
        victims: who gives way, as a whole or in part.
        shrunk: where those run that go on with fewer GPUs.
        exact: whether no other set loses less.
        sets: how many were looked at.
    """

    placement: GangPlacement
    victims: tuple[GivesWay, ...]
    shrunk: tuple[GangPlacement, ...]
    exact: bool
    sets: int

    @property
    def lost(self) -> float:
        """GPU-seconds."""
        return sum(victim.lost for victim in self.victims)


Allowed = Callable[[Sequence[GivesWay]], bool]


def least_lost(
    job: GangJob,
    free: FreeGpus,
    runs: Sequence[GangRun],
    may: Allowed = lambda victims: True,
    enough: Allowed = lambda victims: True,
    limit: int = LIMIT,
) -> GangPreemption | None:
    """The gangs that give way with the least loss so that a job fits; None if it does not fit even so.

    Args:
        job: who needs room.
        free: a copy to try things on.
        runs: gangs that may be asked.
        may: whether a set may give way together; if it may, so may its parts.
        enough: whether what a set gives will do but for places; if it will, so will more.
        limit: sets that are looked at after the first that will do.
    """
    return _Search(job, free, runs, may, enough, limit).result()


class _Search:
    """Depth first over sets of those who give way."""

    def __init__(
        self, job: GangJob, free: FreeGpus, runs: Sequence[GangRun], may: Allowed, enough: Allowed, limit: int
    ) -> None:
        self.job, self.free, self.may, self.enough, self.limit = job, free, may, enough, limit
        self.fit = fit_of(job, free.cluster.largest_host)
        self.options = [GivesWay(run, 0, run.lost_gpu_seconds) for run in runs]
        self.options += [GivesWay(run, sizes[-1], run.shrinking_gpu_seconds)
                         for run in runs if (sizes := shrink_sizes(run.job))]  # fmt: skip
        self.options.sort(key=lambda option: (option.lost / option.frees, -option.frees, option.name))
        self.most = max((option.frees for option in self.options), default=1)
        self.best: list[GivesWay] | None = None
        self.cost: tuple[float, int] = (math.inf, 0)
        self.sets, self.exact = 0, True

    def result(self) -> GangPreemption | None:
        self._visit([], 0, 0.0, self.job.gpus - self.free.free)
        if self.best is None:
            return None
        victims = self.best
        for option in sorted(victims, key=lambda option: -option.lost):
            others = [other for other in victims if other != option]
            victims = others if self._would_do(others) else victims
        for option in victims:
            victims = self._grown(victims, option)
        for option in victims:
            self.free.give_back(option.name)
        placement, *shrunk = self._settle(victims)
        return GangPreemption(placement, tuple(victims), tuple(shrunk), self.exact, self.sets)

    def _visit(self, chosen: list[GivesWay], start: int, lost: float, lacking: int) -> None:
        """Look at a set, then at larger ones; it lacks so many GPUs at least."""
        self.sets += 1
        if self._will_do(chosen):
            self.best, self.cost = list(chosen), (lost, len(chosen))
            return
        lacking = max(1, lacking)
        more = math.ceil(lacking / self.most)
        for at in range(start, len(self.options)):
            option = self.options[at]
            if self.best is not None and self.sets >= self.limit:
                self.exact = False
                return
            if (lost + lacking * option.lost / option.frees, len(chosen) + more) >= self.cost:
                return
            if (lost + option.lost, len(chosen) + 1) >= self.cost or not self.free.owned(option.name):
                continue
            if self.may([*chosen, option]):
                gpus = self.free.give_back(option.name)
                self._visit([*chosen, option], at + 1, lost + option.lost, lacking - option.frees)
                self._take_again(option, gpus)

    def _will_do(self, chosen: Sequence[GivesWay]) -> bool:
        """Whether the job fits, now that these have given back all of their GPUs."""
        if self.free.index(self.fit).total < self.job.gpus or not self.enough(chosen):
            return False
        return not any(option.keeps for option in chosen) or self._settle(chosen) is not None

    def _would_do(self, chosen: Sequence[GivesWay]) -> bool:
        """Whether the job would fit if these gave way."""
        gpus = [self.free.give_back(option.name) for option in chosen]
        found = self._will_do(chosen)
        for option, own in zip(chosen, gpus, strict=True):
            self._take_again(option, own)
        return found

    def _grown(self, victims: list[GivesWay], option: GivesWay) -> list[GivesWay]:
        """The same victims, of whom one that shrinks keeps as many GPUs as it can."""
        for keeps in shrink_sizes(option.run.job) if option.keeps else ():
            grown = [other._replace(keeps=keeps) if other == option else other for other in victims]
            if self._would_do(grown):
                return grown
        return victims

    def _settle(self, chosen: Sequence[GivesWay]) -> list[GangPlacement] | None:
        """Places for the job, and for those who shrink; None if there is not room for all."""
        jobs = [self.job, *(option.run.on_fewer(option.keeps) for option in chosen if option.keeps)]
        placed: list[GangPlacement] = []
        for job in jobs:
            if (placement := best_placement(job, self.free)) is None:
                break
            self.free.take(job.name, placement.gpus)
            placed.append(placement)
        for placement in placed:
            self.free.give_back(placement.job.name)
        return placed if len(placed) == len(jobs) else None

    def _take_again(self, option: GivesWay, gpus: Sequence[int]) -> None:
        """A gang has its GPUs again, but for those that are out of use and would not become free."""
        self.free.take(option.name, [gpu for gpu in gpus if self.free.is_free(gpu)])
