"""What each host, domain, rack and unit can give to a job, kept as GPUs are taken and given back.

What a job can use of a host depends on the job: workers of four GPUs fit once into seven free ones, and a group of
eight that must stay within an NVLink domain fits nowhere in a domain of seven. A `Fit` says which GPUs lie together.

    of a host       free GPUs, rounded down to whole workers; 0 if its labels do not meet the selector
    of a domain     the sum of its hosts, rounded down to whole groups
    above           the sum of what lies below

A change of k hosts costs O(k · levels · log n) comparisons, and the move of parts of lists; where a large part of a
level changes, the level is sorted anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple

from minilib.mechanisms.scheduling.placing import FreeIndex
from minilib.operations.placement.cluster.topology import LEVELS, GpuCluster

FEW = 16  # if more than one group in so many changes, a level is sorted anew


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
        capacity: GPUs that each group can give, by level.
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
        self.capacity = {level: [0] * len(cluster.groups(level)) for level in self.levels}
        self._order = {level: FreeIndex(enumerate(capacity)) for level, capacity in self.capacity.items()}
        self.update(range(hosts), free)

    def smallest(self, level: str, least: int) -> int | None:
        """The group that can give so many and has least to give; None if no group can."""
        return next(self.least_first(level, least), None)

    def least_first(self, level: str, least: int = 1) -> Iterator[int]:
        """Groups that can give so many, the smallest first."""
        return self._counted(self._order[level].least_first(least))

    def deal(self, level: str, gpus: int, within: tuple[str, int] | None = None) -> Iterator[tuple[int, int]]:
        """Few groups that together give so many, as (group, how many): the largest whole, the rest where it fits best.

        Args:
            level: of the groups.
            gpus: how many, and no more than they have.
            within: level and number of the group in which they lie; anywhere if left out.
        """
        capacity = self.capacity[level]
        order = self._order[level] if within is None else self._order_within(level, *within)
        for number in self._counted(order.most_first(1)):
            if capacity[number] < gpus:
                yield number, capacity[number]
                gpus -= capacity[number]
                continue
            best = next(self._counted(order.least_first(gpus)))
            # A group that was taken whole can give no less than this one, so that a smaller one is not taken yet.
            yield (best if capacity[best] < capacity[number] else number), gpus
            return

    def copy(self) -> CapacityIndex:
        """Another index that changes on its own."""
        twin = copy(self)
        twin._hosts, twin._domains = self._hosts.copy(), self._domains.copy()
        twin.capacity = {level: each.copy() for level, each in self.capacity.items()}
        twin._order = {level: FreeIndex(enumerate(each)) for level, each in twin.capacity.items()}
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
            self._change(level, differences)

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
            in_order = sorted((count, number) for number, count in enumerate(expected))
            assert self._order[level].items() == in_order, f"a {level} is out of order"

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

    def _change(self, level: str, differences: Mapping[int, int]) -> None:
        """Groups of a level can give so many more."""
        capacity, order = self.capacity[level], self._order[level]
        anew = len(differences) * FEW > len(capacity)
        for number, more in differences.items():
            if not anew:
                order.remove(number, capacity[number])
                order.add(number, capacity[number] + more)
            capacity[number] += more
        if anew:
            self._order[level] = FreeIndex(enumerate(capacity))

    def _order_within(self, level: str, above: str, number: int) -> FreeIndex:
        """The groups of a level that lie within a group, in order."""
        hosts = self.cluster.groups(above)[number].hosts
        first, last = (self.cluster.group_number(level, host) for host in (hosts[0], hosts[-1]))
        self.looked_at += last + 1 - first
        return FreeIndex((each, self.capacity[level][each]) for each in range(first, last + 1))

    def _counted(self, groups: Iterator[int]) -> Iterator[int]:
        for group in groups:
            self.looked_at += 1
            yield group
