"""What a step costs on the very GPUs of a placement: by the planner for a model, by rings for a mesh alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.ranks.mesh_shape import MeshShape
from minilib.training.planner.layout import ParallelLayout
from minilib.training.planner.shape import TrainedShape
from minilib.training.planner.step_time import StepPrice, price_step


@dataclass(frozen=True)
class TrainingWork:
    """A model in training, priced by the planner of chapter 10.

    Args:
        shape: of the model.
        layout: of its ranks.
        batch: sequences a step.
        sequence: tokens of each.
        dtype: of matrix products.

    Raises:
        LayoutDoesNotFit: if the model cannot be trained so.
    """

    shape: TrainedShape
    layout: ParallelLayout
    batch: int
    sequence: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        self.layout.check(self.shape, self.layout.gpus, self.batch, self.sequence)

    @property
    def mesh(self) -> MeshShape:
        """The mesh of the layout."""
        return self.layout.mesh

    def price(self, gpus: Sequence[int], cluster: GpuCluster) -> StepPrice:
        """A step, term by term, if rank r runs on gpus[r]; the slowest group of each axis counts."""
        domains = _by_appearance(cluster.numbers_of("domain", gpus))
        return price_step(
            self.shape, self.layout, cluster.priced(len(gpus)), self.batch, self.sequence, self.dtype, domains=domains
        )

    def step_seconds(self, gpus: Sequence[int], cluster: GpuCluster) -> float:
        """Seconds of a step if rank r runs on gpus[r]."""
        return self.price(gpus, cluster).seconds


@dataclass(frozen=True)
class MeshTraffic:
    """A mesh whose groups all-reduce in rings, one axis after the other; no group slows down another.

    Args:
        mesh: of the ranks.
        nbytes: that each rank has in the all-reduces of a step, by axis; nothing for axes left out.
        calls: all-reduces of each axis into which these bytes are cut.
        compute: seconds of a step without messages.

    Raises:
        NoSuchAxis: for bytes of an axis that there is not.
        ValueError: for bytes, calls or seconds that are none.
    """

    mesh: MeshShape
    nbytes: Mapping[str, int] = field(hash=False)
    calls: int = 1
    compute: float = 0.0

    def __post_init__(self) -> None:
        for axis, number in self.nbytes.items():
            self.mesh.size(axis)
            check_whole(f"bytes along {axis}", number)
        check_whole("calls", self.calls, 1)
        check_quantity("compute", self.compute)

    def step_seconds(self, gpus: Sequence[int], cluster: GpuCluster) -> float:
        """Seconds of a step if rank r runs on gpus[r]; a ring is as fast as its slowest link."""
        return self.compute + sum(self.axis_seconds(axis, gpus, cluster) for axis in self.nbytes)

    def axis_seconds(self, axis: str, gpus: Sequence[int], cluster: GpuCluster) -> float:
        """Seconds of a step in which the slowest group of an axis talks."""
        n = self.mesh.size(axis)
        if n == 1:
            return 0.0
        joins = {
            cluster.joined_by(gpus[rank], gpus[group[at - 1]])
            for group in self.mesh.groups(axis)
            for at, rank in enumerate(group)
        }
        size = self.nbytes[axis] / n
        links = [cluster.links[join] for join in joins]
        return max(2 * (n - 1) * (self.calls * link.latency + size / link.bandwidth) for link in links)


def _by_appearance(domains: Sequence[int]) -> tuple[int, ...]:
    """Domains numbered in the order in which ranks first stand in them: placements that cost the same look the same."""
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(domain, len(seen)) for domain in domains)
