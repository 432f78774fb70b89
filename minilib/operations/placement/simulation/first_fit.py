"""First fit, the baseline of placements: the lowest numbers that are free.

It gives every job what it asks for (workers on one host, groups within one NVLink domain), so that it starts the same
jobs as `best_placement` if it is given the same free GPUs; but it neither looks for near GPUs nor for the hole that
fits best.
"""

from __future__ import annotations

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.gangs.fitting import fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.gangs.rank_order import in_rank_order


def first_fit(job: GangJob, free: FreeGpus) -> GangPlacement | None:
    """The lowest-numbered free GPUs that a job can use, domain by domain and host by host.

    Args:
        job: to be placed.
        free: who has which GPU.

    Returns:
        Its placement; None if it does not fit now.
    """
    cluster = free.cluster
    fit = fit_of(job, cluster.largest_host)
    index = free.index(fit)
    if index.total < job.gpus:
        return None
    chosen: list[int] = []
    for domain in cluster.groups("domain"):
        usable = {host: index.capacity["host"][host] for host in domain.hosts}
        left = min(sum(usable.values()) // fit.in_domain * fit.in_domain, job.gpus - len(chosen))
        for host, gpus in usable.items():
            chosen += free.free_on(host)[: min(gpus, left)]
            left -= min(gpus, left)
        if len(chosen) == job.gpus:
            break
    return in_rank_order(job, chosen)
