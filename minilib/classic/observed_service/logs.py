"""Structured logs: one JSON object a line with the trace's id; the last ones in a file that outlasts a SIGKILL.

The file is mapped into memory, so that a record costs a copy and no system call, and what was appended belongs to the
kernel: it is there after the process was killed at any moment. After a power cut it may not be: nothing is synced.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minilib.classic.observed_service.traceparent import TraceContext
from minilib.mechanisms.basics.child import child_environment
from minilib.mechanisms.basics.files import extend_with_zeros
from minilib.mechanisms.telemetry import Ring, slot_bytes

RECORD_BYTES = 512  # the longest record; longer ones lose the end of their message
TIMEOUT = 30.0  # seconds for a process that logs


class LogWriterFailed(RuntimeError):
    """A process that was to log died by itself, or did not log in time."""


class JsonLog:
    """The log of one process.

    Args:
        process: its name in the records.
        path: file of the ring; None keeps the ring in this process's memory.
        records: how many the ring holds.

    Attributes:
        ring: the last records.

    Raises:
        OSError: if there is no room for the file.
    """

    def __init__(self, process: str, path: Path | None = None, records: int = 64) -> None:
        self.process, size = process, records * slot_bytes(RECORD_BYTES)
        self._memory: mmap.mmap | bytearray = bytearray(size)
        if path is not None:
            with path.open("a+b") as file:
                file.truncate(min(size, file.tell()))
                extend_with_zeros(file, size)
                self._memory = mmap.mmap(file.fileno(), size)
        self.ring = Ring(self._memory, RECORD_BYTES)

    def write(self, time_ns: int, message: str, context: TraceContext | None = None, **fields: Any) -> int:
        """Append a record; a message is cut where the record would be too long.

        Args:
            time_ns: when, in ns.
            message: what happened, the same text for all records of a kind; what differs goes into fields.
            context: the open span.
            **fields: of JSON's types.

        Returns:
            The record's number.

        Raises:
            ValueError: if it is too long without a message.
        """
        record = {"time_ns": time_ns, "process": self.process, "message": message}
        if context is not None:
            record |= {"trace_id": context.trace_id, "span_id": context.span_id}
        record |= fields
        line = json.dumps(record)
        while len(line) > RECORD_BYTES and record["message"]:
            kept = max(0, len(record["message"]) - (len(line) - RECORD_BYTES) - len('"cut": true, '))
            record |= {"message": record["message"][:kept], "cut": True}
            line = json.dumps(record)
        return self.ring.append(line.encode())

    def records(self) -> list[dict[str, Any]]:
        """The records in the ring, oldest first."""
        return [json.loads(body) for _, body in self.ring.records()]

    def close(self) -> None:
        """Unmap the file."""
        self.ring.close()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records in a file, oldest first, whatever became of the process that wrote them."""
    return [json.loads(body) for _, body in Ring(path.read_bytes(), RECORD_BYTES).records()]


def kill_while_logging(path: Path, acknowledged: int) -> tuple[int, list[dict[str, Any]]]:
    """Start a process that logs as fast as it can, kill it (SIGKILL) once it has told of so many records, and read.

    Args:
        path: file of the ring.
        acknowledged: records of which the process has to tell first, 1 or more.

    Returns:
        The number of the last record of which the process has told, and the records that are in the file.

    Raises:
        LogWriterFailed: if it dies by itself, or is too slow.
    """
    command = [sys.executable, "-m", "minilib.classic.observed_service.logs", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment())
    try:
        told, end = b"", time.monotonic() + TIMEOUT
        while told.count(b"\n") < acknowledged:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise LogWriterFailed(f"told of {told.count(bytes([10]))} records, and {acknowledged} were awaited")
            told += piece
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    last_complete = told[: told.rindex(b"\n")].rsplit(b"\n", 1)[-1]
    return int(last_complete), read_log(path)


def log_for_ever(path: Path) -> None:
    """Log a request after the other, and tell of each on standard output once it is logged."""
    log, number = JsonLog("store/1", path), 0
    while True:
        context = TraceContext(f"{number + 1:032x}", f"{number + 1:016x}")
        written = log.write(time.monotonic_ns(), "request answered", context, request=number)
        os.write(sys.stdout.fileno(), b"%d\n" % written)
        number += 1


if __name__ == "__main__":
    log_for_ever(Path(sys.argv[1]))
