"""What each host, domain, rack and unit can give to a job, kept as GPUs are taken and given back.

What a job can use of a host depends on the job: workers of four GPUs fit once into seven free ones, and a group of
eight that must stay within an NVLink domain fits nowhere in a domain of seven. A `Fit` says which GPUs lie together.

    of a host       free GPUs, rounded down to whole workers; 0 if its labels do not meet the selector
    of a domain     the sum of its hosts, rounded down to whole groups
    above           the sum of what lies below

A change of k hosts costs O(k · levels · log n) comparisons, and the move of parts of lists.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple

from minilib.operations.placement.cluster.topology import LEVELS, GpuCluster

FEW = 64  # if more than one group in so many changes, a level is sorted anew


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


class ByCapacity:
    """Groups in order of what they can give; among equals the lowest number first.

    Args:
        groups: (capacity, number), in any order.

    Attributes:
        looked_at: groups that were read since the beginning.
    """

    def __init__(self, groups: Iterable[tuple[int, int]]) -> None:
        self.groups = sorted(groups)
        self.looked_at = 0

    def smallest(self, least: int) -> tuple[int, int] | None:
        """The group that can give so many and has least to give; None if no group can."""
        return next(self.ascending(least), None)

    def ascending(self, least: int = 1) -> Iterator[tuple[int, int]]:
        """Those that can give so many, the smallest first."""
        for at in range(bisect_left(self.groups, (least, -1)), len(self.groups)):
            self.looked_at += 1
            yield self.groups[at]

    def descending(self) -> Iterator[tuple[int, int]]:
        """Those that can give something, the largest first."""
        end = len(self.groups)
        while end and self.groups[end - 1][0] > 0:
            start = bisect_left(self.groups, (self.groups[end - 1][0], -1))
            for at in range(start, end):
                self.looked_at += 1
                yield self.groups[at]
            end = start

    def move(self, changes: Mapping[int, tuple[int, int]]) -> None:
        """Some groups have other capacities: number → (before, after)."""
        if len(changes) * FEW > len(self.groups):
            kept = [group for group in self.groups if group[1] not in changes]
            self.groups = sorted(kept + sorted((after, number) for number, (_, after) in changes.items()))
            return
        for number, (before, after) in changes.items():
            del self.groups[bisect_left(self.groups, (before, number))]
            insort(self.groups, (after, number))


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
        capacity: GPUs that each group can give, by level.
        order: of each level, its groups by capacity.
    """

    def __init__(self, cluster: GpuCluster, fit: Fit, free: Sequence[int]) -> None:
        self.cluster, self.fit = cluster, fit
        self.levels = ["host"]
        for level in LEVELS[1:]:
            if 1 < len(cluster.groups(level)) < len(cluster.groups(self.levels[-1])):
                self.levels.append(level)
        hosts, domains = len(cluster.hosts), len(cluster.groups("domain"))
        self._rounded_levels = self.levels if hosts == domains else self.levels[1:]  # what holds whole domains
        self.total = 0
        self._suits = [fit.meets(host.labels) for host in cluster.hosts]
        self._hosts, self._domains = [0] * hosts, [0] * domains  # whole workers, not yet rounded to whole groups
        self.capacity = {level: [0] * len(cluster.groups(level)) for level in self.levels}
        self.order = {level: ByCapacity((0, n) for n in range(len(cluster.groups(level)))) for level in self.levels}
        self.update(range(hosts), free)

    @property
    def looked_at(self) -> int:
        """Groups whose capacity was read since the beginning."""
        return sum(order.looked_at for order in self.order.values())

    def within(self, level: str, number: int) -> ByCapacity:
        """The groups of the next lower level within a group."""
        below = self.levels[self.levels.index(level) - 1]
        hosts = self.cluster.groups(level)[number].hosts
        first, last = (self.cluster.group_number(below, host) for host in (hosts[0], hosts[-1]))
        self.order[below].looked_at += last + 1 - first
        return ByCapacity((self.capacity[below][n], n) for n in range(first, last + 1))

    def copy(self) -> CapacityIndex:
        """Another index that changes on its own."""
        twin = copy(self)
        twin._hosts, twin._domains = self._hosts.copy(), self._domains.copy()
        twin.capacity = {level: each.copy() for level, each in self.capacity.items()}
        twin.order = {level: ByCapacity(order.groups) for level, order in self.order.items()}
        return twin

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
            more["host"] = {}  # each host is a domain, and counted as one
        for domain, difference in domains.items():
            self._carry_up(domain, difference, more)
        for level, differences in more.items():
            capacity, changes = self.capacity[level], {}
            for number, difference in differences.items():
                changes[number] = (capacity[number], capacity[number] + difference)
                capacity[number] += difference
            self.order[level].move(changes)

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
            assert self.capacity[level] == expected, f"a {level} has another capacity"
            assert self.order[level].groups == sorted((n, at) for at, n in enumerate(expected)), (
                f"{level}s are out of order"
            )

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
