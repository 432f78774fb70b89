"""Experiments with real HTTP: backends, a proxy and clients in one event loop, and the same open loop without HTTP.

    closed loop    a number of clients, each sends its next request after its answer    a slow server slows them down
    open loop      requests arrive by a Poisson process                                 a slow server gets a queue

In the open loop a latency counts from the moment at which the request was due, so that a stall shows in all requests
that it delays ("coordinated omission", Tene, "How NOT to Measure Latency", 2013).

The event loop runs in a thread, because a notebook has a running one already. One process and one core hold everything,
so a policy is a plain object that can be inspected afterwards, and latencies include what the core does for others.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple
from urllib.parse import quote

from minilib.classic.http.backend import MAX_WORK, Backend
from minilib.classic.http.proxy import Proxy
from minilib.classic.http.wire import Client, HttpError, HttpServer, Result
from minilib.mechanisms.balancing import Policy
from minilib.numbers.load_metrics import Delay

LIMIT = 60.0  # seconds that an experiment may take
MAX_OUTSTANDING = 128  # requests of an open loop; further ones wait in the client while their latency counts
Work = float | Sequence[float]  # seconds: one number for all requests, or one each
BackendEvent = tuple[int, int, Callable[[Backend], Coroutine[Any, Any, object]]]


class Answer(NamedTuple):
    """A response of status 200: who sent it, and seconds since the request and in the backend's queue."""

    backend: int
    latency: float
    queued: float


@dataclass(frozen=True)
class LoadReport:
    """The answer to each request in their order, None for one without."""

    answers: Sequence[Answer | None]
    num_backends: int

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return sum(answer is None for answer in self.answers)

    @property
    def counts(self) -> list[int]:
        """Requests that each backend answered."""
        return self.counts_of(slice(None))

    def counts_of(self, part: slice) -> list[int]:
        """Requests that each backend answered among a part of all, such as slice(500, None)."""
        backends = [answer.backend for answer in self.answers[part] if answer]
        return [backends.count(number) for number in range(self.num_backends)]

    @property
    def latency(self) -> Delay:
        """Seconds from request to answer."""
        return Delay.of([answer.latency for answer in self.answers if answer])

    @property
    def queueing(self) -> Delay:
        """Seconds in the queue of a backend."""
        return Delay.of([answer.queued for answer in self.answers if answer])


def zipf_keys(num_requests: int, num_keys: int, s: float = 1.0, seed: int = 0) -> list[str]:
    """Keys k0, k1, … of which k<i> is drawn in proportion to 1 / (i + 1)ˢ; s = 1 is typical of web traffic.

    Raises:
        ValueError: if an argument is out of range.

    Source: Breslau, Cao, Fan, Phillips and Shenker, "Web Caching and Zipf-like Distributions", INFOCOM 1999.
    """
    if num_requests < 0 or num_keys < 1 or s < 0:
        raise ValueError(f"needs num_requests ≥ 0, num_keys ≥ 1 and s ≥ 0, got {num_requests}, {num_keys} and {s}")
    names, weights = zip(*((f"k{rank}", (rank + 1) ** -s) for rank in range(num_keys)), strict=True)
    return random.Random(seed).choices(names, weights, k=num_requests)


def exponential_work(num_requests: int, mean: float, seed: int = 0) -> list[float]:
    """Exponentially distributed seconds of work: most requests are short, a few long."""
    rng = random.Random(seed)
    return [rng.expovariate(1.0) * mean for _ in range(num_requests)]


def run_experiment(
    policy: Policy,
    speeds: Sequence[float],
    keys: Sequence[str],
    *,
    work: Work = 0.005,
    concurrency: int | None = None,
    utilization: float | None = None,
    seed: int = 0,
    events: Sequence[BackendEvent] = (),
    **options: Any,
) -> LoadReport:
    """Send one request per key through a proxy to backends of these speeds.

    Args:
        policy, options: of the proxy.
        speeds: of the backends, seconds of work per second.
        keys: of the requests, in order.
        work: seconds that a request takes at speed 1.
        concurrency: clients of a closed loop; 16 if no utilization is given.
        utilization, seed: an open loop whose arrivals keep the backends busy for this share of the time.
        events: such as (100, 2, Backend.kill), which kills backend 2 after 100 requests were sent.

    Raises:
        ValueError: if an argument is out of range, or both loops are asked for.
        TimeoutError: if the experiment takes more than LIMIT seconds.
    """
    works, is_open = work_of_each(work, keys, speeds), utilization is not None
    if concurrency is not None and (is_open or concurrency < 1):
        raise ValueError(f"takes one client or more, or a utilization, got {concurrency=} and {utilization=}")
    for after, backend, _ in events:
        if backend not in range(len(speeds)) or after not in range(len(keys)):
            raise ValueError(f"no backend {backend} of {len(speeds)}, or no request {after} of {len(keys)}")
    arrivals = poisson_arrivals(utilization, works, speeds, seed) if is_open else [0.0] * len(keys)

    async def experiment() -> LoadReport:
        backends = [Backend(number, speed) for number, speed in enumerate(speeds)]
        async with stage(policy, backends, **options) as client:
            clock = asyncio.get_running_loop().time
            start, slots = clock(), asyncio.Semaphore(MAX_OUTSTANDING if is_open else concurrency or 16)

            async def send(number: int) -> Answer | None:
                await asyncio.sleep(start + arrivals[number] - clock())
                async with slots:  # a Semaphore admits in order of arrival
                    since = start + arrivals[number] if is_open else clock()
                    for _, backend, method in (event for event in events if event[0] == number):
                        await method(backends[backend])
                    with suppress(OSError, HttpError):
                        response = await client.get(f"/{quote(keys[number], safe='')}?work={works[number]!r}")
                        said = json.loads(response.body) if response.status == 200 else None
                        return said and Answer(said["backend"], clock() - since, said["queued"])

            return LoadReport(await asyncio.gather(*map(send, range(len(keys)))), len(backends))

    return run_in_thread(experiment)


def run_bursts(policy: Policy, num_backends: int, num_requests: int, bursts: int = 1) -> list[list[int]]:
    """Send requests k0, k1, … at once to idle backends that finish none before all have arrived: balls in bins.

    Returns:
        For each burst the length of every backend's queue.

    Raises:
        ValueError: if a number is below 1.
        TimeoutError: if the bursts take more than LIMIT seconds.

    Cost: about num_backends + 4 · num_requests sockets; many systems allow a process 1024.
    """
    if min(num_backends, num_requests, bursts) < 1:
        raise ValueError(f"one of each is needed at least, got {num_backends=}, {num_requests=}, {bursts=}")

    async def experiment() -> list[list[int]]:
        queues = []
        for _ in range(bursts):
            backends = [Backend(number) for number in range(num_backends)]
            async with stage(policy, backends, answer_within=LIMIT) as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(client.get(f"/k{n}?work={MAX_WORK}")) for n in range(num_requests)]
                while sum(backend.queue_length for backend in backends) < num_requests:
                    await asyncio.sleep(0.001)
                queues.append([backend.queue_length for backend in backends])
                for task in tasks:
                    task.cancel()
        return queues

    return run_in_thread(experiment)


def simulate_experiment(
    policy: Policy, speeds: Sequence[float], keys: Sequence[str], *, work: Work, utilization: float, seed: int
) -> LoadReport:
    """What `run_experiment` would report of an open loop if HTTP and the event loop cost nothing: the price of it.

    The same requests arrive at the same times, and no clock is read. The policy chooses and does not observe. Arguments
    and errors are those of run_experiment.
    """
    works, ends, answers = work_of_each(work, keys, speeds), [[] for _ in speeds], []
    for key, seconds, now in zip(keys, works, poisson_arrivals(utilization, works, speeds, seed), strict=True):
        chosen = policy.choose(key, [sum(end > now for end in of_backend) for of_backend in ends])
        start = max([now, *ends[chosen][-1:]])
        ends[chosen].append(start + seconds / speeds[chosen])
        answers.append(Answer(chosen, ends[chosen][-1] - now, start - now))
    return LoadReport(answers, len(speeds))


def run_in_thread(
    main: Callable[[], Coroutine[Any, Any, Result]], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> Result:
    """Run a coroutine function in an event loop of its own in a thread, and wait for it.

    An interrupt of the wait cancels the coroutine, which then closes what it has opened.

    Args:
        main: the coroutine function.
        loop_factory: makes the loop; None for the usual one.

    Raises:
        TimeoutError: if it takes more than LIMIT seconds of the loop's clock.
    """
    running: list[asyncio.Task] = []

    async def limited() -> Result:
        running.append(asyncio.current_task())
        async with asyncio.timeout(LIMIT):
            return await main()

    def run_in_loop() -> Result:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(limited())

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(run_in_loop)
        try:
            return result.result()
        finally:
            for task in running:
                with suppress(RuntimeError):  # the loop is closed: the coroutine is done
                    task.get_loop().call_soon_threadsafe(task.cancel)


@asynccontextmanager
async def stage(policy: Policy, backends: Sequence[HttpServer], **options: Any) -> AsyncIterator[Client]:
    """Start these servers and a proxy with `options` in front of them; yields a client of the proxy."""
    async with AsyncExitStack() as stack:
        for backend in backends:
            stack.push_async_callback(backend.kill)
        proxy = Proxy(policy, [await backend.start() for backend in backends], **options)
        stack.push_async_callback(proxy.kill)
        client = Client(await proxy.start(), LIMIT)
        stack.push_async_callback(client.close)
        yield client


def work_of_each(work: Work, keys: Sequence[str], speeds: Sequence[float]) -> list[float]:
    """Seconds of work of each request, from one number for all or one each; ValueError if they do not fit."""
    works = [work] * len(keys) if isinstance(work, int | float) else list(work)
    if not keys or not speeds or len(works) != len(keys):
        raise ValueError(f"needs speeds, keys and a work for each, got {len(speeds)}, {len(keys)} and {len(works)}")
    return works


def poisson_arrivals(utilization: float, works: Sequence[float], speeds: Sequence[float], seed: int) -> list[float]:
    """Seconds at which independent requests arrive that keep backends busy for a share `utilization` of the time."""
    if utilization <= 0 or sum(works) <= 0:
        raise ValueError(f"utilization > 0 of backends that have work, got {utilization} and {sum(works)} s of work")
    rng, rate = random.Random(seed), utilization * sum(speeds) * len(works) / sum(works)
    return list(accumulate(rng.expovariate(rate) for _ in works))
