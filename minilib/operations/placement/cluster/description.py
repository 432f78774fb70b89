"""Descriptions of clusters in TOML: hosts, and groups of which each contains others, as Slurm's topology.conf has them.

    name = "two racks"
    gpu = "h100-sxm"                                   # a data sheet

    [links]                                            # optional, see GpuCluster
    rack = { bandwidth = 50e9, latency = 3e-6 }        # bytes/s each way of one GPU, seconds
    domain = "nvlink"                                  # or by name, from the data sheet

    [[host]]
    names = ["node[01-08]"]                            # node01 … node08
    gpus = 8
    labels = { zone = "a" }                            # optional

    [[rack]]                                           # domain, rack or unit
    names = ["rack1"]
    contains = ["node[01-04]"]

A host in no domain is a domain of its own; so it is with the racks and units that nobody describes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilib.operations.placement.cluster.errors import (
    InvalidTopology,
    NoGpus,
    NoSuchCluster,
    TopologyLoop,
    TwoParents,
    UnknownMember,
)

STORED = Path(__file__).with_name("stored")
ABOVE_HOSTS = ("domain", "rack", "unit")
RANGE = re.compile(r"^(?P<before>[^\[\]]*)\[(?P<first>\d+)-(?P<last>\d+)\](?P<after>[^\[\]]*)$")


@dataclass(frozen=True)
class ClusterDescription:
    """What a file says.

    Args:
        name: of the cluster.
        gpu: its data sheet.
        hosts: keyword arguments of each `Host`, in topology order.
        links: by what they join.
        sources: where the figures come from.
    """

    name: str
    gpu: str
    hosts: tuple[dict[str, Any], ...]
    links: Mapping[str, Any]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class _Group:
    """A group, or a host, as described."""

    level: str
    name: str
    number: int  # its place in the file
    contains: tuple[str, ...] = ()
    gpus: Any = 0
    labels: Mapping[str, str] | None = None


def stored_clusters() -> list[str]:
    """Names of the clusters that are described here."""
    return sorted(path.stem.replace("_", "-") for path in STORED.glob("*.toml"))


def read_description(path: Path | str) -> ClusterDescription:
    """Read a file, or a stored cluster by its name.

    Raises:
        NoSuchCluster: if there is neither.
        InvalidTopology: or a kind of it.
    """
    named = STORED / f"{str(path).replace('-', '_')}.toml"
    file = Path(path) if Path(path).is_file() else named
    if not file.is_file():
        raise NoSuchCluster(f"{str(path)!r} is no file and no stored cluster: {', '.join(stored_clusters())}")
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    known = {"name", "gpu", "links", "sources", "host", *ABOVE_HOSTS}
    if unknown := sorted(set(content) - known):
        raise InvalidTopology(f"a description has {', '.join(sorted(known))}; got {unknown[0]!r}")
    for name in ("name", "gpu"):
        if not isinstance(content.get(name), str):
            raise InvalidTopology(f"a description has a {name}, a string; got {content.get(name)!r}")
    hosts = tuple(_hosts(content))
    return ClusterDescription(content["name"], content["gpu"], hosts, content.get("links", {}),
                              content.get("sources", {}))  # fmt: skip


def expand_names(names: Sequence[str]) -> list[str]:
    """Names from patterns as Slurm has them: "node[08-10]" is node08, node09 and node10.

    Raises:
        InvalidTopology: for a pattern that is none.
    """
    found: list[str] = []
    for name in names:
        match = RANGE.match(name) if isinstance(name, str) else None
        if match is None and (not isinstance(name, str) or not name or "[" in name):
            raise InvalidTopology(f"a name is a string such as node7 or node[01-32], got {name!r}")
        if match is None:
            found.append(name)
            continue
        first, last = match["first"], match["last"]
        numbers = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
        found += [f"{match['before']}{n}{match['after']}" for n in numbers]
    return found


def _hosts(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Hosts with the groups that they stand in, in topology order."""
    groups: dict[str, _Group] = {}
    for group in _described(content):
        if group.name in groups:
            raise InvalidTopology(f"{group.level} {group.name!r} is described twice: give each its own name")
        groups[group.name] = group
    parents = _parents(groups)
    places = {host.name: _ancestors(host, groups, parents) for host in groups.values() if host.level == "host"}
    if not places:
        raise NoGpus("the description has no [[host]] with names")

    def order(name: str) -> list[int]:
        return [groups[places[name][level]].number for level in reversed(ABOVE_HOSTS)] + [groups[name].number]

    for name in sorted(places, key=order):
        yield {"name": name, "gpus": groups[name].gpus, **places[name], "labels": groups[name].labels or {}}


def _described(content: Mapping[str, Any]) -> Iterator[_Group]:
    """Every host and group, once for each name."""
    number = 0
    for level in ("host", *ABOVE_HOSTS):
        allowed = {"names", "gpus", "labels"} if level == "host" else {"names", "contains"}
        for entry in content.get(level, []):
            if set(entry) - allowed or "names" not in entry:
                raise InvalidTopology(f"a [[{level}]] has {', '.join(sorted(allowed))}; got {', '.join(entry)}")
            contains = tuple(expand_names(entry.get("contains", [])))
            for name in expand_names(entry["names"]):
                yield _Group(level, name, number, contains, entry.get("gpus", 0), entry.get("labels"))
                number += 1


def _parents(groups: Mapping[str, _Group]) -> dict[str, str]:
    """Which group contains which."""
    parents: dict[str, str] = {}
    for group in groups.values():
        for member in group.contains:
            if member not in groups:
                raise UnknownMember(f"{group.level} {group.name!r} contains {member!r}, which is described nowhere")
            if member in parents:
                raise TwoParents(f"{groups[member].level} {member!r} stands in {parents[member]!r} and in "
                                 f"{group.name!r}: take it out of one")  # fmt: skip
            parents[member] = group.name
    for name in groups:
        path = [name]
        while (above := parents.get(path[-1])) is not None:
            if above in path:
                raise TopologyLoop(" in ".join([*path[path.index(above) :], above]) + ": a group that contains itself")
            path.append(above)
    return parents


def _ancestors(host: _Group, groups: Mapping[str, _Group], parents: Mapping[str, str]) -> dict[str, str]:
    """Name of a host's group of each level; where none is described, that of the level below."""
    found: dict[str, str] = {}
    at = host.name
    while (above := parents.get(at)) is not None:
        level = groups[above].level
        if level in found or any(higher in found for higher in ABOVE_HOSTS[ABOVE_HOSTS.index(level) :]):
            raise InvalidTopology(f"{level} {above!r} contains {groups[at].level} {at!r}: groups contain lower ones, "
                                  f"from host to {', '.join(ABOVE_HOSTS)}")  # fmt: skip
        found[level] = at = above
    below = host.name
    for level in ABOVE_HOSTS:
        below = found.setdefault(level, below)
    return found
