"""How a change becomes durable, as data: steps in an order that a power cut may break off anywhere.

    append     write ─ fsync file                                                        then acknowledge
    publish    create temp ─ write ─ fsync temp ─ rename to its name ─ fsync folder      whole, or not there
    commit     (create ─ write ─ fsync) for each part ─ fsync folder ─ publish manifest  all parts, or none
    retire     remove manifest ─ fsync folder ─ remove parts                             never a manifest without parts

A disk takes the steps: the real one, one that a power cut stops at any step, one that only counts
(minilib/classic/write_ahead_log/). Names are relative to the disk's folder, with "/" between folders.

Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (what applications take for granted).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

TEMPORARY = ".partial"  # at the end of a name: not committed, whatever it holds


class SyncFailed(OSError):
    """An fsync failed: what was written since the last one may be lost, though a further fsync may say it is not."""


@dataclass(frozen=True)
class MakeFolder:
    """Make a folder, unless it is there."""

    name: str


@dataclass(frozen=True)
class CreateFile:
    """Make an empty file; one that is there is emptied."""

    name: str


@dataclass(frozen=True)
class WriteFile:
    """Write bytes into a file that is there.

    Args:
        name: the file.
        data: bytes, or any buffer of them.
        offset: where they begin.
    """

    name: str
    data: bytes | memoryview
    offset: int = 0


@dataclass(frozen=True)
class CutFile:
    """Cut a file off behind so many bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class SyncFile:
    """Wait until a file's bytes and its size are durable; this says nothing about its name."""

    name: str


@dataclass(frozen=True)
class RenameFile:
    """Give a file another name in the same folder, in place of the file that has it."""

    old: str
    new: str


@dataclass(frozen=True)
class RemoveFile:
    """Remove a file's name."""

    name: str


@dataclass(frozen=True)
class SyncFolder:
    """Wait until a folder's names are durable: of files made, renamed, removed in it; "" is the disk's own folder."""

    name: str = ""


DiskStep = MakeFolder | CreateFile | WriteFile | CutFile | SyncFile | RenameFile | RemoveFile | SyncFolder


class Disk(Protocol):
    """A folder of files that takes steps."""

    def run(self, steps: Iterable[DiskStep]) -> None:
        """Take steps, in order.

        Raises:
            SyncFailed: if the disk does not confirm an fsync.
            OSError: if it refuses another step; a part of a write may have been done.
        """

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, in order; of none if it is not there."""

    def read(self, name: str) -> bytes:
        """All bytes of a file, durable or not.

        Raises:
            FileNotFoundError: if it is not there.
        """


def append(name: str, data: bytes, offset: int) -> list[DiskStep]:
    """Make bytes durable at the end of a file whose name is durable. Cost: one fsync, however many records."""
    return [WriteFile(name, data, offset), SyncFile(name)]


def write_part(name: str, data: bytes | memoryview) -> list[DiskStep]:
    """Write a file under its own name and make its bytes durable; its name is durable after a `SyncFolder`.

    The name must be one that no manifest holds: a part is overwritten in place. Cost: one fsync.
    """
    return [CreateFile(name), WriteFile(name, data), SyncFile(name)]


def publish(name: str, data: bytes | memoryview) -> list[DiskStep]:
    """Put a whole file in its place: whoever opens it sees the old one or the new one. Cost: two fsyncs."""
    temporary = name + TEMPORARY
    return [*write_part(temporary, data), RenameFile(temporary, name), SyncFolder(folder_of(name))]


def commit(manifest: str, contents: bytes, parts: Mapping[str, bytes | memoryview]) -> Iterator[DiskStep]:
    """Make parts durable and then, by a manifest that is published last, valid: all of them or none.

    Writers of several parts, such as ranks, each do `write_part`; once all have, one of them syncs the folder and
    publishes the manifest.

    Args:
        manifest: name of its file.
        contents: what it holds.
        parts: name → bytes of each part, in the manifest's folder.

    Cost: an fsync a part, and three.
    """
    for name, data in parts.items():
        yield from write_part(name, data)
    yield SyncFolder(folder_of(manifest))
    yield from publish(manifest, contents)


def retire(manifest: str, parts: Iterable[str]) -> list[DiskStep]:
    """Remove what a manifest holds, the manifest first and for good. Cost: one fsync."""
    return [RemoveFile(manifest), SyncFolder(folder_of(manifest)), *(RemoveFile(name) for name in parts)]


def folder_of(name: str) -> str:
    """The folder that a file is in; "" is the disk's own."""
    return name.rpartition("/")[0]
