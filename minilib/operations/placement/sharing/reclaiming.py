"""Who may be asked to give way to a gang: less urgent gangs of its tenant, and those of tenants that borrow.

Only a gang within its tenant's nominal quota reclaims what others borrow, whatever their priority. A tenant is asked as
long as it borrows: its last victim may lead it below its nominal quota, since a gang gives way as a whole. Two tenants
that do so in turn would preempt each other for ever (volcano#3729, #3869), so nobody disturbs whom it gave way to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.sharing.giving_way import GangPreemption, GivesWay, least_lost
from minilib.operations.placement.sharing.lost_work import GangRun
from minilib.operations.placement.sharing.quota import Quotas


class GaveWay:
    """Which gang gave way to which."""

    def __init__(self) -> None:
        self._to: dict[str, set[str]] = {}

    def note(self, victim: str, newcomer: str) -> None:
        """A gang gives way to another."""
        self._to.setdefault(victim, set()).add(newcomer)

    def forget(self, name: str) -> None:
        """A gang has gone."""
        self._to.pop(name, None)
        for newcomers in self._to.values():
            newcomers.discard(name)

    def spared_by(self, name: str) -> set[str]:
        """Whom a gang gave way to, whom those gave way to, and so on: none of them gives way to it."""
        found: set[str] = set()
        left = set(self._to.get(name, ()))
        while left:
            found |= left
            left = {more for other in left for more in self._to.get(other, ())} - found
        return found

    def check_invariants(self, here: Collection[str]) -> None:
        """Nobody gave way to itself, through others or not, and who has gone is forgotten."""
        for name, newcomers in self._to.items():
            assert name in here and newcomers <= set(here), "somebody has gone"
            assert name not in self.spared_by(name), f"{name} gave way to itself"


def find_room(job: GangJob, trial: FreeGpus, runs: Sequence[GangRun], quotas: Quotas) -> GangPreemption | None:
    """Who gives way to a gang that waits; None if nobody can, or nobody has to.

    Args:
        job: who waits.
        trial: a copy of what is free, without what is kept for others.
        runs: gangs that it may disturb.
        quotas: of all tenants.
    """
    lenders: set[str] = set()
    if quotas.entitled(job.tenant, job.gpus):
        lenders = set(quotas.cohort(job.tenant)) - {job.tenant}
    asked = [run for run in runs if _yields(run.job, job, lenders, quotas)]
    if not asked or trial.free + sum(run.job.gpus for run in asked) < job.gpus:
        return None

    def enough(victims: Sequence[GivesWay]) -> bool:
        after = quotas.scratch()
        for victim in victims:
            after.give_back(victim.run.job.tenant, victim.frees)
        return after.available(job.tenant) >= job.gpus

    found = least_lost(job, trial, asked, lambda victims: _all_borrow(job.tenant, victims, quotas), enough)
    return found if found is not None and found.victims else None


def _yields(running: GangJob, job: GangJob, lenders: set[str], quotas: Quotas) -> bool:
    if running.tenant == job.tenant:
        return running.priority > job.priority
    return running.tenant in lenders and _borrowed(running.tenant, quotas) > 0


def _all_borrow(tenant: str, victims: Sequence[GivesWay], quotas: Quotas) -> bool:
    """Whether every other tenant borrows until its last victim goes, if that is the largest one."""
    frees: dict[str, list[int]] = {}
    for victim in victims:
        if victim.run.job.tenant != tenant:
            frees.setdefault(victim.run.job.tenant, []).append(victim.frees)
    return all(_borrowed(other, quotas) > sum(gpus) - max(gpus) for other, gpus in frees.items())


def _borrowed(tenant: str, quotas: Quotas) -> int:
    return quotas.used(tenant) - quotas.quota(tenant).nominal
