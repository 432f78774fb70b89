"""The last records of a process, in a ring that outlasts it: of a file in memory, another process reads them.

    slot    │ sequence + 1, 8 │ marks, 8 each │ body, padded to 8 │ CRC-32 of sequence and body 4, length 4 │

A flight recorder is read when its writer is dead or hangs, so the writer may have stopped between any two stores. An
append first takes the slot's old record back (sequence −1), then writes the body, and the checksum last: a reader finds
the old record, nothing, or the new record, whole. Only the slot of the last append can be torn.

A mark is what becomes known about a record after its append, such as the time at which a call ended: one word of 8
bytes, which a processor stores at once, so that a record is never taken back for it.

In production: the flight recorder of torch.distributed (a ring of collectives), the kernel's printk and ftrace buffers,
an aircraft's recorder.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

WORD = 8  # bytes
_BEING_WRITTEN = -1  # in place of a sequence


class RingRecord(NamedTuple):
    """A record that was found whole.

    Args:
        sequence: its number since the ring was empty, from 0.
        body: its bytes.
        marks: what was marked since, 0 where nothing was.
    """

    sequence: int
    body: bytes
    marks: tuple[int, ...]


def slot_bytes(record_bytes: int, marks: int = 0) -> int:
    """Bytes of a ring's buffer that one record takes."""
    return (2 + marks) * WORD + -(-record_bytes // WORD) * WORD


class Ring:
    """The last records that were appended to a buffer, as many as fit; a new record overwrites the oldest.

    One writer at a time; readers at any time, in any process that maps the same memory. A ring on a buffer that holds
    records goes on behind them, and writes a torn record's sequence again, whose append never returned; without a whole
    record, it begins again.

    Args:
        buffer: bytearray, mmap or shared memory, zeros at first; `bytes`, such as a copied file, can be read only.
        record_bytes: the longest body.
        marks: words of each record that may be set after its append.

    Attributes:
        capacity: records that fit.
        next_sequence: of the record that is appended next.

    Raises:
        ValueError: if a number is out of range, or the buffer is too small for a single record.
    """

    def __init__(self, buffer, record_bytes: int, marks: int = 0) -> None:
        if record_bytes < 1 or marks < 0:
            raise ValueError(f"a record has at least 1 byte and 0 marks, got {record_bytes} and {marks}")
        self.record_bytes, self.num_marks = record_bytes, marks
        self._slot, self._no_marks = slot_bytes(record_bytes, marks), bytes(marks * WORD)
        self._last = self._slot // WORD - 1  # word of a slot
        self.capacity = memoryview(buffer).nbytes // self._slot
        if not self.capacity:
            needed, found = self._slot, memoryview(buffer).nbytes
            raise ValueError(f"a record of {record_bytes} bytes takes {needed} bytes, and the buffer has {found}")
        self._bytes = memoryview(buffer).cast("B")[: self.capacity * self._slot]
        self._words = self._bytes.cast("q")
        whole = self.entries()
        self.next_sequence = whole[-1].sequence + 1 if whole else 0

    def append(self, body: bytes) -> int:
        """Write a record over the oldest, and return its sequence.

        Raises:
            ValueError: if it is longer than `record_bytes`.
            TypeError: if the buffer can only be read.

        Cost: one pass over the body.
        """
        if len(body) > self.record_bytes:
            raise ValueError(f"a record of this ring has at most {self.record_bytes} bytes, got {len(body)}")
        words, sequence = self._words, self.next_sequence
        at = sequence % self.capacity * self._slot
        first, start = at // WORD, at + WORD
        content = self._no_marks + body
        words[first] = _BEING_WRITTEN
        self._bytes[start : start + len(content)] = content
        words[first + self._last] = _seal(sequence, body)
        words[first] = sequence + 1
        self.next_sequence = sequence + 1
        return sequence

    def mark(self, sequence: int, which: int, value: int) -> bool:
        """Set a mark of a record.

        Args:
            sequence: what `append` returned.
            which: the mark, from 0.
            value: 64 bits, signed.

        Returns:
            False if the record is overwritten by now; nothing is written then.

        Raises:
            IndexError: if records of this ring have no such mark.
        """
        if not 0 <= which < self.num_marks:
            raise IndexError(f"records of this ring have {self.num_marks} marks, numbered from 0; got {which}")
        first = sequence % self.capacity * self._slot // WORD
        if self._words[first] != sequence + 1:
            return False
        self._words[first + 1 + which] = value
        return True

    def records(self) -> list[tuple[int, bytes]]:
        """The whole records, oldest first: sequence and body."""
        return [(record.sequence, record.body) for record in self.entries()]

    def entries(self) -> list[RingRecord]:
        """The whole records with their marks, oldest first."""
        found = (self._read(slot) for slot in range(self.capacity))
        return sorted(record for record in found if record)

    @property
    def torn(self) -> int:
        """Slots that hold something that is no whole record: 1 if a writer died within an append, else 0."""
        slot_words = self._slot // WORD
        used = sum(self._words[slot * slot_words] != 0 for slot in range(self.capacity))
        return used - len(self.entries())

    @property
    def lost(self) -> int:
        """Records that were appended, and are not here any more."""
        whole = self.entries()
        return whole[-1].sequence + 1 - len(whole) if whole else 0

    def close(self) -> None:
        """Let go of the buffer, so that an mmap can be closed; the ring is of no use after that."""
        self._words.release()
        self._bytes.release()

    def _read(self, slot: int) -> RingRecord | None:
        """The record of a slot, if there is a whole one, also while another process writes."""
        at, first = slot * self._slot, slot * self._slot // WORD
        sequence = self._words[first] - 1
        if sequence < 0 or sequence % self.capacity != slot:
            return None
        content = bytes(self._bytes[at : at + self._slot])
        words = memoryview(content).cast("q")
        start, length = (1 + self.num_marks) * WORD, words[-1] >> 32
        body = content[start : start + length] if 0 <= length <= self.record_bytes else b""
        unchanged = self._words[first] == sequence + 1  # else the marks may be of the next record
        if not unchanged or words[-1] != _seal(sequence, body):
            return None
        return RingRecord(sequence, body, tuple(words[1 : 1 + self.num_marks]))


def _seal(sequence: int, body: bytes) -> int:
    """Length and checksum in one word; the checksum begins with the sequence, so that no old record passes for new."""
    return len(body) << 32 | crc32(body, (sequence ^ sequence >> 32) & 0xFFFFFFFF)
