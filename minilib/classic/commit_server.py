"""The process that makes rows durable: a SQLite file, a socket to each writer, and a rule for who shares a commit.

    one       a commit for each row
    window    the first row waits for others, for a time or until every writer has sent one, and all share a commit
    group     a commit for all rows that are there when the last commit has ended: nobody waits for a timer

While a commit waits for the disk, the rows of other writers gather in the buffers of their sockets, so that the slower
the disk is, the larger are the groups.

SQLite writes a log (WAL) and, with synchronous=FULL, has the disk confirm it at every commit. The confirmations are
counted where SQLite asks for them: its files are opened through a VFS of ours, whose xSync counts and passes on. Other
ways were weighed: the sqlite3 module of the standard library has no VFS to put in between, strace slows down what it
counts and is not on macOS, a preloaded library takes a compiler, and the kernel's own counters leave fsync out.

Sources: DeWitt et al., "Implementation Techniques for Main Memory Database Systems", SIGMOD 1984 (group commit);
SQLite, "Write-Ahead Logging"; MySQL, binlog_group_commit_sync_delay, and PostgreSQL, commit_delay (a window).
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import apsw

GROUPINGS = ("one", "window", "group")
ROW = struct.Struct("!q")  # a row is one number
ACK = struct.Struct("!5q")  # the row, number of its commit, rows in it, fsyncs of the log and of the database so far
FILE_NAME = "rows.sqlite"


class CountedFile(apsw.VFSFile):
    """A file of SQLite's that counts how often the disk has to confirm it."""

    def __init__(self, vfs: str, name: apsw.URIFilename | str | None, flags: list[int], syncs: Counter[str]) -> None:
        super().__init__(vfs, name, flags)
        self.kind = "log" if flags[0] & apsw.SQLITE_OPEN_WAL else "database"
        self._syncs = syncs

    def xSync(self, flags: int) -> None:  # noqa: N802, the name is SQLite's
        """Have the disk confirm what was written."""
        super().xSync(flags)
        self._syncs[self.kind] += 1


class CountingVFS(apsw.VFS):
    """SQLite's way to files, with counted confirmations.

    Attributes:
        syncs: "log" or "database" → fsyncs so far.
    """

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        super().__init__("counting", "")

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> CountedFile:  # noqa: N802
        """Open a file of SQLite's."""
        return CountedFile("", name, flags, self.syncs)


class CommitServer:
    """Takes rows from writers, and acknowledges each when it is durable.

    Args:
        folder: where the file is, or is made.
        writers: a socket for each writer.
        grouping: one of `GROUPINGS`.
        window: seconds that the first row of a group waits for others, if the grouping is "window".
    """

    def __init__(self, folder: Path, writers: list[socket.socket], grouping: str, window: float) -> None:
        self._vfs = CountingVFS()
        self._file = apsw.Connection(str(folder / FILE_NAME), vfs="counting")
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = FULL")
        self._file.execute("CREATE TABLE IF NOT EXISTS rows (value INTEGER, number INTEGER, size INTEGER)")
        self._number: int = self._file.execute("SELECT coalesce(max(number), 0) FROM rows").fetchall()[0][0]
        self._vfs.syncs.clear()  # of the preparations
        self._grouping, self._window = grouping, window
        self._selector = selectors.DefaultSelector()
        self._partial: dict[socket.socket, bytes] = {}
        self._waiting: list[tuple[socket.socket, int]] = []
        for writer in writers:
            self._partial[writer] = b""
            self._selector.register(writer, selectors.EVENT_READ)

    def serve(self) -> None:
        """Commit until all writers are gone and all of their rows are durable."""
        while self._partial or self._waiting:
            self._receive(0 if self._waiting else None)
            if self._waiting and self._grouping == "window":
                self._wait_for_others()
            if self._waiting:
                group = self._waiting[:1] if self._grouping == "one" else self._waiting
                self._waiting = self._waiting[len(group) :]
                self._commit(group)
        self._file.close()

    def _receive(self, timeout: float | None) -> None:
        """Take all rows that are there; wait for the first of them as long as this."""
        while self._partial and (ready := self._selector.select(timeout)):
            for key, _ in ready:
                self._receive_from(key.fileobj)
            timeout = 0

    def _receive_from(self, writer: socket.socket) -> None:
        try:
            data = writer.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(writer)
            del self._partial[writer]  # the beginning of a row is no row
            return
        data = self._partial[writer] + data
        whole = len(data) // ROW.size * ROW.size
        self._partial[writer] = data[whole:]
        self._waiting += [(writer, value) for (value,) in ROW.iter_unpack(data[:whole])]

    def _wait_for_others(self) -> None:
        end = time.monotonic() + self._window
        while {writer for writer, _ in self._waiting} < self._partial.keys() and (left := end - time.monotonic()) > 0:
            self._receive(left)

    def _commit(self, group: list[tuple[socket.socket, int]]) -> None:
        self._number += 1
        self._file.execute("BEGIN IMMEDIATE")
        insert = "INSERT INTO rows VALUES (?, ?, ?)"
        self._file.executemany(insert, [(value, self._number, len(group)) for _, value in group])
        self._file.execute("COMMIT")
        syncs = self._vfs.syncs
        for writer, value in group:
            try:
                writer.sendall(ACK.pack(value, self._number, len(group), syncs["log"], syncs["database"]))
            except OSError:  # the writer is gone, and its row is durable all the same
                continue


def serve_writers() -> None:
    """The process: `python -m minilib.classic.commit_server <folder> <grouping> <window> <descriptors of sockets>`."""
    folder, grouping, window, *descriptors = sys.argv[1:]
    writers = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    CommitServer(Path(folder), writers, grouping, float(window)).serve()


if __name__ == "__main__":
    serve_writers()
