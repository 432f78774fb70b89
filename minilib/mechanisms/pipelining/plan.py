"""Pipelined work as data: for each worker the operations that it does, in order, and what each of them waits for.

`timeline_of` prices such a plan. Plans are made for items that flow through stages (flow.py: processes joined by
pipes, minilib/classic/unix_pipes.py), for a processor's instructions (instructions.py) and for training schedules
(minilib/parallel/pipeline/).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class InvalidPlan(ValueError):
    """A plan that has an operation twice, or waits for an operation that is in no worker's list."""


class Deadlock(InvalidPlan):
    """Workers wait for one another for ever; the message says which, and what for.

    Args:
        message: what happened.
        stuck: each of these workers → the operation that it cannot begin.
    """

    def __init__(self, message: str, stuck: dict[int, Hashable]) -> None:
        super().__init__(message)
        self.stuck = stuck


@dataclass(frozen=True)
class Operation:
    """Work that one worker does without a break.

    Args:
        key: its name, unique in the plan.
        after: operations that must have ended before it begins, such as those whose results it reads.
        room: operations that must have begun before it begins: each takes an item out of a buffer that was full.
    """

    key: Hashable
    after: tuple[Hashable, ...] = ()
    room: tuple[Hashable, ...] = ()


class Interval(NamedTuple):
    """When a worker did an operation, in the plan's unit of time."""

    key: Hashable
    worker: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every operation of a plan begins and ends.

    Args:
        workers: for each worker its spans, in order.
    """

    workers: tuple[tuple[Interval, ...], ...]

    def __iter__(self) -> Iterator[Interval]:
        """All spans, worker by worker."""
        return (span for spans in self.workers for span in spans)

    @property
    def makespan(self) -> float:
        """Time from 0 to the end of the last operation; 0 without operations."""
        return max((span.end for span in self), default=0.0)

    def busy(self, worker: int) -> float:
        """Time in which a worker works."""
        return sum(span.end - span.start for span in self.workers[worker])

    def idle(self, worker: int) -> float:
        """Time until the makespan in which a worker waits, before, between and after its operations."""
        return self.makespan - self.busy(worker)

    @property
    def bubble(self) -> float:
        """Fraction of all workers' time in which they wait; 0 without operations."""
        offered = len(self.workers) * self.makespan
        return 1 - sum(self.busy(worker) for worker in range(len(self.workers))) / offered if offered else 0.0


def timeline_of(
    plan: Sequence[Sequence[Operation]], seconds: Callable[[Hashable], float], transfer: float = 0.0
) -> Timeline:
    """When every operation begins and ends, if each worker does its operations in order, each as soon as it can.

    Args:
        plan: for each worker its operations.
        seconds: time that the operation of a key takes, 0 or more.
        transfer: time from the end of an operation to the moment when another worker has its result.

    Raises:
        Deadlock: if workers wait for one another.
        InvalidPlan: if an operation is there twice, or waits for one that is in no list.
        ValueError: if the time of an operation or of the transfer is no finite number of 0 or more.

    Cost: O(operations and what they wait for).
    """
    home = _homes(plan)
    if not 0 <= transfer < math.inf:
        raise ValueError(f"transfer is a time, 0 or more, got {transfer!r}; it has to be finite")
    done: dict[Hashable, Interval] = {}
    workers: list[list[Interval]] = [[] for _ in plan]
    waiting: dict[Hashable, list[int]] = {}
    ready = deque(range(len(plan)))
    while ready:
        worker = ready.popleft()
        spans = workers[worker]
        while len(spans) < len(plan[worker]):
            operation = plan[worker][len(spans)]
            missing = next((key for key in (*operation.after, *operation.room) if key not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(worker)
                break
            start = spans[-1].end if spans else 0.0
            start = max([start, *(done[key].end + transfer * (home[key] != worker) for key in operation.after)])
            start = max([start, *(done[key].start for key in operation.room)])
            span = Interval(operation.key, worker, start, start + checked_time(operation.key, seconds(operation.key)))
            spans.append(span)
            done[operation.key] = span
            ready.extend(waiting.pop(operation.key, ()))
    _refuse_deadlock(plan, workers, done, home)
    return Timeline(tuple(map(tuple, workers)))


def checked_time(what: object, time: float) -> float:
    """The time that something takes, if it is one.

    Raises:
        ValueError: for what is no finite number of 0 or more.
    """
    if not 0 <= time < math.inf:
        raise ValueError(f"{what} takes a time of 0 or more, got {time!r}; it has to be finite")
    return time


def _homes(plan: Sequence[Sequence[Operation]]) -> dict[Hashable, int]:
    """The worker of every operation."""
    home: dict[Hashable, int] = {}
    for worker, operations in enumerate(plan):
        for operation in operations:
            if operation.key in home:
                raise InvalidPlan(
                    f"{operation.key} is in the list of worker {home[operation.key]} and in that of {worker}"
                )
            home[operation.key] = worker
    for worker, operations in enumerate(plan):
        for operation in operations:
            for key in (*operation.after, *operation.room):
                if key not in home:
                    raise InvalidPlan(f"{operation.key} of worker {worker} waits for {key}, which no worker does")
    return home


def _refuse_deadlock(
    plan: Sequence[Sequence[Operation]],
    workers: Sequence[Sequence[Interval]],
    done: dict[Hashable, Interval],
    home: dict,
) -> None:
    """Name the circle of workers that wait for one another; whoever else is stuck waits for them."""
    waits: dict[int, tuple[Hashable, Hashable]] = {}  # worker → what it cannot begin, and what it waits for
    for worker, (operations, spans) in enumerate(zip(plan, workers, strict=True)):
        if len(spans) < len(operations):
            operation = operations[len(spans)]
            missing = next(key for key in (*operation.after, *operation.room) if key not in done)
            waits[worker] = operation.key, missing
    if not waits:
        return
    walk = [min(waits)]  # from one to whom it waits for, until one comes a second time
    while walk.count(walk[-1]) == 1:
        walk.append(home[waits[walk[-1]][1]])
    circle = sorted(walk[walk.index(walk[-1]) : -1])
    said = [
        f"worker {worker} waits before {waits[worker][0]} for {waits[worker][1]} of worker {home[waits[worker][1]]}"
        for worker in circle
    ]
    raise Deadlock(f"deadlock: {'; '.join(said)}", {worker: waits[worker][0] for worker in circle})
