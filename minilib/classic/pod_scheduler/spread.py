"""PodTopologySpread: no domain may have many more pods of a kind than the domain with the fewest.

Domains are those of the nodes that the pod's selector allows, whether they take pods or not: a domain whose nodes are
all cordoned still counts with its few pods, and may keep others from growing.

Source: kubernetes.io, "Pod Topology Spread Constraints" (skew; nodeAffinityPolicy Honor, nodeTaintsPolicy Ignore).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from minilib.classic.pod_scheduler.objects import Pod, TopologySpreadConstraint, selects
from minilib.mechanisms.scheduling.placing import Claim, Ledger, Node

SKEWED = "node(s) didn't match pod topology spread constraints"
UNLABELLED = f"{SKEWED} (missing required label)"


class TopologySpread:
    """The filter.

    Args:
        pods: all pods by name, those in the ledger among them.

    Cost: pods and nodes are counted once after each change of the ledger, not once for each node.
    """

    def __init__(self, pods: Mapping[str, Pod]) -> None:
        self._pods = pods
        self._counted: tuple[str, int] | None = None  # for whom, and at which version of the ledger
        self._counts: dict[int, Counter[str]] = {}  # number of the constraint → domain → pods

    def __call__(self, claim: Claim, node: Node, ledger: Ledger) -> list[str]:
        """Why a pod may not stand on a node; a node where it has no room is left to the next filter."""
        pod = self._pods[claim.name]
        if not pod.topology_spread or ledger.lacks(claim, node.name):
            return []
        if self._counted != (claim.name, ledger.version):
            self._counted = (claim.name, ledger.version)
            constraints = enumerate(pod.topology_spread)
            self._counts = {number: self._count(pod, constraint, ledger) for number, constraint in constraints}
        for number, constraint in enumerate(pod.topology_spread):
            domain, counts = node.labels.get(constraint.topology_key), self._counts[number]
            if domain is None:
                return [UNLABELLED]
            itself = selects(constraint.match_labels, pod.labels)
            if domain in counts and counts[domain] + itself - min(counts.values()) > constraint.max_skew:
                return [SKEWED]
        return []

    def _count(self, pod: Pod, constraint: TopologySpreadConstraint, ledger: Ledger) -> Counter[str]:
        counts: Counter[str] = Counter()
        for node in ledger.nodes:
            domain = node.labels.get(constraint.topology_key)
            if domain is not None and selects(pod.node_selector, node.labels):
                on_node = [self._pods[claim.name] for claim in ledger.claims_on(node.name)]
                counts[domain] += sum(selects(constraint.match_labels, other.labels) for other in on_node)
        return counts
