"""A node: what it has in whole units, what is known about it, and what keeps claims away from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from minilib.mechanisms.basics.checks import check_whole

EFFECTS = ("NoSchedule", "NoExecute")


class InvalidNode(ValueError):
    """The node cannot be what it is said to be; the message says what came and what was expected."""


def amounts(what: str, given: Mapping[str, int], error: type[ValueError]) -> Mapping[str, int]:
    """Whole amounts of resources by name, as a mapping that nobody changes.

    Raises:
        error: if an amount is no whole number ≥ 0.
    """
    for resource, amount in given.items():
        check_whole(f"{resource} of {what}", amount, 0, error)
    return MappingProxyType({resource: int(amount) for resource, amount in given.items()})


@dataclass(frozen=True)
class Taint:
    """What keeps claims that do not tolerate it away from a node.

    Args:
        key: its name, "gpu".
        value: "" where the name says all.
        effect: "NoSchedule" keeps new claims away; "NoExecute" ends those that run, too.

    Raises:
        InvalidNode: if there is no key, or another effect.
    """

    key: str
    value: str = ""
    effect: str = "NoSchedule"

    def __post_init__(self) -> None:
        if not self.key or self.effect not in EFFECTS:
            raise InvalidNode(f"a taint has a key, and an effect of {' and '.join(EFFECTS)}; got {self!r}")

    def __str__(self) -> str:
        return f"{{{self.key}: {self.value}}}"


@dataclass(frozen=True)
class Node:
    """A place for claims.

    Args:
        name: its own.
        capacity: whole units of each resource by name, {"gpu": 8, "pods": 110}.
        labels: what is known about it by name, {"rack": "r1"}.
        taints: what keeps claims away.

    Raises:
        InvalidNode: if it has no name, or an amount that is no whole number ≥ 0.
    """

    name: str
    capacity: Mapping[str, int]
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidNode("a node has a name of its own, got an empty one")
        object.__setattr__(self, "capacity", amounts(f"node {self.name!r}", self.capacity, InvalidNode))
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))
        object.__setattr__(self, "taints", tuple(self.taints))
