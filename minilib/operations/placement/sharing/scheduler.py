"""A scheduler of gangs for many tenants: within quotas, and with gangs that give way to those that have a right to it.

    a waiting gang starts   as quotas and room allow (quota_scheduler.py)
    else it preempts        less urgent gangs of its tenant and, within its nominal quota, gangs of tenants that borrow

Those give way whose work is cheapest to lose. Whoever gave way disturbs neither whom it gave way to, nor whom that one
gave way to: preemptions end.
"""

from __future__ import annotations

from collections.abc import Mapping

from minilib.mechanisms.scheduling import SchedulingPolicy
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.scheduler import _Entry
from minilib.operations.placement.sharing.giving_way import GangPreemption
from minilib.operations.placement.sharing.lost_work import GangRun
from minilib.operations.placement.sharing.quota import TenantQuota
from minilib.operations.placement.sharing.quota_scheduler import QuotaScheduler
from minilib.operations.placement.sharing.reclaiming import GaveWay, find_room


class TenantScheduler(QuotaScheduler):
    """Gangs of tenants with quotas that borrow and reclaim, on a clock that the caller advances.

    Args:
        cluster, quotas, policy, weights, resources, backfill, depth: as a `QuotaScheduler` has them.

    Attributes:
        preemptions: of the last `start`.

    Raises:
        InvalidQuota: if nominal quotas are more than the cluster has.
        InvalidWeight: if a weight is not above 0.
    """

    def __init__(
        self,
        cluster: GpuCluster,
        quotas: Mapping[str, TenantQuota],
        policy: SchedulingPolicy | None = None,
        weights: Mapping[str, float] | None = None,
        resources: Mapping[str, float] | None = None,
        backfill: bool = True,
        depth: int = 100,
    ) -> None:
        super().__init__(cluster, quotas, policy, weights, resources, backfill, depth)
        self.preemptions: list[GangPreemption] = []
        self._resumed: set[str] = set()  # ran before
        self._gave_way = GaveWay()

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now, and let gangs give way to those that have a right to their room."""
        self.preemptions = []
        started = super().start(now)
        while (preemption := self._next_preemption(now)) is not None:
            started += [self._carry_out(preemption, now), *super().start(now)]
        running = self.running
        return [running[name] for name in dict.fromkeys(each.job.name for each in started) if name in running]

    def finish(self, name: str, now: float) -> None:
        """A gang has ended, or is cancelled while it waits."""
        super().finish(name, now)
        self._resumed.discard(name)
        self._gave_way.forget(name)

    def preempt(self, name: str, now: float, seconds: float | None = None) -> None:
        """A gang gives way; it waits at the place that it has earned, and goes on from its last checkpoint.

        Raises:
            UnknownJob: if it does not run.
        """
        entry = self._entry(name, runs=True)
        super().preempt(name, now, self._run(entry, now).next_seconds if seconds is None else seconds)

    def check_invariants(self) -> None:
        """Besides those of quotas: nobody gave way to itself, through others or not."""
        super().check_invariants()
        assert self._resumed <= self._entries.keys(), "a note of who has gone"
        self._gave_way.check_invariants(self._entries.keys())

    def _next_preemption(self, now: float) -> GangPreemption | None:
        """Who gives way to the first gang in line that may ask for it."""
        behind = set()
        for job in self._line():
            if job.tenant not in behind and (found := self._preemption(job, now)) is not None:
                return found
            if self._within(job):
                behind.add(job.tenant)
        return None

    def _preemption(self, job: GangJob, now: float) -> GangPreemption | None:
        """Who gives way to a gang; None if nobody can, or nobody has to."""
        spared = self._gave_way.spared_by(job.name)
        runs = [self._run(self._entries[name], now) for name in self.running if name not in spared]
        trial = self.free.scratch(fit_of(job, self.cluster.largest_host))
        if self.reservation is not None and not self._is_kept_for(job):
            self._room.hold(not self._owns(job, self._entries[self.reservation.name].job), trial)
        return find_room(job, trial, runs, self.quotas)

    def _carry_out(self, preemption: GangPreemption, now: float) -> GangPlacement:
        self.preemptions.append(preemption)
        job = preemption.placement.job
        for victim in preemption.victims:
            self._gave_way.note(victim.name, job.name)
            self.preempt(victim.name, now)
        self._room.forget(preemption.placement.gpus)
        self._begin(preemption.placement, now)
        for placement in preemption.shrunk:
            self.resize(placement.job, now)
            self._begin(placement, now)
        return preemption.placement

    def _run(self, entry: _Entry, now: float) -> GangRun:
        began = entry.end - entry.seconds
        return GangRun(entry.job, now - began, entry.end - now, entry.job.name in self._resumed)

    def _stop(self, entry: _Entry, now: float) -> None:
        super()._stop(entry, now)
        self._resumed.add(entry.job.name)
