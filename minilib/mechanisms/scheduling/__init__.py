"""Scheduling: the policies that choose whose work is done next."""

from minilib.mechanisms.scheduling.by_rank import AgedPriority, EarliestDeadline, ShortestRemaining
from minilib.mechanisms.scheduling.by_turns import MultiLevelFeedback, TimeSlicing
from minilib.mechanisms.scheduling.dominant_share import (
    DominantResourceFairness,
    InvalidDemand,
    dominant_share,
    progressive_filling,
)
from minilib.mechanisms.scheduling.fair_share import FairShare, InvalidWeight
from minilib.mechanisms.scheduling.named import POLICIES, UnknownPolicy, make_policy
from minilib.mechanisms.scheduling.policy import FirstComeFirstServed, SchedulingPolicy
from minilib.mechanisms.scheduling.task import (
    DeadlinePassed,
    InvalidPriority,
    InvalidTask,
    Load,
    Task,
    UnknownCost,
    UnknownTenant,
)

__all__ = [
    "POLICIES",
    "AgedPriority",
    "DeadlinePassed",
    "DominantResourceFairness",
    "EarliestDeadline",
    "FairShare",
    "FirstComeFirstServed",
    "InvalidDemand",
    "InvalidTask",
    "InvalidPriority",
    "InvalidWeight",
    "Task",
    "Load",
    "MultiLevelFeedback",
    "SchedulingPolicy",
    "ShortestRemaining",
    "TimeSlicing",
    "UnknownCost",
    "UnknownPolicy",
    "UnknownTenant",
    "dominant_share",
    "make_policy",
    "progressive_filling",
]
