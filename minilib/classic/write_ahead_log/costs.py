"""What durability costs, counted: fsyncs and bytes for each record that is acknowledged, and what recovery reads.

The store runs on a disk in memory, so that only what it asks for is counted. With groups of g records, payload p and a
frame and record header of h bytes each:

    fsyncs a record        1 / g
    bytes asked for        p + h
    bytes of pages         what the disk writes: whole pages, the last one of a group once more with the next group
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from minilib.classic.write_ahead_log.restart import put_record
from minilib.classic.write_ahead_log.store import DurableStore
from minilib.mechanisms.journaling import FRAME_BYTES, WriteFile

PAGE = 4096  # bytes, of most file systems and drives


@dataclass(frozen=True)
class WriteCosts:
    """What it cost to make records durable.

    Args:
        records: acknowledged.
        payload: bytes of their keys and values.
        syncs: fsyncs.
        bytes_written: that the store asked the disk to write.
        bytes_flushed: of the pages that fsyncs made durable.
    """

    records: int
    payload: int
    syncs: int
    bytes_written: int
    bytes_flushed: int

    @property
    def syncs_per_record(self) -> float:
        """Fsyncs for each record."""
        return self.syncs / self.records

    @property
    def amplification(self) -> float:
        """Bytes of pages written for each byte of keys and values."""
        return self.bytes_flushed / self.payload


@dataclass(frozen=True)
class RecoveryCosts:
    """What it cost to start again.

    Args:
        replayed: records behind the snapshot.
        bytes_read: of snapshot, manifest and log.
        seconds: that it took here, on a disk in memory; to be reported, never asserted.
    """

    replayed: int
    bytes_read: int
    seconds: float


def write_costs(num_records: int, group: int, value_bytes: int = 100, snapshot_every: int = 0) -> WriteCosts:
    """Write records in groups, and count.

    Args:
        num_records: records, 1 or more; keys have 8 bytes.
        group: records that share an fsync, 1 or more; the last group may be smaller.
        value_bytes: bytes of each value.
        snapshot_every: records between snapshots; 0 for none.

    Raises:
        ValueError: if there is no record, or a group of none.
    """
    if num_records < 1 or group < 1:
        raise ValueError(f"num_records and group are 1 or more, got {num_records} and {group}")
    disk = FaultyDisk(page_size=PAGE)
    store = DurableStore(disk)
    syncs, flushed, steps = disk.num_syncs, disk.pages_flushed, len(disk.steps)
    for number in range(num_records):
        store.put(number.to_bytes(8, "big"), bytes(value_bytes))
        if (number + 1) % group == 0:
            store.commit()
        if snapshot_every and (number + 1) % snapshot_every == 0:
            store.snapshot()
    store.commit()
    written = sum(len(step.data) for step in disk.steps[steps:] if isinstance(step, WriteFile))
    payload = num_records * (8 + value_bytes)
    return WriteCosts(
        store.num_acknowledged, payload, disk.num_syncs - syncs, written, (disk.pages_flushed - flushed) * PAGE
    )


def bytes_per_record(key_bytes: int, value_bytes: int) -> int:
    """Bytes of a record in the log: what `write_costs` counts for each, in closed form."""
    return FRAME_BYTES + len(put_record(bytes(key_bytes), bytes(value_bytes)))


def recovery_costs(num_keys: int, log_lengths: Sequence[int], value_bytes: int = 100) -> list[RecoveryCosts]:
    """Start a store again with logs of several lengths behind a snapshot of the same size.

    Args:
        num_keys: keys in the snapshot, 1 or more.
        log_lengths: records behind it, 0 or more each; they overwrite keys in turn.
        value_bytes: bytes of each value.
    """
    found = []
    for length in log_lengths:
        disk = FaultyDisk(page_size=PAGE)
        store = DurableStore(disk)
        for number in range(num_keys):
            store.put(number.to_bytes(8, "big"), bytes(value_bytes))
        store.snapshot()
        for number in range(length):
            store.put((number % num_keys).to_bytes(8, "big"), bytes(value_bytes))
        store.commit()
        files = disk.files()
        start = time.perf_counter()
        again = DurableStore(FaultyDisk(files, page_size=PAGE)).recovered
        found.append(RecoveryCosts(again.replayed, again.bytes_read, time.perf_counter() - start))
    return found
