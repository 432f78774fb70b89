"""Choosing: filter the nodes, score those that are left, and take the best; several claims together, or none.

Where the score follows the order of what is free (`BinPacking`, `Spreading`), nodes are looked at in that order, and
the first that passes the filters is the best. With any other score every open node is looked at, or as many as pass
until there are `enough`. A node that is closed, or has too little of the resource that orders the nodes, is counted
and not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from minilib.mechanisms.scheduling.placing.claim import Claim
from minilib.mechanisms.scheduling.placing.filters import FILTERS, Filter
from minilib.mechanisms.scheduling.placing.ledger import Ledger
from minilib.mechanisms.scheduling.placing.node import Node
from minilib.mechanisms.scheduling.placing.scores import BinPacking, Score, Spreading

CLOSED = "node(s) were unschedulable"


@dataclass(frozen=True)
class Refusal:
    """Why a claim gets no node.

    Args:
        claim: its name.
        nodes: how many nodes there are.
        reasons: what spoke against how many of them; several things may speak against one.
        placed: how many claims of the same call had got a node before.
    """

    claim: str
    nodes: int
    reasons: Mapping[str, int]
    placed: int = 0

    def __str__(self) -> str:
        """As kube-scheduler writes it: "0/5 nodes are available: 2 Insufficient gpu, 3 node(s) were unschedulable."."""
        reasons = ", ".join(sorted(f"{count} {reason}" for reason, count in self.reasons.items()))
        return f"0/{self.nodes} nodes are available" + (f": {reasons}." if reasons else ".")


def reasons_against(claim: Claim, node: Node, ledger: Ledger, filters: Iterable[Filter] = FILTERS) -> list[str]:
    """What speaks against a node: of the first filter that refuses it, else each resource that does not suffice."""
    for refuses in filters:
        if reasons := refuses(claim, node, ledger):
            return reasons
    return [insufficient(resource) for resource in ledger.lacks(claim, node.name)]


def insufficient(resource: str) -> str:
    """The reason that too little is free of a resource, as kube-scheduler words it."""
    return "Too many pods" if resource == "pods" else f"Insufficient {resource}"


def choose(
    claim: Claim,
    ledger: Ledger,
    filters: Sequence[Filter],
    score: Score,
    enough: int | None = None,
    start: int = 0,
) -> str | Refusal:
    """The best node for a claim, which is not reserved yet; among equals the one that the ledger knew first.

    Args:
        claim: what is needed.
        ledger: what is free; it counts the nodes that are looked at.
        filters: what else may speak against a node.
        score: what is best.
        enough: with a score that is a function, stop to look once so many nodes have passed; None for all.
        start: with such a score, the place among the nodes where to begin.

    Returns:
        The node's name, or why no node will do.

    Cost: with an ordered score O(log n) and a look at each better node that a filter refuses; with others n looks.
    """
    reasons = Counter({CLOSED: closed} if (closed := len(ledger) - ledger.num_open) else {})
    if isinstance(score, BinPacking | Spreading):
        wanted, index = claim.requests.get(score.resource, 0), ledger.index(score.resource)
        if short := index.fewer_than(wanted):
            reasons[insufficient(score.resource)] += short
        passing = _passing(claim, ledger, filters, map(ledger.by_number, score.order(index, wanted)), reasons)
        best = next(passing, None)
    else:
        nodes = [node for node in ledger.nodes if ledger.is_open(node.name)]
        begin = start % len(nodes) if nodes else 0
        passing = _passing(claim, ledger, filters, iter(nodes[begin:] + nodes[:begin]), reasons)
        found = islice(passing, enough)
        best = max(found, key=lambda node: (score(claim, node, ledger), -ledger.number(node.name)), default=None)
    return Refusal(claim.name, len(ledger), reasons) if best is None else best.name


def place_all(
    claims: Iterable[Claim],
    ledger: Ledger,
    filters: Sequence[Filter],
    score: Score,
) -> dict[str, str] | Refusal:
    """Reserve a node for each of several claims, or for none of them.

    Args:
        claims: placed in this order.
        ledger: what is free; unchanged if one of the claims is refused.
        filters: what may speak against a node.
        score: which node is best for a claim.

    Returns:
        Claim → node, by name; or why the first claim that gets no node gets none.

    Raises:
        InvalidClaim: if one of them has a node already, or two have the same name.
    """
    chosen: dict[str, str] = {}
    with ledger.attempt() as trial:
        for claim in claims:
            node = choose(claim, ledger, filters, score)
            if isinstance(node, Refusal):
                return Refusal(claim.name, node.nodes, node.reasons, placed=len(chosen))
            ledger.reserve(claim, node)
            chosen[claim.name] = node
        trial.commit()
    return chosen


def _passing(
    claim: Claim, ledger: Ledger, filters: Iterable[Filter], nodes: Iterator[Node], reasons: Counter[str]
) -> Iterator[Node]:
    """Nodes that nothing speaks against; what speaks against others is counted, and every look is."""
    for node in nodes:
        ledger.visits += 1
        if against := reasons_against(claim, node, ledger, filters):
            reasons.update(against)
        else:
            yield node
