"""Scores that follow the order of what is free, so that an index finds the best node without scoring all.

    BinPacking   the node with the least free that suffices: large holes stay for large claims
    Spreading    the node with the most free: a node's loss takes little, and neighbours disturb each other little

Any function of a claim, a node and the ledger is a score, too, the larger the better; then every node is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minilib.mechanisms.scheduling.placing.claim import Claim
from minilib.mechanisms.scheduling.placing.free_index import FreeIndex
from minilib.mechanisms.scheduling.placing.ledger import Ledger
from minilib.mechanisms.scheduling.placing.node import Node


@dataclass(frozen=True)
class BinPacking:
    """Best fit: the node with the least free of a resource that is enough.

    Args:
        resource: its name.
    """

    resource: str

    def order(self, index: FreeIndex, amount: int) -> Iterator[int]:
        """Nodes with enough, the best first."""
        return index.least_first(amount)


@dataclass(frozen=True)
class Spreading:
    """Worst fit: the node with the most free of a resource.

    Args:
        resource: its name.
    """

    resource: str

    def order(self, index: FreeIndex, amount: int) -> Iterator[int]:
        """Nodes with enough, the best first."""
        return index.most_first(amount)


Score = BinPacking | Spreading | Callable[[Claim, Node, Ledger], float]
