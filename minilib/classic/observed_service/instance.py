"""One instance of a service: a handler behind workers, observed in three ways, with faults that can be switched on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from minilib.classic.http.wire import HttpError, Response
from minilib.classic.observed_service.logs import JsonLog
from minilib.classic.observed_service.metrics import Red, Resource
from minilib.classic.observed_service.traceparent import HEADER, parse_traceparent
from minilib.classic.observed_service.tracer import ALL, Tracer, now_ns
from minilib.mechanisms.telemetry import HeadSampler, Span

CALL_TIMEOUT = 2.0  # seconds for one attempt


class Network(Protocol):
    """Carries a request to an instance, with nothing but a target and headers."""

    async def call(self, process: str, target: str, headers: Mapping[str, str]) -> Response:
        """The response of an instance; OSError or HttpError if there is none."""


@dataclass(frozen=True)
class Pause:
    """Stops of a whole process, as a garbage collector makes them: at every period · (k + ½) of the loop's clock.

    Args:
        period: seconds from the beginning of one stop to that of the next.
        length: seconds that each takes.
    """

    period: float
    length: float

    def next_end(self, now: float) -> float:
        """When the first stop ends that is not over by now."""
        number = max(0, int((now - self.period / 2 - self.length) // self.period) + 1)
        return self.period * (number + 0.5) + self.length


class Instance:
    """Answers requests, calls other instances, and tells of both in spans, RED and USE metrics, and a log.

    Args:
        process: service and number, such as "store/2".
        handle: coroutine function, this instance → None; what a request makes it do. An HttpError is its answer.
        network: to other instances.
        spans: where its spans go.
        rng: of ids and durations.
        workers: requests at work at once; others wait.
        speed: seconds of work that it does in a second.
        pause: stops of the whole process, or None.
        sampler: of traces that begin here.

    Attributes:
        red: of its requests.
        workers, lock: what its requests hold; the lock is for one at a time.
        log: of its requests.
        requests: how many have come.
    """

    def __init__(
        self,
        process: str,
        handle: Callable[[Instance], Awaitable[None]],
        network: Network,
        spans: list[Span],
        rng: random.Random,
        workers: int = 16,
        speed: float = 1.0,
        pause: Pause | None = None,
        sampler: HeadSampler = ALL,
    ) -> None:
        self.process, self.service, self.speed, self.pause = process, process.partition("/")[0], speed, pause
        self.tracer, self.red, self.log = Tracer(process, spans, rng, sampler), Red(), JsonLog(process)
        self.workers, self.lock = Resource("workers", workers, self.tracer), Resource("lock", 1, self.tracer)
        self.requests, self._handle, self._network, self._rng = 0, handle, network, rng

    async def respond(self, target: str, headers: Mapping[str, str]) -> Response:
        """Answer a request as a server: its span hangs from that of the caller."""
        start, self.requests = now_ns(), self.requests + 1
        with self.tracer.span(self.service, parse_traceparent(headers.get(HEADER))) as attributes:
            try:
                async with self.workers.hold():
                    await self._handle(self)
                response = Response(200, b"")
            except HttpError as error:
                response = error.response()
            attributes["status"] = response.status
            failed, took = response.status >= 500, now_ns() - start
            self.red.add(took, failed)
            message = "request failed" if failed else "request answered"
            self.log.write(now_ns(), message, self.tracer.current, status=response.status, duration_ns=took)
        return response

    async def work(self, seconds: float, name: str = "work") -> None:
        """Be busy for this time at speed 1, give or take a fifth; at most one stop of the process comes on top."""
        seconds *= self._rng.uniform(0.8, 1.2) / self.speed
        with self.tracer.span(name):
            now = asyncio.get_running_loop().time()
            if self.pause is None or (stop := self.pause.next_end(now)) - self.pause.length >= now + seconds:
                await asyncio.sleep(seconds)
                return
            before = max(0.0, stop - self.pause.length - now)
            await asyncio.sleep(before)
            with self.tracer.span("pause"):
                await asyncio.sleep(stop - max(now, stop - self.pause.length))
            await asyncio.sleep(seconds - before)

    async def call(self, process: str) -> None:
        """Call another instance, as a client.

        Raises:
            HttpError: if it does not answer with 200, or not at all.
        """
        service = process.partition("/")[0]
        with self.tracer.span(f"GET {service}", peer=process) as attributes:
            try:
                async with asyncio.timeout(CALL_TIMEOUT):
                    headers = {HEADER: self.tracer.current.encode()}
                    response = await self._network.call(process, f"/{service}", headers)
            except OSError as error:
                raise HttpError(502, f"no answer from {process}: {type(error).__name__}") from error
            attributes["status"] = response.status
            if response.status != 200:
                raise HttpError(502, f"{process} answered {response.status}")

    async def call_all(self, processes: Sequence[str]) -> None:
        """Call several instances at once, and wait for all.

        Raises:
            HttpError: of the first that fails; the other calls are cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for process in processes:
                    group.create_task(self.call(process))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def call_with_retry(self, process: str, backoff: float) -> None:
        """Call once more, after a pause of `backoff` seconds, if the first call has failed."""
        try:
            await self.call(process)
        except HttpError:
            with self.tracer.span(f"retry {process.partition('/')[0]}"):
                await asyncio.sleep(backoff)
                await self.call(process)
