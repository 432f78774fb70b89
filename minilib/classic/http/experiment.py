"""Experiments with real HTTP: backends, a proxy and clients in one event loop, behind functions that anybody may call.

The loop runs in a thread of its own, since a notebook has one already. With all in one process, policies are plain
objects that are there afterwards. The price: they share one core, and a request takes about half a millisecond of it.
`Report.overhead` says what that did to latencies; keep the requests a second well below what the core can do.
"""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from minilib.classic.http.backend import Backend
from minilib.classic.http.connection import Client
from minilib.classic.http.load import LoadGenerator, Report, arrivals_at, works_of
from minilib.classic.http.proxy import Proxy
from minilib.mechanisms.balancing import Policy
from minilib.numbers.load_metrics import max_over_mean

Result = TypeVar("Result")


@dataclass(frozen=True)
class Event:
    """Something that happens to a backend while requests flow; made by `slow`, `kill` and `restart`.

    Args:
        after: requests sent before it happens.
        backend: to whom.
        action: what happens, in one word.
        factor: how many times slower it gets.
    """

    after: int
    backend: int
    action: str
    factor: float = 1.0


def slow(backend: int, after: int, factor: float) -> Event:
    """A backend becomes `factor` times slower once `after` requests were sent."""
    return Event(after, backend, "slow", factor)


def kill(backend: int, after: int) -> Event:
    """A backend dies once `after` requests were sent: connections are reset, and what it was doing is lost."""
    return Event(after, backend, "kill")


def restart(backend: int, after: int) -> Event:
    """A killed backend listens again, on the same port, once `after` requests were sent."""
    return Event(after, backend, "restart")


@dataclass(frozen=True)
class Burst:
    """Requests that came all at once.

    Args:
        queues: how many of them each backend had before it began the first.
        queued: seconds that each request waited, in no order.
    """

    queues: tuple[int, ...]
    queued: tuple[float, ...]

    @property
    def max_over_mean(self) -> float:
        """The longest queue over the mean."""
        return max_over_mean(self.queues)


def run_experiment(
    policy: Policy,
    speeds: Sequence[float],
    keys: Sequence[str],
    *,
    work: float | Sequence[float] = 0.005,
    concurrency: int | None = None,
    utilization: float | None = None,
    seed: int = 0,
    events: Sequence[Event] = (),
    window: int = 64,
    signal: str = "requests",
    answer_within: float = 2.0,
    limit: float = 60.0,
) -> Report:
    """Send keys through a proxy with this policy to backends of these speeds.

    Args:
        policy: changed by what it does.
        speeds: one a backend, in seconds of work a second.
        keys: one a request.
        work: seconds at speed 1 that a request takes, or that each takes.
        concurrency: for a closed loop of so many clients; 16 if utilization is not given either.
        utilization: for an open loop at this share of what all backends together can do.
        seed: of the open loop's arrivals.
        events: what happens meanwhile.
        window, signal, answer_within: as of Proxy.
        limit: seconds that all of it may take.

    Raises:
        ValueError: if an argument is out of range, or both loops are asked for.
        TimeoutError: if it takes longer than the limit.
    """
    works = works_of(work, keys, speeds)
    if concurrency is not None and utilization is not None:
        raise ValueError("concurrency makes a closed loop, utilization an open one; give one of them")
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency is 1 client or more, got {concurrency}")
    arrivals = None if utilization is None else arrivals_at(utilization, works, speeds, seed)
    for event in events:
        if event.backend not in range(len(speeds)) or not 0 <= event.after < len(keys) or event.factor <= 0:
            raise ValueError(f"{event} is about no backend of {len(speeds)}, or comes after all {len(keys)} requests")

    async def experiment() -> Report:
        async with stage(policy, speeds, window=window, signal=signal, answer_within=answer_within) as on_stage:
            backends, proxy, client = on_stage
            async with asyncio.TaskGroup() as restarts:

                def happen(sent: int) -> None:
                    for event in events:
                        if event.after == sent:
                            _happen(event, backends[event.backend], restarts)

                generator = LoadGenerator(client, keys, works, limit, happen)
                start = asyncio.get_running_loop().time()
                if arrivals is not None:
                    answers = await generator.open_loop(arrivals)
                else:
                    answers = await generator.closed_loop(concurrency or 16)
                seconds = asyncio.get_running_loop().time() - start
            return Report(tuple(answers), seconds, proxy.retries, tuple(proxy.backends))

    return run_in_thread(experiment, limit)


def run_bursts(
    policy: Policy, num_backends: int, num_requests: int, bursts: int = 1, *, work: float = 0.001, limit: float = 60.0
) -> list[Burst]:
    """Send requests all at once to idle backends, and look at the queues before anybody begins: balls in bins.

    Args:
        policy: changed by what it does.
        num_backends: bins, of speed 1.
        num_requests: balls a burst; request number i has the key k<i>.
        bursts: how often, each with the backends idle again.
        work: seconds that a request takes.
        limit: seconds that all of it may take.

    Raises:
        ValueError: if a number is below 1.
        TimeoutError: if it takes longer than the limit.

    Cost: about num_backends + 4 · num_requests sockets; many systems allow a process 1024.
    """
    if min(num_backends, num_requests, bursts) < 1:
        raise ValueError(f"one of each is needed at least, got {num_backends=}, {num_requests=}, {bursts=}")

    async def experiment() -> list[Burst]:
        async with stage(policy, [1.0] * num_backends, answer_within=limit) as (backends, _, client):
            return [await burst(backends, client) for _ in range(bursts)]

    async def burst(backends: list[Backend], client: Client) -> Burst:
        for backend in backends:
            backend.hold()
        generator = LoadGenerator(client, [f"k{i}" for i in range(num_requests)], [work] * num_requests, limit)
        sending = asyncio.create_task(generator.closed_loop(num_requests))
        while sum(backend.queue_length for backend in backends) < num_requests and not sending.done():
            await asyncio.sleep(0.001)
        queues = tuple(backend.queue_length for backend in backends)
        for backend in backends:
            backend.release()
        return Burst(queues, tuple(answer.queued for answer in await sending))

    return run_in_thread(experiment, limit)


def run_in_thread(main: Callable[[], Coroutine[Any, Any, Result]], limit: float) -> Result:
    """Run a coroutine function in an event loop of its own, in a thread of its own, and wait for it.

    Whoever interrupts the wait cancels the coroutine, which still closes what it has opened.

    Raises:
        TimeoutError: if it takes longer than `limit` seconds.
    """

    cancel: list[Callable[[], object]] = []

    async def limited() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        cancel.append(lambda: loop.call_soon_threadsafe(task.cancel))
        async with asyncio.timeout(limit):
            return await main()

    def run() -> Result:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_PreciseSelector())) as runner:
            return runner.run(limited())

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(run)
        try:
            return result.result()
        except BaseException:
            with suppress(RuntimeError):  # the loop is closed: it has failed by itself
                for each in cancel:
                    each()
            raise


@asynccontextmanager
async def stage(
    policy: Policy, speeds: Sequence[float], **options: Any
) -> AsyncIterator[tuple[list[Backend], Proxy, Client]]:
    """Backends and a proxy that listen, and a client of the proxy; in the end they are closed, in this order reversed.

    Args:
        policy, options: as of Proxy.
        speeds: one a backend.
    """
    backends = [Backend(number, speed) for number, speed in enumerate(speeds)]
    try:
        proxy = Proxy(policy, [await backend.start() for backend in backends], **options)
        client = Client(await proxy.start())
        try:
            yield backends, proxy, client
        finally:
            await client.close()
            await proxy.close(grace=0.0)  # nobody is left who waits for an answer
    finally:
        for backend in backends:
            await backend.close(grace=0.0)


def _happen(event: Event, backend: Backend, restarts: asyncio.TaskGroup) -> None:
    if event.action == "slow":
        backend.speed /= event.factor
    elif event.action == "kill":
        backend.kill()
    elif not backend.listening:
        restarts.create_task(backend.start())


class _PreciseSelector(selectors.DefaultSelector):
    """Waits to the microsecond where that can be had: epoll rounds up to milliseconds, and select does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        number = self.fileno()
        if timeout is not None and timeout > 0 and number < 1024:  # more than select can take
            select.select([number], [], [], timeout)
            timeout = 0
        return super().select(timeout)
