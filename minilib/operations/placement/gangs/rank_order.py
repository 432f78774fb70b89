"""Which rank runs on which GPU: ranks that talk most stand next to each other, also after a host was replaced.

GPUs are numbered in topology order, so that GPUs in a row share a host, a domain, a rack. Ranks are dealt to them with
the axis that talks most as the fastest, however the mesh orders its axes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import product

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.ranks.mesh_shape import MeshShape

# From the axis that talks most (in every layer) to the one that talks least (once between two stages).
NEAREST_FIRST = ("tp", "etp", "cp", "ep", "dp", "edp", "pp")


class NoReplacement(ValueError):
    """Spare GPUs that cannot take the place of those that were lost; the message says how many are missing."""


@lru_cache(maxsize=256)
def topology_order(mesh: MeshShape) -> tuple[int, ...]:
    """Ranks in the order in which they are dealt to GPUs; axes that nobody knows are farthest apart."""
    slowest_first = sorted(mesh.names, key=_distance, reverse=True)
    if slowest_first == list(mesh.names):
        return tuple(range(mesh.world_size))
    strides = {name: math.prod(mesh.sizes[at + 1 :]) for at, name in enumerate(mesh.names)}
    places = product(*(range(mesh.size(name)) for name in slowest_first))
    return tuple(sum(at * strides[name] for at, name in zip(place, slowest_first, strict=True)) for place in places)


def in_rank_order(job: GangJob, gpus: Iterable[int]) -> GangPlacement:
    """Deal ranks to the GPUs that were chosen for a job.

    Raises:
        InvalidJob: if there is not one for each rank.
    """
    chosen = sorted(gpus)
    if job.mesh is None or len(chosen) != job.gpus:
        return GangPlacement(job, tuple(chosen))
    dealt = dict(zip(topology_order(job.mesh), chosen, strict=True))
    return GangPlacement(job, tuple(dealt[rank] for rank in range(job.gpus)))


def replaced(
    placement: GangPlacement, lost: Collection[int], spare: Sequence[int], cluster: GpuCluster
) -> GangPlacement:
    """The same gang with spare GPUs in place of lost ones; every other rank stays where it is.

    Where the spares stand in other NVLink domains than what is left of a group along tp, the whole group moves: half a
    group on each side of a slow link would slow down every rank.

    Args:
        placement: before the loss.
        lost: GPUs that it cannot have any more; those that it does not have do not matter.
        spare: free GPUs, more than are needed if there are more.
        cluster: where they stand.

    Raises:
        NoReplacement: if the spares are too few, or none of their domains has room for a group that moves.
    """
    lost, left = set(lost), sorted(set(spare) - set(lost) - set(placement.gpus))
    gpus = list(placement.gpus)
    together = placement.job.tp if placement.job.tp_in_domain else 1
    order = topology_order(placement.job.mesh) if placement.job.mesh is not None else range(len(gpus))
    for start in range(0, len(gpus), together):
        group = order[start : start + together]
        missing = [rank for rank in group if gpus[rank] in lost]
        if not missing:
            continue
        moved, taken = _for_group([gpus[rank] for rank in group if gpus[rank] not in lost], len(group), left, cluster)
        for rank, gpu in zip(group if moved else missing, taken, strict=True):
            gpus[rank] = gpu
        left = [gpu for gpu in left if gpu not in set(taken)]
    return GangPlacement(placement.job, tuple(gpus))


def _for_group(kept: list[int], size: int, spare: Sequence[int], cluster: GpuCluster) -> tuple[bool, list[int]]:
    """Whether a whole group moves, and the spares that it takes."""
    by_domain: dict[int, list[int]] = {}
    for gpu, domain in zip(spare, cluster.numbers_of("domain", spare), strict=True):
        by_domain.setdefault(domain, []).append(gpu)
    missing = size - len(kept)
    homes = set(cluster.numbers_of("domain", kept))
    beside = by_domain.get(min(homes), []) if len(homes) == 1 else []
    if kept and len(beside) >= missing:
        return False, beside[:missing]
    fitting = [gpus for gpus in by_domain.values() if len(gpus) >= size]
    if not fitting:
        most = max(map(len, by_domain.values()), default=0)
        raise NoReplacement(f"a group of {size} ranks moves into one NVLink domain, and no domain has more than {most} "
                            f"spare GPUs: {size - most} too few")  # fmt: skip
    return True, min(fitting, key=len)[:size]


def _distance(axis: str) -> int:
    return NEAREST_FIRST.index(axis) if axis in NEAREST_FIRST else len(NEAREST_FIRST)
