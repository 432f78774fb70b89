"""Two sets of three numbers: RED of a service that is called, USE of a resource that it needs.

    RED    rate, errors, duration              what callers see
    USE    utilisation, saturation, errors     why

Utilisation and saturation are integrals over time, so that two laws hold exactly: utilisation is the rate times the
mean time held over the capacity, and the mean length of the queue is the rate times the mean wait (Little).

Source: Wilkie, "The RED method", 2015; Gregg, "Thinking methodically about performance", CACM 2013.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from minilib.classic.observed_service.tracer import Tracer
from minilib.mechanisms.telemetry import Histogram


@dataclass
class Red:
    """Requests of one instance of a service.

    Attributes:
        errors: requests that failed.
        durations: ns of all requests, failed ones too.
    """

    errors: int = 0
    durations: Histogram = field(default_factory=lambda: Histogram(1.05))

    def add(self, duration_ns: int, failed: bool) -> None:
        """Count a request that is over."""
        self.durations.add(duration_ns)
        self.errors += failed

    def rate(self, seconds: float) -> float:
        """Requests a second, over this time."""
        return self.durations.count / seconds

    @classmethod
    def merged(cls, parts: list[Red]) -> Red:
        """The numbers of a service from those of its instances."""
        return cls(sum(part.errors for part in parts), Histogram.merged(part.durations for part in parts))


@dataclass(frozen=True)
class Use:
    """A resource over a stretch of time.

    Args:
        utilisation: share of its capacity that was held, 0 to 1.
        saturation: mean number of those that waited for it.
        errors: those that gave up, or were refused.
    """

    utilisation: float
    saturation: float
    errors: int


class Resource:
    """Something that at most `capacity` tasks hold at once, first come first served: workers, a lock, connections.

    Args:
        name: in spans and metrics.
        capacity: how many may hold it.
        tracer: records a span "wait for <name>" in the trace of whoever waits; its attribute `holder` is the trace to
            which it was given last. What belongs to no trace waits unrecorded.

    Attributes:
        held, waiting: how many do so now.
        acquired: how often it was given to somebody.

    Raises:
        ValueError: if the capacity is below 1.
    """

    def __init__(self, name: str, capacity: int, tracer: Tracer) -> None:
        if capacity < 1:
            raise ValueError(f"a resource has room for one holder or more, got {capacity}")
        self.name, self.capacity, self._tracer = name, capacity, tracer
        self.held = self.waiting = self.acquired = self._errors = 0
        self._held_seconds = self._waiting_seconds = 0.0
        self._slots, self._since = asyncio.Semaphore(capacity), asyncio.get_running_loop().time()
        self._last_change, self._holder = self._since, ""

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for it, hold it for the block, and give it back, however the block ends."""
        if self._slots.locked():
            await self._wait()
        else:
            await self._slots.acquire()
        self._change(held=1)
        self.acquired += 1
        self._holder = self._tracer.current.trace_id if self._tracer.current else ""
        try:
            yield
        finally:
            self._change(held=-1)
            self._slots.release()

    def use(self) -> Use:
        """What has been counted since it was made."""
        self._change()
        seconds = self._last_change - self._since or 1.0
        utilisation = self._held_seconds / (self.capacity * seconds)
        return Use(utilisation, self._waiting_seconds / seconds, self._errors)

    def check_invariants(self) -> None:
        """Nobody waits for a resource that has room, and nobody holds more than there is."""
        assert 0 <= self.held <= self.capacity, f"{self.held} of {self.capacity} are held"
        assert self.waiting >= 0, f"{self.waiting} wait"

    async def _wait(self) -> None:
        in_trace = self._tracer.current is not None
        with self._tracer.span(f"wait for {self.name}", holder=self._holder) if in_trace else nullcontext():
            self._change(waiting=1)
            try:
                await self._slots.acquire()
            except asyncio.CancelledError:
                self._errors += 1
                raise
            finally:
                self._change(waiting=-1)

    def _change(self, held: int = 0, waiting: int = 0) -> None:
        now = asyncio.get_running_loop().time()
        self._held_seconds += self.held * (now - self._last_change)
        self._waiting_seconds += self.waiting * (now - self._last_change)
        self._last_change = now
        self.held, self.waiting = self.held + held, self.waiting + waiting
