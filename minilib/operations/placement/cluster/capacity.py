"""Whose each GPU is: a job's, nobody's, or out of use.

For each fit that was asked for, an index is kept of what every group of the tree can give (index.py).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from minilib.operations.placement.cluster.index import CapacityIndex, Fit
from minilib.operations.placement.cluster.topology import GpuCluster

OUT = ("failed", "drained", "reserved")
MOST_INDEXES = 16  # fits that are kept up to date; another one drops the index that nobody asked for the longest


class NotFree(RuntimeError):
    """A GPU that is taken twice, or given back by whom it does not belong to."""


class FreeGpus:
    """Who has which GPU.

    A GPU is free, or has an owner, or is out of use: failed, drained or reserved. A drained GPU may still have an
    owner; when it is given back it does not become free.

    Args:
        cluster: whose GPUs.
    """

    def __init__(self, cluster: GpuCluster) -> None:
        self.cluster = cluster
        self._owner: dict[int, Hashable] = {}
        self._taken: dict[Hashable, tuple[int, ...]] = {}
        self._out: dict[int, str] = {}
        self._free = [host.gpus for host in cluster.hosts]
        self._indexes: OrderedDict[Fit, CapacityIndex] = OrderedDict()
        self._looked_at = 0  # by indexes that are kept no more

    @property
    def free(self) -> int:
        """How many GPUs are free."""
        return sum(self._free)

    @property
    def looked_at(self) -> int:
        """Groups and hosts that were looked at since the beginning."""
        return self._looked_at + sum(index.looked_at for index in self._indexes.values())

    def is_free(self, gpu: int) -> bool:
        """Whether a job can have this GPU."""
        return gpu not in self._owner and gpu not in self._out

    def owner(self, gpu: int) -> Hashable | None:
        """Whose a GPU is."""
        return self._owner.get(gpu)

    def owned(self, owner: Hashable) -> tuple[int, ...]:
        """An owner's GPUs, as they were taken; none for who has none."""
        return self._taken.get(owner, ())

    def out(self, gpu: int) -> str | None:
        """Why a GPU is out of use: one of OUT; None if it is in use."""
        return self._out.get(gpu)

    def free_on(self, host: int) -> list[int]:
        """The free GPUs of a host, in order."""
        self._looked_at += 1
        return [gpu for gpu in self.cluster.gpus_of(host) if self.is_free(gpu)]

    def index(self, fit: Fit) -> CapacityIndex:
        """What each group can give to jobs of a fit; made when it is asked for first, and kept up to date."""
        if fit not in self._indexes:
            if len(self._indexes) == MOST_INDEXES:
                self._looked_at += self._indexes.popitem(last=False)[1].looked_at
            self._indexes[fit] = CapacityIndex(self.cluster, fit, self._free)
        self._indexes.move_to_end(fit)
        return self._indexes[fit]

    def take(self, owner: Hashable, gpus: Sequence[int]) -> None:
        """Give free GPUs to an owner who has none: all of them, or nothing is changed.

        Raises:
            NotFree: if one is not free, comes twice, or the owner has some already.
        """
        if owner in self._taken:
            raise NotFree(f"{owner!r} has {len(self._taken[owner])} GPUs already; give them back first")
        for gpu in gpus:
            if not self.is_free(gpu):
                raise NotFree(f"GPU {gpu} is {self.out(gpu) or f'that of {self.owner(gpu)!r}'}, and {owner!r} wants it")
        if len(set(gpus)) < len(gpus):
            raise NotFree(f"{owner!r} wants a GPU twice: {sorted(gpus)}")
        self._taken[owner] = tuple(gpus)
        self._owner |= dict.fromkeys(gpus, owner)
        self._count(gpus, -1)

    def give_back(self, owner: Hashable) -> tuple[int, ...]:
        """Take all GPUs from an owner; those in use become free.

        Raises:
            NotFree: if the owner has none.
        """
        if owner not in self._taken:
            raise NotFree(f"{owner!r} has no GPUs to give back")
        gpus = self._taken.pop(owner)
        for gpu in gpus:
            del self._owner[gpu]
        self._count([gpu for gpu in gpus if gpu not in self._out], +1)
        return gpus

    def take_out(self, gpus: Iterable[int], why: str) -> None:
        """GPUs are failed, drained or reserved from now on; who owns them keeps them until `give_back`.

        Raises:
            ValueError: if `why` is none of OUT.
            IndexError: if there is no such GPU.
        """
        if why not in OUT:
            raise ValueError(f"a GPU is out because it is {', '.join(OUT)}; got {why!r}")
        gpus = list(gpus)
        for gpu in gpus:
            self.cluster.host_of(gpu)
        self._count([gpu for gpu in dict.fromkeys(gpus) if self.is_free(gpu)], -1)
        self._out |= dict.fromkeys(gpus, why)

    def restore(self, gpus: Iterable[int]) -> None:
        """GPUs are in use again; those that were are left as they are."""
        back = [gpu for gpu in dict.fromkeys(gpus) if self._out.pop(gpu, None)]
        self._count([gpu for gpu in back if gpu not in self._owner], +1)

    def scratch(self, fit: Fit) -> FreeGpus:
        """A copy to try things on, with the index of one fit."""
        twin = FreeGpus.__new__(FreeGpus)
        twin.cluster, twin._looked_at = self.cluster, 0
        twin._owner, twin._taken, twin._out = self._owner.copy(), self._taken.copy(), self._out.copy()
        twin._free = self._free.copy()
        twin._indexes = OrderedDict({fit: self.index(fit).copy()})
        return twin

    def check_invariants(self) -> None:
        """No GPU has two owners, and all counts are as if they were counted anew."""
        pairs = {gpu: owner for owner, gpus in self._taken.items() for gpu in gpus}
        assert sum(map(len, self._taken.values())) == len(pairs), "a GPU was given twice"
        assert pairs == self._owner, "who owns a GPU is told in two ways"
        for host, count in enumerate(self._free):
            assert count == sum(map(self.is_free, self.cluster.gpus_of(host))), f"host {host} has another count"
        for index in self._indexes.values():
            index.check_invariants(self._free)

    def _count(self, gpus: Iterable[int], change: int) -> None:
        hosts = Counter(map(self.cluster.host_of, gpus))
        for host, count in hosts.items():
            self._free[host] += change * count
        for index in self._indexes.values():
            index.update(hosts, self._free)
