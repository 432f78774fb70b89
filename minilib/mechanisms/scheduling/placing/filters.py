"""Filters: what speaks against a node, in words that can be counted over nodes.

A filter is a function of a claim, a node and the ledger that lists reasons; none means that the node will do. Whether
enough is free is no filter: `choose` always asks that.

Source: kube-scheduler's plugins TaintToleration and NodeAffinity, whose words these are.
"""

from __future__ import annotations

from collections.abc import Callable

from minilib.mechanisms.scheduling.placing.claim import Claim
from minilib.mechanisms.scheduling.placing.ledger import Ledger
from minilib.mechanisms.scheduling.placing.node import Node

Filter = Callable[[Claim, Node, Ledger], list[str]]


def tolerates_taints(claim: Claim, node: Node, ledger: Ledger) -> list[str]:
    """The first taint of the node that the claim does not tolerate."""
    for taint in node.taints:
        if not any(toleration.covers(taint) for toleration in claim.tolerations):
            return [f"node(s) had untolerated taint {taint}"]
    return []


def matches_labels(claim: Claim, node: Node, ledger: Ledger) -> list[str]:
    """Whether the node has the labels that the claim selects."""
    if all(node.labels.get(key) == value for key, value in claim.selector.items()):
        return []
    return ["node(s) didn't match Pod's node affinity/selector"]


FILTERS: tuple[Filter, ...] = (tolerates_taints, matches_labels)
