"""When a process counts as hung, when one that crashed is started again, and when that is given up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Supervision:
    """Limits of an engine's process.

    Args:
        start_timeout: seconds that it may take to load its model.
        step_timeout: seconds that a step may take; after them the process is killed.
        most_crashes: so many within `window` end the engine.
        window: seconds.
        first_pause: seconds before a process that crashed is started again; twice as many after each further crash.
        longest_pause: most of those seconds.

    Raises:
        ValueError: if a limit makes no sense.
    """

    start_timeout: float = 600.0
    step_timeout: float = 60.0
    most_crashes: int = 5
    window: float = 300.0
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def __post_init__(self) -> None:
        for name in ("start_timeout", "step_timeout", "window"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)!r}")
        if not self.most_crashes >= 1:
            raise ValueError(f"most_crashes must be at least 1, got {self.most_crashes!r}")
        if not 0 <= self.first_pause <= self.longest_pause:
            raise ValueError(
                f"pauses must be 0 ≤ first_pause ≤ longest_pause, got {self.first_pause!r} and {self.longest_pause!r}"
            )


class Crashes:
    """Crashes within a window of time.

    Args:
        limits: how many are too many, and how long to pause.
    """

    def __init__(self, limits: Supervision) -> None:
        self.limits = limits
        self._times: deque[float] = deque()

    def pause(self, now: float) -> float | None:
        """Note a crash; seconds to wait before the next start, None if there were too many."""
        self._times.append(now)
        while self._times[0] <= now - self.limits.window:
            self._times.popleft()
        if len(self._times) >= self.limits.most_crashes:
            return None
        return min(self.limits.first_pause * 2 ** (len(self._times) - 1), self.limits.longest_pause)
