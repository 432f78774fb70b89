"""Pipelining: plans of operations that wait for one another, and when each of them begins and ends."""

from minilib.mechanisms.pipelining.flow import (
    Waiting,
    flow,
    flow_seconds,
    most_in_flight,
    waiting,
)
from minilib.mechanisms.pipelining.instructions import STAGES, Instruction, instruction_plan, stalled_cycles
from minilib.mechanisms.pipelining.plan import Deadlock, Interval, InvalidPlan, Operation, Timeline, timeline_of

__all__ = [
    "STAGES",
    "Deadlock",
    "Instruction",
    "Interval",
    "InvalidPlan",
    "Operation",
    "Timeline",
    "Waiting",
    "flow",
    "flow_seconds",
    "instruction_plan",
    "most_in_flight",
    "stalled_cycles",
    "timeline_of",
    "waiting",
]
