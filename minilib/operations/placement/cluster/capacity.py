"""Whose each GPU is, and how much is free in each host, domain, rack and unit, kept as GPUs are taken and given back.

What a job can use of a host depends on the job: workers of four GPUs fit once into seven free ones, and a group of
eight that must stay within an NVLink domain fits nowhere in a domain of seven. A `Fit` says which GPUs lie together;
for each fit that was asked for, a `CapacityIndex` keeps what every group of the tree can give.

    of a host       free GPUs, rounded down to whole workers; 0 if its labels do not meet the selector
    of a domain     the sum of its hosts, rounded down to whole groups
    above           the sum of what lies below

A change of k hosts costs O(k · levels · log n) comparisons for each index, and the move of parts of lists.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from minilib.operations.placement.cluster.topology import LEVELS, GpuCluster

OUT = ("failed", "drained", "reserved")
MOST_INDEXES = 16  # fits that are kept up to date; another one drops the index that nobody asked for the longest
FEW = 64  # if more than one group in so many changes, a level is sorted anew


class NotFree(RuntimeError):
    """A GPU that is taken twice, or given back by whom it does not belong to."""


class Fit(NamedTuple):
    """Which GPUs lie together.

    Args:
        on_host: GPUs of a worker.
        in_domain: GPUs of a group; a multiple of on_host.
        selector: labels that hosts have, as sorted pairs.
    """

    on_host: int = 1
    in_domain: int = 1
    selector: tuple[tuple[str, str], ...] = ()

    def meets(self, labels: Mapping[str, str]) -> bool:
        """Whether a host with these labels is one of them."""
        return all(labels.get(name) == value for name, value in self.selector)


class CapacityIndex:
    """What each group of the tree can give to jobs of one fit.

    A level whose groups are those of the level below, or that has one group alone, says nothing new and is left out.

    Args:
        cluster: the tree.
        fit: of the jobs.
        free: free GPUs of each host.

    Attributes:
        levels: those that are kept, the lowest first.
        total: GPUs that the whole cluster can give.
        looked_at: groups whose capacity was read since the beginning.
    """

    def __init__(self, cluster: GpuCluster, fit: Fit, free: Sequence[int]) -> None:
        self.cluster, self.fit = cluster, fit
        self.levels = ["host"]
        for level in LEVELS[1:]:
            if 1 < len(cluster.groups(level)) < len(cluster.groups(self.levels[-1])):
                self.levels.append(level)
        hosts, domains = len(cluster.hosts), len(cluster.groups("domain"))
        self._rounded_levels = self.levels if hosts == domains else self.levels[1:]  # what holds whole domains
        self.total = self.looked_at = 0
        self._suits = [fit.meets(host.labels) for host in cluster.hosts]
        self._hosts, self._domains = [0] * hosts, [0] * domains  # whole workers, not yet rounded to whole groups
        self._capacity = {level: [0] * len(cluster.groups(level)) for level in self.levels}
        self._sorted = {level: [(0, n) for n in range(len(cluster.groups(level)))] for level in self.levels}
        self.update(range(hosts), free)

    def capacity(self, level: str, number: int) -> int:
        """GPUs that a group can give."""
        self.looked_at += 1
        return self._capacity[level][number]

    def smallest(self, level: str, least: int) -> int | None:
        """The group of a level that can give so many and has least to give; None if no group can."""
        return next((number for _, number in self.ascending(level, least)), None)

    def ascending(self, level: str, least: int = 1) -> Iterator[tuple[int, int]]:
        """(capacity, group) of those that can give so many, the smallest first."""
        groups = self._sorted[level]
        for at in range(bisect_left(groups, (least, -1)), len(groups)):
            self.looked_at += 1
            yield groups[at]

    def descending(self, level: str) -> Iterator[tuple[int, int]]:
        """(capacity, group), the largest first."""
        for group in reversed(self._sorted[level]):
            self.looked_at += 1
            yield group

    def update(self, hosts: Iterable[int], free: Sequence[int]) -> None:
        """Some hosts have other numbers of free GPUs now."""
        more: dict[str, dict[int, int]] = {level: {} for level in self.levels}
        domains: dict[int, int] = {}
        worker = self.fit.on_host
        for host in hosts:
            after = free[host] // worker * worker if self._suits[host] else 0
            if after != self._hosts[host]:
                domain = self.cluster.group_number("domain", host)
                domains[domain] = domains.get(domain, 0) + after - self._hosts[host]
                more["host"][host] = after - self._hosts[host]
                self._hosts[host] = after
        if self._rounded_levels is self.levels:
            more["host"] = {}
        for domain, difference in domains.items():
            self._carry_up(domain, difference, more)
        for level, differences in more.items():
            self._move(level, differences)

    def check_invariants(self, free: Sequence[int]) -> None:
        """Everything is as if it were counted anew."""
        worker, group = self.fit.on_host, self.fit.in_domain
        hosts = [n // worker * worker if suits else 0 for n, suits in zip(free, self._suits, strict=True)]
        domains = [sum(hosts[h] for h in each.hosts) for each in self.cluster.groups("domain")]
        assert (hosts, domains) == (self._hosts, self._domains), "a host or domain was not brought up to date"
        usable = [n // group * group for n in domains]
        assert self.total == sum(usable), "the total is another"
        for level in self.levels:
            if level in self._rounded_levels:
                expected = [0] * len(self.cluster.groups(level))
                for each, count in zip(self.cluster.groups("domain"), usable, strict=True):
                    expected[self.cluster.group_number(level, each.hosts[0])] += count
            else:
                expected = hosts
            assert self._capacity[level] == expected, f"a {level} has another capacity"
            assert self._sorted[level] == sorted((n, at) for at, n in enumerate(expected)), f"{level}s are out of order"

    def _carry_up(self, domain: int, difference: int, more: dict[str, dict[int, int]]) -> None:
        """A domain's hosts have so many more to give: note what that makes for all groups above them."""
        group, before = self.fit.in_domain, self._domains[domain]
        self._domains[domain] = after = before + difference
        usable = after // group * group - before // group * group
        if usable:
            self.total += usable
            host = self.cluster.groups("domain")[domain].hosts[0]
            for level in self._rounded_levels:
                number = self.cluster.group_number(level, host)
                more[level][number] = more[level].get(number, 0) + usable

    def _move(self, level: str, differences: Mapping[int, int]) -> None:
        """Groups of a level have other capacities: put them where they belong in order."""
        capacity, groups = self._capacity[level], self._sorted[level]
        if len(differences) * FEW > len(groups):
            for number, more in differences.items():
                capacity[number] += more
            kept = [group for group in groups if group[1] not in differences]
            self._sorted[level] = sorted(kept + sorted((capacity[number], number) for number in differences))
            return
        for number, more in differences.items():
            del groups[bisect_left(groups, (capacity[number], number))]
            capacity[number] += more
            insort(groups, (capacity[number], number))


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
