"""A task: abstract work that waits for service, which theory calls a job; and what makes one impossible to schedule."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Real


class InvalidTask(ValueError):
    """The task cannot be scheduled; the message says what came, what was expected and how to mend it."""


class InvalidPriority(InvalidTask):
    """A priority that is negative or no number."""


class DeadlinePassed(InvalidTask):
    """A deadline that is not later than the task's arrival."""


class UnknownCost(InvalidTask):
    """A policy orders tasks by predicted cost, and this one has no prediction."""


class UnknownTenant(InvalidTask):
    """A policy shares service among tenants, and this one has no weight."""


def check_priority(key: Hashable, priority: object) -> None:
    """Refuse what is no priority.

    Raises:
        InvalidPriority: if it is not a finite number ≥ 0.
    """
    if not isinstance(priority, Real) or not 0 <= priority <= sys.float_info.max:
        raise InvalidPriority(f"priority of {key!r} is a finite number ≥ 0, 0 the most urgent; got {priority!r}")


@dataclass(eq=False, kw_only=True)
class Task:
    """Work that is served piece by piece: a process, a request to a language model.

    Costs are counted in units of work, which are the caller's: slices of a process, tokens of a request.

    Args:
        key: the caller's name for it.
        arrival: time of its arrival on the caller's clock.
        tenant: whose task it is.
        priority: 0 is the most urgent.
        predicted: units of work that it is expected to take in all, 0 or more; None if nobody knows.
        deadline: time on the caller's clock by which it should be completed; math.inf for none.
        done: units of work that it has received; the policy counts them.

    Raises:
        InvalidPriority: if the priority is not a finite number ≥ 0.
        DeadlinePassed: if the deadline is not later than the arrival.
        InvalidTask: if the prediction is not a finite number ≥ 0, or the arrival no finite number.
    """

    key: Hashable
    arrival: float = 0
    tenant: str = ""
    priority: float = 0
    predicted: float | None = None
    deadline: float = math.inf
    done: float = 0

    def __post_init__(self) -> None:
        check_priority(self.key, self.priority)
        if not isinstance(self.arrival, Real) or not math.isfinite(self.arrival):
            raise InvalidTask(f"arrival of {self.key!r} is a finite time on the caller's clock, got {self.arrival!r}")
        if not isinstance(self.deadline, Real) or not self.deadline > self.arrival:
            raise DeadlinePassed(
                f"deadline of {self.key!r} is {self.deadline!r}, and it arrives at {self.arrival!r}; give a later one, "
                "or math.inf for none"
            )
        known = self.predicted is not None
        if known and not (isinstance(self.predicted, Real) and 0 <= self.predicted <= sys.float_info.max):
            raise InvalidTask(f"predicted cost of {self.key!r} is a finite number ≥ 0 or None, got {self.predicted!r}")

    @property
    def remaining(self) -> float:
        """Units of work that the prediction still expects; 0 if the task has outlived it."""
        return max(0, (self.predicted or 0) - self.done)


@dataclass(frozen=True)
class Load:
    """What a bound on waiting is stated for.

    Args:
        others: most other tasks in the system at a time.
        largest: most units of work of one task, received and predicted ones.
        step: most units of work that a task receives between two decisions.
        tenants: how many tenants there are, over all time.
    """

    others: int
    largest: float
    step: float = 1
    tenants: int = 1
