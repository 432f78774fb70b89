"""Policies that give each task a rank: its priority, the work that remains of it, its deadline.

The first two starve by nature: a task of low rank waits for as long as better ones keep arriving. Here they age. How
much service others can receive before a task counts as one of the best is said by `patience`:

    rank = patience · (priority, or remaining work) + service that all tasks had received when the task arrived

The second term grows for newcomers and stays for whoever waits, so that newcomers stand behind it from some time on,
and nobody has to compute the order of the line anew as time goes by.

Sources: Schrage, "A Proof of the Optimality of the Shortest Remaining Processing Time Discipline", Operations Research
1968; Liu and Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment", JACM 1973.
"""

from __future__ import annotations

import math

from minilib.mechanisms.scheduling.policy import Place, SchedulingPolicy, check_positive
from minilib.mechanisms.scheduling.task import Load, Task, UnknownCost


class AgingPolicy(SchedulingPolicy):
    """What `AgedPriority` and `ShortestRemaining` have in common: the cost that ranks a task, and its age.

    Args:
        patience: units of work that others may receive for each unit of a task's cost; math.inf for no aging.

    Raises:
        ValueError: if patience is not above 0.
    """

    def __init__(self, patience: float) -> None:
        check_positive("patience", patience, infinite=True)
        super().__init__()
        self.patience = patience
        self._entered: dict[Task, float] = {}  # what all tasks had received when this one arrived

    def cost(self, task: Task) -> float:
        """What ranks a task, apart from its age; 0 is best."""
        raise NotImplementedError

    def rank(self, task: Task) -> Place:
        """By cost and age; without aging by cost, and among equals the oldest."""
        if self.patience == math.inf:
            return (self.cost(task),)
        return (self.patience * self.cost(task) + self._entered[task],)

    def wait_bound(self, task: Task, load: Load) -> float:
        """Later ones overtake until patience × cost units have been served; then those that are here at that time."""
        cost = self.cost(task)
        return (self.patience * cost + load.step if cost else 0) + super().wait_bound(task, load)

    def check_invariants(self) -> None:
        """The ages of all tasks that are here, and of no others, are known."""
        super().check_invariants()
        assert self._entered.keys() == self._number.keys(), "the age of a task is unknown, or was kept"

    def _enter(self, task: Task) -> None:
        self._entered[task] = self.served_units

    def _inherit(self, task: Task, child: Task) -> None:
        self._entered[child] = self._entered[task]

    def _forget(self, task: Task) -> None:
        del self._entered[task]


class AgedPriority(AgingPolicy):
    """The most urgent first, that is the smallest priority; among equals the oldest.

    Args:
        patience: units of work that others may receive for each level of priority that they are more urgent.

    Bound: patience × priority, and the work of those that are here then.
    """

    def __init__(self, patience: float = 10_000) -> None:
        super().__init__(patience)

    def cost(self, task: Task) -> float:
        """Its priority."""
        return task.priority


class ShortestRemaining(AgingPolicy):
    """The task that the least work remains of, as predicted (SRPT). To a caller that never preempts, it is SJF.

    Args:
        patience: units of work that others may receive for each unit that remains of a task: it bounds the slowdown.

    Bound: patience × predicted cost, and the work of those that are here then.
    """

    reorders = True

    def __init__(self, patience: float = 10) -> None:
        super().__init__(patience)

    def cost(self, task: Task) -> float:
        """What remains of it."""
        return task.remaining

    def _check(self, task: Task) -> None:
        if task.predicted is None:
            raise UnknownCost(f"task {task.key!r} has no predicted cost, by which this policy orders; predict one")


class EarliestDeadline(SchedulingPolicy):
    """The earliest deadline first; whoever has none is given one.

    A deadline that has passed makes a task no less urgent: it goes on, before all others.

    Args:
        horizon: time, on the caller's clock, from the arrival to the deadline of a task that comes without one.

    Raises:
        ValueError: if horizon is no finite number above 0.

    Bound: those that arrive before the deadline. Nobody arrives later with an earlier one, since no deadline is past.
    """

    def __init__(self, horizon: float = 60) -> None:
        check_positive("horizon", horizon)
        super().__init__()
        self.horizon = horizon

    def deadline(self, task: Task) -> float:
        """When a task should be done, on the caller's clock."""
        return task.deadline if task.deadline < math.inf else task.arrival + self.horizon

    def rank(self, task: Task) -> Place:
        """By deadline."""
        return (self.deadline(task),)

    def wait_bound(self, task: Task, load: Load) -> float:
        """What is served until the deadline, on a clock that counts units of work; then those that are here then."""
        return self.deadline(task) - task.arrival + load.step + super().wait_bound(task, load)
