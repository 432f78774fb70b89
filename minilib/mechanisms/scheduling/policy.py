"""Scheduling: who is served next. Tasks are processes that want a CPU, or requests that want a language model.

    in order         first come, first served; priority; shortest remaining; earliest deadline     by_rank.py
    in turns         round robin, multi-level feedback                                             by_turns.py
    in shares        fair share by virtual time, for each tenant                                   fair_share.py
                     dominant resource fairness, by what tenants hold of several resources         dominant_share.py

One protocol serves both worlds. The policy holds the line of tasks that wait, and hears what becomes of each:

    arrive ─→ in the line ──admit──→ running ──remove──→ gone
                  ↑  └──────remove───────┼────────────────↑
                  └────────preempt───────┘

A caller that serves one task at a time (classic/process_queue.py) leaves all tasks in the line and always serves the
first. A caller that serves many at once (serving/scheduler.py) admits the first as long as there is room, and lets the
last of those that run give way.

Each policy states how much service others can receive at steps in which a task receives none (`wait_bound`). One that
starves by nature has a `patience` against that, and with an infinite patience an infinite bound. So has dominant
resource fairness, which looks at what tenants hold and not at who waited.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from minilib.mechanisms.scheduling.task import Load, Task

Place = tuple[Any, ...]  # what is compared; the smallest place goes first


class SchedulingPolicy:
    """A line of tasks, here in the order of arrival; subclasses override `rank`, or group tasks and order the groups.

    Attributes:
        served_units: units of work that all tasks together have received.
        reorders: whether service changes the order of tasks.

    Cost: `arrive`, `admit`, `preempt`, `remove` and `serve` take O(log n) comparisons and the move of part of a list;
    `first` takes O(groups).
    """

    reorders = False

    def __init__(self) -> None:
        self.served_units: float = 0
        self._number: dict[Task, tuple[int, int]] = {}  # of every task: its arrival, and its place among forks
        self._numbers = itertools.count()
        self._lines: dict[Hashable, list[tuple[Place, Task]]] = {}  # by group, each in order
        self._stands: dict[Task, tuple[Hashable, Place]] = {}  # where each task in the line stands

    def __len__(self) -> int:
        """Tasks in the line."""
        return len(self._stands)

    def __iter__(self) -> Iterator[Task]:
        """The tasks in the line, in order."""
        return iter(self.order(self._stands))

    @property
    def num_tasks(self) -> int:
        """Tasks that are here, whether they wait or run."""
        return len(self._number)

    def arrive(self, task: Task) -> None:
        """A new task joins the line.

        Raises:
            InvalidTask: if this policy cannot schedule it; nothing was changed.
            ValueError: if it is here already.
        """
        if task in self._number:
            raise ValueError(f"task {task.key!r} has arrived already; it leaves by `remove`")
        self._check(task)
        self._number[task] = (next(self._numbers), 0)
        self._enter(task)
        self._join(task)

    def fork(self, task: Task, child: Task) -> None:
        """A child of a running task runs beside it, with its place; it comes behind it, and before whoever came later.

        Raises:
            LookupError: if the task does not run.
        """
        self._must_run(task)
        self._number[child] = (self._number[task][0], next(self._numbers))
        self._inherit(task, child)

    def admit(self, task: Task) -> None:
        """A task leaves the line, to run beside others.

        Raises:
            LookupError: if it is not in the line.
        """
        self._must_wait(task)
        self._leave(task)

    def preempt(self, task: Task) -> None:
        """A running task is back in the line, at the place that it has earned and not at the end.

        Raises:
            LookupError: if it does not run.
        """
        self._must_run(task)
        self._join(task)

    def serve(self, task: Task, units: float) -> None:
        """A task has received service; work that was lost and is done again is no service.

        Raises:
            LookupError: if it never arrived, or has gone.
        """
        waits = task in self._stands
        if waits:
            self._take_out(task)
        elif task not in self._number:
            raise LookupError(f"task {task.key!r} is not here")
        task.done += units
        self.served_units += units
        self._charge(task, units)
        if waits:
            self._put_in(task)

    def remove(self, task: Task) -> None:
        """A task is completed, or cancelled.

        Raises:
            LookupError: if it never arrived, or has gone.
        """
        if task in self._stands:
            self._leave(task)
        elif task not in self._number:
            raise LookupError(f"task {task.key!r} is not here")
        del self._number[task]
        self._forget(task)

    def first(self) -> Task | None:
        """The task in the line that goes next; None if nobody waits."""
        if not self._lines:
            return None
        group = min(self._lines, key=lambda group: (self.group_rank(group), self._lines[group][0][0]))
        return self._lines[group][0][1]

    def order(self, tasks: Iterable[Task]) -> list[Task]:
        """Tasks that are here, whether they wait or run, first to go first."""
        return sorted(tasks, key=self.place)

    def victim(self, running: Iterable[Task]) -> Task:
        """The task that gives way: the last in order."""
        return max(running, key=self.place)

    def place(self, task: Task) -> Place:
        """What decides the order of all tasks; no two have the same."""
        return (self.group_rank(self.group(task)), (*self.rank(task), *self._number[task]))

    def group(self, task: Task) -> Hashable:
        """Tasks of one group keep their order among each other while they wait."""
        return None

    def group_rank(self, group: Hashable) -> Place:
        """Orders groups."""
        return ()

    def rank(self, task: Task) -> Place:
        """Orders the tasks of a group. It may change when the task is served, and never while the task waits."""
        return ()

    def wait_bound(self, task: Task, load: Load) -> float:
        """Most units of work that others receive until a task's completion, at steps in which it receives none.

        Asked at its arrival, for a caller that at each step serves the first in order. Here: the work of those before.
        """
        return load.others * load.largest

    def check_invariants(self) -> None:
        """Every line is in order, no line is empty, and whoever stands in a line has arrived."""
        assert self._stands.keys() <= self._number.keys(), "a task waits that never arrived"
        assert sum(map(len, self._lines.values())) == len(self._stands), "a task stands in no line, or in two"
        for group, line in self._lines.items():
            assert line, "an empty line was kept"
            assert [place for place, _ in line] == sorted(place for place, _ in line), "a line is out of order"
            for place, task in line:
                assert self._stands[task] == (group, place) == (self.group(task), self._place_in_group(task)), "moved"
        if self._stands:
            assert self.first() is min(self._stands, key=self.place), "another task should be the first"

    def _check(self, task: Task) -> None:
        """Refuse a task that this policy cannot schedule."""

    def _enter(self, task: Task) -> None:
        """Note what the policy needs to know about a new task, before it joins the line."""

    def _inherit(self, task: Task, child: Task) -> None:
        """Note the same about a child."""

    def _charge(self, task: Task, units: float) -> None:
        """Note service."""

    def _forget(self, task: Task) -> None:
        """A task is gone."""

    def _join(self, task: Task) -> None:
        self._put_in(task)

    def _leave(self, task: Task) -> None:
        self._take_out(task)

    def _put_in(self, task: Task) -> None:
        stand = self._stands[task] = (self.group(task), self._place_in_group(task))
        insort(self._lines.setdefault(stand[0], []), (stand[1], task))  # places differ, so that tasks are not compared

    def _take_out(self, task: Task) -> None:
        group, place = self._stands.pop(task)
        line = self._lines[group]
        del line[bisect_left(line, (place,))]
        if not line:
            del self._lines[group]

    def _place_in_group(self, task: Task) -> Place:
        return (*self.rank(task), *self._number[task])

    def _must_wait(self, task: Task) -> None:
        if task not in self._stands:
            raise LookupError(f"task {task.key!r} is not in the line; it runs, has gone, or never arrived")

    def _must_run(self, task: Task) -> None:
        if task not in self._number or task in self._stands:
            raise LookupError(f"task {task.key!r} does not run; it is in the line, has gone, or never arrived")


class FirstComeFirstServed(SchedulingPolicy):
    """In the order of arrival, and each until it is done.

    Bound: the work of those that were here before.
    """


def check_positive(name: str, value: float, error: type[ValueError] = ValueError, infinite: bool = False) -> None:
    """Refuse what is no number above 0.

    Raises:
        ValueError: or the given kind of it.
    """
    if not isinstance(value, int | float) or not (0 < value < math.inf or (infinite and value == math.inf)):
        raise error(f"{name} is a{'' if infinite else ' finite'} number above 0, got {value!r}")
