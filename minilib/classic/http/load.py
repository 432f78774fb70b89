"""Load for HTTP experiments: streams of keys and of work, clients that send them, and a report of the answers.

    closed loop    a number of clients, each sends its next request after its answer    a slow server slows them down
    open loop      requests arrive by a Poisson process                                 a slow server gets a queue

In the open loop a latency counts from the moment at which the request was due, so that a stall shows in all requests
that it delays ("coordinated omission", Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from minilib.classic.http.proxy import BackendHealth
from minilib.classic.http.wire import Response
from minilib.numbers.load_metrics import Delay

Send = Callable[[int], Awaitable[Response | None]]
MAX_OUTSTANDING = 128  # requests of an open loop; further ones wait in the client while their latency counts


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


def work_of_each(work: float | Sequence[float], keys: Sequence[str], speeds: Sequence[float]) -> list[float]:
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


class Answer(NamedTuple):
    """What became of a request: status 0 and backend -1 without a response; seconds, the last two by the backend."""

    key: str
    status: int
    backend: int
    latency: float
    queued: float
    service: float


@dataclass(frozen=True)
class LoadReport:
    """An answer to each request in their order, the proxy's retries, and its final view of each backend."""

    answers: Sequence[Answer]
    retries: int
    health: Sequence[BackendHealth]

    @property
    def lost(self) -> int:
        """Requests without a response of status 200."""
        return sum(answer.status != 200 for answer in self.answers)

    @property
    def counts(self) -> list[int]:
        """Requests that each backend answered."""
        return self.counts_of(slice(None))

    def counts_of(self, part: slice) -> list[int]:
        """Requests that each backend answered among a part of all, such as slice(500, None)."""
        backends = [answer.backend for answer in self.answers[part]]
        return [backends.count(number) for number in range(len(self.health))]

    @property
    def latency(self) -> Delay:
        """Seconds from request to response, of those with status 200."""
        return self._delay(lambda answer: answer.latency)

    @property
    def queueing(self) -> Delay:
        """Seconds in the queue of a backend, of those with status 200."""
        return self._delay(lambda answer: answer.queued)

    @property
    def overhead(self) -> Delay:
        """Seconds of latency that are neither queueing nor service: HTTP, the event loop, other processes."""
        return self._delay(lambda answer: answer.latency - answer.queued - answer.service)

    def _delay(self, seconds: Callable[[Answer], float]) -> Delay:
        return Delay.of([seconds(answer) for answer in self.answers if answer.status == 200])


async def send_all(send: Send, keys: Sequence[str], arrivals: Sequence[float] | None, concurrency: int) -> list[Answer]:
    """Call send(i) for keys[i] when arrivals[i] seconds are over, or from `concurrency` clients if there are none.

    Returns:
        The answers in the order of the keys; `send` returns None if there was no response.
    """
    slots = asyncio.Semaphore(concurrency if arrivals is None else MAX_OUTSTANDING)
    clock = asyncio.get_running_loop().time
    start = clock()

    async def answer(number: int) -> Answer:
        async with slots:  # a Semaphore admits in order of arrival
            since = clock() if arrivals is None else start + arrivals[number]
            response = await send(number)
            status = response.status if response else 0
            said = json.loads(response.body) if status == 200 else {}
            seconds = said.get("queued", 0.0), said.get("service", 0.0)
            return Answer(keys[number], status, said.get("backend", -1), clock() - since, *seconds)

    tasks = []
    async with asyncio.TaskGroup() as group:
        for number in range(len(keys)):
            if arrivals is not None:
                await asyncio.sleep(start + arrivals[number] - clock())
            tasks.append(group.create_task(answer(number)))
    return [task.result() for task in tasks]
