"""A process that writes, acknowledges and is killed: `python -m …write_ahead_log.crashes.victim KIND FOLDER SEED`.

It goes on where the store in the folder ends, for ever. After each commit it writes the number of durable records to
its standard output: whoever reads that has been told. Every record follows from the seed and its number, which tell
what a store with n records holds.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from pathlib import Path
from typing import Protocol

from minilib.classic.write_ahead_log.disks.real_disk import RealDisk
from minilib.classic.write_ahead_log.sqlite_store import SqliteStore
from minilib.classic.write_ahead_log.store import DurableStore

ACKNOWLEDGED = struct.Struct("!q")  # records
MAX_GROUP = 8  # records that share a commit
SNAPSHOT_EVERY = 48  # records, about
KINDS = ("journal", "sqlite full", "sqlite normal")


class Victim(Protocol):
    """A store that is killed."""

    num_acknowledged: int

    def put(self, key: bytes, value: bytes) -> object:
        """Give a key a value with the next commit."""

    def delete(self, key: bytes) -> object:
        """Remove a key with the next commit."""

    def commit(self) -> int:
        """Make it durable; returns the number of durable records."""

    def snapshot(self) -> object:
        """Write what shortens recovery."""


class JournalVictim(DurableStore):
    """Our store in a folder on this machine.

    Args:
        folder: one that is there.
    """

    def __init__(self, folder: Path) -> None:
        self._real = RealDisk(folder)
        try:
            super().__init__(self._real)
        except BaseException:
            self._real.close()
            raise

    def close(self) -> None:
        """Give the folder back."""
        self._real.close()


def open_victim(kind: str, folder: Path) -> JournalVictim | SqliteStore:
    """A store of one of KINDS in a folder.

    Raises:
        ValueError: if the kind is none of these.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}; got {kind!r}")
    return JournalVictim(folder) if kind == "journal" else SqliteStore(folder, kind.removeprefix("sqlite ").upper())


def nth_change(seed: int, number: int) -> tuple[bytes, bytes | None]:
    """What the record of this number does: a key and its value, None to delete it."""
    rng = random.Random(seed << 32 | number)
    key = b"key %d" % rng.randrange(17)
    if rng.random() < 0.15:
        return key, None
    return key, b"%d " % number * rng.randrange(1, 60)


def write_on(store: Victim, seed: int) -> None:
    """Write, and tell; for ever."""
    rng, number = random.Random(seed + store.num_acknowledged), store.num_acknowledged
    while True:
        for number in range(number, number + rng.randint(1, MAX_GROUP)):  # noqa: B020, it goes on from there
            key, value = nth_change(seed, number)
            store.delete(key) if value is None else store.put(key, value)
        number = store.commit()
        os.write(1, ACKNOWLEDGED.pack(number))
        if rng.random() < MAX_GROUP / 2 / SNAPSHOT_EVERY:
            store.snapshot()


if __name__ == "__main__":
    write_on(open_victim(sys.argv[1], Path(sys.argv[2])), int(sys.argv[3]))
