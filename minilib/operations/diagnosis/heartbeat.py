"""A rank's heartbeat: a few numbers in a file that it maps, which another process reads whatever becomes of the rank.

A thread of the rank adds a beat every few milliseconds, and the rank's own thread says where it is. So a rank whose
process is gone or stopped has no new beats, and one that hangs has beats and no progress. Time is counted in beats, not
seconds: on a machine that gives the ranks no processor, a rank makes no beats, either.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from minilib.mechanisms.basics.files import mapped_anew
from minilib.training.phases import PHASES

PLACES = ("start", *PHASES, "between", "failed", "done")  # where a rank can be
_FIELDS = struct.Struct("<5q")  # pid, beats, beats at the last progress, step, number of the place
_PID, _BEATS, _PROGRESS, _STEP, _PLACE = range(0, 40, 8)


@dataclass(frozen=True)
class Pulse:
    """A heartbeat as it was read.

    Args:
        pid: of the rank's process; 0 if it has not begun.
        beats: since it began.
        still: of these, since it last said where it is.
        step, place: where that was; one of PLACES.
    """

    pid: int
    beats: int
    still: int
    step: int
    place: str

    @property
    def over(self) -> bool:
        """Whether the rank has come to an end and said so."""
        return self.place in ("failed", "done")


class Heartbeat:
    """Writes the heartbeat of this process.

    Args:
        path: of a file, which is made.
        period: seconds between beats.
    """

    def __init__(self, path: Path, period: float = 0.1) -> None:
        self._map = mapped_anew(path, _FIELDS.size)
        self._set(_PID, os.getpid())
        self._beats, self._period, self._ended = 0, period, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def tell(self, step: int, place: str) -> None:
        """Say where this rank is.

        Raises:
            ValueError: if that is none of PLACES.
        """
        if place not in PLACES:
            raise ValueError(f"a rank is in one of the places {', '.join(PLACES)}; got {place!r}")
        number = PLACES.index(place)
        self._set(_STEP, step)
        self._set(_PLACE, number)
        self._set(_PROGRESS, self._beats)

    def close(self) -> None:
        """End the beats; the file stays."""
        self._ended.set()
        self._thread.join()
        self._map.close()

    def _beat(self) -> None:
        while not self._ended.wait(self._period):
            self._beats += 1
            self._set(_BEATS, self._beats)

    def _set(self, offset: int, value: int) -> None:
        struct.pack_into("<q", self._map, offset, value)


def read_pulse(path: Path) -> Pulse:
    """The heartbeat in a file, which may not be there yet."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < _FIELDS.size:
        return Pulse(0, 0, 0, 0, "start")
    pid, beats, progress, step, place = _FIELDS.unpack(content)
    return Pulse(pid, beats, max(0, beats - progress), step, PLACES[place])


class PulseWatch:
    """Reads the heartbeats of all ranks again and again, and counts how long each has been silent.

    Args:
        paths: of the ranks' files.

    Attributes:
        pulses: as last read.
        silent: for each rank, beats of the median of the others since its own last one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.pulses = [read_pulse(path) for path in paths]
        self._others = [0] * len(paths)
        self.silent = [0] * len(paths)

    def look(self) -> None:
        """Read all heartbeats."""
        before, self.pulses = self.pulses, [read_pulse(path) for path in self._paths]
        for rank, (old, new) in enumerate(zip(before, self.pulses, strict=True)):
            others = sorted(pulse.beats for number, pulse in enumerate(self.pulses) if number != rank)
            if new.beats != old.beats or new.over or not new.pid:
                self._others[rank] = others[len(others) // 2] if others else 0
            self.silent[rank] = others[len(others) // 2] - self._others[rank] if others else 0
