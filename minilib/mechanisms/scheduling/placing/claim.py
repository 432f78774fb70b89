"""A claim: what somebody wants of one node, in whole units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.scheduling.placing.node import Taint, amounts


class InvalidClaim(ValueError):
    """Nobody can have what the claim asks for; the message says what came and how to mend it."""


@dataclass(frozen=True)
class Toleration:
    """A taint that a claim does not mind.

    Args:
        key: of the taint; "" for every taint.
        value: of the taint; None for every value.
        effect: of the taint; "" for every effect.
    """

    key: str = ""
    value: str | None = None
    effect: str = ""

    def covers(self, taint: Taint) -> bool:
        """Whether it is this taint that is tolerated."""
        key, value = self.key in ("", taint.key), self.value in (None, taint.value)
        return key and value and self.effect in ("", taint.effect)


@dataclass(frozen=True)
class Claim:
    """What has to be free on one node.

    Args:
        name: its own; a ledger holds one claim of a name.
        requests: whole units of each resource by name.
        selector: labels that the node has to have, with their values.
        tolerations: taints that it does not mind.
        priority: larger is more important, as in Kubernetes (a `Task` of this package counts the other way).

    Raises:
        InvalidClaim: if it has no name, an amount is no whole number ≥ 0, or the priority is no whole number.
    """

    name: str
    requests: Mapping[str, int]
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidClaim("a claim has a name of its own, got an empty one")
        if not is_whole(self.priority):
            raise InvalidClaim(f"priority of claim {self.name!r} is a whole number, got {self.priority!r}")
        object.__setattr__(self, "requests", amounts(f"claim {self.name!r}", self.requests, InvalidClaim))
        object.__setattr__(self, "selector", MappingProxyType(dict(self.selector)))
        object.__setattr__(self, "tolerations", tuple(self.tolerations))
