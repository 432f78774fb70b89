"""Experiments with real HTTP: backends, a proxy and clients in one event loop, and the same open loop without HTTP.

The loop runs in a thread, because a notebook has a running loop already. One process holds everything, so a policy is a
plain object that can be inspected afterwards. Everything also shares one core, and LoadReport.overhead says
how much that adds to latencies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import quote

from minilib.classic.http.backend import Backend
from minilib.classic.http.client import Client
from minilib.classic.http.load import Answer, LoadReport, poisson_arrivals, send_all, work_of_each
from minilib.classic.http.proxy import BackendHealth, Proxy
from minilib.classic.http.wire import BadMessage, Response
from minilib.mechanisms.balancing import Policy

Result = TypeVar("Result")
Stage = tuple[list[Backend], Proxy, Client]
BackendEvent = tuple[int, int, Callable[[Backend], Awaitable[object] | None]]


def run_experiment(
    policy: Policy,
    speeds: Sequence[float],
    keys: Sequence[str],
    *,
    work: float | Sequence[float] = 0.005,
    concurrency: int | None = None,
    utilization: float | None = None,
    seed: int = 0,
    events: Sequence[BackendEvent] = (),
    limit: float = 60.0,
    **options: Any,
) -> LoadReport:
    """Send one request per key through a proxy to backends of these speeds.

    Args:
        policy, options: of the proxy.
        speeds: of the backends, seconds of work per second.
        keys: of the requests, in order.
        work: seconds that a request takes at speed 1: one number for all, or one each.
        concurrency: clients of a closed loop; 16 if no utilization is given.
        utilization, seed: an open loop whose arrivals keep the backends busy for this share of the time.
        events: such as (100, 2, Backend.kill), which kills backend 2 after 100 requests were sent.
        limit: seconds that the experiment may take.

    Raises:
        ValueError: if an argument is out of range, or both loops are asked for.
        TimeoutError: if the experiment exceeds its limit.
    """
    works = work_of_each(work, keys, speeds)
    if concurrency is not None and utilization is not None:
        raise ValueError("concurrency makes a closed loop, utilization an open one; give one of them")
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency is 1 client or more, got {concurrency}")
    arrivals = None if utilization is None else poisson_arrivals(utilization, works, speeds, seed)
    for after, backend, _ in events:
        if backend not in range(len(speeds)) or after not in range(len(keys)):
            raise ValueError(f"no backend {backend} of {len(speeds)}, or no request {after} of {len(keys)}")

    async def experiment() -> LoadReport:
        async with stage(policy, speeds, **options) as (backends, proxy, client):

            async def send(number: int) -> Response | None:
                for after, backend, method in events:
                    if after == number and (pending := method(backends[backend])) is not None:
                        await pending
                with suppress(OSError, BadMessage):
                    return await client.get(f"/{quote(keys[number], safe='')}?work={works[number]!r}", limit)
                return None

            answers = await send_all(send, keys, arrivals, concurrency or 16)
            return LoadReport(answers, proxy.retries, proxy.backends)

    return run_in_thread(experiment, limit)


def run_bursts(
    policy: Policy, num_backends: int, num_requests: int, bursts: int = 1, limit: float = 60.0
) -> list[list[int]]:
    """Send requests k0, k1, … at once to idle backends that start none before all have arrived: balls in bins.

    Returns:
        For each burst the length of every backend's queue.

    Raises:
        ValueError: if a number is below 1.
        TimeoutError: if the bursts take more than `limit` seconds.

    Cost: about num_backends + 4 · num_requests sockets; many systems allow a process 1024.
    """
    if min(num_backends, num_requests, bursts) < 1:
        raise ValueError(f"one of each is needed at least, got {num_backends=}, {num_requests=}, {bursts=}")

    async def experiment() -> list[list[int]]:
        async with stage(policy, [1.0] * num_backends, answer_within=limit) as (backends, _, client):
            return [await burst(backends, client) for _ in range(bursts)]

    async def burst(backends: list[Backend], client: Client) -> list[int]:
        for backend in backends:
            await backend.hold()
        async with asyncio.TaskGroup() as group:
            for number in range(num_requests):
                group.create_task(client.get(f"/k{number}", limit))
            while sum(backend.queue_length for backend in backends) < num_requests:
                await asyncio.sleep(0.001)
            queues = [backend.queue_length for backend in backends]
            for backend in backends:
                backend.release()
        return queues

    return run_in_thread(experiment, limit)


def simulate_experiment(
    policy: Policy,
    speeds: Sequence[float],
    keys: Sequence[str],
    *,
    work: float | Sequence[float] = 0.005,
    utilization: float = 0.8,
    seed: int = 0,
    window: int = 64,
) -> LoadReport:
    """What `run_experiment` would report of an open loop if HTTP and the event loop cost nothing: the price of it.

    The same requests arrive at the same times, and no clock is read. Arguments and errors are those of run_experiment.
    """
    works, targets = work_of_each(work, keys, speeds), range(len(speeds))
    free_at, in_flight, answers = [0.0] * len(speeds), [], []
    for key, seconds, now in zip(keys, works, poisson_arrivals(utilization, works, speeds, seed), strict=True):
        in_flight = [(end, target) for end, target in in_flight if end > now]
        chosen = policy.choose(key, [sum(target == each for _, target in in_flight) for each in targets])
        start, service = max(now, free_at[chosen]), seconds / speeds[chosen]
        free_at[chosen] = start + service
        in_flight.append((free_at[chosen], chosen))
        answers.append(Answer(key, 200, chosen, free_at[chosen] - now, start - now, service))
        if len(answers) % window == 0:
            policy.observe([sum(answer.backend == each for answer in answers[-window:]) for each in targets])
    return LoadReport(answers, retries=0, health=[BackendHealth() for _ in speeds])


def run_in_thread(main: Callable[[], Coroutine[Any, Any, Result]], limit: float) -> Result:
    """Run a coroutine function in an event loop of its own in a thread, and wait for it.

    An interrupt of the wait cancels the coroutine, which then closes what it has opened.

    Raises:
        TimeoutError: if it exceeds `limit` seconds.
    """
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = []

    async def limited() -> Result:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        async with asyncio.timeout(limit):
            return await main()

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lambda: asyncio.run(limited()))
        try:
            return result.result()
        except BaseException:
            for loop, task in running:
                with suppress(RuntimeError):  # the loop is closed: the coroutine itself has failed
                    loop.call_soon_threadsafe(task.cancel)
            raise


@asynccontextmanager
async def stage(policy: Policy, speeds: Sequence[float], **options: Any) -> AsyncIterator[Stage]:
    """Listening backends of these speeds, a proxy with `options` in front of them, and a client of the proxy."""
    backends = [Backend(number, speed) for number, speed in enumerate(speeds)]
    async with AsyncExitStack() as stack:
        for backend in backends:
            stack.push_async_callback(backend.close, grace=0.0)  # at that point nobody waits for a response
        proxy = Proxy(policy, [await backend.start() for backend in backends], **options)
        stack.push_async_callback(proxy.close, grace=0.0)
        client = Client(await proxy.start())
        stack.push_async_callback(client.close)
        yield backends, proxy, client
