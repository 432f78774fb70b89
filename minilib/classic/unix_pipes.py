"""A Unix pipeline for real: processes joined by pipes of bounded size, and when each of them works, waits to read
(starved), or waits to write (blocked).

    stage 0 ──▶ pipe of k pages ──▶ stage 1 ──▶ pipe of k pages ──▶ stage 2        an item is a page of bytes

`run_in_ticks` counts time: in a tick every process that has an item does one unit of work, between ticks items move as
far as they can. So the same pipeline takes the same ticks on every machine, however busy, and the timeline is that of
minilib.mechanisms.pipelining, operation by operation. `run_freely` lets the processes go, and reads clocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from minilib.classic.pipe_processes import StageProcesses
from minilib.classic.pipe_stage import BLOCKED, FINISHED, MOVE, RUN, STARVED, UNIT, WORKING
from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.pipelining import Interval, Timeline

TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class PipeRun:
    """What became of the items.

    Args:
        timeline: when each stage worked on each item; keys are (stage, item), times are ticks or seconds.
        starved: for each stage, time in which it had no item and waited for one.
        blocked: for each stage, time in which it had finished an item and found no room for it.
        results: of the items, after the last stage.
    """

    timeline: Timeline
    starved: tuple[float, ...]
    blocked: tuple[float, ...]
    results: tuple[bytes, ...]


def run_in_ticks(
    units: Sequence[int | Sequence[int]], num_items: int, capacity: int, timeout: float = TIMEOUT
) -> PipeRun:
    """Run items through processes, a unit of work a tick.

    Args:
        units: of work, for each stage: the same for all items, or a number for each.
        num_items: items, at least 1.
        capacity: items that each pipe holds, a power of two.
        timeout: seconds for each answer of a process, more than 0 and at most 1e6.

    Raises:
        StageFailed: if a process dies, or does not answer in time. No process is left behind.
        PipeSizeUnsupported: if the system cannot make such a pipe.
        ValueError: before any process starts, if there is no stage, no item, a number of units that is not whole or
            negative, or a time that is none.
    """
    with StageProcesses(_work_of(units, num_items), capacity, 0.0, timeout) as processes:
        log = _Log(len(units))
        while any(state != FINISHED for state in log.states):
            while any([log.note(stage, processes.ask(stage, MOVE)) for stage in range(len(units))]):
                pass
            for stage, state in enumerate(log.states):
                log.waited[state][stage] += 1
                if state == WORKING:
                    log.note(stage, processes.ask(stage, UNIT), after=1)
            log.clock += 1
        return PipeRun(log.timeline(), tuple(log.waited[STARVED]), tuple(log.waited[BLOCKED]), tuple(log.results))


def run_freely(
    units: Sequence[int | Sequence[int]],
    num_items: int,
    capacity: int,
    unit_seconds: float = 0.0,
    timeout: float = TIMEOUT,
) -> PipeRun:
    """Run items through processes that wait only in read and write; times in seconds since the first item began.

    Args:
        units, num_items, capacity: see `run_in_ticks`.
        unit_seconds: least time of a unit: a process that is done earlier sleeps, so that more stages than cores
            overlap as if each had a core.
        timeout: seconds for everything.

    Raises:
        StageFailed, PipeSizeUnsupported, ValueError: see `run_in_ticks`.
    """
    with StageProcesses(_work_of(units, num_items), capacity, unit_seconds, timeout) as processes:
        stages = range(len(units))
        for stage in stages:
            processes.tell(stage, RUN)
        deadline = time.monotonic() + timeout
        reports: list[list[tuple]] = [[] for _ in stages]
        for _ in range(num_items + 1):  # all stages in step: one whose reports nobody reads would stop in the end
            for stage in stages:
                reports[stage].append(processes.hear(stage, deadline))
        origin = reports[0][0][3]
        times = [[(begin - origin, end - origin) for _, _, _, begin, end, _ in each[:-1]] for each in reports]
        reading, writing = ([each[-1][place] for each in reports] for place in (3, 4))
        results = tuple(report[5] for report in reports[-1][:-1])
        return PipeRun(_timeline(times), tuple(reading), tuple(writing), results)


class _Log:
    """What stages report, tick by tick.

    Args:
        num_stages: how many there are.
    """

    def __init__(self, num_stages: int) -> None:
        self.clock = 0
        self.states = [STARVED] * num_stages
        self.waited = {state: [0] * num_stages for state in (STARVED, WORKING, BLOCKED, FINISHED)}  # ticks
        self.results: list[bytes] = []
        self._begun: list[list[int]] = [[] for _ in range(num_stages)]
        self._ended: list[list[int]] = [[] for _ in range(num_stages)]

    def note(self, stage: int, report: tuple, after: int = 0) -> bool:
        """Note a report, of so many ticks after now; whether something has moved."""
        state, moved, item, _, _, result = report
        self.states[stage] = state
        begun, ended = self._begun[stage], self._ended[stage]
        if item == len(begun):
            begun.append(self.clock)
        if state != WORKING and item == len(ended):
            ended.append(self.clock + after)
            if stage + 1 == len(self.states):
                self.results.append(result)
        return moved

    def timeline(self) -> Timeline:
        """All that was noted."""
        return _timeline(
            [zip(begun, ended, strict=True) for begun, ended in zip(self._begun, self._ended, strict=True)]
        )


def _work_of(units: Sequence[int | Sequence[int]], num_items: int) -> list[list[int]]:
    if is_whole(num_items, 1):
        work = [list(each) if isinstance(each, Sequence) else [each] * num_items for each in units]
        if work and all(len(row) == num_items and all(is_whole(number, 0) for number in row) for row in work):
            return work
    raise ValueError(
        f"needs 1 stage or more, 1 item or more, and for each stage units ≥ 0, one whole number or one for each of "
        f"{num_items} items; got {list(units)}"
    )


def _timeline(times: Sequence[Sequence[tuple[float, float]]]) -> Timeline:
    """From begin and end of every item in every stage."""
    return Timeline(tuple(
        tuple(Interval((stage, item), stage, begin, end) for item, (begin, end) in enumerate(row))
        for stage, row in enumerate(times)
    ))  # fmt: skip
