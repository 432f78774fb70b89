"""GPUs of a cluster that are cut into MIG instances while others are given whole.

    whole ──a slice is asked for, and no cut GPU has room──→ cut ──its last instance is gone──→ whole

A GPU that is cut is kept from gangs, as a reserved one is; a gang on a part of a GPU could not reach its peers: between
instances there is no NVLink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.mig import MigGpu, MigProfile, SliceTaken, mig_profile


class GpuSlice(NamedTuple):
    """Where an instance is.

    Args:
        gpu: its number in the cluster.
        start: memory slice at which it starts.
    """

    gpu: int
    start: int


Choose = Callable[[Iterable[tuple[int, MigGpu]], MigProfile], GpuSlice | None]


def first_start(cut: Iterable[tuple[int, MigGpu]], profile: MigProfile) -> GpuSlice | None:
    """The first start of the first GPU that has one."""
    return next((GpuSlice(number, start) for number, gpu in cut for start in gpu.starts(profile)), None)


def keep_large_starts(cut: Iterable[tuple[int, MigGpu]], profile: MigProfile) -> GpuSlice | None:
    """The start that takes fewest starts from large profiles, over all GPUs that are cut."""
    found = [(gpu.cost(profile, start), number, start) for number, gpu in cut for start in gpu.starts(profile)]
    return GpuSlice(*min(found)[1:]) if found else None


class MigSlices:
    """Instances on the GPUs of a scheduler that gives gangs whole ones.

    Args:
        scheduler: whose free GPUs are cut when they are needed.
        choose: where an instance goes among the GPUs that are cut.
    """

    def __init__(self, scheduler: GangScheduler, choose: Choose = keep_large_starts) -> None:
        self.scheduler, self.choose = scheduler, choose
        self._cut: dict[int, MigGpu] = {}
        self._gpu_of: dict[str, int] = {}

    @property
    def cut(self) -> dict[int, MigGpu]:
        """GPUs that are cut, by number."""
        return dict(sorted(self._cut.items()))

    def create(self, name: str, profile: str) -> GpuSlice | None:
        """A new instance; None if no cut GPU has room and none is free.

        Raises:
            NoSuchProfile: if there is no such profile, such as 1.5.
            SliceTaken: if there is an instance of this name.
        """
        wanted = mig_profile(profile)
        if name in self._gpu_of:
            raise SliceTaken(f"there is an instance {name!r} already; give each its own name")
        gpus = self._usable()
        where = self.choose(gpus.items(), wanted)
        if where is None:
            if (number := self._whole()) is None:
                return None
            gpus = {number: MigGpu()}
            if (where := self.choose(gpus.items(), wanted)) is None:
                return None
        gpus[where.gpu].create(name, wanted, where.start)
        if where.gpu not in self._cut:
            self._cut |= gpus
            self.scheduler.drain(gpus, "reserved")
        self._gpu_of[name] = where.gpu
        return where

    def destroy(self, name: str) -> None:
        """An instance is gone; with the last one its GPU is whole again, and free unless it failed.

        Raises:
            SliceTaken: if there is none of this name.
        """
        if name not in self._gpu_of:
            raise SliceTaken(f"there is no instance {name!r}; there are {len(self._gpu_of)}")
        number = self._gpu_of.pop(name)
        self._cut[number].destroy(name)
        if not self._cut[number].instances:
            del self._cut[number]
            if self.scheduler.free.out(number) == "reserved":
                self.scheduler.restore([number])

    def fail(self, gpu: int, now: float) -> list[str]:
        """A GPU is lost with all its instances; their names. It is restored as a whole one."""
        self.scheduler.fail([gpu], now)
        lost = list(self._cut.pop(gpu, MigGpu()).instances)
        for name in lost:
            del self._gpu_of[name]
        return lost

    def placeable(self, profile: str) -> int:
        """How many more instances of a profile fit into the GPUs that are cut, if nothing else comes."""
        wanted, count = mig_profile(profile), 0
        for gpu in self._usable().values():
            trial = MigGpu()
            trial.instances = dict(gpu.instances)
            while (start := trial.best_start(wanted)) is not None:
                trial.create(f"{len(trial.instances)} more", wanted, start)
                count += 1
        return count

    def check_invariants(self) -> None:
        """No slice twice, no cut GPU whole or a gang's, no GPU cut for nothing."""
        for number, gpu in self._cut.items():
            gpu.check_invariants()
            assert self.scheduler.free.owner(number) is None and not self.scheduler.free.is_free(number), (
                "a cut GPU runs"
            )
            assert gpu.instances and all(self._gpu_of[name] == number for name in gpu.instances), "cut for nothing"
        assert sum(len(gpu.instances) for gpu in self._cut.values()) == len(self._gpu_of), "an instance is nowhere"

    def _usable(self) -> dict[int, MigGpu]:
        """GPUs that are cut and have not failed."""
        return {number: gpu for number, gpu in self.cut.items() if self.scheduler.free.out(number) == "reserved"}

    def _whole(self) -> int | None:
        """A free GPU to cut, on the host that has least to give; none that is kept for a gang."""
        free, kept = self.scheduler.free, self.scheduler.reservation
        hosts = [free.free_on(host) for host in range(len(free.cluster.hosts))]
        found = [(len(gpus), gpu) for gpus in hosts for gpu in gpus if kept is None or gpu not in kept.gpus]
        return min(found, default=(0, None))[1]
