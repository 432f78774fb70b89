"""A folder on this machine that takes steps, and the lock that keeps other processes out of it.

A file stays open from its first write until it is renamed or removed: an fsync tells of failed writes only through a
descriptor that was open when they failed.

Sources: fsync(2), open(2), posix_fadvise(2) of Linux; Rebello et al., "Can Applications Recover from fsync Failures?",
USENIX ATC 2020.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from minilib.mechanisms.journaling import (
    CreateFile,
    CutFile,
    DiskStep,
    MakeFolder,
    RemoveFile,
    RenameFile,
    SyncFailed,
    SyncFile,
    SyncFolder,
    WriteFile,
)

LOCK = "lock"
WRITEBACK = 8 * 2**20  # bytes of a file after which the kernel is told to write them: an fsync then waits for few


class DiskInUse(RuntimeError):
    """Another process, or another object of this one, has the folder."""


class RealDisk:
    """A folder, locked for this object until `close` or until the process ends, however it ends.

    Args:
        folder: one that is there.
        locked: False for several writers that keep to files of their own.

    Raises:
        NotADirectoryError: if there is no such folder.
        DiskInUse: if somebody else has it.
    """

    def __init__(self, folder: Path, locked: bool = True) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder.name} is no folder; make it first, or give the folder of a store")
        self._folder = folder
        self._open: dict[str, _OpenFile] = {}
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if locked else -1
        if not locked:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DiskInUse(f"{folder.name} is in use; close that store, or end its process, first") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, in order; see `Disk.run`."""
        for step in steps:
            self._take(step)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, in order; of none if it is not there."""
        path = self._folder / folder
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return (self._folder / name).read_bytes()

    def close(self) -> None:
        """Close all files and give the folder back. Nothing is made durable by it."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self, step: DiskStep) -> None:
        match step:
            case WriteFile(name, data, offset):
                self._opened(name).write(memoryview(data).cast("B"), offset)
            case SyncFile(name):
                self._opened(name).sync(name)
            case CreateFile(name):
                self._forget(name)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._open[name] = _OpenFile(os.open(self._folder / name, flags, 0o600))
            case CutFile(name, size):
                os.ftruncate(self._opened(name).descriptor, size)
            case RenameFile(old, new):
                self._forget(old)
                self._forget(new)
                (self._folder / old).replace(self._folder / new)
            case RemoveFile(name):
                self._forget(name)
                (self._folder / name).unlink(missing_ok=True)
            case MakeFolder(name):
                (self._folder / name).mkdir(exist_ok=True)
            case SyncFolder(name):
                self._sync_folder(name)

    def _opened(self, name: str) -> _OpenFile:
        if name not in self._open:
            self._open[name] = _OpenFile(os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC))
        return self._open[name]

    def _forget(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name).descriptor)

    def _sync_folder(self, name: str) -> None:
        folder = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sync(folder, name or "the folder")
        finally:
            os.close(folder)


@dataclass
class _OpenFile:
    """A file that is open, and which of its bytes the kernel has, and was not told to write."""

    descriptor: int
    unsent: range = range(0)

    def write(self, data: memoryview, offset: int) -> None:
        """Give bytes to the kernel; once there are many of them, let it write them behind what follows."""
        start = self.unsent.start if self.unsent.stop == offset else offset
        while data:
            written = os.pwrite(self.descriptor, data, offset)
            data, offset = data[written:], offset + written
        self.unsent = range(start, offset)
        if len(self.unsent) >= WRITEBACK and hasattr(os, "posix_fadvise"):  # Linux writes what is not needed any more
            os.posix_fadvise(self.descriptor, start, len(self.unsent), os.POSIX_FADV_DONTNEED)
            self.unsent = range(offset, offset)

    def sync(self, name: str) -> None:
        """Wait until its bytes are durable."""
        _sync(self.descriptor, name)
        self.unsent = range(0)


def _sync(descriptor: int, name: str) -> None:
    try:
        if full := getattr(fcntl, "F_FULLFSYNC", None):  # macOS: fsync stops at the drive's cache
            fcntl.fcntl(descriptor, full)
        else:
            os.fsync(descriptor)
    except OSError as error:
        raise SyncFailed(error.errno, f"fsync of {name} failed: {error.strerror}") from error
