"""Load balancing: policies choose a target for a request or a token; a dispatcher keeps loads and health of targets."""

from minilib.mechanisms.balancing.by_key import BoundedHashing, Sticky, hash_affinity
from minilib.mechanisms.balancing.dispatcher import Dispatched, Dispatcher
from minilib.mechanisms.balancing.health import Health, HealthRule
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
from minilib.mechanisms.balancing.retry_budget import RetryBudget

__all__ = [
    "Affinity",
    "BoundedHashing",
    "Dispatched",
    "Dispatcher",
    "Feedback",
    "Health",
    "HealthRule",
    "Heedless",
    "LeastLoaded",
    "NoTarget",
    "Policy",
    "Random",
    "RetryBudget",
    "RoundRobin",
    "Sticky",
    "TwoChoices",
    "Weighted",
    "assign",
    "hash_affinity",
    "up_among",
]
