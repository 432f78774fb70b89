"""Kubernetes' scores of nodes by what is allocated, and how many nodes its scheduler takes the trouble to score.

    LeastAllocated   (capacity − requested) · 100 / capacity     spreads; the default
    MostAllocated    requested · 100 / capacity                  packs

Each is the weighted mean over resources, in whole numbers, rounded down; "requested" includes the pod that is placed.

Source: kubernetes/kubernetes, pkg/scheduler/framework/plugins/noderesources/least_allocated.go, most_allocated.go and
resource_allocation.go; numFeasibleNodesToFind in pkg/scheduler/schedule_one.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from minilib.mechanisms.scheduling.placing import Claim, Ledger, Node

MAX_NODE_SCORE = 100
ALWAYS_SCORED = ("cpu", "memory")  # other resources count only for a pod that asks for them
MIN_NODES, MIN_PERCENT = 100, 5


@dataclass(frozen=True)
class LeastAllocated:
    """The emptier the better.

    Args:
        weights: of resources, by name.
    """

    weights: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({"cpu": 1, "memory": 1}))

    def __call__(self, claim: Claim, node: Node, ledger: Ledger) -> int:
        """0 to 100."""
        free, total, weights = ledger.free(node.name), 0, 0
        for resource, weight in self.weights.items():
            capacity, request = node.capacity.get(resource, 0), claim.requests.get(resource, 0)
            if capacity and (request or resource in ALWAYS_SCORED):
                requested = capacity - free[resource] + request
                total += weight * self.of_one(requested, capacity)
                weights += weight
        return total // weights if weights else 0

    def of_one(self, requested: int, capacity: int) -> int:
        """The score of one resource."""
        return max(0, capacity - requested) * MAX_NODE_SCORE // capacity


@dataclass(frozen=True)
class MostAllocated(LeastAllocated):
    """The fuller the better."""

    def of_one(self, requested: int, capacity: int) -> int:
        """The score of one resource."""
        return min(requested, capacity) * MAX_NODE_SCORE // capacity


def num_nodes_to_find(num_nodes: int) -> int:
    """How many nodes that pass are enough for kube-scheduler: all of 100, half of a few more, 5 % of very many."""
    percent = max(MIN_PERCENT, 50 - num_nodes // 125)
    return min(num_nodes, max(MIN_NODES, num_nodes * percent // 100))
