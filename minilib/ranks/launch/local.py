"""Start ranks on this machine, wait for them, and leave nothing of them behind."""

from __future__ import annotations

import contextlib
import linecache
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path

from minilib.ranks.launch.errors import RankFailed, RanksTimedOut, TemporaryFolderTooLong
from minilib.ranks.launch.group import value
from minilib.ranks.launch.member import Member
from minilib.ranks.launch.pickling import dumps
from minilib.ranks.launch.rank import Job, Rank

# What the fork server loads once and all ranks share. Nothing else of minilib: a reader may be editing it.
# Without torch._dynamo, which an optimizer imports when it is made, every rank would spend a second on that.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy.random", "cloudpickle", "minilib.ranks.launch.rank"]
START_TIMEOUT = 120.0  # seconds for the fork server to load them, on a machine that is busy with other things
END_TIMEOUT = 5.0  # seconds for ranks to end by themselves once all have returned, and for the killed to be gone
GRACE = 0.3  # seconds in which a death that explains a failure comes to light

server = forkserver.ForkServer()  # starts with the first rank, ends with this process
server.set_forkserver_preload(PRELOAD)


def run(fn: Callable, args: tuple, world_size: int, *, timeout: float, backend: str, threads: int) -> list:
    """`minilib.ranks.launch.run` on processes that are started for the purpose and end with it."""
    sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    job = Job(_pickled(fn, args), world_size, timeout, backend, threads, dict(os.environ), sources)
    with (
        _interrupts_noted() as interrupts,
        tempfile.TemporaryDirectory(prefix="minilib-ranks-", ignore_cleanup_errors=True) as folder,
    ):
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        ranks = Ranks(interrupts)
        try:
            ranks.start(world_size, folder)
            ranks.wait(timeout)
            ranks.let_end()
        finally:
            ranks.end()
            ranks.show_output()
        files = [member.rank.file("value") for member in ranks.members]
        return [value(file.read_bytes(), rank, world_size) for rank, file in enumerate(files)]


class Ranks:
    """The ranks of one call.

    Args:
        interrupts: gets an entry whenever the user interrupts.
    """

    def __init__(self, interrupts: list[int]) -> None:
        self.interrupts = interrupts
        self.members: list[Member] = []
        self.dead: list[Member] = []  # whose process ended before the function returned, the first one first
        self.failed: list[Member] = []  # whose function raised, the first one first
        self.reports, self.report = os.pipe()

    def start(self, world_size: int, folder: str) -> None:
        """Ask the fork server for the ranks."""
        prepare = {"sys_path": sys.path, "sys_argv": sys.argv, "dir": str(Path.cwd())}
        for number in range(world_size):
            # Not a multiprocessing.Process: that would run the main script again in every rank.
            try:
                pipes = server.connect_to_new_process([self.report])
            except OSError as error:
                if "AF_UNIX path too long" not in str(error):
                    raise
                raise TemporaryFolderTooLong(
                    f"the fork server's socket would lie in {tempfile.gettempdir()}, whose path is too long for that: "
                    "set TMPDIR to a folder with a path of at most 70 bytes"
                ) from None
            member = Member(Rank(number, folder), *pipes)
            self.members.append(member)
            with open(member.pipe, "wb", closefd=False) as pipe, contextlib.suppress(BrokenPipeError):
                pipe.write(pickle.dumps(prepare) + pickle.dumps(member.rank))

    def wait(self, timeout: float) -> None:
        """Wait until all functions have returned.

        Raises:
            RankFailed: as soon as a function raises or its process ends.
            RanksTimedOut: `timeout` seconds after the last rank has started.
            KeyboardInterrupt: if the user interrupts.
        """
        if not self._until(
            lambda: all(member.pid is not None or member.ended for member in self.members), START_TIMEOUT
        ):
            raise RanksTimedOut(f"the fork server did not start the ranks within {START_TIMEOUT:g} s", ())
        if not self._until(lambda: self.dead or self.failed or self._running() == [], timeout):
            raise self._timed_out(timeout)
        if self.interrupts:
            raise KeyboardInterrupt
        if self.dead or self.failed:
            raise self._first_failure()

    def let_end(self) -> None:
        """Tell the ranks that all have returned, and let them end by themselves."""
        for member in self.members:
            with contextlib.suppress(BrokenPipeError):  # it died after it had returned, which nobody needs to know
                os.write(member.pipe, b"!")
        self._until(lambda: all(member.ended for member in self.members), END_TIMEOUT)

    def end(self) -> None:
        """Kill whatever still runs and release what the ranks held here."""
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            for member in self.members:  # again and again: a rank may only just have got the pid to kill it by
                member.kill()
            if all(member.ended for member in self.members) or time.monotonic() > deadline:
                break
            self._listen(0.1)
        for member in self.members:
            os.close(member.status)
            os.close(member.pipe)  # a rank that starts even later finds nobody at its other end, and ends
        os.close(self.reports)
        os.close(self.report)

    def show_output(self) -> None:
        """Print what the ranks printed, rank by rank."""
        for member in self.members:
            for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
                path = member.rank.file(kind)
                if stream is not None and path.exists():
                    stream.write(path.read_text(encoding="utf-8", errors="replace"))

    def _running(self) -> list[Member]:
        return [member for member in self.members if member.report != "value"]

    def _until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Listen until the condition holds or the user interrupts; False if neither happens in time."""
        deadline = time.monotonic() + seconds
        while not (condition() or self.interrupts):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._listen(min(remaining, 0.1))  # a signal does not wake it, so look up now and then
        return True

    def _listen(self, seconds: float) -> None:
        """Take in what the ranks and the fork server have to say, if they say it in time."""
        living = {member.status: member for member in self.members if not member.ended}
        ready = connection.wait([self.reports, *living], max(0.0, seconds))
        if self.reports in ready:  # before any death, which is of no interest once the function has returned
            for line in os.read(self.reports, 65536).decode().splitlines():
                kind, number = line.split()
                self.members[int(number)].report = kind
                if kind == "failure":
                    self.failed.append(self.members[int(number)])
        for member in (living[status] for status in ready if status != self.reports):
            member.read_status()
            if member.ended and not member.report:
                self.dead.append(member)

    def _first_failure(self) -> RankFailed:
        """The failure that came first, not one that came of it."""

        # A rank that raised still holds its connections, but one that died has broken those of others: they raise or
        # abort, and we may hear of that before we hear of the death.
        def cause() -> Member | None:
            return next((member for member in self.dead if member.code != -signal.SIGABRT), None)

        self._until(cause, GRACE)
        if not self.dead:
            return pickle.loads(self.failed[0].rank.file("failure").read_bytes())
        first = cause() or self.dead[0]
        number = first.rank.rank
        return RankFailed(f"rank {number} of {len(self.members)} {first.epitaph()}{first.stack()}", number)

    def _timed_out(self, timeout: float) -> RanksTimedOut:
        """Which ranks have not returned, and where they are."""
        running = self._running()
        for member in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGUSR1)
        stacks: list[str] = []
        for _ in range(25):  # half a second at most: a rank that is stopped or starting will not answer
            time.sleep(0.02)
            before, stacks = stacks, [member.stack() for member in running]
            if all(stacks) and stacks == before:
                break
        message = f"{len(running)} of {len(self.members)} ranks had not returned after {timeout:g} s"
        for member, stack in zip(running, stacks, strict=True):
            message += f"\nrank {member.rank.rank} was here:{stack or ' not known, it did not answer'}"
        return RanksTimedOut(message, tuple(member.rank.rank for member in running))


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Note SIGINT in a list, and raise KeyboardInterrupt at the end: none may fall between two steps of cleaning up.

    Only the main thread is ever interrupted.
    """
    noted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield noted
        return
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            raise KeyboardInterrupt from None


def _pickled(fn: Callable, args: tuple) -> bytes:
    try:
        return dumps((fn, args))
    except Exception as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(f"{name}, with its arguments, must be picklable to reach the ranks: {error}") from error
