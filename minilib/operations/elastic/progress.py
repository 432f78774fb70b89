"""How far each rank of an attempt is: a row of a file for each rank, which outlasts a rank that is killed.

rank   first step   newest step   standing
0      4            7             waited in vain for another rank
1      4            7             running          killed, or it hangs: it never said how it ended
2      4            7             waited in vain for another rank
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from minilib.operations.checkpoint.commit import SaveFailed
from minilib.operations.checkpoint.together import OtherRankFailed
from minilib.ranks.transport.base import CollectiveFailed, CollectiveMismatch

GRACE = 1.0  # seconds in which ranks that wait for a lost one find out, once the first of them has
_ROW = struct.Struct("<qqq")


class Standing(IntEnum):
    """What a rank has told of itself."""

    RUNNING = 0
    RAISED = 1
    WAITED_IN_VAIN = 2  # for another rank
    RETURNED = 3


class RankProgress(NamedTuple):
    """One rank's row.

    Args:
        first_step: from which the rank went on; None if it has reported none.
        newest_step: how far it came.
        standing: how it ended, if it could tell.
    """

    first_step: int | None = None
    newest_step: int | None = None
    standing: Standing = Standing.RUNNING


class ProgressFile:
    """The rows of all ranks of an attempt.

    Args:
        path: of the file; what is not in it has not been reported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, rank: int, row: RankProgress) -> None:
        """Replace a rank's row."""
        first, newest = (0 if step is None else step + 1 for step in row[:2])  # a row that is not there is zeros
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, _ROW.pack(first, newest, row.standing), rank * _ROW.size)
        finally:
            os.close(descriptor)

    def read(self, world_size: int) -> list[RankProgress]:
        """The rows of so many ranks."""
        data = self.path.read_bytes() if self.path.exists() else b""
        size = world_size * _ROW.size
        rows = _ROW.iter_unpack(data[:size].ljust(size, b"\0"))
        return [RankProgress(*map(_step, steps), Standing(standing)) for *steps, standing in rows]


class Reporter:
    """Writes one rank's row.

    Args:
        file: of the attempt.
        rank: this one.
        attempt: number of the attempt.
    """

    def __init__(self, file: ProgressFile, rank: int, attempt: int) -> None:
        self.attempt = attempt
        self._file, self._rank, self._row = file, rank, RankProgress()
        self._file.write(rank, self._row)

    def step(self, step: int) -> None:
        """This rank stands before a step."""
        first = step if self._row.first_step is None else self._row.first_step
        self._write(self._row._replace(first_step=first, newest_step=step))

    def call(self, fn: Callable, args: tuple) -> object:
        """What a function returns; whether it returns, raises, or raises because of another rank is in the row."""
        try:
            value = fn(*args)
        except (CollectiveFailed, OtherRankFailed, SaveFailed) as error:
            mismatch = isinstance(error, CollectiveMismatch)
            self._write(self._row._replace(standing=Standing.RAISED if mismatch else Standing.WAITED_IN_VAIN))
            time.sleep(GRACE)  # the launcher ends everybody at the first error; then nobody could tell who hangs
            raise
        except BaseException:
            self._write(self._row._replace(standing=Standing.RAISED))
            raise
        self._write(self._row._replace(standing=Standing.RETURNED))
        return value

    def _write(self, row: RankProgress) -> None:
        self._row = row
        self._file.write(self._rank, row)


reporter: ContextVar[Reporter | None] = ContextVar(
    "tells the launcher of this attempt how far this rank is", default=None
)


def report_step(step: int) -> None:
    """Tell `run_elastic` that this rank stands before a step; elsewhere, and under torchrun, it does nothing."""
    if (own := reporter.get()) is not None:
        own.step(step)


def restart_count() -> int:
    """How often the job of this rank was begun again, by `run_elastic` or by torchrun; 0 at first."""
    if (own := reporter.get()) is not None:
        return own.attempt
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _step(number: int) -> int | None:
    return number - 1 if number else None
