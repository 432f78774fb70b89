"""The recorder of one rank: a file in memory that any process can read, whatever has become of the rank.

    file    │ head, 64 bytes │ ring of names │ ring of calls │

Names are texts that recur: groups, kinds of calls, lines of code. A call refers to them by number, so that a call takes
120 bytes and no text is made while a job runs. No name is ever overwritten; what finds no room reads "?". The name of a
group carries a mark, the number of its calls so far, which outlasts the calls themselves.

In production: torch.distributed's flight recorder keeps its ring in the memory of the rank, which has to be alive to
dump it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

from minilib.mechanisms.basics.files import mapped_anew
from minilib.mechanisms.telemetry.ring import Ring, slot_bytes
from minilib.operations.flight_recorder.recording import RecordedGroup, start_ticks

MAGIC, VERSION = int.from_bytes(b"flights\n", "little"), 1
HEAD = struct.Struct("=8q")  # magic, version, rank, capacity, process, start of the process, whether closed, 0
CLOSED = 6  # the word of the head that says so
NUM_NAMES, NAME_BYTES = 512, 112
MAX_DIMS = 6  # of a larger shape the last numbers are multiplied
CALL = [struct.Struct(f"=IIIHHqq{dims}q") for dims in range(MAX_DIMS + 1)]  # group, kind, site, flags, dims, …
CALL_BYTES = CALL[MAX_DIMS].size
STARTED, ENDED, WAITED = range(3)  # marks of a call: times in ns, of failure negative; ns waited, or -since
CALL_MARKS = 3
REFUSED = 1  # in place of the time of its end
ASYNCHRONOUS = 1  # a flag


def recording_bytes(capacity: int) -> int:
    """Bytes of a recording of that many calls."""
    return HEAD.size + NUM_NAMES * slot_bytes(NAME_BYTES, 1) + capacity * slot_bytes(CALL_BYTES, CALL_MARKS)


def rings(buffer, capacity: int) -> tuple[memoryview, Ring, Ring]:
    """The head's words, the names and the calls of a recording.

    Raises:
        ValueError: if the buffer is too small.
    """
    content = memoryview(buffer).cast("B")
    if len(content) < recording_bytes(capacity):
        raise ValueError(f"{capacity} calls take {recording_bytes(capacity)} bytes, and the buffer has {len(content)}")
    calls = HEAD.size + NUM_NAMES * slot_bytes(NAME_BYTES, 1)
    names = Ring(content[HEAD.size : calls], NAME_BYTES, marks=1)
    return (
        content[: HEAD.size].cast("q"),
        names,
        Ring(content[calls : recording_bytes(capacity)], CALL_BYTES, CALL_MARKS),
    )


class Recorder:
    """Writes down what one rank does; any thread may call.

    Args:
        where: path of a file, which is made anew, best in /dev/shm; or a buffer of `recording_bytes`, which is
            overwritten.
        rank: of the job.
        capacity: calls to keep.

    Attributes:
        lock: held by whoever begins or marks a call.
        waited_ns: how long this rank has waited for collectives so far, in all groups.

    Raises:
        ValueError: if a number is out of range, or the buffer too small.
        OSError: if there is no room for the file.
    """

    def __init__(self, where: Path | str | bytearray | mmap.mmap, rank: int, capacity: int = 2000) -> None:
        if capacity < 1 or rank < 0:
            raise ValueError(f"a recorder keeps at least 1 call of a rank from 0, got {capacity} calls of rank {rank}")
        self.rank, self.capacity, self.lock = rank, capacity, threading.Lock()
        buffer = mapped_anew(Path(where), recording_bytes(capacity)) if isinstance(where, Path | str) else where
        rings(buffer, capacity)  # refuses a buffer that is too small, before anything in it is lost
        memoryview(buffer).cast("B")[:] = bytes(memoryview(buffer).nbytes)
        self._head, self._names, self._calls = rings(buffer, capacity)
        self.waited_ns = 0
        self._ids: dict[str, int] = {"?": self._names.append(b"n?")}
        self._sites: dict[tuple[int, int], tuple[int, CodeType]] = {}
        self._generations: dict[tuple[str, tuple[int, ...]], int] = {}
        process = os.getpid()
        head = HEAD.pack(MAGIC, VERSION, rank, capacity, process, start_ticks(process), 0, 0)
        for word in reversed(range(8)):  # the magic number last: from here on readers may come
            self._head[word] = memoryview(head).cast("q")[word]

    def name(self, text: str) -> int:
        """The number of a text, which is written down if it is new; 0 if there is no room."""
        with self.lock:
            if text not in self._ids:
                content, size = text.encode(errors="replace"), NAME_BYTES - 1
                pieces = [content[at : at + size] for at in range(0, len(content), size)]
                used = self._names.next_sequence
                fits = used + len(pieces) <= self._names.capacity
                for position, piece in enumerate(pieces if fits else ()):
                    self._names.append((b"+" if position else b"n") + piece)
                self._ids[text] = used if fits else 0
            return self._ids[text]

    def site(self, depth: int) -> int:
        """The number of the line of code that called the function `depth` frames above the caller's."""
        frame = sys._getframe(depth + 1)
        code, at = frame.f_code, frame.f_lasti
        known = self._sites.get((id(code), at))  # a code object's own hash goes through all its constants
        if known is None:
            file = "/".join(Path(code.co_filename).parts[-2:])
            known = self.name(f"{file}:{frame.f_lineno} {code.co_name}"), code  # kept, so that its id stays its own
            self._sites[id(code), at] = known
        return known[0]

    def group(self, name: str, ranks: Sequence[int]) -> int:
        """The number of a group, one for each time that it is asked for."""
        key = name, tuple(ranks)
        generation = self._generations[key] = self._generations.get(key, -1) + 1
        return self.name(group_text(RecordedGroup(name, key[1], generation)))

    def begin(
        self,
        group: int,
        kind: int,
        site: int,
        flags: int,
        sequence: int,
        shape: tuple[int, ...],
        started: bool,
        now: int,
    ) -> int:
        """Write down a call before it is made, and return its number for `mark`. The caller holds `lock`.

        Args:
            group, kind, site: names.
            flags: ASYNCHRONOUS or 0.
            sequence: its number in the group, -1 for a message.
            shape: of its tensor.
            started: whether nothing is in front of it.
            now: by the monotonic clock, in ns.
        """
        dims = len(shape)
        if dims > MAX_DIMS:
            shape, dims = _fewer_dims(shape), MAX_DIMS
        body = CALL[dims].pack(group, kind, site, flags, dims, sequence, now, *shape)
        number = self._calls.append(body)
        if started:
            self._calls.mark(number, STARTED, now)
        if sequence >= 0:
            self.entered(group, sequence + 1)
        return number

    def entered(self, group: int, count: int) -> None:
        """Write down how many calls of a group there are so far. The caller holds `lock`."""
        self._names.mark(group, 0, count)

    def mark(self, number: int, which: int, value: int) -> None:
        """Write down what has become of a call: STARTED, ENDED or WAITED. The caller holds `lock`."""
        self._calls.mark(number, which, value)

    def close(self) -> None:
        """Say that the rank has ended well; the recording stays, and nothing is recorded any more."""
        self._head[CLOSED] = 1


def group_text(group: RecordedGroup) -> str:
    """The name of a group in a recording; ranks at equal distances take little room, however many."""
    ranks = group.ranks
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    evenly = range(ranks[0], ranks[0] + step * len(ranks), step) if step else ()
    short = [ranks[0], len(ranks), step] if tuple(evenly) == ranks else None
    return "group " + json.dumps([group.name, group.generation, short, None if short else ranks])


def group_of_text(text: str) -> RecordedGroup | None:
    """The group that has this name in a recording, if it is a whole name, and a group's."""
    if not text.startswith("group "):
        return None
    try:
        name, generation, short, ranks = json.loads(text.removeprefix("group "))
    except ValueError:  # a killed rank has written a part of it, or a folder with lines of code is named so
        return None
    if short:
        first, count, step = short
        ranks = range(first, first + step * count, step)
    return RecordedGroup(name, tuple(ranks), generation)


def _fewer_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    rest = 1
    for size in shape[MAX_DIMS - 1 :]:
        rest *= size
    return (*shape[: MAX_DIMS - 1], rest)
