"""Replication and reduction by plan: plan.py says what a plan is, plans.py which plans there are."""

from minilib.mechanisms.replication.plan import (
    ContributionLost,
    CountedTwice,
    LinkLike,
    NothingToSend,
    Plan,
    PlanError,
    Transfer,
    pack_rounds,
    seconds,
    simulate,
)

__all__ = [
    "ContributionLost",
    "CountedTwice",
    "LinkLike",
    "NothingToSend",
    "Plan",
    "PlanError",
    "Transfer",
    "pack_rounds",
    "seconds",
    "simulate",
]
