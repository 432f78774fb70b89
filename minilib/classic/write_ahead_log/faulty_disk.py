"""A disk in memory that tells what a power cut may leave of it; and one that fails, or is full, when it is told to.

SIGKILL never loses what a process has written: the kernel has it. A power cut does, and what it leaves here is the most
that POSIX allows, no particular file system's habit:

    a page written since the last fsync of its file     any version since then, each page for itself
    the size of a file                                  any size since then, for itself; a missing page is zeros
    a name made, renamed or removed since the last      any subset of these changes; the rename of a name is one change
    fsync of its folder                                 and is never half done

An fsync that fails leaves the pages in memory, where reads find them, and marks them clean: a further fsync succeeds
and does not write them. That is what Linux does.

Sources: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014; Rebello et al., "Can Applications Recover
from fsync Failures?", USENIX ATC 2020.
"""

from __future__ import annotations

import errno
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class _Inode:
    """A file without its names; None in `_Changes` stands for no file, and a folder has an inode, too."""

    page_size: int
    pages: dict[int, list[bytes]] = field(
        default_factory=dict
    )  # versions that may be on the disk, the durable one first
    sizes: list[int] = field(default_factory=lambda: [0])
    dirty: set[int] = field(default_factory=set)
    resized: bool = False
    is_folder: bool = False

    def write(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        for page in range(offset // self.page_size, math.ceil(end / self.page_size)):
            start = page * self.page_size
            versions = self.pages.setdefault(page, [bytes(self.page_size)])
            content = bytearray(versions[-1])
            low, high = max(offset, start), min(end, start + self.page_size)
            content[low - start : high - start] = data[low - offset : high - offset]
            versions.append(bytes(content))
            self.dirty.add(page)
        self.resize(max(end, self.sizes[-1]))

    def cut(self, size: int) -> None:
        end = max(self.pages, default=-1) * self.page_size + self.page_size
        if size < self.sizes[-1]:
            self.write(bytes(end - size), size)
        self.resize(size)

    def resize(self, size: int) -> None:
        if size != self.sizes[-1]:
            self.sizes.append(size)
            self.resized = True

    def sync(self) -> int:
        """Make all that is dirty durable; returns how many pages that were."""
        flushed = len(self.dirty)
        for page in self.dirty:
            del self.pages[page][:-1]
        if self.resized:
            del self.sizes[:-1]
        self.forget()
        return flushed

    def forget(self) -> None:
        """Take what is dirty for clean."""
        self.dirty.clear()
        self.resized = False

    def choices(self) -> list[list]:
        """What a power cut chooses from: sizes first, then the versions of each page."""
        return [_distinct(self.sizes), *(_distinct(versions) for _, versions in sorted(self.pages.items()))]

    def content(self, chosen: Iterable | None = None) -> bytes:
        """The bytes for one of the choices; those that reads find if there is none."""
        size, *pages = chosen or [self.sizes[-1], *(versions[-1] for _, versions in sorted(self.pages.items()))]
        content = bytearray(max(size, (max(self.pages, default=-1) + 1) * self.page_size))
        for page, data in zip(sorted(self.pages), pages, strict=True):
            content[page * self.page_size : (page + 1) * self.page_size] = data
        return bytes(content[:size])


_Changes = Mapping[str, _Inode | None]  # name → what it leads to from now on


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
        self._durable: dict[str, _Inode] = {}
        self._pending: list[tuple[str, _Changes]] = []  # folder, changes of its names that belong together
        for name, data in (files or {}).items():
            inode = self._durable[name] = _Inode(page_size)
            inode.write(data, 0)
            inode.sync()
            while name := folder_of(name):
                self._durable[name] = _Inode(page_size, is_folder=True)
        self.steps: list[DiskStep] = []
        self.num_syncs = self.pages_flushed = 0

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, in order; see `Disk.run`."""
        for step in steps:
            self._take(step)
            self.steps.append(step)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, in order."""
        found = self._now().items()
        return sorted(
            name.rpartition("/")[2] for name, inode in found if folder_of(name) == folder and not inode.is_folder
        )

    def read(self, name: str) -> bytes:
        """All bytes of a file, as a process finds them while there is power."""
        return self._file(name).content()

    def files(self) -> dict[str, bytes]:
        """All files, as processes find them while there is power."""
        return {name: inode.content() for name, inode in self._now().items() if not inode.is_folder}

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
                    self._change(name, {name: _Inode(self.page_size)})
            case RenameFile(old, new):
                self._change(new, {old: None, new: self._file(old)})
            case RemoveFile(name):
                if name in self._now():
                    self._change(name, {name: None})
            case MakeFolder(name):
                if name not in self._now():
                    self._change(name, {name: _Inode(self.page_size, is_folder=True)})
            case SyncFile(name):
                self._sync(name, [self._file(name)])
            case SyncFolder(name):
                self._sync(name, [])
                for _, changes in (pending for pending in self._pending if pending[0] == name):
                    _apply(self._durable, changes)
                self._pending = [pending for pending in self._pending if pending[0] != name]

    def _sync(self, name: str, inodes: list[_Inode]) -> None:
        self.num_syncs += 1
        if self.num_syncs - 1 in self._failing:
            for inode in inodes:
                inode.forget()
            raise SyncFailed(errno.EIO, f"fsync of {name or 'the folder'} failed: the disk is told to")
        self.pages_flushed += sum(inode.sync() for inode in inodes)

    def _write(self, inode: _Inode, data: bytes, offset: int) -> None:
        others = sum(other.sizes[-1] for other in self._now().values() if other is not inode)
        room = self._capacity - others - offset
        inode.write(data[: int(max(0, min(len(data), room)))], offset)
        if room < len(data):
            raise OSError(errno.ENOSPC, "no space left on the simulated disk")

    def _change(self, name: str, changes: _Changes) -> None:
        folder = folder_of(name)
        if folder and folder not in self._now():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}")
        self._pending.append((folder, changes))

    def _now(self) -> dict[str, _Inode]:
        names = dict(self._durable)
        for _, changes in self._pending:
            _apply(names, changes)
        return names

    def _file(self, name: str) -> _Inode:
        inode = self._now().get(name)
        if inode is None or inode.is_folder:
            raise FileNotFoundError(errno.ENOENT, f"there is no file {name}")
        return inode


def _distinct(versions: list) -> list:
    return list(dict.fromkeys(versions))


def _apply(names: dict[str, _Inode], changes: _Changes) -> None:
    for name, inode in changes.items():
        names.pop(name, None)
        if inode is not None:
            names[name] = inode


def _reachable(names: dict[str, _Inode]) -> Iterator[tuple[str, _Inode]]:
    """Files whose folders are there."""
    for name, inode in names.items():
        folders = itertools.accumulate(folder_of(name).split("/"), lambda above, below: f"{above}/{below}")
        if not inode.is_folder and all(folder in names for folder in folders if folder):
            yield name, inode


def _listed(durable: dict[str, _Inode], pending: list[tuple[str, _Changes]], limit: int) -> list[dict] | None:
    """All states; None if they are more than the limit."""
    found: list[dict] = []
    for kept in itertools.product((False, True), repeat=len(pending)):
        names = dict(durable)
        for _, changes in itertools.compress(pending, kept):
            _apply(names, changes)
        files = list(_reachable(names))
        choices = [inode.choices() for _, inode in files]
        if len(found) + math.prod(len(options) for inode in choices for options in inode) > limit:
            return None
        for chosen in itertools.product(*(itertools.product(*inode) for inode in choices)):
            found.append({name: inode.content(one) for (name, inode), one in zip(files, chosen, strict=True)})
    return found


def _chosen(durable: dict[str, _Inode], pending: list[tuple[str, _Changes]], choose) -> dict[str, bytes]:
    """One state, by a function that takes one of several options."""
    names = dict(durable)
    for _, changes in pending:
        if choose((False, True)):
            _apply(names, changes)
    return {name: inode.content([choose(options) for options in inode.choices()]) for name, inode in _reachable(names)}
