"""Scheduling: the policies that choose whose work is done next."""

from minilib.mechanisms.scheduling.by_rank import AgedPriority, EarliestDeadline, ShortestRemaining
from minilib.mechanisms.scheduling.by_turns import MultiLevelFeedback, TimeSlicing
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
    "EarliestDeadline",
    "FairShare",
    "FirstComeFirstServed",
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
    "make_policy",
]
