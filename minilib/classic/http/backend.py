"""A backend to be balanced: an HTTP server with one worker, a queue in front of it, and a speed.

GET /some/key?work=0.002 takes 0.002 / speed seconds of the worker, after all requests that came before.

The worker only sleeps, so dozens of backends share a core. It has a clock of its own: a request ends at its start plus
work / speed, and the next one starts at that moment even if the event loop wakes up late. So lateness does not add up,
and the queueing delay that a response reports is that of the queue alone.
"""

from __future__ import annotations

import asyncio
import json
import math
from urllib.parse import parse_qs

from minilib.classic.http.wire import HttpError, HttpServer, Response

MAX_WORK = 60.0  # seconds at speed 1


class Backend(HttpServer):
    """One worker, first come first served.

    Args:
        number: its name in responses.
        speed: seconds of work done in a second, finite and above 0.

    Attributes:
        served: requests finished so far.
        queue_length: requests not finished, including the one at work.

    Raises:
        ValueError: if the speed is out of range.
    """

    def __init__(self, number: int, speed: float = 1.0) -> None:
        if not 0 < speed < math.inf:
            raise ValueError(f"a speed is finite and above 0, got {speed!r}")
        super().__init__(self._work)
        self.number, self.speed, self.served, self.queue_length = number, speed, 0, 0
        self._worker, self._free_at = asyncio.Lock(), 0.0  # waiters get a Lock in their order

    def check_invariants(self) -> None:
        """A request in the queue has a connection that waits for it."""
        assert 0 <= self.queue_length <= len(self._connections), f"{self.queue_length} requests wait for nobody"

    async def _work(self, target: str) -> Response:
        try:
            work = float(parse_qs(target.partition("?")[2]).get("work", ["0"])[-1])
        except ValueError:
            work = math.nan
        if not 0 <= work <= MAX_WORK:
            raise HttpError(400, f"work is a number of seconds from 0 to {MAX_WORK:g}")
        clock = asyncio.get_running_loop().time
        came, self.queue_length = clock(), self.queue_length + 1
        try:
            async with self._worker:
                start, service = max(came, self._free_at), work / self.speed
                await asyncio.sleep(start + service - clock())
                self._free_at, self.served = start + service, self.served + 1
        finally:
            self.queue_length -= 1
        said = {"backend": self.number, "served": self.served, "came": came, "queued": start - came, "service": service}
        return Response(200, json.dumps(said).encode(), "application/json")
