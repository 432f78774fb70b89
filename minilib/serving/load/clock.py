"""Time that passes by itself, and time that passes when somebody says so."""

from __future__ import annotations

import time


class WallClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def now(self) -> float:
        """The time, in seconds."""
        return time.perf_counter() - self._started

    def wait_until(self, moment: float) -> None:
        """Sleep until then; not at all if it is past."""
        time.sleep(max(0.0, moment - self.now()))


class VirtualClock:
    """Seconds that a simulation counts; it starts at 0."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """The time, in seconds."""
        return self._now

    def wait_until(self, moment: float) -> None:
        """It is then; nothing changes if that is past."""
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: for a negative time, or one that is no number.
        """
        if not seconds >= 0:
            raise ValueError(f"time passes by 0 seconds or more, got {seconds!r}")
        self._now += seconds
