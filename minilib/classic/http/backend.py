"""A backend to be balanced: an HTTP server with one worker, a queue before it, and a speed that is set.

    GET /some/key?work=0.002       takes 0.002 / speed seconds of the worker, after whatever came before it
    GET /-/health                  is answered at once

The worker only waits, so dozens of backends share a core. It keeps its own time: a request is done at its start plus
its work over the speed, and the next one starts at that very moment, even if the event loop wakes late. So lateness
does not add up, and the queueing delay that an answer reports is that of the queue alone.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from dataclasses import dataclass
from urllib.parse import parse_qs

from minilib.classic.http.server import HttpServer, error
from minilib.classic.http.wire import Request, Response

HEALTH = "/-/health"
MAX_WORK = 60.0  # seconds at speed 1


@dataclass
class _Job:
    """A request in the queue: when it came, the seconds that it takes at speed 1, and its answer to come."""

    came: float
    work: float
    done: asyncio.Future


class Backend(HttpServer):
    """One worker, first come first served.

    Args:
        number: what its answers call it.
        speed: how many seconds of work it does in a second, above 0; setting it counts from the next request on.
        timeout: as of HttpServer.

    Attributes:
        served: requests answered since it was made.

    Raises:
        ValueError: if the speed is not above 0.
    """

    def __init__(self, number: int, speed: float = 1.0, timeout: float = 5.0) -> None:
        super().__init__(self._work, timeout)
        self.number, self.speed, self.served = number, speed, 0
        self._queue: deque[_Job] = deque()
        self._job: _Job | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._free_at, self._held = 0.0, False

    @property
    def speed(self) -> float:
        """Seconds of work that it does in a second."""
        return self._speed

    @speed.setter
    def speed(self, speed: float) -> None:
        if not 0 < speed < math.inf:
            raise ValueError(f"a speed is finite and above 0, got {speed!r}")
        self._speed = speed

    @property
    def queue_length(self) -> int:
        """Requests that it has and has not answered, that at work included."""
        return len(self._queue) + (self._job is not None)

    def hold(self) -> None:
        """Begin no further request, so that a queue can be looked at."""
        self._held = True

    def release(self) -> None:
        """Go on after `hold`."""
        self._held, self._free_at = False, max(self._free_at, asyncio.get_running_loop().time())
        self._begin()

    def kill(self) -> None:
        """Die as a process does that is killed: connections reset, queue lost. `start` brings it back, empty."""
        super().kill()
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()
        self._job, self._timer, self._free_at = None, None, 0.0

    def check_invariants(self) -> None:
        """It works while there is work, unless it is held."""
        super().check_invariants()
        assert (self._job is None) == (self._timer is None), "somebody is served and nobody counts the time"
        assert self._job is not None or self._held or not self._queue, "somebody waits and nobody works"

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
        loop = asyncio.get_running_loop()
        job = _Job(loop.time(), work, loop.create_future())
        self._queue.append(job)
        self._begin()
        queued, service = await job.done
        answer = {"backend": self.number, "queued": queued, "service": service, "served": self.served}
        return Response(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _begin(self) -> None:
        """Take the next request if the worker is free."""
        if self._job is None and self._queue and not self._held:
            self._job = self._queue.popleft()
            start = max(self._job.came, self._free_at)
            self._free_at = start + self._job.work / self.speed
            self._timer = asyncio.get_running_loop().call_at(self._free_at, self._finish, start)

    def _finish(self, start: float) -> None:
        job, self._job, self._timer = self._job, None, None
        self.served += 1
        if not job.done.done():  # otherwise whoever asked is gone
            job.done.set_result((start - job.came, self._free_at - start))
        self._begin()
