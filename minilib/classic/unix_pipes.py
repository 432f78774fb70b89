"""A Unix pipeline for real: processes joined by pipes of bounded size, and when each of them works, waits to read
(starved), or waits to write (blocked).

    stage 0 ──▶ pipe of k pages ──▶ stage 1 ──▶ pipe of k pages ──▶ stage 2        an item is a page of bytes

`run_in_ticks` counts time: in a tick every process that has an item does one unit of work, between ticks items move as
far as they can. So the same pipeline takes the same ticks on every machine, however busy, and the timeline is that of
minilib.mechanisms.pipelining, operation by operation. `run_freely` lets the processes go, and reads clocks.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from minilib.classic.pipe_stage import BLOCKED, FINISHED, MOVE, PAGE, READY, REPORT, RUN, STARVED, UNIT, WORKING
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.basics.interrupts import held
from minilib.mechanisms.pipelining import Span, Timeline
from minilib.mechanisms.pipelining.plan import checked_time

TIMEOUT = 30.0  # seconds
LONGEST = 1e6  # seconds; a socket's timeout is at most 2^31 ms


class StageFailed(RuntimeError):
    """A stage's process died, or did not answer in time; the message says which one, and how."""


class PipeSizeUnsupported(ValueError):
    """This system cannot make a pipe that holds so many items."""


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
        timeout: seconds for each answer of a process, more than 0 and at most LONGEST.

    Raises:
        StageFailed: if a process dies, or does not answer in time. No process is left behind.
        PipeSizeUnsupported: if the system cannot make such a pipe.
        ValueError: before any process starts, if there is no stage, no item, a number of units that is not whole or
            negative, or a time that is none.
    """
    with _Processes(_work_of(units, num_items), capacity, 0.0, timeout) as processes:
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
    with _Processes(_work_of(units, num_items), capacity, unit_seconds, timeout) as processes:
        stages = range(len(units))
        for stage in stages:
            processes.tell(stage, RUN)
        deadline = time.monotonic() + timeout
        reports = [[processes.hear(stage, deadline) for _ in range(num_items + 1)] for stage in stages]
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


class _Processes:
    """The processes of a pipeline, which end with the with block.

    Args:
        work: units, for each stage and item.
        capacity: items in each pipe.
        unit_seconds: see `run_freely`.
        timeout: seconds for each answer.

    Raises:
        ValueError: for a time that is none.
    """

    def __init__(self, work: Sequence[Sequence[int]], capacity: int, unit_seconds: float, timeout: float) -> None:
        if not 0 < timeout <= LONGEST:
            raise ValueError(f"timeout is more than 0 and at most {LONGEST:g} seconds, got {timeout!r}")
        checked_time("a unit of work", unit_seconds)
        self._timeout = timeout
        self._processes: list[subprocess.Popen] = []
        self._sockets: list[socket.socket] = []
        pipes: list[int] = []
        try:
            with held():  # an interrupt must not come between a process and the note of it
                for _ in work[1:]:
                    pipes += _new_pipe(capacity)
                for stage, units in enumerate(work):
                    ends = (pipes[2 * stage - 2] if stage else subprocess.DEVNULL,
                            pipes[2 * stage + 1] if stage + 1 < len(work) else subprocess.DEVNULL)  # fmt: skip
                    self._start(units, ends, stage == 0, stage + 1 == len(work), unit_seconds)
        except BaseException:
            self.__exit__()
            raise
        finally:
            for end in pipes:
                os.close(end)

    def __enter__(self) -> _Processes:
        try:
            for stage in range(len(self._processes)):
                self.tell(stage, READY)
            for stage in range(len(self._processes)):
                self.hear(stage)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with held():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
            for each in self._sockets:
                each.close()

    def ask(self, stage: int, command: bytes) -> tuple:
        """The answer to a command."""
        self.tell(stage, command)
        return self.hear(stage)

    def tell(self, stage: int, command: bytes) -> None:
        """Send a command."""
        try:
            self._sockets[stage].sendall(command)
        except OSError as error:
            raise StageFailed(self._how(stage)) from error

    def hear(self, stage: int, deadline: float | None = None) -> tuple:
        """The next report of a stage."""
        data = b""
        while len(data) < REPORT.size:
            left = self._timeout if deadline is None else max(0.001, deadline - time.monotonic())
            self._sockets[stage].settimeout(left)
            try:
                part = self._sockets[stage].recv(REPORT.size - len(data))
            except TimeoutError as error:
                raise StageFailed(f"stage {stage} did not answer within {self._timeout:g} s") from error
            except OSError as error:
                raise StageFailed(self._how(stage)) from error
            if not part:
                raise StageFailed(self._how(stage))
            data += part
        return REPORT.unpack(data)

    def _start(self, units: Sequence[int], ends: tuple[int, int], first: bool, last: bool, seconds: float) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        words = [str(theirs.fileno()), ",".join(map(str, units)), str(int(first)), str(int(last)), str(seconds)]
        with theirs:
            self._processes.append(subprocess.Popen(
                [sys.executable, "-P", "-S", "-m", "minilib.classic.pipe_stage", *words],
                stdin=ends[0], stdout=ends[1], stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env=child_environment(),
            ))  # fmt: skip

    def _how(self, stage: int) -> str:
        """How a stage ended, or one whose end made others end."""
        time.sleep(0.05)  # for the kernel to close what the dead had open
        codes = [process.poll() for process in self._processes]
        killed = next((number for number, code in enumerate(codes) if code is not None and code < 0), stage)
        code = codes[killed]
        if code is None:
            return f"stage {killed} has closed its connection"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"stage {killed}, process {self._processes[killed].pid}, {how}"


def _work_of(units: Sequence[int | Sequence[int]], num_items: int) -> list[list[int]]:
    if _is_whole(num_items, 1):
        work = [list(each) if isinstance(each, Sequence) else [each] * num_items for each in units]
        if work and all(len(row) == num_items and all(_is_whole(number, 0) for number in row) for row in work):
            return work
    raise ValueError(
        f"needs 1 stage or more, 1 item or more, and for each stage units ≥ 0, one whole number or one for each of "
        f"{num_items} items; got {list(units)}"
    )


def _is_whole(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _new_pipe(capacity: int) -> tuple[int, int]:
    """A pipe that holds so many items: its end to read, and its end to write."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        raise PipeSizeUnsupported("this system does not let a program choose a pipe's size; Linux does")
    if not _is_whole(capacity, 1) or capacity.bit_count() > 1:
        raise PipeSizeUnsupported(f"a pipe holds a power of two of pages, at least 1; got {capacity!r}")
    ends, found = os.pipe(), None
    try:
        found = fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, capacity * PAGE) // PAGE
    except (OSError, OverflowError) as error:
        raise PipeSizeUnsupported(f"the system refuses a pipe of {capacity} pages: {error}") from error
    finally:
        if found != capacity:
            for end in ends:
                os.close(end)
    if found != capacity:
        raise PipeSizeUnsupported(f"the system refuses a pipe of {capacity} pages, and makes one of {found}")
    return ends


def _timeline(times: Sequence[Sequence[tuple[float, float]]]) -> Timeline:
    """From begin and end of every item in every stage."""
    return Timeline(tuple(
        tuple(Span((stage, item), stage, begin, end) for item, (begin, end) in enumerate(row))
        for stage, row in enumerate(times)
    ))  # fmt: skip
