"""Policies by name, as a configuration has them."""

from __future__ import annotations

from minilib.mechanisms.scheduling.by_rank import AgedPriority, EarliestDeadline, ShortestRemaining
from minilib.mechanisms.scheduling.by_turns import MultiLevelFeedback, TimeSlicing
from minilib.mechanisms.scheduling.fair_share import FairShare
from minilib.mechanisms.scheduling.policy import FirstComeFirstServed, SchedulingPolicy

POLICIES: dict[str, type[SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "round_robin": TimeSlicing,
    "srpt": ShortestRemaining,
    "feedback": MultiLevelFeedback,
    "priority": AgedPriority,
    "fair_share": FairShare,
    "deadline": EarliestDeadline,
}


class UnknownPolicy(ValueError):
    """There is no policy of that name."""


def make_policy(policy: str | SchedulingPolicy) -> SchedulingPolicy:
    """A policy that schedules nothing yet.

    Args:
        policy: a name of `POLICIES`, for that policy with its defaults; or a policy, which is returned.

    Raises:
        UnknownPolicy: if it is neither.
        ValueError: if it is a policy that schedules tasks already.
    """
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    if not isinstance(policy, SchedulingPolicy):
        raise UnknownPolicy(f"policy is one of {', '.join(POLICIES)}, or a policy of your own; got {policy!r}")
    if policy.num_tasks:
        raise ValueError(f"this {type(policy).__name__} schedules the tasks of somebody else; make a policy for each")
    return policy
