"""A load generator: a stream of keys as HTTP requests, and what came back.

    closed loop    so many clients, each sends its next request when it has its answer    a slow server slows them down
    open loop      requests arrive when they arrive, a Poisson process                    a slow server has a queue

In the open loop a latency counts from the moment at which a request should have been sent, so that a stall is felt by
all that it delays ("coordinated omission", Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import quote

from minilib.classic.http.connection import Client
from minilib.classic.http.proxy import BackendHealth
from minilib.classic.http.wire import BadMessage
from minilib.numbers.load_metrics import Delay, max_over_mean

MAX_OUTSTANDING = 128  # requests of an open loop; further ones wait here, and their latency counts on


def zipf_keys(num_requests: int, num_keys: int, s: float = 1.0, seed: int = 0) -> list[str]:
    """Keys k0, k1, … of which number i is asked for in proportion to 1 / (i + 1)ˢ.

    Args:
        num_requests: 0 or more.
        num_keys: different keys there are, 1 or more.
        s: 0 asks for all alike, 1 is what web traffic looks like, more is more skewed.
        seed: the same keys for the same seed.

    Raises:
        ValueError: if a number is out of range.

    Source: Breslau, Cao, Fan, Phillips and Shenker, "Web Caching and Zipf-like Distributions", INFOCOM 1999.
    """
    if num_requests < 0 or num_keys < 1 or s < 0:
        raise ValueError(f"needs num_requests ≥ 0, num_keys ≥ 1 and s ≥ 0, got {num_requests}, {num_keys} and {s}")
    shares = list(accumulate((rank + 1) ** -s for rank in range(num_keys)))
    names = [f"k{rank}" for rank in range(num_keys)]
    return random.Random(seed).choices(names, cum_weights=shares, k=num_requests)


def exponential_work(num_requests: int, mean: float, seed: int = 0) -> list[float]:
    """Seconds of work that differ from request to request, most short and a few long: exponentially distributed."""
    rng = random.Random(seed)
    return [rng.expovariate(1.0) * mean for _ in range(num_requests)]


def poisson_arrivals(num_requests: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests arrive that know nothing of each other, `rate` a second on average."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(num_requests)))


def works_of(work: float | Sequence[float], keys: Sequence[str], speeds: Sequence[float]) -> list[float]:
    """Seconds of work of each request: one number for all, or one each.

    Raises:
        ValueError: if there is no request, no backend, or not one work a request.
    """
    works = [work] * len(keys) if isinstance(work, int | float) else list(work)
    if not keys or not speeds or len(works) != len(keys):
        raise ValueError(f"needs speeds, keys and a work for each, got {len(speeds)}, {len(keys)} and {len(works)}")
    return works


def arrivals_at(utilization: float, works: Sequence[float], speeds: Sequence[float], seed: int) -> list[float]:
    """Arrivals, as of `poisson_arrivals`, that keep backends of these speeds so busy: 1.0 is all that they can do.

    Raises:
        ValueError: if there is nothing to be busy with.
    """
    if utilization <= 0 or sum(works) <= 0:
        raise ValueError(f"utilization > 0 of backends that have work, got {utilization} and {sum(works)} s of work")
    return poisson_arrivals(len(works), utilization * sum(speeds) * len(works) / sum(works), seed)


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Args:
        key: what it asked for.
        status: of the answer, 200 if all is well; 0 if none came.
        backend: who answered, -1 if no backend did.
        latency: seconds until the client had it.
        queued: seconds that it waited at its backend, as that one says.
        service: seconds that it was served there.
    """

    key: str
    status: int
    backend: int
    latency: float
    queued: float
    service: float


@dataclass(frozen=True)
class Report:
    """What came of an experiment.

    Args:
        answers: one to each request, in the order of the requests.
        seconds: from the first request to the last answer.
        retries: attempts beyond the first that the proxy made.
        health: what the proxy knew of each backend at the end.
    """

    answers: tuple[Answer, ...]
    seconds: float
    retries: int
    health: tuple[BackendHealth, ...]

    @property
    def lost(self) -> int:
        """Requests without an answer of status 200."""
        return sum(answer.status != 200 for answer in self.answers)

    @property
    def throughput(self) -> float:
        """Requests answered in a second."""
        return (len(self.answers) - self.lost) / self.seconds

    @property
    def counts(self) -> list[int]:
        """Requests that each backend answered."""
        return self.counts_of(slice(None))

    def counts_of(self, part: slice) -> list[int]:
        """Requests that each backend answered, of some of them, such as slice(500, None) for all but the first 500."""
        counts = [0] * len(self.health)
        for answer in self.answers[part]:
            if answer.backend >= 0:
                counts[answer.backend] += 1
        return counts

    @property
    def max_over_mean(self) -> float:
        """The most that a backend answered over the mean."""
        return max_over_mean(self.counts)

    @property
    def latency(self) -> Delay:
        """Seconds from a request to its answer, of those with status 200."""
        return Delay.of([answer.latency for answer in self.answers if answer.status == 200])

    @property
    def queueing(self) -> Delay:
        """Seconds in the queue of a backend, of those with status 200."""
        return Delay.of([answer.queued for answer in self.answers if answer.status == 200])

    @property
    def overhead(self) -> Delay:
        """Seconds of latency that neither queue nor service explains: HTTP, the event loop, others on the core."""
        return Delay.of([a.latency - a.queued - a.service for a in self.answers if a.status == 200])


class LoadGenerator:
    """Sends keys to a server, one request each.

    Args:
        client: of the server.
        keys: what to ask for, in order.
        work: seconds at speed 1 that each request takes, in the same order.
        timeout: seconds to wait for an answer.
        before: called with the number of requests sent so far before each one.
    """

    def __init__(
        self,
        client: Client,
        keys: Sequence[str],
        work: Sequence[float],
        timeout: float,
        before: Callable[[int], object] = lambda sent: None,
    ) -> None:
        self._client, self._timeout, self._before = client, timeout, before
        self._requests = [(key, f"/{quote(key, safe='')}?work={each!r}") for key, each in zip(keys, work, strict=True)]
        self._sent = 0

    async def closed_loop(self, concurrency: int) -> list[Answer]:
        """Let `concurrency` clients send everything between them; returns the answers in the order of the requests."""
        answers: dict[int, Answer] = {}

        async def client() -> None:
            while self._sent < len(self._requests):
                number = self._sent
                answers[number] = await self._send(asyncio.get_running_loop().time())

        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
        return [answers[number] for number in range(len(answers))]

    async def open_loop(self, arrivals: Sequence[float]) -> list[Answer]:
        """Send each request when its time has come, in seconds from now; returns the answers in their order."""
        loop, slots, tasks = asyncio.get_running_loop(), asyncio.Semaphore(MAX_OUTSTANDING), []
        start = loop.time()

        async def send(due: float) -> Answer:
            async with slots:
                return await self._send(due)

        async with asyncio.TaskGroup() as group:
            for arrival in arrivals:
                await asyncio.sleep(start + arrival - loop.time())
                tasks.append(group.create_task(send(start + arrival)))
        return [task.result() for task in tasks]

    async def _send(self, since: float) -> Answer:
        """Send the next request."""
        key, target = self._requests[self._sent]
        self._before(self._sent)
        self._sent += 1
        status, said = 0, {}
        try:
            response = await self._client.get(target, self._timeout)
            status = response.status
            said = json.loads(response.body) if status == 200 else {}
        except (OSError, BadMessage):
            pass  # no answer: status 0
        latency = asyncio.get_running_loop().time() - since
        return Answer(key, status, said.get("backend", -1), latency, said.get("queued", 0.0), said.get("service", 0.0))
