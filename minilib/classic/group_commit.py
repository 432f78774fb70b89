"""Group commit: many writers, one disk, and an fsync that costs the same for one row as for a hundred.

`GroupCommit` starts the process that commits (commit_server.py) and gives each writer a socket to it; `run_writers`
plays writers that send a row, wait until it is durable, and send the next one. What a grouping costs is counted:
commits, fsyncs, and the commits that a row waits for, its own included.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from minilib.classic.commit_server import ACK, GROUPINGS, ROW
from minilib.mechanisms.basics.child import child_environment

TIMEOUT = 30.0  # seconds


class CommitServerGone(ConnectionError):
    """The process that commits has ended; rows that it has not acknowledged may be durable, or may be not."""


class CommitTimeout(TimeoutError):
    """A row was not acknowledged in time; it may become durable later."""


@dataclass(frozen=True)
class Ack:
    """A row is durable.

    Args:
        value: the row.
        number: of its commit, counted from 1 over the life of the file.
        size: rows in that commit.
        log_syncs: fsyncs of SQLite's log since the process started; each commit takes one.
        database_syncs: fsyncs of the file itself, when SQLite moves the log into it.
    """

    value: int
    number: int
    size: int
    log_syncs: int
    database_syncs: int


@dataclass(frozen=True)
class Written:
    """What `run_writers` counted.

    Args:
        rows: rows made durable.
        commits: commits that took.
        log_syncs: fsyncs of the log.
        database_syncs: fsyncs of the file.
        waits: for each row, the commits from the last one that was known when it was sent, up to its own.
    """

    rows: int
    commits: int
    log_syncs: int
    database_syncs: int
    waits: tuple[int, ...]


class GroupCommit:
    """A process that commits the rows of several writers to SQLite, and is ended with this object.

    Args:
        folder: where the file is, or is made; nobody else may have it open.
        num_writers: how many writers there are, at least 1.
        grouping: "one", "window" or "group", see commit_server.py.
        window: seconds that the first row of a group waits for others; of the grouping "window" alone.

    Attributes:
        pid: the process.

    Raises:
        ValueError: if the grouping is unknown, there is no writer, or the window is no time.
        NotADirectoryError: if there is no such folder.
    """

    def __init__(self, folder: Path, num_writers: int, grouping: str = "group", window: float = 0.0) -> None:
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping is one of {', '.join(GROUPINGS)}; got {grouping!r}")
        if num_writers < 1:
            raise ValueError(f"num_writers must be at least 1, got {num_writers!r}")
        if not 0 <= window < math.inf or (window and grouping != "window"):
            raise ValueError(f"window is a time in seconds, for the grouping 'window' alone; got {window!r}")
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder.name}; make it first")
        pairs = [socket.socketpair() for _ in range(num_writers)]
        self._writers = [ours for ours, _ in pairs]
        theirs = [other for _, other in pairs]
        descriptors = [other.fileno() for other in theirs]
        command = [sys.executable, "-P", "-m", "minilib.classic.commit_server", str(folder), grouping, str(window)]
        try:
            self._process = subprocess.Popen(
                [*command, *map(str, descriptors)],
                pass_fds=descriptors,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=child_environment(),
                start_new_session=True,  # an interrupt is for the writers alone
            )
        except BaseException:
            self._close_sockets()
            raise
        finally:
            for other in theirs:
                other.close()
        self.pid = self._process.pid

    def __enter__(self) -> GroupCommit:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_writers(self) -> int:
        """How many writers there are."""
        return len(self._writers)

    def send(self, writer: int, value: int) -> None:
        """Send a row; its acknowledgement is waited for by `receive`.

        Raises:
            CommitServerGone: if there is nobody to send it to.
            ValueError: if the value has more than 64 bits.
        """
        try:
            row = ROW.pack(value)
        except struct.error as error:
            raise ValueError(f"a row is a whole number of 64 bits, got {value!r}") from error
        try:
            self._writers[writer].sendall(row)
        except OSError as error:
            raise self._gone() from error

    def receive(self, writer: int, timeout: float = TIMEOUT) -> Ack:
        """Wait until this writer's next row is durable.

        Raises:
            CommitServerGone: if it never will be.
            CommitTimeout: if that takes longer than the timeout, in seconds.
        """
        data = b""
        while len(data) < ACK.size:
            ready, _, _ = select.select([self._writers[writer]], [], [], timeout)
            if not ready:
                raise CommitTimeout(f"no acknowledgement for writer {writer} within {timeout:g} s")
            try:
                part = self._writers[writer].recv(ACK.size - len(data))
            except OSError as error:
                raise self._gone() from error
            if not part:
                raise self._gone()
            data += part
        return Ack(*ACK.unpack(data))

    def ready(self, timeout: float = TIMEOUT) -> list[int]:
        """The writers for whom something is there; waits for the first of them.

        Raises:
            CommitTimeout: if nothing comes within the timeout, in seconds.
        """
        found, _, _ = select.select(self._writers, [], [], timeout)
        if not found:
            raise CommitTimeout(f"no acknowledgement for any writer within {timeout:g} s")
        return [self._writers.index(writer) for writer in found]

    def stop(self) -> None:
        """Stop the process as a slow disk would; rows gather until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process as a crash would, at whatever it does (SIGKILL)."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the process commit what was sent, and end; whoever does not end in time is killed."""
        self._close_sockets()
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.resume()
        try:
            self._process.wait(TIMEOUT)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stderr.close()

    def _close_sockets(self) -> None:
        for writer in self._writers:
            writer.close()

    def _gone(self) -> CommitServerGone:
        try:
            code = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            return CommitServerGone("the process that commits has closed a connection")
        complaint = self._process.stderr.read().decode(errors="replace").strip()
        why = f": {complaint.splitlines()[-1]}" if complaint else ""
        return CommitServerGone(f"the process that commits ended with code {code}{why}")


def run_writers(server: GroupCommit, rows_each: int) -> Written:
    """Let every writer send rows, each when the one before is durable; all rows together are 0, 1, 2, ….

    Args:
        server: with no row on its way.
        rows_each: rows of each writer, 0 or more.

    Raises:
        CommitServerGone, CommitTimeout: as `GroupCommit.receive`.
    """
    left = {writer: deque(range(writer * rows_each, (writer + 1) * rows_each)) for writer in range(server.num_writers)}
    acks: list[Ack] = []
    sent_after: dict[int, int] = {}  # writer → number of the last commit that was known when it sent its row
    spans: list[tuple[int, int]] = []
    for writer, rows in left.items():
        if rows:
            server.send(writer, rows.popleft())
            sent_after[writer] = 0
    while sent_after:
        for writer in server.ready():
            acks.append(ack := server.receive(writer))
            spans.append((sent_after.pop(writer), ack.number))
            if left[writer]:
                server.send(writer, left[writer].popleft())
                sent_after[writer] = max(ack.number for ack in acks[-server.num_writers :])
    if not acks:
        return Written(0, 0, 0, 0, ())
    numbers = {ack.number for ack in acks}
    waits = tuple(number - max(before, min(numbers) - 1) for before, number in spans)
    last = max(acks, key=lambda ack: ack.number)
    return Written(len(acks), len(numbers), last.log_syncs, last.database_syncs, waits)
