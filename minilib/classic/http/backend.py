"""A backend to be balanced: an HTTP server with one worker, a queue in front of it, and a speed.

    GET /some/key?work=0.002       takes 0.002 / speed seconds of the worker, after all requests that came before
    GET /-/health                  is answered at once

The worker only sleeps, so dozens of backends share a core. It has a clock of its own: a request ends at its start plus
work / speed, and the next one starts at that moment even if the event loop wakes up late. So lateness does not add up,
and the queueing delay that a response reports is that of the queue alone.
"""

from __future__ import annotations

import asyncio
import json
import math
from urllib.parse import parse_qs

from minilib.classic.http.server import HttpServer, error
from minilib.classic.http.wire import Request, Response

HEALTH = "/-/health"
MAX_WORK = 60.0  # seconds at speed 1


class Backend(HttpServer):
    """One worker, first come first served.

    Args:
        number: its name in responses.
        speed: seconds of work done in a second, finite and above 0; may be set while it runs.
        timeout: as of HttpServer.

    Attributes:
        served: requests finished so far.
        queue_length: requests not finished, including the one at work.

    Raises:
        ValueError: if the speed is out of range.
    """

    def __init__(self, number: int, speed: float = 1.0, timeout: float = 5.0) -> None:
        super().__init__(self._work, timeout)
        self.number, self.speed, self.served, self.queue_length = number, speed, 0, 0
        self._worker, self._free_at = asyncio.Lock(), 0.0  # waiters get a Lock in their order

    @property
    def speed(self) -> float:
        """Seconds of work done in a second."""
        return self._speed

    @speed.setter
    def speed(self, speed: float) -> None:
        if not 0 < speed < math.inf:
            raise ValueError(f"a speed is finite and above 0, got {speed!r}")
        self._speed = speed

    async def hold(self) -> None:
        """Keep the worker from starting a request until `release`, so that a queue builds up."""
        await self._worker.acquire()

    def release(self) -> None:
        """Let the worker go on after `hold`."""
        self._free_at = max(self._free_at, asyncio.get_running_loop().time())
        self._worker.release()

    def check_invariants(self) -> None:
        """A request in the queue is one that is being answered."""
        super().check_invariants()
        assert 0 <= self.queue_length <= len(self._answering), f"{self.queue_length} requests wait for nobody"

    async def _work(self, request: Request) -> Response:
        path, _, query = request.target.partition("?")
        if path == HEALTH:
            return Response(200, b"alive\n")
        try:
            work = float(parse_qs(query).get("work", ["0"])[-1])
        except ValueError:
            work = math.nan
        if not 0 <= work <= MAX_WORK:
            return error(400, f"work is a number of seconds from 0 to {MAX_WORK:g}")
        clock = asyncio.get_running_loop().time
        came, self.queue_length = clock(), self.queue_length + 1
        try:
            async with self._worker:
                start, service = max(came, self._free_at), work / self.speed
                await asyncio.sleep(start + service - clock())
                self._free_at, self.served = start + service, self.served + 1
        finally:
            self.queue_length -= 1
        seconds = {"came": came, "queued": start - came, "service": service}
        body = json.dumps({"backend": self.number, "served": self.served, **seconds})
        return Response(200, body.encode(), {"Content-Type": "application/json"})
