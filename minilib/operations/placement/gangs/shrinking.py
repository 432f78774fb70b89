"""The same gang on fewer GPUs: whole workers, whole segments, and fewer replicas of the model along the axis dp."""

from __future__ import annotations

import math
from dataclasses import replace

from minilib.operations.placement.gangs.job import GangJob


def shrink_unit(job: GangJob) -> int:
    """GPUs by which a gang shrinks at least: whole workers, segments and replicas. A mesh without dp is one replica."""
    replica = 1 if job.mesh is None else job.gpus // _replicas(job)
    return math.lcm(replica, job.gpus_per_host or 1, job.segment or 1)


def on_fewer_gpus(job: GangJob, gpus: int) -> GangJob:
    """A job on so many GPUs, a multiple of `shrink_unit`: its mesh has fewer replicas, and so has that of its work."""
    if job.mesh is None:
        return replace(job, gpus=gpus)
    sizes = dict(zip(job.mesh.names, job.mesh.sizes, strict=True))
    if "dp" in sizes:
        sizes["dp"] = gpus * sizes["dp"] // job.gpus
    mesh = replace(job.mesh, sizes=tuple(sizes.values()))
    return replace(job, gpus=gpus, mesh=mesh, work=job.work and replace(job.work, mesh=mesh))


def _replicas(job: GangJob) -> int:
    return job.mesh.size("dp") if "dp" in job.mesh.names else 1
