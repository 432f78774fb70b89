"""What a rank did and when, written into a buffer that is there before the first step.

    trace = RankTrace(rank, path=folder / f"rank-{rank}.trace")
    with trace.span("step", number=7), trace.span("forward"):   …
    with trace.collective("all_reduce", "data", sequence, num_bytes):   …
    trace.count("allocated bytes", 123)

A row is 40 bytes: time, code (kind and name), and three numbers. Spans are written as their begin and their end by one
thread, so they nest by construction. A buffer in a file outlives its rank: whoever reads it after a SIGKILL finds all
rows but the one that was being written, and the spans that were open.

Cost: a row is two calls of `struct.pack_into`; a span took 1.6 µs of processor time. A full buffer drops new
spans whole and counts them.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.basics.files import mapped_anew
from minilib.operations.tracing.recording import (
    BEGIN,
    COUNT,
    END,
    HEADER,
    KIND_BITS,
    MAGIC,
    NAMES,
    ROW,
    Recording,
    read_recording,
)

_COUNTS = struct.Struct("<qqq")  # rows, spans lost, bytes of names
_COUNTS_AT = HEADER.size - _COUNTS.size


class _Entered:
    """A span of one name; it has no state, so one object serves all of its spans, nested ones too."""

    __slots__ = ("_begin", "_end", "_name")

    def __init__(self, trace: RankTrace, name: str) -> None:
        self._begin, self._end, self._name = trace.begin, trace.end, name

    def __enter__(self) -> None:
        self._begin(self._name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class _Numbered(_Entered):
    """A span with numbers of its own."""

    __slots__ = ("_numbers",)

    def __init__(self, trace: RankTrace, name: str, *numbers: int) -> None:
        super().__init__(trace, name)
        self._numbers = numbers

    def __enter__(self) -> None:
        self._begin(self._name, *self._numbers)


class RankTrace:
    """Records the spans of one rank; called by one thread. It is a `StepPhases` of the trainer.

    Args:
        rank: whose spans these are.
        capacity: rows of the buffer; a span takes two, a counter's value one.
        path: file that holds the buffer, made anew; None for memory alone.
        clock: nanoseconds that never go back.
        host: name of the machine.

    Attributes:
        lost: spans and values for which there was no room.

    Raises:
        ValueError: if rank is negative, or there is no room for a span.
        OSError: if there is no room for the file.
    """

    def __init__(
        self,
        rank: int,
        capacity: int = 2**16,
        path: Path | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        host: str | None = None,
    ) -> None:
        check_whole("a rank", rank)
        check_whole("capacity, in rows,", capacity, 2)
        self.rank, self.lost = rank, 0
        self._clock, self._capacity, self._thread = clock, capacity, threading.get_ident()
        size = HEADER.size + NAMES + capacity * ROW.size
        self._buffer: bytearray | mmap.mmap = bytearray(size) if path is None else mapped_anew(path, size)
        self._rows = self._depth = self._skipped = self._names_end = 0
        self._names: dict[str, int] = {}
        self._spans: dict[str, _Entered] = {}
        HEADER.pack_into(self._buffer, 0, MAGIC, rank, os.getpid(), capacity, 0, 0, 0)
        self._name(host or socket.gethostname())  # the first name is the machine's

    def __call__(self, name: str) -> _Entered:
        """A span without numbers, to be entered; the same object for each name."""
        found = self._spans.get(name)
        if found is None:
            found = self._spans[name] = _Entered(self, name)
        return found

    def span(self, name: str, number: int | None = None) -> _Entered:
        """A span, to be entered; the number says which, as that of a step does."""
        return self(name) if number is None else _Numbered(self, name, 0, number)

    def collective(self, name: str, group: str, sequence: int, num_bytes: int = 0) -> _Entered:
        """One side of a collective, to be entered: the sides are those of equal group, sequence number and name."""
        return _Numbered(self, name, 1 + self._name(group), sequence, num_bytes)

    def begin(self, name: str, group: int = 0, number: int = -1, num_bytes: int = 0) -> None:
        """A span begins, inside of the one that was begun last and has not ended.

        Raises:
            RuntimeError: in another thread than the one that made the trace.
        """
        if threading.get_ident() != self._thread:
            raise RuntimeError("a RankTrace takes the spans of one thread, which nest; give each thread its own")
        if self._rows + self._depth + 2 > self._capacity:  # its own end and those of open spans have room
            self._skipped += 1
            self._lose()
            return
        self._depth += 1
        self._write(BEGIN | self._name(name) << KIND_BITS, group, number, num_bytes)

    def end(self) -> None:
        """The span that was begun last ends.

        Raises:
            ValueError: if none is open.
        """
        if self._skipped:
            self._skipped -= 1
            return
        if not self._depth:
            raise ValueError("no span is open: each end() needs a begin() before it")
        self._depth -= 1
        self._write(END, 0, 0, 0)

    def count(self, name: str, value: int) -> None:
        """A counter has this value from now on."""
        if self._rows + self._depth + 1 > self._capacity:
            self._lose()
            return
        self._write(COUNT | self._name(name) << KIND_BITS, value, 0, 0)

    def recording(self) -> Recording:
        """What has been recorded so far."""
        return read_recording(self._buffer)

    def _write(self, code: int, first: int, second: int, third: int) -> None:
        at = HEADER.size + NAMES + self._rows * ROW.size
        ROW.pack_into(self._buffer, at, self._clock(), code, first, second, third)
        self._rows += 1  # counted when it is whole
        self._publish()

    def _lose(self) -> None:
        self.lost += 1
        self._publish()

    def _publish(self) -> None:
        _COUNTS.pack_into(self._buffer, _COUNTS_AT, self._rows, self.lost, self._names_end)

    def _name(self, name: str) -> int:
        """Number of a name, which is written when it is new; names for which there is no room are the last one."""
        number = self._names.get(name)
        if number is None:
            text = name.encode(errors="replace")[:1000]
            if self._names_end + 2 + len(text) > NAMES:
                return len(set(self._names.values())) - 1
            at = HEADER.size + self._names_end
            struct.pack_into(f"<H{len(text)}s", self._buffer, at, len(text), text)
            self._names_end += 2 + len(text)
            number = self._names[name] = len(self._names)
            self._publish()
        return number
