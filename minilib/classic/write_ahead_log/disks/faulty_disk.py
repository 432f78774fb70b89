"""A disk in memory that tells what a power cut may leave of it; and one that fails, or is full, when it is told to.

SIGKILL never loses what a process has written: the kernel has it. A power cut does, and what it leaves here is the most
that POSIX allows, no particular file system's habit:

    bytes and size of a file                            any page in any version since its last fsync: cached_file.py
    a name made, renamed or removed since the last      any subset of these changes; the rename of a name is one change
    fsync of its folder                                 and is never half done

An fsync that fails leaves the pages in memory, where reads find them, and marks them clean: a further fsync succeeds
and does not write them. So ext4 and XFS do; Btrfs goes back to what was there before, and reads find that.

Sources: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014; Rebello et al., "Can Applications Recover
from fsync Failures?", USENIX ATC 2020.
"""

from __future__ import annotations

import errno
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from minilib.classic.write_ahead_log.disks.cached_file import CachedFile
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
    folder_of,
)

Files = Mapping[str, bytes]  # name → what is in the file


_FOLDER = object()  # what the name of a folder leads to
_Changes = Mapping[str, "CachedFile | object | None"]  # name → what it leads to from now on; None for nothing


@dataclass(frozen=True)
class PowerCut:
    """What a power cut may leave.

    Args:
        states: different ones; name → bytes of each file.
        exhaustive: whether these are all.
    """

    states: tuple[dict[str, bytes], ...]
    exhaustive: bool


class FaultyDisk:
    """A folder in memory.

    Args:
        files: what it holds from the beginning, durable.
        page_size: bytes that are written whole or not at all.
        capacity: bytes of all files; a write that exceeds them is done in part.
        failing_syncs: which fsyncs fail, counted from 0.

    Attributes:
        steps: those taken so far.
        num_syncs: fsyncs so far.
        pages_flushed: pages that fsyncs of files have made durable.
    """

    def __init__(
        self,
        files: Files | None = None,
        page_size: int = 64,
        capacity: float = math.inf,
        failing_syncs: Iterable[int] = (),
    ) -> None:
        self.page_size, self._capacity, self._failing = page_size, capacity, frozenset(failing_syncs)
        self._durable: dict[str, CachedFile | object] = {}
        self._pending: list[tuple[str, _Changes]] = []  # folder, changes of its names that belong together
        for name, data in (files or {}).items():
            file = self._durable[name] = CachedFile(page_size)
            file.write(data, 0)
            file.sync()
            while name := folder_of(name):
                self._durable[name] = _FOLDER
        self.steps: list[DiskStep] = []
        self.num_syncs = self.pages_flushed = 0

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, in order; see `Disk.run`."""
        for step in steps:
            self._take(step)
            self.steps.append(step)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, in order."""
        return sorted(name.rpartition("/")[2] for name, _ in self._files() if folder_of(name) == folder)

    def read(self, name: str) -> bytes:
        """All bytes of a file, as a process finds them while there is power."""
        return self._file(name).content()

    def files(self) -> dict[str, bytes]:
        """All files, as processes find them while there is power."""
        return {name: file.content() for name, file in self._files()}

    def power_cut(self, limit: int = 4096, seed: int = 0) -> PowerCut:
        """What a power cut at this moment may leave.

        Args:
            limit: more states than these are not listed: as many are then chosen by chance.
            seed: of that chance.
        """
        found = _listed(self._durable, self._pending, limit)
        exhaustive = found is not None
        if found is None:
            rng = random.Random(seed)
            found = [_chosen(self._durable, self._pending, lambda options: options[0])]
            found += [_chosen(self._durable, self._pending, lambda options: options[-1])]
            found += [_chosen(self._durable, self._pending, rng.choice) for _ in range(limit)]
        return PowerCut(tuple({tuple(sorted(files.items())): files for files in found}.values()), exhaustive)

    def _take(self, step: DiskStep) -> None:
        match step:
            case WriteFile(name, data, offset):
                self._write(self._file(name), bytes(memoryview(data).cast("B")), offset)
            case CutFile(name, size):
                self._file(name).cut(size)
            case CreateFile(name):
                if name in self._now():
                    self._file(name).cut(0)
                else:
                    self._change(name, {name: CachedFile(self.page_size)})
            case RenameFile(old, new):
                self._change(new, {old: None, new: self._file(old)})
            case RemoveFile(name):
                if name in self._now():
                    self._change(name, {name: None})
            case MakeFolder(name):
                if name not in self._now():
                    self._change(name, {name: _FOLDER})
            case SyncFile(name):
                self._sync(name, [self._file(name)])
            case SyncFolder(name):
                self._sync(name, [])
                for _, changes in (pending for pending in self._pending if pending[0] == name):
                    _apply(self._durable, changes)
                self._pending = [pending for pending in self._pending if pending[0] != name]

    def _sync(self, name: str, files: list[CachedFile]) -> None:
        self.num_syncs += 1
        if self.num_syncs - 1 in self._failing:
            for file in files:
                file.fail_to_sync()
            raise SyncFailed(errno.EIO, f"fsync of {name or 'the folder'} failed: the disk is told to")
        self.pages_flushed += sum(file.sync() for file in files)

    def _write(self, file: CachedFile, data: bytes, offset: int) -> None:
        others = sum(other.size for _, other in self._files() if other is not file)
        room = self._capacity - others - offset
        file.write(data[: int(max(0, min(len(data), room)))], offset)
        if room < len(data):
            raise OSError(errno.ENOSPC, "no space left on the simulated disk")

    def _change(self, name: str, changes: _Changes) -> None:
        folder = folder_of(name)
        if folder and folder not in self._now():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}")
        self._pending.append((folder, changes))

    def _files(self) -> Iterator[tuple[str, CachedFile]]:
        return ((name, file) for name, file in self._now().items() if isinstance(file, CachedFile))

    def _now(self) -> dict[str, CachedFile | object]:
        names = dict(self._durable)
        for _, changes in self._pending:
            _apply(names, changes)
        return names

    def _file(self, name: str) -> CachedFile:
        file = self._now().get(name)
        if not isinstance(file, CachedFile):
            raise FileNotFoundError(errno.ENOENT, f"there is no file {name}")
        return file


def _apply(names: dict[str, CachedFile | object], changes: _Changes) -> None:
    for name, target in changes.items():
        names.pop(name, None)
        if target is not None:
            names[name] = target


def _left(
    durable: dict[str, CachedFile | object], pending: list[tuple[str, _Changes]], kept: Iterable[bool]
) -> list[tuple[str, CachedFile]]:
    """Files that have a name, in folders that have one, if these of the pending changes are on the disk."""
    names = dict(durable)
    for _, changes in itertools.compress(pending, kept):
        _apply(names, changes)
    return [
        (name, file)
        for name, file in names.items()
        if isinstance(file, CachedFile) and all(folder in names for folder in _folders_of(name))
    ]


def _folders_of(name: str) -> Iterator[str]:
    while name := folder_of(name):
        yield name


def _listed(durable: dict, pending: list[tuple[str, _Changes]], limit: int) -> list[dict[str, bytes]] | None:
    """All states; None if they are more than the limit."""
    found: list[dict[str, bytes]] = []
    for kept in itertools.product((False, True), repeat=len(pending)):
        files = _left(durable, pending, kept)
        if len(found) + math.prod(file.num_states() for _, file in files) > limit:
            return None
        for contents in itertools.product(*(file.states() for _, file in files)):
            found.append({name: data for (name, _), data in zip(files, contents, strict=True)})
    return found


def _chosen(durable: dict, pending: list[tuple[str, _Changes]], choose: Callable) -> dict[str, bytes]:
    """One state, by a function that takes one of several options."""
    files = _left(durable, pending, [choose((False, True)) for _ in pending])
    return {name: file.state(choose) for name, file in files}
