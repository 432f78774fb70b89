"""Load balancing: the policies that choose a target for a request or a token."""

from minilib.mechanisms.balancing.by_key import BoundedHashing, Sticky, hash_affinity
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
    "BoundedHashing",
    "Feedback",
    "Heedless",
    "LeastLoaded",
    "NoTarget",
    "Policy",
    "Random",
    "RoundRobin",
    "Sticky",
    "TwoChoices",
    "Weighted",
    "assign",
    "hash_affinity",
    "up_among",
]
