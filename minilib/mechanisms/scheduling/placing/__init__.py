"""Placing: which node a claim gets, or why none; several claims together, or none of them."""

from minilib.mechanisms.scheduling.placing.attempts import Trial
from minilib.mechanisms.scheduling.placing.choosing import Refusal, choose, place_all, reasons_against
from minilib.mechanisms.scheduling.placing.claim import Claim, InvalidClaim, Toleration
from minilib.mechanisms.scheduling.placing.filters import FILTERS, matches_labels, tolerates_taints
from minilib.mechanisms.scheduling.placing.free_index import FreeIndex
from minilib.mechanisms.scheduling.placing.holding import Holding, InsufficientCapacity, UnknownName
from minilib.mechanisms.scheduling.placing.ledger import Ledger
from minilib.mechanisms.scheduling.placing.node import InvalidNode, Node, Taint
from minilib.mechanisms.scheduling.placing.scores import BinPacking, Spreading

__all__ = [
    "FILTERS",
    "BinPacking",
    "Claim",
    "FreeIndex",
    "Holding",
    "InsufficientCapacity",
    "InvalidClaim",
    "InvalidNode",
    "Ledger",
    "Node",
    "Refusal",
    "Spreading",
    "Taint",
    "Toleration",
    "Trial",
    "UnknownName",
    "choose",
    "matches_labels",
    "place_all",
    "reasons_against",
    "tolerates_taints",
]
