"""The processes of a Unix pipeline (pipe_stage.py): started, joined by pipes, told what to do, and ended.

Work goes over a socket, too, since the system takes at most 128 KiB as one argument of a program.
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

from minilib.classic.pipe_stage import PAGE, READY, REPORT, packed_units
from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.basics.interrupts import held
from minilib.mechanisms.pipelining.plan import checked_time

LONGEST = 1e6  # seconds; a socket's timeout is at most 2^31 ms


class StageFailed(RuntimeError):
    """A stage's process died, or did not answer in time; the message says which one, and how."""


class PipeSizeUnsupported(ValueError):
    """This system cannot make a pipe that holds so many items."""


class StageProcesses:
    """The processes of a pipeline, which end with the with block; each gets its work and its commands over a socket.

    Args:
        work: units, for each stage and item.
        capacity: items in each pipe.
        unit_seconds: least time of a unit when a process runs by itself.
        timeout: seconds for each answer, more than 0 and at most LONGEST.

    Raises:
        ValueError: for a time that is none, before any process starts.
        PipeSizeUnsupported: if the system cannot make such a pipe.
        StageFailed: if a process cannot be started, dies, or does not answer in time. No process is left behind.
    """

    def __init__(self, work: Sequence[Sequence[int]], capacity: int, unit_seconds: float, timeout: float) -> None:
        if not 0 < timeout <= LONGEST:
            raise ValueError(f"timeout is more than 0 and at most {LONGEST:g} seconds, got {timeout!r}")
        checked_time("a unit of work", unit_seconds)
        self._work, self._timeout = work, timeout
        self._processes: list[subprocess.Popen] = []
        self._sockets: list[socket.socket] = []
        pipes: list[int] = []
        try:
            with held():  # an interrupt must not come between a process and the note of it
                for _ in work[1:]:
                    pipes += new_pipe(capacity)
                for stage in range(len(work)):
                    ends = (pipes[2 * stage - 2] if stage else subprocess.DEVNULL,
                            pipes[2 * stage + 1] if stage + 1 < len(work) else subprocess.DEVNULL)  # fmt: skip
                    self._start(ends, stage == 0, stage + 1 == len(work), unit_seconds)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):  # too many processes or files
                raise StageFailed(f"stage {len(self._processes)} of {len(work)} cannot be started: {error}") from error
            raise
        finally:
            for end in pipes:
                os.close(end)

    def __enter__(self) -> StageProcesses:
        try:
            for stage, units in enumerate(self._work):
                self.tell(stage, packed_units(units))
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
        self._sockets[stage].settimeout(self._timeout)
        try:
            self._sockets[stage].sendall(command)
        except TimeoutError as error:
            raise StageFailed(f"stage {stage} did not take a command within {self._timeout:g} s") from error
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

    def _start(self, ends: tuple[int, int], first: bool, last: bool, seconds: float) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        words = [str(theirs.fileno()), str(int(first)), str(int(last)), str(seconds)]
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


def new_pipe(capacity: int) -> tuple[int, int]:
    """A pipe that holds so many items: its end to read, and its end to write.

    Raises:
        PipeSizeUnsupported: if the system makes none of that size.
    """
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        raise PipeSizeUnsupported("this system does not let a program choose a pipe's size; Linux does")
    if not is_whole(capacity, 1) or capacity.bit_count() > 1:
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
