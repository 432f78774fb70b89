"""A placement carried out on this machine: each rank runs on the one core that stands for its GPU.

Cores become GPUs of small hosts: a cluster of two hosts with one GPU each is two cores here, and the host of a rank is
a label. What ranks see is what they would see there: RANK and LOCAL_RANK, GROUP_RANK for the number of the host among
those of the job, HOSTNAME for its name. Links between hosts are as slow as the cluster's links say, see `transport`.

A pinned process is pinned thread by thread: `os.sched_setaffinity(0, …)` moves the thread that calls it, and the
threads that there are already, of torch and gloo, stay where they were. So each thread is moved, and asked afterwards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangPlacement
from minilib.ranks import launch
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

THREADS = Path("/proc/self/task")


class NoAffinity(RuntimeError):
    """This system does not let a process choose its cores."""


class NotEnoughCores(ValueError):
    """Fewer cores than the GPUs that they stand for."""


class NotPinned(RuntimeError):
    """A rank that the system runs elsewhere than on its core."""


@dataclass(frozen=True)
class Seat:
    """Where a rank runs.

    Args:
        core: of this machine.
        host: name of the host that the core belongs to, as the cluster says.
        group_rank: number of that host among the job's hosts, the host of rank 0 first.
        local_rank: number of the rank among the job's ranks of that host.
        local_world_size: how many these are.
    """

    core: int
    host: str
    group_rank: int
    local_rank: int
    local_world_size: int

    def environment(self) -> dict[str, str]:
        """What a rank sees of it."""
        return {"HOSTNAME": self.host, "GROUP_RANK": str(self.group_rank), "LOCAL_RANK": str(self.local_rank),
                "LOCAL_WORLD_SIZE": str(self.local_world_size)}  # fmt: skip


@dataclass(frozen=True)
class CoresAsGpus:
    """A cluster whose GPUs are cores of this machine.

    Args:
        cluster: what they stand for.
        cores: of each GPU; those that this process may use, in order, if left out. Two GPUs may be given one core:
            their ranks take turns, and run correctly.

    Raises:
        NoAffinity: where a process cannot choose its cores, as on macOS.
        NotEnoughCores: for fewer cores than GPUs, or a core that this process may not use.
    """

    cluster: GpuCluster
    cores: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        there = usable_cores()
        cores = tuple(there[: self.cluster.gpus] if self.cores is None else self.cores)
        if len(cores) != self.cluster.gpus or not set(cores) <= set(there):
            raise NotEnoughCores(f"{self.cluster.name} has {self.cluster.gpus} GPUs, got cores {cores} of the usable "
                                 f"{there}: describe fewer GPUs, or name a core for several")  # fmt: skip
        object.__setattr__(self, "cores", cores)

    def seats(self, placement: GangPlacement) -> tuple[Seat, ...]:
        """Where each rank of a placement runs."""
        hosts = [self.cluster.host_of(gpu) for gpu in placement.gpus]
        numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
        sizes, before = Counter(hosts), Counter[int]()
        seats = []
        for gpu, host in zip(placement.gpus, hosts, strict=True):
            name = self.cluster.hosts[host].name
            seats.append(Seat(self.cores[gpu], name, numbers[host], before[host], sizes[host]))
            before[host] += 1
        return tuple(seats)


@dataclass(frozen=True)
class PlacedRun:
    """What ranks returned, and where they ran.

    Args:
        values: of each rank.
        placement: that they ran on, in the end.
        lost: ranks that died before, in the order of their deaths.
    """

    values: list
    placement: GangPlacement
    lost: tuple[int, ...]


def run_placed(
    fn: Callable,
    placement: GangPlacement,
    machine: CoresAsGpus,
    *args,
    spares: Sequence[int] = (),
    timeout: float | None = None,
) -> PlacedRun:
    """Run `fn(*args)` on the ranks of a placement, each on its core; see `minilib.ranks.launch.run`.

    A rank that fails ends the gang: n − 1 of n ranks are nothing. If there is a spare GPU, its rank moves there, and
    all start again: the others stay where they are, and the order of ranks is kept, so each has the neighbours that
    its mesh was placed for.

    Args:
        fn: what each rank calls.
        placement: rank r runs on the core of its GPU r.
        machine: which core that is.
        args: of `fn`.
        spares: GPUs that the placement does not use, the first one is taken first.
        timeout: seconds for one try.

    Raises:
        RankFailed: if a rank fails and no spare is left.
        NotPinned: a RankFailed that says so, if the system moves a rank elsewhere.
        ValueError: if a spare is in use, named twice or no GPU of the cluster.
        RanksTimedOut: as `launch.run`.
    """
    left = list(spares)
    if len({*left, *placement.gpus}) < len(left) + len(placement.gpus) or any(
        spare not in range(machine.cluster.gpus) for spare in left
    ):
        raise ValueError(f"spares are GPUs of {machine.cluster.name} that {placement.job.name} does not use, each "
                         f"once; got {left} beside {placement.gpus}")  # fmt: skip
    lost: list[int] = []
    while True:
        seats = machine.seats(placement)
        try:
            values = launch.run(_in_its_seat, len(seats), seats, fn, args, timeout=timeout)
        except launch.RankFailed as failure:
            if not left or isinstance(failure, launch.ReturnNotPicklable):  # which it would be elsewhere, too
                raise
            lost.append(failure.rank)
            placement = moved(placement, failure.rank, left.pop(0))
        else:
            return PlacedRun(values, placement, tuple(lost))


def moved(placement: GangPlacement, rank: int, gpu: int) -> GangPlacement:
    """The same ranks in the same order, one of them on another GPU."""
    gpus = [*placement.gpus]
    gpus[rank] = gpu
    return replace(placement, gpus=tuple(gpus))


def transport(placement: GangPlacement, cluster: GpuCluster) -> ShapedTransport:
    """In a rank: messages through memory, and as slow as the cluster's links between the GPUs of a placement."""
    gpus = placement.gpus
    return ShapedTransport(SharedMemoryTransport(), lambda src, dst: cluster.link(gpus[src], gpus[dst]))


def usable_cores() -> list[int]:
    """Cores that this process may use, in order.

    Raises:
        NoAffinity: where the system does not say.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise NoAffinity("a process cannot choose its cores on this system (Linux lets it): run without run_placed")
    return sorted(os.sched_getaffinity(0))


def cores_of_threads() -> set[int]:
    """Cores that any thread of this process may run on, as the system says."""
    found: set[int] = set()
    for thread in _threads():
        with suppress(ProcessLookupError):  # it ended since it was listed
            found |= os.sched_getaffinity(thread)
    return found


def _in_its_seat(seats: tuple[Seat, ...], fn: Callable, args: tuple) -> object:
    seat = seats[int(os.environ["RANK"])]
    for thread in _threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, {seat.core})
    if cores_of_threads() != {seat.core}:
        raise NotPinned(f"a rank of {seat.host} belongs on core {seat.core} and may run on {cores_of_threads()}")
    os.environ.update(seat.environment())
    return fn(*args)


def _threads() -> list[int]:
    return [int(entry.name) for entry in THREADS.iterdir()]
