"""Load balancing: the policies that choose a target for a request or a token."""

from minilib.mechanisms.balancing.policies import (
    Affinity,
    Feedback,
    Heedless,
    LeastLoaded,
    NoTarget,
    Policy,
    Random,
    RoundRobin,
    TwoChoices,
    Weighted,
    assign,
    up_among,
)

__all__ = [
    "Affinity",
    "Feedback",
    "Heedless",
    "LeastLoaded",
    "NoTarget",
    "Policy",
    "Random",
    "RoundRobin",
    "TwoChoices",
    "Weighted",
    "assign",
    "up_among",
]
