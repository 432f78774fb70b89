"""A cluster as data: which GPU stands in which host, NVLink domain, rack and unit, and which link joins two GPUs.

    unit     racks below one set of leaf switches, a scalable unit of a SuperPOD
    rack       power and cooling, a NVL72's NVLink domain
    domain       hosts whose GPUs NVLink joins: one DGX H100, or 18 trays of an NVL72
    host           one operating system
    GPU              numbered 0 … n − 1 in this order: a group of any level has consecutive numbers

The spine joins all units. Rates are those of training/planner's clusters: NVLink from the data sheet, a port of the
network for each GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

from minilib.mechanisms.basics.checks import check_whole, is_whole
from minilib.numbers import quoted
from minilib.numbers.machine import Link, Machine
from minilib.operations.placement.cluster.description import read_description
from minilib.operations.placement.cluster.errors import InvalidTopology, NoGpus, UnknownLink
from minilib.training.planner.cluster import Cluster

LEVELS = ("host", "domain", "rack", "unit")  # the lowest first
JOINS = ("domain", "rack", "unit", "spine")  # what joins two GPUs, the nearest first
PORT = 50e9  # bytes/s each way of a GPU's network port as sold: 400 Gbit/s


@dataclass(frozen=True)
class Host:
    """One machine.

    Args:
        name: no other host has it.
        gpus: how many it has.
        domain, rack, unit: names of the groups that it stands in.
        labels: what a job's selector asks for.

    Raises:
        NoGpus: if it has no GPU, or no whole number.
    """

    name: str
    gpus: int
    domain: str
    rack: str
    unit: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not is_whole(self.gpus, 1):
            raise NoGpus(f"host {self.name!r} has {self.gpus!r} GPUs; give a whole number ≥ 1, or leave the host out")

    def group(self, level: str) -> str:
        """Name of the group that it stands in."""
        return self.name if level == "host" else getattr(self, level)


@dataclass(frozen=True)
class HostGroup:
    """Hosts of one level's group.

    Args:
        level: one of LEVELS.
        number: among the groups of this level, in topology order.
        name: as described.
        hosts: numbers of its hosts.
        gpus: numbers of its GPUs.
    """

    level: str
    number: int
    name: str
    hosts: range
    gpus: range


@dataclass(frozen=True)
class GpuCluster:
    """GPUs of one kind in a tree.

    Args:
        name: as people call it.
        gpu: name of the data sheet.
        hosts: in topology order: those of a unit in a row, among them those of a rack, among them those of a domain.
        links: what one GPU reaches another through, by what joins them (JOINS); the data sheet's NVLink and a port of
            50 GB/s for those left out.

    Raises:
        NoGpus: if there is no host.
        InvalidTopology: if hosts of a group do not stand in a row, or two hosts share a name.
        UnknownLink: for a link that joins nothing.
    """

    name: str
    gpu: str
    hosts: tuple[Host, ...]
    links: Mapping[str, Link] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.hosts:
            raise NoGpus(f"cluster {self.name!r} has no host")
        if unknown := [join for join in self.links if join not in JOINS]:
            raise UnknownLink(f"a link joins GPUs of one {', '.join(JOINS)}; got {unknown[0]!r}")
        object.__setattr__(self, "hosts", tuple(self.hosts))
        object.__setattr__(self, "links", _usual_links(self.gpu) | dict(self.links))
        for level, groups in self._groups.items():
            names = [group.name for group in groups]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InvalidTopology(f"the hosts of {level} {twice!r} do not stand in a row, or it is named twice: "
                                      "sort hosts by unit, rack and domain, and name each group")  # fmt: skip

    @classmethod
    def from_toml(cls, path: Path | str) -> GpuCluster:
        """A cluster from a description; `description.py` tells what stands in one.

        Args:
            path: of a TOML file, or the name of one that is stored here, such as "h100-superpod" or "gb200-nvl72".

        Raises:
            NoSuchCluster: if there is neither.
            InvalidTopology: or a kind of it that says what is wrong.
        """
        described = read_description(path)
        hosts = [Host(**host) for host in described.hosts]
        links = {join: _described_link(join, link, described.gpu) for join, link in described.links.items()}
        return cls(described.name, described.gpu, tuple(hosts), links)

    @classmethod
    def regular(
        cls,
        racks: int,
        hosts_per_rack: int,
        gpus_per_host: int = 8,
        nvlink_domain: int | None = None,
        racks_per_unit: int | None = None,
        gpu: str = "h100-sxm",
    ) -> GpuCluster:
        """A cluster whose hosts, domains, racks and units are all alike.

        Args:
            racks: how many.
            hosts_per_rack: in each.
            gpus_per_host: in each.
            nvlink_domain: GPUs that NVLink joins: whole hosts of one rack; a host's if left out.
            racks_per_unit: below one set of leaf switches; up to 32 hosts' racks if left out.
            gpu: name of the data sheet.

        Raises:
            InvalidTopology: if a domain is no whole number of hosts that divides a rack.
            ValueError: if a number is no whole one ≥ 1.
        """
        domain = gpus_per_host if nvlink_domain is None else nvlink_domain
        given = {"racks": racks, "hosts_per_rack": hosts_per_rack, "gpus_per_host": gpus_per_host,
                 "nvlink_domain": domain}  # fmt: skip
        for name, number in given.items():
            check_whole(name, number, 1, NoGpus)
        if domain % gpus_per_host or hosts_per_rack * gpus_per_host % domain:
            raise InvalidTopology(f"a domain is whole hosts of {gpus_per_host} GPUs and divides a rack of "
                                  f"{hosts_per_rack * gpus_per_host}; got {domain}")  # fmt: skip
        per_unit = max(1, 32 // hosts_per_rack) if racks_per_unit is None else racks_per_unit
        check_whole("racks_per_unit", per_unit, 1)
        in_domain = domain // gpus_per_host
        hosts = [
            Host(f"host{n}", gpus_per_host, f"domain{n // in_domain}", f"rack{n // hosts_per_rack}",
                 f"unit{n // hosts_per_rack // per_unit}")
            for n in range(racks * hosts_per_rack)
        ]  # fmt: skip
        return cls(f"{racks} racks of {hosts_per_rack} hosts of {gpus_per_host}", gpu, tuple(hosts))

    @cached_property
    def first_gpus(self) -> list[int]:
        """Number of each host's first GPU, and at the end the number of all GPUs."""
        return [0, *accumulate(host.gpus for host in self.hosts)]

    @property
    def gpus(self) -> int:
        """How many there are."""
        return self.first_gpus[-1]

    @cached_property
    def largest_host(self) -> int:
        """GPUs of the host that has most."""
        return max(host.gpus for host in self.hosts)

    @cached_property
    def largest_domain(self) -> int:
        """GPUs of the NVLink domain that has most."""
        return max(len(group.gpus) for group in self.groups("domain"))

    def gpus_of(self, host: int) -> range:
        """Numbers of a host's GPUs."""
        return range(self.first_gpus[host], self.first_gpus[host + 1])

    def host_of(self, gpu: int) -> int:
        """Number of the host that a GPU stands in.

        Raises:
            IndexError: if there is no such GPU.
        """
        if not is_whole(gpu, 0) or gpu >= self.gpus:
            raise IndexError(f"GPU {gpu!r} is none of the {self.gpus} of {self.name}")
        return bisect_right(self.first_gpus, gpu) - 1

    def groups(self, level: str) -> Sequence[HostGroup]:
        """All groups of a level, in topology order."""
        return self._groups[level]

    def group_number(self, level: str, host: int) -> int:
        """Number of the group of a level that a host stands in."""
        return self._numbers[level][host]

    def numbers_of(self, level: str, gpus: Iterable[int]) -> list[int]:
        """For each GPU the number of its group of a level."""
        numbers = self._numbers[level]
        return [numbers[self.host_of(gpu)] for gpu in gpus]

    def host_named(self, name: str) -> int:
        """Number of a host.

        Raises:
            LookupError: if no host has this name.
        """
        if name not in self._by_name:
            raise LookupError(f"no host of {self.name} is named {name!r}; the first is {self.hosts[0].name!r}")
        return self._by_name[name]

    def joined_by(self, one: int, other: int) -> str:
        """The nearest of JOINS that two GPUs share."""
        a, b = self.host_of(one), self.host_of(other)
        return next((level for level in JOINS[:-1] if self._numbers[level][a] == self._numbers[level][b]), JOINS[-1])

    def link(self, one: int, other: int) -> Link:
        """What one GPU reaches another through."""
        return self.links[self.joined_by(one, other)]

    def priced(self, gpus: int | None = None) -> Cluster:
        """The planner's cluster of so many of these GPUs, all of them if left out; domains are the largest here.

        Raises:
            ValueError: if nothing is quoted for this GPU.
        """
        number, port = self.gpus if gpus is None else gpus, self.links["rack"].bandwidth
        return Cluster.of(self.gpu, number, self.largest_domain, port)

    @cached_property
    def _groups(self) -> dict[str, list[HostGroup]]:
        found: dict[str, list[HostGroup]] = {}
        for level in LEVELS:
            found[level] = []
            for name, numbers in groupby(range(len(self.hosts)), key=lambda n, level=level: self.hosts[n].group(level)):
                hosts = list(numbers)
                gpus = range(self.first_gpus[hosts[0]], self.first_gpus[hosts[-1] + 1])
                found[level].append(HostGroup(level, len(found[level]), name, range(hosts[0], hosts[-1] + 1), gpus))
        return found

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """For each level the number of each host's group."""
        return {
            level: [group.number for group in groups for _ in group.hosts] for level, groups in self._groups.items()
        }

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {host.name: number for number, host in enumerate(self.hosts)}


def _usual_links(gpu: str) -> dict[str, Link]:
    """NVLink of a data sheet within a domain, beyond it one port of 400 Gbit/s for each GPU.

    Raises:
        UnknownLink: if the data sheet has no NVLink.
    """
    beyond = Link(PORT, quoted.value("gpu", "nccl_step_network"))
    return {"domain": _sheet_link("nvlink", gpu)} | {join: beyond for join in JOINS[1:]}


def _sheet_link(name: str, gpu: str) -> Link:
    links = Machine.datasheet(gpu).links
    if name not in links:
        raise UnknownLink(f"the data sheet of {gpu} has no link {name!r}; it has: {', '.join(links)}")
    return Link(links[name].bandwidth, quoted.value("gpu", "nccl_step_nvlink"))


def _described_link(join: str, link: str | Mapping[str, float], gpu: str) -> Link:
    """A link by its name in the data sheet, or by its bandwidth and latency."""
    if isinstance(link, str):
        return _sheet_link(link, gpu)
    if not isinstance(link, Mapping) or set(link) - {"bandwidth", "latency"} or "bandwidth" not in link:
        raise UnknownLink(f"the link of a {join} is a name or has bandwidth and latency, got {link!r}")
    return Link(**{"latency": quoted.value("gpu", "nccl_step_network")} | dict(link))
