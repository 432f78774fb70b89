"""A job that needs all of its GPUs at once, where it was placed, or why it never will be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.scheduling.task import check_priority
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.ranks.mesh_shape import MeshShape


class InvalidJob(ValueError):
    """A job that no cluster could run; the message says what came and how to mend it."""


class UnknownJob(LookupError):
    """A job that is not here, or not in the state that was expected."""


class StepWork(Protocol):
    """What a job does again and again, so that its steps can be priced on given GPUs; see price.py."""

    @property
    def mesh(self) -> MeshShape:
        """The mesh of its ranks."""

    def step_seconds(self, gpus: Sequence[int], cluster: GpuCluster) -> float:
        """Seconds of a step if rank r runs on gpus[r]."""


@dataclass(frozen=True)
class GangJob:
    """All or nothing: the job runs on all of its GPUs, or waits.

    Args:
        name: no other job has it.
        gpus: ranks, one on each.
        gpus_per_host: GPUs of one worker, which lie on one host; two workers may share a host. If left out, a group
            of the axis tp lies on one host wherever hosts hold whole groups, and nothing else is asked for.
        mesh: of its ranks; that of `work`, or none, if left out.
        work: what a step does, to price placements.
        tenant: whose job it is.
        priority: 0 is the most urgent.
        seconds: how long it runs at most. Backfill relies on it.
        checkpoint_every: seconds between two checkpoints; None for a job that keeps nothing.
        restart_seconds: from a loss to the first step after it.
        min_gpus: with how few it goes on; all of them if left out.
        selector: labels that its hosts have.
        tp_in_domain: refuse GPUs on which a group of the axis tp would span two NVLink domains.
        segment: GPUs that lie together in an NVLink domain, as Slurm's --segment asks for; a group of tp if left out.
        anywhere: workers that do not talk to each other take what is of least use to others, near or far.

    Raises:
        InvalidJob: for 1.5 GPUs, a mesh of other ranks, no time, and whatever else contradicts itself.
        InvalidPriority: if the priority is not a finite number ≥ 0.
    """

    name: str
    gpus: int
    gpus_per_host: int | None = None
    mesh: MeshShape | None = None
    work: StepWork | None = field(default=None, hash=False)
    tenant: str = ""
    priority: float = 0
    seconds: float = 3600
    checkpoint_every: float | None = None
    restart_seconds: float = 0
    min_gpus: int | None = None
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)
    tp_in_domain: bool = True
    segment: int | None = None
    anywhere: bool = False

    def __post_init__(self) -> None:
        check_priority(self.name, self.priority)
        if self.mesh is None and self.work is not None:
            object.__setattr__(self, "mesh", self.work.mesh)
        self._check_counts()
        if self.mesh is not None and self.mesh.world_size != self.gpus:
            raise InvalidJob(f"{self.name}: the mesh {self.mesh} has {self.mesh.world_size} ranks and the job "
                             f"{self.gpus} GPUs: one rank runs on each")  # fmt: skip
        if self.work is not None and self.work.mesh != self.mesh:
            raise InvalidJob(f"{self.name}: the mesh {self.mesh} is not that of its work, {self.work.mesh}: give one")
        if self.anywhere and self.mesh is not None:
            raise InvalidJob(f"{self.name}: ranks of the mesh {self.mesh} talk to each other: they do not go anywhere")
        times = {"seconds": self.seconds, "checkpoint_every": self.checkpoint_every,
                 "restart_seconds": self.restart_seconds}  # fmt: skip
        for name, value in times.items():
            least = "≥ 0" if name == "restart_seconds" else "> 0"
            if value is not None and not (0 <= value < math.inf and (value > 0 or least == "≥ 0")):
                raise InvalidJob(f"{self.name}: {name} is a finite number {least}, got {value!r}")

    def _check_counts(self) -> None:
        counts = {"gpus": self.gpus, "gpus_per_host": self.gpus_per_host, "min_gpus": self.min_gpus,
                  "segment": self.segment}  # fmt: skip
        for name, count in counts.items():
            if not (count is None and name != "gpus") and not is_whole(count, 1):
                raise InvalidJob(f"{self.name}: {name} is a whole number ≥ 1, got {count!r}: a GPU is given whole, "
                                 "or cut in hardware into slices that are devices of their own")  # fmt: skip
        if self.gpus_per_host and self.gpus % self.gpus_per_host:
            raise InvalidJob(f"{self.name}: {self.gpus} GPUs are no whole number of workers of {self.gpus_per_host}")
        if self.segment and self.gpus % self.segment:
            raise InvalidJob(f"{self.name}: {self.gpus} GPUs are no whole number of segments of {self.segment}")
        if self.min_gpus and self.min_gpus > self.gpus:
            raise InvalidJob(f"{self.name}: min_gpus is at most gpus = {self.gpus}, got {self.min_gpus}")

    @property
    def tp(self) -> int:
        """Ranks of a group that talks in every layer."""
        return self.mesh.size("tp") if self.mesh is not None and "tp" in self.mesh.names else 1

    @property
    def least_gpus(self) -> int:
        """With how few it goes on."""
        return self.gpus if self.min_gpus is None else self.min_gpus

    def on_one_host(self, host_gpus: int) -> int:
        """GPUs that have to lie together on a host, if the largest host has so many."""
        if self.gpus_per_host is not None:
            return self.gpus_per_host
        return self.tp if self.tp_in_domain and host_gpus % self.tp == 0 else 1

    def in_one_domain(self, host_gpus: int) -> int:
        """GPUs that have to lie together in an NVLink domain."""
        return math.lcm(self.on_one_host(host_gpus), self.tp if self.tp_in_domain else 1, self.segment or 1)


@dataclass(frozen=True)
class GangPlacement:
    """Where a gang runs.

    Args:
        job: which.
        gpus: rank r runs on gpus[r].

    Raises:
        InvalidJob: unless each rank has one GPU of its own.
    """

    job: GangJob
    gpus: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpus", tuple(self.gpus))
        if len(set(self.gpus)) != len(self.gpus) or len(self.gpus) != self.job.gpus:
            raise InvalidJob(f"{self.job.name}: {self.job.gpus} ranks run on {self.job.gpus} different GPUs, "
                             f"got {len(set(self.gpus))} in {len(self.gpus)} places")  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """A job that this cluster never runs.

    Args:
        job: which.
        reason: the constraint that fails, and by how much.
    """

    job: GangJob
    reason: str
