"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do.

Sleeps and timeouts cost no time and end exactly when they are due, so a run gives the same numbers on every machine,
however busy. Nothing but timers may be waited for: what arrives over a network arrives in real time.
"""

from __future__ import annotations

import asyncio
import selectors


class NothingWillHappen(RuntimeError):
    """All tasks wait, and no timer is set: in real time they would wait for ever."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a file until a timer is due, makes the timer due."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0)
        if not ready and timeout is None:
            raise NothingWillHappen("every task waits for something that no timer and no other task will bring about")
        if not ready:
            self.now += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s; `time()` is the time of the last timer that was due."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._jumping.now
