"""Which free GPUs a gang gets: all that it needs or none, near each other, and so that what is left is of use.

    near          the lowest group of the tree that has room: a host, a domain, a rack, a unit, all of it
    fewest        within it as few groups as can be, the largest first
    best fit      of the groups that hold the rest, the one that has least to give: large holes stay large
    anywhere      workers that do not talk to each other go where least is free

A decision looks at one place in the order of each level, then at the members of the groups that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.index import CapacityIndex, Fit
from minilib.operations.placement.cluster.topology import LEVELS
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.rank_order import in_rank_order

Placer = Callable[[GangJob, FreeGpus], GangPlacement | None]  # where a gang goes now; None if it does not fit


def fit_of(job: GangJob, host_gpus: int) -> Fit:
    """Which GPUs of a job lie together, on hosts of so many at most."""
    selector = tuple(sorted(job.selector.items()))
    return Fit(job.on_one_host(host_gpus), job.in_one_domain(host_gpus), selector)


def candidates(job: GangJob, free: FreeGpus) -> Iterator[GangPlacement]:
    """Placements to choose from: of workers as they are, of whole hosts, of whole NVLink domains."""
    cluster = free.cluster
    fit = fit_of(job, cluster.largest_host)
    fits = [fit]
    for whole in dict.fromkeys((cluster.largest_host, cluster.largest_domain)):
        host = lcm(fit.on_host, cluster.largest_host)
        if job.mesh is not None and job.gpus % whole == 0 and host == cluster.largest_host:
            fits.append(Fit(host, lcm(fit.in_domain, whole), fit.selector))
    for fit in dict.fromkeys(fits):
        if job.gpus % fit.in_domain == 0 and (gpus := free_gpus_for(job, free, free.index(fit))) is not None:
            yield in_rank_order(job, gpus)


def best_placement(job: GangJob, free: FreeGpus) -> GangPlacement | None:
    """The candidate with the fastest step, among equals the one nearest together; None if the job does not fit now."""

    def cost(placement: GangPlacement) -> tuple[float, ...]:
        cluster, gpus = free.cluster, placement.gpus
        seconds = job.work.step_seconds(gpus, cluster) if job.work is not None else 0.0
        return (seconds, *(len(set(cluster.numbers_of(level, gpus))) for level in reversed(LEVELS)))

    found = list(candidates(job, free))
    return min(found, key=cost) if len(found) > 1 else next(iter(found), None)


def free_gpus_for(job: GangJob, free: FreeGpus, index: CapacityIndex) -> list[int] | None:
    """GPUs for a job; None if it does not fit now."""
    if index.total < job.gpus:
        return None
    if job.anywhere:
        return _anywhere(job.gpus, free, index)
    for level in index.levels:
        if (group := index.smallest(level, job.gpus)) is not None:
            return _within(free, index, level, group, job.gpus)
    top = index.levels[-1]
    return [gpu for group, share in index.deal(top, job.gpus) for gpu in _within(free, index, top, group, share)]


def _within(free: FreeGpus, index: CapacityIndex, level: str, group: int, gpus: int) -> list[int]:
    """So many GPUs of one group, which has them."""
    if level == "host":
        return free.free_on(group)[:gpus]
    below = index.levels[index.levels.index(level) - 1]
    shares = index.deal(below, gpus, within=(level, group))
    return [gpu for member, share in shares for gpu in _within(free, index, below, member, share)]


def _anywhere(gpus: int, free: FreeGpus, index: CapacityIndex) -> list[int]:
    """GPUs of workers that do not talk: from the hosts that have least to give."""
    found: list[int] = []
    for host in index.least_first("host"):
        found += free.free_on(host)[: min(index.capacity["host"][host], gpus - len(found))]
        if len(found) == gpus:
            break
    return found
