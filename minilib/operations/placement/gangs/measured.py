"""Two placements of one mesh on real ranks, over links that are slowed to those of a small cluster.

Each rank runs on a core here, and what it sends takes as long as between the GPUs that a placement gives it. Steps of
the two placements are taken in turns in the same processes; of a step the slowest rank counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minilib.mechanisms.basics.checks import check_whole
from minilib.numbers.neighbours import BUSY, Watch
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangPlacement, InvalidJob
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator, ring_plan
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRIES = 3  # as long as others are busy; the quietest counts


@dataclass(frozen=True)
class PlacementsCompared:
    """Step times of two placements, predicted and measured.

    Args:
        predicted: seconds of a step in each.
        measured: medians.
        busy: share of the cores that others took meanwhile.
    """

    predicted: tuple[float, float]
    measured: tuple[float, float]
    busy: float

    @property
    def predicted_ratio(self) -> float:
        """The second's step over the first's, as priced."""
        return self.predicted[1] / self.predicted[0]

    @property
    def measured_ratio(self) -> float:
        """The same, as measured."""
        return self.measured[1] / self.measured[0]


def compare_placements(
    first: GangPlacement, second: GangPlacement, cluster: GpuCluster, steps: int = 8
) -> list[PlacementsCompared]:
    """Run the work of a job in two placements.

    Where others take more than a tenth of the cores, everything is repeated, three times at most.

    Args:
        first, second: of one job whose work is a MeshTraffic.
        cluster: with links that this machine keeps up with.
        steps: taken in each, after one that is not counted.

    Returns:
        Every try, the one that counts first: the quietest.

    Raises:
        InvalidJob: if the job has other work.
        ValueError: if there is no step.
    """
    work = first.job.work
    if not isinstance(work, MeshTraffic) or second.job != first.job:
        raise InvalidJob(f"both placements are of one job whose work is a MeshTraffic; got {work!r}")
    check_whole("steps", steps, 1)
    predicted = tuple(work.step_seconds(each.gpus, cluster) for each in (first, second))
    tries = []
    for _ in range(TRIES):
        watch = Watch()
        ranks = launch.run(_steps, first.job.gpus, work, (first.gpus, second.gpus), cluster, steps, timeout=120)
        slowest = [[max(taken) for taken in zip(*placement, strict=True)] for placement in zip(*ranks, strict=True)]
        measured = tuple(statistics.median(seconds[1:]) for seconds in slowest)
        tries.append(PlacementsCompared(predicted, measured, watch.busy))
        if tries[-1].busy <= BUSY:
            break
    return sorted(tries, key=lambda each: each.busy)


def _steps(
    work: MeshTraffic, placements: Sequence[Sequence[int]], cluster: GpuCluster, steps: int
) -> list[list[float]]:
    """On a rank: for each placement the seconds of each step."""
    meshes = [_mesh(work, gpus, cluster) for gpus in placements]
    taken: list[list[float]] = [[] for _ in placements]
    for _ in range(1 + steps):
        for mesh, seconds in zip(meshes, taken, strict=True):
            mesh.comm(*work.mesh.names).barrier()
            started = time.perf_counter()
            _step(work, mesh)
            seconds.append(time.perf_counter() - started)
    for mesh in meshes:
        mesh.close()
    return taken


def _mesh(work: MeshTraffic, gpus: Sequence[int], cluster: GpuCluster) -> DeviceMesh:
    def make(group: torch.distributed.ProcessGroup, ranks: Sequence[int]) -> Communicator:
        links = [[cluster.link(gpus[src], gpus[dst]) for dst in ranks] for src in ranks]
        shaped = ShapedTransport(SharedMemoryTransport(group, timeout=60.0), lambda src, dst: links[src][dst])
        return Communicator(shaped)

    return DeviceMesh(work.mesh, make)


def _step(work: MeshTraffic, mesh: DeviceMesh) -> None:
    """Compute, then all-reduce along each axis."""
    time.sleep(work.compute)
    for axis, nbytes in work.nbytes.items():
        comm, calls = mesh.comm(axis), work.calls.get(axis, 1)
        part = torch.ones(nbytes // calls // 4)
        for _ in range(calls):
            comm.all_reduce(part, plan=ring_plan("all_reduce", comm.world_size))
