"""A claim that has a node, and the errors of whoever asks a ledger for what it has not."""

from __future__ import annotations

from dataclasses import dataclass

from minilib.mechanisms.scheduling.placing.claim import Claim


class UnknownName(LookupError):
    """No such node, or no claim of that name has one."""


class InsufficientCapacity(ValueError):
    """More is asked of a node than is free there, or the node takes no claims."""


@dataclass
class Holding:
    """A claim that has a node.

    Args:
        claim: whose node it is.
        node: the node's number.
        since: a number that grows with each reservation of the ledger.
        bound: whether the work was started there.
    """

    claim: Claim
    node: int
    since: int
    bound: bool = False
