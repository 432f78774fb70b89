"""Spares: GPUs that no job gets, so that a gang which loses a host goes on with another host in its place.

    spare ──a gang lost as many──→ in use ──fails──→ under repair ──→ in use, as long as less is in use than at first
      ↑                                                        └────→ spare, after that
      └── what a gang leaves behind in good order, because a whole group of it moved

A gang that no spares suit waits, or goes on with fewer ranks if it may. Then the spares that it could use are in use
as well: nobody waits for a repair beside an idle spare. The price is what is bought and idle: 2 of 18 trays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from minilib.mechanisms.basics.checks import check_quantity, check_whole, is_whole
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.operations.placement.gangs.rank_order import NoReplacement, replaced
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.gangs.shrinking import on_fewer_gpus, shrink_unit


class InvalidSpares(ValueError):
    """Hosts that cannot be spares, or GPUs that are not under repair; the message says which and why."""


@dataclass(frozen=True)
class GangRecovery:
    """What became of a gang that lost GPUs.

    Args:
        job: as it was before.
        placement: where it goes on, perhaps with fewer ranks; None if it waits.
        reason: why it does not go on as it was; empty if it does.
    """

    job: GangJob
    placement: GangPlacement | None
    reason: str = ""


class SparePool:
    """Hosts that are kept from all jobs until a gang needs them in place of lost ones.

    Args:
        scheduler: of the gangs.
        hosts: their numbers; none of them is in use.

    Attributes:
        size: GPUs that are spare when nothing is lost.

    Raises:
        InvalidSpares: for a host that there is not, that is named twice, in use or out of use, or if no host is left.
    """

    def __init__(self, scheduler: GangScheduler, hosts: Iterable[int]) -> None:
        self.scheduler, self.cluster = scheduler, scheduler.cluster
        named = list(hosts)
        hosts = len(self.cluster.hosts)
        if not all(map(is_whole, named)) or len(set(named)) < len(named) or not set(named) < set(range(hosts)):
            raise InvalidSpares(f"spares are some of the {hosts} hosts of {self.cluster.name}, each "
                                f"once and not all of them; got {len(named)}: {named[:20]}")  # fmt: skip
        gpus = [gpu for host in named for gpu in self.cluster.gpus_of(host)]
        if taken := [gpu for gpu in gpus if not scheduler.free.is_free(gpu)]:
            raise InvalidSpares(f"GPU {taken[0]} is in use or out of use, and no spare: take free hosts")
        self.size = len(gpus)
        self._spare, self._lost = set(gpus), set[int]()
        scheduler.drain(gpus, "reserved")

    @property
    def spare(self) -> list[int]:
        """GPUs that are spare now."""
        return sorted(self._spare)

    @property
    def under_repair(self) -> list[int]:
        """GPUs that were lost and have not come back."""
        return sorted(self._lost)

    @property
    def price(self) -> float:
        """Share of the cluster's GPUs that nobody uses, as long as nothing fails."""
        return self.size / self.cluster.gpus

    @property
    def short(self) -> int:
        """How many GPUs fewer are in use than at first."""
        return len(self._lost) - (self.size - len(self._spare))

    def fail(self, gpus: Iterable[int], now: float, why: str = "failed") -> list[GangRecovery]:
        """GPUs are lost: all at once, spare ones perhaps among them. Gangs go on with spares, ranks in their order.

        Where the spares do not suffice for all gangs, the most urgent comes first, then the largest. It does not
        matter whether a gang had started: one that loses a host between the decision and the start keeps its turn.

        Returns:
            What became of each gang that ran on one of them.

        Raises:
            IndexError: if there is no such GPU; nothing was changed.
            ValueError: if `why` is no reason to be out of use; nothing was changed.
        """
        lost = set(gpus)
        self.scheduler.drain(lost, why)  # looks at both; and no gang is given again what it lost
        self._spare -= lost
        owners = dict.fromkeys(map(self.scheduler.free.owner, sorted(lost)))
        hit = [self.scheduler.running[name].job for name in owners if name is not None]
        hit.sort(key=lambda job: (job.priority, -job.gpus))
        found = {job.name: self._replace(job, lost) for job in hit}
        self._lost |= lost
        for job in hit:  # whom no spares suit comes last, so that it takes none from whom they do
            if found[job.name].placement is None:
                found[job.name] = self._go_on_with_fewer(found[job.name], lost, now)
        self.scheduler.fail(lost, now, why)
        return list(found.values())

    def repair(self, gpus: Iterable[int]) -> list[int]:
        """GPUs are in good order again: the first of them are in use until as many are as at first, the rest spare.

        Returns:
            Those that are in use.

        Raises:
            InvalidSpares: for a GPU that is not under repair; nothing was changed.
        """
        back = list(dict.fromkeys(gpus))
        if unknown := [gpu for gpu in back if gpu not in self._lost]:
            raise InvalidSpares(f"GPU {unknown[0]} is not under repair; {len(self._lost)} are: {self.under_repair}")
        used, spare = back[: max(self.short, 0)], back[max(self.short, 0) :]
        self._lost -= set(back)
        self.scheduler.restore(used)
        self._keep(spare)
        return used

    def check_invariants(self) -> None:
        """Spares belong to nobody, and as much is in use or spare as the losses leave."""
        free = self.scheduler.free
        assert all(free.out(gpu) == "reserved" and free.owner(gpu) is None for gpu in self._spare), "a spare is in use"
        assert all(free.out(gpu) and free.owner(gpu) is None for gpu in self._lost), "a lost GPU is in use"
        assert not self._spare & self._lost and 0 <= self.short <= len(self._lost), "GPUs are miscounted"

    def _replace(self, job: GangJob, lost: set[int]) -> GangRecovery:
        """Move a gang onto spares, if they suit it."""
        before = self.scheduler.running[job.name]
        gone = lost | {gpu for gpu in before.gpus if self.scheduler.free.out(gpu)}  # on hosts that are drained, too
        try:
            after = replaced(before, gone, self.spare, self.cluster)
        except NoReplacement as error:
            return GangRecovery(job, None, str(error))
        taken, left = set(after.gpus) - set(before.gpus), set(before.gpus) - set(after.gpus)
        self._spare -= taken
        self._lost |= left & gone
        self.scheduler.restore(taken)
        self.scheduler.move(after)
        self._keep(left - gone)
        return GangRecovery(job, after)

    def _go_on_with_fewer(self, waits: GangRecovery, lost: set[int], now: float) -> GangRecovery:
        """A gang that no spares suit: those that it could use are in use from now on, and it goes on if it may."""
        job, free = waits.job, self.scheduler.free
        before = self.scheduler.running[job.name].gpus
        kept = [gpu for gpu in before if gpu not in lost and not free.out(gpu)]
        homes = set(self.cluster.numbers_of("domain", kept))
        near_first = sorted(self.spare, key=lambda gpu: (self.cluster.numbers_of("domain", [gpu])[0] not in homes, gpu))
        released = near_first[: len(lost.intersection(before))]
        self._spare -= set(released)
        self.scheduler.restore(released)
        fewer = with_fewer_ranks(job, min(len(kept) + len(released), job.gpus - 1))
        if fewer is None:
            return waits
        placement = self.scheduler.resize(fewer, now)
        return replace(waits, placement=placement) if isinstance(placement, GangPlacement) else waits

    def _keep(self, gpus: Iterable[int]) -> None:
        """These are spare from now on."""
        self._spare |= set(gpus)
        self.scheduler.drain(gpus, "reserved")


def spare_hosts(cluster: GpuCluster, each: int, level: str = "domain") -> list[int]:
    """The last hosts of every group of a level, to be spares: with 2 of each of 18 trays 16 are in use.

    Args:
        cluster: where they stand.
        each: how many of a group.
        level: "domain", "rack" or "unit".

    Raises:
        InvalidSpares: if a group has no more hosts than that.
    """
    check_whole("each", each, error=InvalidSpares)
    groups = cluster.groups(level)
    if (least := min(len(group.hosts) for group in groups)) <= each:
        raise InvalidSpares(f"a {level} of {cluster.name} has {least} hosts: {each} spare ones would leave none in use")
    return [host for group in groups for host in group.hosts[len(group.hosts) - each :]]


def with_fewer_ranks(job: GangJob, most: int) -> GangJob | None:
    """A job of at most so many GPUs that does the same with fewer replicas of the model: dp is smaller, as the rest is.

    Returns:
        None if that is less than the job goes on with, or its work is not known for other meshes.
    """
    unit = shrink_unit(job)
    gpus = min(most, job.gpus) // unit * unit
    if gpus < max(job.least_gpus, 1) or (job.work is not None and not isinstance(job.work, MeshTraffic)):
        return None
    return on_fewer_gpus(job, gpus)


def chance_spares_suffice(hosts: int, spares: int, down: float) -> float:
    """Probability that at most as many hosts are down at a time as there are spares.

    Σ C(n, k) pᵏ (1 − p)ⁿ⁻ᵏ over k ≤ s: of n hosts, the spares among them, each is down by itself with probability p.

    Args:
        hosts: n, in use or spare.
        spares: s of them.
        down: p, see `share_down`.

    Raises:
        InvalidSpares: if there are more spares than hosts.
        ValueError: for numbers that are none, or a probability above 1.
    """
    check_whole("hosts", hosts)
    check_whole("spares", spares)
    check_quantity("down", down)
    if spares > hosts:
        raise InvalidSpares(f"of {hosts} hosts at most {hosts} are spare, got {spares}")
    if down > 1:
        raise ValueError(f"down is a probability of at most 1, got {down!r}")
    if down in (0, 1):
        return float(down == 0 or spares == hosts)
    ways = [math.lgamma(hosts + 1) - math.lgamma(k + 1) - math.lgamma(hosts - k + 1) for k in range(spares + 1)]
    terms = (way + k * math.log(down) + (hosts - k) * math.log1p(-down) for k, way in enumerate(ways))
    return min(1.0, math.fsum(map(math.exp, terms)))


def share_down(between: float, repair: float) -> float:
    """Share of time in which a host is down: repair / (between + repair), however both are distributed.

    Args:
        between: mean seconds that it runs until it fails.
        repair: mean seconds until it runs again.

    Raises:
        ValueError: unless both are finite, the first above 0.
    """
    check_quantity("between", between, above_zero=True)
    check_quantity("repair", repair)
    return repair / (between + repair)
