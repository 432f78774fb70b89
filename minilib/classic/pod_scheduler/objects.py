"""Pods and what else Kubernetes declares about them, as far as its scheduler reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.scheduling.placing import Claim, InvalidClaim, Toleration

HIGHEST_PRIORITY = 2_000_001_000  # of Kubernetes' own class system-node-critical


def selects(match_labels: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels contain all of those that are to match."""
    return all(labels.get(key) == value for key, value in match_labels.items())


@dataclass(frozen=True)
class TopologySpreadConstraint:
    """Pods with certain labels are spread evenly over domains (`whenUnsatisfiable: DoNotSchedule`).

    Args:
        topology_key: the label of nodes whose values are the domains, "zone".
        match_labels: of the pods that are counted.
        max_skew: by how many pods a domain may exceed the one with the fewest.

    Raises:
        InvalidClaim: if max_skew is no whole number ≥ 1.
    """

    topology_key: str
    match_labels: Mapping[str, str]
    max_skew: int = 1

    def __post_init__(self) -> None:
        check_whole("max_skew", self.max_skew, 1, InvalidClaim)


@dataclass(frozen=True)
class PodDisruptionBudget:
    """So many pods with certain labels should stay, when somebody preempts or drains by choice.

    Args:
        match_labels: of the pods that are counted.
        min_available: how many should stay.

    Raises:
        InvalidClaim: if min_available is no whole number ≥ 0.
    """

    match_labels: Mapping[str, str]
    min_available: int

    def __post_init__(self) -> None:
        check_whole("min_available", self.min_available, 0, InvalidClaim)


@dataclass(frozen=True)
class Pod:
    """What Kubernetes' PodSpec says to the scheduler.

    Args:
        name: its own.
        requests: whole units of each resource: millicores of "cpu", bytes of "memory", "nvidia.com/gpu".
        labels: by which others select it.
        node_selector: labels that its node has to have.
        tolerations: taints that it does not mind.
        priority: larger is more important; at most HIGHEST_PRIORITY.
        topology_spread: how it is spread with others.
        namespace: whose pod it is; the tenant, to a policy that shares.

    Attributes:
        claim: what it wants of a node, itself counted among the node's pods.

    Raises:
        InvalidClaim: if it has no name, an amount is no whole number ≥ 0, it asks for "pods" (it is one itself), or its
            priority is no whole number or above the highest.
    """

    name: str
    requests: Mapping[str, int]
    labels: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    priority: int = 0
    topology_spread: tuple[TopologySpreadConstraint, ...] = ()
    namespace: str = "default"
    claim: Claim = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if "pods" in self.requests:
            raise InvalidClaim(f"pod {self.name!r} asks for 'pods'; it is one pod, and is counted as that")
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))
        requests = {**self.requests, "pods": 1}
        claim = Claim(self.name, requests, self.node_selector, self.tolerations, self.priority)
        if self.priority > HIGHEST_PRIORITY:
            raise InvalidClaim(f"priority of pod {self.name!r} is at most {HIGHEST_PRIORITY}, got {self.priority}")
        object.__setattr__(self, "claim", claim)
