"""Policies that serve tasks in turns: round robin, and several lines of which the first have shorter turns.

A turn is counted in units of work, not in time. A task that has used up its turn goes to the end of the next line.

Sources: Corbató, Merwin-Daggett and Daley, "An Experimental Time-Sharing System", 1962 (several lines); Arpaci-Dusseau,
"Operating Systems: Three Easy Pieces", chapter 8 (the boost).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minilib.mechanisms.scheduling.policy import Place, SchedulingPolicy, check_positive
from minilib.mechanisms.scheduling.task import Load, Task


@dataclass
class Turn:
    """Where a task is in its turns.

    Args:
        level: its line; 0 is served first.
        ticket: its place there.
        used: units of work of its turn that it has received.
    """

    level: int
    ticket: int
    used: float = 0


class MultiLevelFeedback(SchedulingPolicy):
    """Several lines; a task sinks by one when it has used up a turn, so that short ones are early without a prediction.

    After every `boost` units of work all tasks are back in the first line, in the order in which they were; without
    that, a task in the last line would starve.

    Args:
        quanta: units of work in a turn, for each line; in the last one a task stays.
        boost: units of work, of all tasks, between two boosts; math.inf for none.

    Raises:
        ValueError: if there is no line, or a number is not above 0.

    Bound: for each turn in the first line that a task needs, a boost and a turn of each other task.

    Cost: a boost sorts all tasks.
    """

    reorders = True

    def __init__(self, quanta: Sequence[float] = (8, 32, 128), boost: float = 1_000) -> None:
        if not quanta:
            raise ValueError("quanta has the length of a turn for each line, got none")
        for quantum in quanta:
            check_positive("a quantum", quantum)
        check_positive("boost", boost, infinite=True)
        super().__init__()
        self.quanta, self.boost = tuple(quanta), boost
        self._turns: dict[Task, Turn] = {}
        self._tickets = itertools.count()
        self._next_boost = boost

    def level(self, task: Task) -> int:
        """The line of a task that is here."""
        return self._turns[task].level

    group = level

    def group_rank(self, group: int) -> Place:
        """The first line first."""
        return (group,)

    def rank(self, task: Task) -> Place:
        """In the order in which tasks came to this line."""
        return (self._turns[task].ticket,)

    def wait_bound(self, task: Task, load: Load) -> float:
        """For each turn that the task needs: the time to the next boost, then a turn of each other task."""
        between = load.others * (self.quanta[0] + load.step)
        if len(self.quanta) > 1:
            between += self.boost + load.step
        return math.ceil(load.largest / self.quanta[0]) * between

    def check_invariants(self) -> None:
        """Every task that is here has a turn that is not used up."""
        super().check_invariants()
        assert self._turns.keys() == self._number.keys(), "a task has no turn, or its turn was kept"
        for turn in self._turns.values():
            assert 0 <= turn.used < self.quanta[turn.level], f"{turn} is used up"

    def _enter(self, task: Task) -> None:
        self._turns[task] = Turn(0, next(self._tickets))

    def _inherit(self, task: Task, child: Task) -> None:
        self._turns[child] = replace(self._turns[task])

    def _charge(self, task: Task, units: float) -> None:
        turn = self._turns[task]
        turn.used += units
        if turn.used >= self.quanta[turn.level]:
            below = min(turn.level + 1, len(self.quanta) - 1)
            self._turns[task] = Turn(below, next(self._tickets))
        if self.served_units >= self._next_boost:
            self._next_boost = self.served_units + self.boost
            self._lift_all()

    def _lift_all(self) -> None:
        """Put every task, whether it waits or runs, back into the first line."""
        tasks = self.order(self._number)
        waiting = [task for task in tasks if task in self._stands]
        for task in waiting:
            self._take_out(task)
        for task in tasks:
            self._turns[task] = Turn(0, next(self._tickets))
        for task in waiting:
            self._put_in(task)

    def _forget(self, task: Task) -> None:
        del self._turns[task]


class TimeSlicing(MultiLevelFeedback):
    """Round robin: one line, and turns of one length.

    Args:
        quantum: units of work in a turn.

    Raises:
        ValueError: if quantum is no finite number above 0.

    Bound: for each turn that a task needs, a turn of each other task.
    """

    def __init__(self, quantum: float = 8) -> None:
        super().__init__((quantum,), math.inf)
