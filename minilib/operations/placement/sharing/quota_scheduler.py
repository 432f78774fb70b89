"""Gangs of tenants with quotas: who may start, who borrows, and who waits for what.

    a waiting gang starts   if its tenant's quota allows it and it has room; by policy, interrupted gangs first
    else it waits           for quota, for GPUs or for its turn, and can say for which

A gang that nothing could make start is refused when it comes, with the reason. What is guaranteed:

* A gang within its tenant's nominal quota is passed by no other gang of its tenant for want of quota.
* What is kept for the head of the line, GPUs and quota, is used only by who ends before the head starts; or by its
  owner, if the head would borrow it. A gang that needs to borrow may be passed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import islice

from minilib.mechanisms.scheduling import DominantResourceFairness, SchedulingPolicy
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, InvalidJob, Refused
from minilib.operations.placement.gangs.scheduler import GangScheduler, _Entry
from minilib.operations.placement.sharing.quota import QuotaInUse, Quotas, TenantQuota
from minilib.operations.placement.sharing.refusing import QuotaFeasibility, WaitReason, check_resources


class QuotaScheduler(GangScheduler):
    """Gangs of tenants with quotas, on a clock that the caller advances.

    Args:
        cluster: whose GPUs.
        quotas: by tenant.
        policy: who goes next; dominant resource fairness if left out.
        weights: of each tenant, for that; 1 for all if left out.
        resources: beside GPUs, how much of each the cluster has; they count for dominant shares.
        backfill: let later gangs start as long as they do not delay the first that waits.
        depth: how many later gangs a decision looks at.

    Attributes:
        quotas: what each tenant may have, and has.

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
        self.quotas = Quotas(quotas, cluster.gpus)
        self.capacity = {"gpus": cluster.gpus, **(resources or {})}
        self._held: dict[str, Counter[str]] = {}
        policy = DominantResourceFairness(self.capacity, self.use, weights) if policy is None else policy
        super().__init__(cluster, policy, backfill, depth)
        self._feasible = QuotaFeasibility(cluster, self.quotas)
        self._waits: dict[str, WaitReason] = {}
        self._interrupted: dict[str, None] = {}  # lost their GPUs by a failure, the first first

    def use(self, tenant: str) -> Mapping[str, float]:
        """What a tenant's gangs hold, of each resource."""
        return self._held.get(tenant, {})

    def why_waits(self, name: str) -> WaitReason:
        """Why a gang waits, as of the last `start`.

        Raises:
            UnknownJob: if it is not here.
        """
        self._entry(name)
        return self._waits.get(name, WaitReason("turn", f"{name} came after the last decision, or beyond its depth"))

    def submit(self, job: GangJob, now: float = 0.0) -> Refused | None:
        """A new gang joins the line, or is refused: by what the cluster has, or its tenant ever may have.

        Raises:
            InvalidJob: if a job of this name is here, or was refused.
            UnknownTenant: if its tenant has no quota, or no weight.
            InvalidDemand: if it takes a resource that the cluster does not have.
        """
        self.quotas.quota(job.tenant)
        check_resources(job, self.capacity)
        return super().submit(job, now)

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now."""
        if self.policy.reorders:
            self.charge(now)
        started = []
        while (placement := self._next(now)) is not None:
            started.append(self._begin(placement, now))
        return started

    def finish(self, name: str, now: float) -> None:
        """A gang has ended, or is cancelled while it waits."""
        super().finish(name, now)
        for notes in (self._waits, self._interrupted):
            notes.pop(name, None)

    def fail(self, gpus: Iterable[int], now: float, why: str = "failed") -> list[str]:
        """GPUs are lost. Gangs that ran on one of them wait again, before those that were not interrupted."""
        hit = super().fail(gpus, now, why)
        self._interrupted |= dict.fromkeys(hit)
        return hit

    def reject(self, name: str, host: int, now: float) -> None:
        """A host refuses to start its part of a gang, which waits again as after a failure.

        Raises:
            UnknownJob: if the gang does not run on this host.
        """
        super().reject(name, host, now)
        self._interrupted[name] = None

    def resize(self, job: GangJob, now: float) -> GangPlacement | Refused | None:
        """A gang goes on with another number of GPUs, or another mesh, if its tenant's quota allows it.

        Returns:
            Where it runs now; None if it waits; or why it stays as it was.

        Raises:
            UnknownJob: if there is no job of this name.
            InvalidJob: if the tenant is another.
            InvalidDemand: if it takes a resource that the cluster does not have.
        """
        entry = self._entry(job.name)
        check_resources(job, self.capacity)
        if job.tenant != entry.job.tenant:
            raise InvalidJob(f"{job.name} is of tenant {entry.job.tenant!r}, and not of {job.tenant!r}: submit it anew")
        more, there = job.gpus - entry.job.gpus, self.quotas.available(job.tenant)
        if entry.placement is not None and more > max(0, there):
            return Refused(job, f"{job.name} grows by {more} GPUs, and tenant {job.tenant!r} may have {there} more: "
                                f"{more - there} too many")  # fmt: skip
        return super().resize(job, now)

    def change_quota(self, tenant: str, quota: TenantQuota, now: float) -> list[Refused]:
        """A tenant has another quota, or joins; gangs that wait and would never start now are refused.

        Raises:
            QuotaInUse: if more runs than it would allow; nothing was changed.
            InvalidQuota: if nominal quotas would be more than the cluster has.
        """
        self.quotas.change(tenant, quota)
        found = [refused for job in self.waiting if (refused := self._feasible.refusal(job)) is not None]
        for refused in found:
            self.finish(refused.job.name, now)
            self.refused[refused.job.name] = refused
        return found

    def remove_tenant(self, tenant: str, now: float) -> list[Refused]:
        """A tenant leaves; gangs of its cohort that would never start without it are refused.

        Raises:
            UnknownTenant: if it has no quota.
            QuotaInUse: if its jobs are here, or others have borrowed its GPUs; nothing was changed.
        """
        if jobs := [name for name, entry in self._entries.items() if entry.job.tenant == tenant]:
            raise QuotaInUse(f"{len(jobs)} jobs of tenant {tenant!r} are here, {jobs[0]!r} among them; finish them "
                             "before it leaves")  # fmt: skip
        lender = self.quotas.quota(tenant)
        refused = self.change_quota(tenant, TenantQuota(0, lender.cohort), now)
        self.quotas.remove(tenant)
        return refused

    def check_invariants(self) -> None:
        """Besides those of gangs: nobody has more than nominal and borrowed, and what is counted is what runs."""
        super().check_invariants()
        self.quotas.check_invariants()
        used: Counter[str] = Counter()
        for placement in self.running.values():
            used[placement.job.tenant] += placement.job.gpus
        for each in self.quotas.use():
            assert each.used == used[each.tenant] == self.use(each.tenant).get("gpus", 0), f"{each}, and {used} run"
        assert self._interrupted.keys() | self._waits.keys() <= self._entries.keys(), "a note of who has gone"
        assert not self._interrupted.keys() & self.running.keys(), "a gang that runs counts as interrupted"

    def _line(self) -> Iterator[GangJob]:
        """Gangs that wait, those that were interrupted first: DRF alone would let every newcomer pass them."""
        interrupted = [self._entries[name].job for name in self._interrupted]
        others = (self._entries[task.key].job for task in self.policy if task.key not in self._interrupted)
        return islice((job for line in (interrupted, others) for job in line), self.depth + 1)

    def _next(self, now: float) -> GangPlacement | None:
        """Where the next gang starts that can; notes why those before it wait."""
        self._waits.clear()
        first: dict[str, str] = {}  # by tenant, who waits for quota that it has a right to
        head, beside_head = None, self.quotas
        for job in self._line():
            passes = head is None or self._owns(job, head) or self._ends_before(job, now)
            lacking = job.gpus - (self.quotas if passes else beside_head).available(job.tenant)
            if job.tenant in first or (head is not None and not self.backfill):
                self._wait(job, "turn", f"is behind {first.get(job.tenant) or head.name}")
                continue
            if lacking > 0:
                self._wait(job, "quota", f"needs {job.gpus} GPUs, {lacking} more than {job.tenant!r} may have now")
            elif (placement := self._placement(job, not passes)) is not None:
                if head is not None and self._owns(job, head):
                    self._room.forget(placement.gpus)
                return placement
            else:
                self._wait(job, "gpus", f"needs {job.gpus} GPUs together; {self.free.free} are free")
            may_keep = lacking <= 0 or (self._within(job) and self._is_kept_for(job))
            if head is None and may_keep and self._room.keep(job, self.free, self._ends, now):
                head, beside_head = job, self.quotas.with_more(job.tenant, job.gpus)
            elif self._within(job) and job.gpus > self.quotas.available(job.tenant):
                first[job.tenant] = job.name
        if head is None:
            self._room.reservation = None
        return None

    def _placement(self, job: GangJob, hold: bool) -> GangPlacement | None:
        """Where a gang could start now, with what is kept for the head of the line held back or not."""
        self._room.hold(hold, self.free)
        placement = self.place(job, self.free)
        self._room.hold(False, self.free)
        return placement

    def _within(self, job: GangJob) -> bool:
        """Whether its tenant has a right to so many GPUs."""
        return job.gpus <= self.quotas.quota(job.tenant).nominal

    def _owns(self, job: GangJob, head: GangJob) -> bool:
        """Whether a gang has a right to what is kept for one that would borrow it."""
        return not self._within(head) and self.quotas.entitled(job.tenant, job.gpus)

    def _ends_before(self, job: GangJob, now: float) -> bool:
        return now + self._entries[job.name].seconds <= self.reservation.time

    def _is_kept_for(self, job: GangJob) -> bool:
        return self.reservation is not None and self.reservation.name == job.name

    def _wait(self, job: GangJob, what: str, sentence: str) -> None:
        self._waits[job.name] = WaitReason(what, f"{job.name} {sentence}")

    def _begin(self, placement: GangPlacement, now: float) -> GangPlacement:
        self._interrupted.pop(placement.job.name, None)
        self._count(placement.job, +1)
        return super()._begin(placement, now)

    def _stop(self, entry: _Entry, now: float) -> None:
        super()._stop(entry, now)
        self._count(entry.job, -1)

    def _resize_running(self, entry: _Entry, job: GangJob, now: float) -> GangPlacement | Refused:
        found = super()._resize_running(entry, job, now)
        if isinstance(found, GangPlacement):
            self._count(job, +1)
        return found

    def _count(self, job: GangJob, sign: int) -> None:
        """A tenant holds what a gang takes, or no more."""
        (self.quotas.take if sign > 0 else self.quotas.give_back)(job.tenant, job.gpus)
        held = self._held.setdefault(job.tenant, Counter())
        for resource, amount in {"gpus": job.gpus, **job.resources}.items():
            held[resource] += sign * Fraction(float(amount))  # exact: floats would leave a rest, even below 0
