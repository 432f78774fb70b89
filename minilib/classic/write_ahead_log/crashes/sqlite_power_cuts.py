"""SQLite on the simulated disk: what SQLite writes is recorded through a VFS, and the power is cut after every step.

So the disk's model is held against a program that others wrote and documented: with synchronous = FULL no state may
lose a commit, with NORMAL some must, and in no state may the database be damaged.

Source: SQLite, os_unix.c (the folder of a log is synced when the log is synced for the first time).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import apsw

from minilib.classic.write_ahead_log.crashes.power_cuts import (
    COMMIT,
    SNAP,
    TORN,
    Change,
    History,
    RecordedRun,
    held_against,
    with_change,
)
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk, Files
from minilib.classic.write_ahead_log.sqlite_store import SQLITE_FILE, SqliteStore
from minilib.mechanisms.journaling import CreateFile, CutFile, DiskStep, RemoveFile, SyncFile, SyncFolder, WriteFile

SECTOR = 512  # bytes: of a page of the database and of the disk, so that states stay few
_VFS = "recording"


class _RecordedFile(apsw.VFSFile):
    """A file of SQLite's that tells what is done to it."""

    def __init__(self, name: str | apsw.URIFilename | None, flags: list[int], steps: list[DiskStep]) -> None:
        path = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary")
        created = not path.exists()
        super().__init__("", name, flags)
        self._name, self._steps = path.name, steps
        self._new_log = created and bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        if created:
            steps.append(CreateFile(self._name))

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802, the names are SQLite's
        super().xWrite(data, offset)
        self._steps.append(WriteFile(self._name, bytes(data), offset))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        super().xTruncate(newsize)
        self._steps.append(CutFile(self._name, newsize))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._steps.append(SyncFile(self._name))
        if self._new_log:
            self._steps.append(SyncFolder())
            self._new_log = False


class _RecordingVFS(apsw.VFS):
    """SQLite's way to files, with the steps kept."""

    def __init__(self) -> None:
        self.steps: list[DiskStep] = []
        super().__init__(_VFS, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> _RecordedFile:  # noqa: N802
        return _RecordedFile(name, flags, self.steps)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        self.steps += [RemoveFile(Path(filename).name), *([SyncFolder()] if syncdir else [])]


def record_sqlite(changes: Sequence[Change], synchronous: str) -> RecordedRun:
    """Let SQLite do things, and note what the disk does and what is acknowledged when; see `power_cuts.record_run`.

    The run begins with an empty store whose file is durable.

    Args:
        changes: what is done, in order.
        synchronous: "FULL" or "NORMAL".
    """
    with tempfile.TemporaryDirectory() as name:
        folder, vfs = Path(name), _RecordingVFS()
        try:
            SqliteStore(folder, synchronous, page_size=SECTOR).close()
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            store = SqliteStore(folder, synchronous, _VFS, SECTOR)
            history, acknowledged = {0: {}}, [(0, 0)]
            for change in changes:
                _make(store, change, history)
                acknowledged.append((len(vfs.steps), store.num_acknowledged if change in (COMMIT, SNAP) else 0))
            steps = tuple(vfs.steps)
            store.close()
        finally:
            vfs.unregister()
    return RecordedRun(partial(FaultyDisk, files, SECTOR), steps, tuple(acknowledged), history)


def sqlite_outcome(files: Files, acknowledged: int, history: History) -> str:
    """What SQLite makes of the files that a power cut has left: one of `power_cuts.OUTCOMES`; TORN for a fault."""
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        if SQLITE_FILE not in files:
            return TORN
        try:
            store = SqliteStore(Path(name), "OFF")
        except apsw.Error:
            return TORN
        try:
            store.check_invariants()
            return held_against(store.num_acknowledged, dict(store.items()), acknowledged, history)
        except (apsw.Error, AssertionError):
            return TORN
        finally:
            store.close()


def _make(store: SqliteStore, change: Change, history: dict[int, dict[bytes, bytes]]) -> None:
    if change in (COMMIT, SNAP):
        store.commit() if change == COMMIT else store.snapshot()
        return
    key, value = change
    store.delete(key) if value is None else store.put(key, value)
    history[max(history) + 1] = with_change(history[max(history)], key, value)
