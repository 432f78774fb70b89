"""Start ranks on this machine, wait for them, and leave nothing of them behind."""

from __future__ import annotations

import contextlib
import linecache
import math
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

from minilib.mechanisms.basics import interrupts
from minilib.ranks.launch.errors import RankFailed, RanksTimedOut, TemporaryFolderTooLong
from minilib.ranks.launch.fork_server import ForkServer
from minilib.ranks.launch.group import returned
from minilib.ranks.launch.pickling import dumps
from minilib.ranks.launch.process import RankProcess
from minilib.ranks.launch.rank import Job, Rank

# What the fork server imports once, for all ranks. Nothing else of minilib: ranks must see the files that a reader has
# just edited. Without torch._dynamo, which an optimizer imports when it is made, every rank would spend a second on it.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy.random", "cloudpickle", "minilib.ranks.launch.rank"]
COLLECTIVE_TIMEOUT = 60.0  # seconds that a collective may take where the caller sets no limit
MARGIN = 60.0  # seconds by which collectives time out later than the caller's limit, whose error says more
STANDSTILL = 3600.0  # seconds without a turn for any Python thread of a rank, after which the rank ends itself
START_TIMEOUT = 120.0  # seconds for the fork server to load them, on a machine that is busy with other things
END_TIMEOUT = 5.0  # seconds for ranks to end by themselves once all have returned, and for the killed to be gone
GRACE = 0.3  # seconds in which a death that explains a failure comes to light

server = ForkServer(PRELOAD)


def run_ranks(fn: Callable, args: tuple, world_size: int, *, timeout: float | None, backend: str, threads: int) -> list:
    """`minilib.ranks.launch.run` on new processes, which end before it returns."""
    sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    limit = COLLECTIVE_TIMEOUT if timeout is None else timeout + MARGIN
    job = Job(_pickled(fn, args), world_size, limit, STANDSTILL, backend, threads, dict(os.environ), sources)
    with (
        interrupts.held() as noted,
        tempfile.TemporaryDirectory(prefix="minilib-ranks-", ignore_cleanup_errors=True) as folder,
    ):
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        ranks = Ranks(noted)
        try:
            ranks.start(world_size, folder)
            ranks.wait(timeout)
            ranks.let_end()
        finally:
            ranks.end()
            ranks.show_output()
        files = [process.rank.file("value") for process in ranks.processes]
        return [returned(file.read_bytes(), rank, world_size) for rank, file in enumerate(files)]


class Ranks:
    """The ranks of one call.

    Args:
        interrupts: gets an entry whenever the user interrupts.
    """

    def __init__(self, interrupts: list[int]) -> None:
        self.interrupts = interrupts
        self.processes: list[RankProcess] = []
        self.dead: list[RankProcess] = []  # whose process ended before the function returned, the first one first
        self.failed: list[RankProcess] = []  # whose function raised, the first one first
        self.reports, self.report = os.pipe()
        self._server_pid: int | None = None

    def start(self, world_size: int, folder: str) -> None:
        """Ask the fork server for the ranks."""
        for number in range(world_size):
            rank = Rank(number, folder)
            try:
                self.processes.append(RankProcess(rank, *server.start(rank, [self.report])))
                self._server_pid = server.pid
            except OSError as error:
                if "AF_UNIX path too long" not in str(error):
                    raise
                raise TemporaryFolderTooLong(
                    f"the fork server's socket would lie in {tempfile.gettempdir()}, whose path is too long for that: "
                    "set TMPDIR to a folder with a path of at most 70 bytes"
                ) from None

    def wait(self, timeout: float | None) -> None:
        """Wait until all functions have returned.

        Raises:
            RankFailed: as soon as a function raises or its process ends.
            RanksTimedOut: `timeout` seconds after the last rank has started, unless that is None.
            KeyboardInterrupt: if the user interrupts.
        """
        if not self._until(self._have_started, START_TIMEOUT):
            raise RanksTimedOut(f"the fork server did not start the ranks within {START_TIMEOUT:g} s", ())
        limit = math.inf if timeout is None else timeout
        if not self._until(lambda: self.dead or self.failed or self._running() == [], limit):
            raise self._timed_out(limit)
        if self.interrupts:
            raise KeyboardInterrupt
        if self.dead or self.failed:
            raise self._first_failure()

    def let_end(self) -> None:
        """Tell the ranks that all have returned, and let them end by themselves."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # it died after it had returned, which nobody needs to know
                os.write(process.pipe, b"!")
        self._until(lambda: all(process.ended for process in self.processes), END_TIMEOUT)

    def end(self) -> None:
        """Kill whatever still runs and release what the ranks held here."""
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            for process in self.processes:  # again and again: a rank may only just have got the pid to kill it by
                process.kill()
            if all(process.ended for process in self.processes) or time.monotonic() > deadline:
                break
            self._listen(0.1)
        for process in self.processes:
            os.close(process.status)
            os.close(process.pipe)  # a rank that starts even later finds nobody at its other end, and ends
        os.close(self.reports)
        os.close(self.report)
        if any(process.vanished for process in self.processes):
            server.forget(self._server_pid)

    def show_output(self) -> None:
        """Print what the ranks printed, rank by rank."""
        for process in self.processes:
            for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
                path = process.rank.file(kind)
                if stream is not None and path.exists():
                    stream.write(path.read_text(encoding="utf-8", errors="replace"))

    def _have_started(self) -> bool:
        return all(process.pid is not None or process.ended for process in self.processes)

    def _running(self) -> list[RankProcess]:
        return [process for process in self.processes if process.report != "value"]

    def _until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Listen until the condition holds or the user interrupts; False if neither happens in time."""
        deadline = time.monotonic() + seconds
        while not (condition() or self.interrupts):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._listen(min(remaining, 0.1))  # a signal does not wake it, so look now and then
        return True

    def _listen(self, seconds: float) -> None:
        """Read what ranks and the fork server report within `seconds`."""
        living = {process.status: process for process in self.processes if not process.ended}
        ready = connection.wait([self.reports, *living], max(0.0, seconds))
        if self.reports in ready:  # before any death, which is of no interest once the function has returned
            for line in os.read(self.reports, 65536).decode().splitlines():
                kind, number = line.split()
                self.processes[int(number)].report = kind
                if kind == "failure":
                    self.failed.append(self.processes[int(number)])
        for process in (living[status] for status in ready if status != self.reports):
            process.read_status()
            if process.ended and not process.report:
                self.dead.append(process)

    def _first_failure(self) -> RankFailed:
        """The failure that came first, not one that came of it."""

        # A rank that raised still holds its connections, but one that died has broken those of others: they raise or
        # abort, and the report of that may come before the fork server's report of the death.
        def cause() -> RankProcess | None:
            return next((process for process in self.dead if process.code != -signal.SIGABRT), None)

        self._until(cause, GRACE)
        if not self.dead:
            return pickle.loads(self.failed[0].rank.file("failure").read_bytes())
        first = cause() or self.dead[0]
        number = first.rank.rank
        return RankFailed(f"rank {number} of {len(self.processes)} {first.epitaph()}{first.stack()}", number)

    def _timed_out(self, timeout: float) -> RanksTimedOut:
        """Which ranks have not returned, and where they are."""
        running = self._running()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        stacks: list[str] = []
        for _ in range(25):  # half a second at most: a rank that is stopped or starting will not answer
            time.sleep(0.02)
            before, stacks = stacks, [process.stack() for process in running]
            if all(stacks) and stacks == before:
                break
        message = f"{len(running)} of {len(self.processes)} ranks had not returned after {timeout:g} s"
        for process, stack in zip(running, stacks, strict=True):
            message += f"\nrank {process.rank.rank} was here:{stack or ' not known, it did not answer'}"
        return RanksTimedOut(message, tuple(process.rank.rank for process in running))


def _pickled(fn: Callable, args: tuple) -> bytes:
    try:
        return dumps((fn, args))
    except Exception as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(f"{name}, with its arguments, must be picklable to reach the ranks: {error}") from error
