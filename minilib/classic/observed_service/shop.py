"""The service under observation, with a tail that is slow for a reason that is switched on.

    front ──► auth                     "retry"          1 request of 50 to auth fails, and is sent again after a while
          ├─► catalog ──► store/0      "lock"           1 request of 50 to catalog holds a lock for long
          │           ├─► store/1      "queue"          now and then a batch of jobs takes catalog's workers
          │           └─► …            "pause"          the last shard stops now and then, as a garbage collector has it
          └─► recommend/0, 1 or 2      "slow replica"   the last one works at a twentieth of the others' speed
                                       "slow canary"    so it does, and gets 1 request of 200
                                       "slow leaves"    1 call of 100 to any shard of the store is slow
                                       "healthy"

Requests come by a Poisson process, whether earlier ones are answered or not (an open loop).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from minilib.classic.http.experiment import run_in_thread
from minilib.classic.http.wire import HttpError
from minilib.classic.observed_service.instance import Instance, Pause
from minilib.classic.observed_service.metrics import Red, Use
from minilib.classic.observed_service.networks import DirectNetwork, HttpNetwork
from minilib.classic.observed_service.virtual_time import VirtualTimeLoop
from minilib.mechanisms.telemetry import HeadSampler, Span, Trace, outliers, traces_of

CAUSES = ("healthy", "slow replica", "slow canary", "lock", "retry", "queue", "pause", "slow leaves")
ONE_IN = 50  # requests of which one takes the lock for long, or has to be sent again
ONE_LEAF_IN = 100  # calls to shards of which one is slow
ONE_CANARY_IN = 200  # requests of which one goes to the last replica of recommend
LONG, BACKOFF = 0.1, 0.08  # seconds: of what is slow, and before a retry
JOBS, JOBS_EVERY = 32, 1.0  # jobs of a batch, and seconds from batch to batch
SLOW_SPEED = 0.05  # seconds of work a second, of the slow replica
PAUSE = Pause(period=1.0, length=LONG)


@dataclass(frozen=True)
class Observation:
    """What a run of the shop has told.

    Args:
        spans: all of them, in order of their ends.
        red: of each instance, by process.
        use: of each resource that was used, by process and name, such as "catalog/0 lock".
        logs: last records of each instance, oldest first, by process.
        seconds: that the run took.
        lost: requests without an answer.
    """

    spans: tuple[Span, ...]
    red: dict[str, Red]
    use: dict[str, Use]
    logs: dict[str, list[dict[str, Any]]]
    seconds: float
    lost: int

    def traces(self) -> list[Trace]:
        """One trace for each request that was sampled."""
        return traces_of(self.spans)

    def instances_of(self, service: str) -> list[str]:
        """The processes of a service."""
        return [process for process in self.red if process.partition("/")[0] == service]

    def red_of(self, service: str) -> Red:
        """RED of a service: the numbers of its instances, merged."""
        return Red.merged([self.red[process] for process in self.instances_of(service)])

    def slow_instances(self, service: str, q: float = 0.5, floor_ns: float = 10e6) -> list[str]:
        """Instances of a service of which a quantile is far above that of the others, and by `floor_ns` at least.

        The p50 shows who is always slow; a high quantile also who seldom is, and any instance with few requests.
        """
        asked = [process for process in self.instances_of(service) if self.red[process].durations.count]
        quantiles = [self.red[process].durations.quantile(q) for process in asked]
        return [asked[position] for position in outliers(quantiles, floor=floor_ns, side="above")]


def observe(
    cause: str = "healthy",
    requests: int = 200,
    *,
    rate: float = 60.0,
    shards: int = 4,
    replicas: int = 3,
    head_rate: float = 1.0,
    seed: int = 0,
    real: bool = False,
) -> Observation:
    """Run the shop under a load.

    Args:
        cause: one of CAUSES.
        requests: how many there are.
        rate: requests a second, on average.
        shards: of the store; each request to catalog asks all of them.
        replicas: of recommend; each request asks one of them, by turns.
        head_rate: share of requests whose traces are recorded.
        seed: of arrivals, durations and ids.
        real: HTTP servers and the clock of the machine; otherwise time is simulated, and a run is exactly repeatable.

    Raises:
        ValueError: if an argument is out of range.
        TimeoutError: if it takes more than a minute of its clock.
    """
    if cause not in CAUSES:
        raise ValueError(f"a cause is one of {', '.join(CAUSES)}; got {cause!r}")
    if min(requests, shards, replicas) < 1 or not 0 < rate < float("inf"):
        raise ValueError(f"needs one of each and a finite rate > 0, got {requests=}, {shards=}, {replicas=}, {rate=}")

    async def run() -> Observation:
        async with AsyncExitStack() as stack:
            network = HttpNetwork() if real else DirectNetwork()
            stack.push_async_callback(network.close)
            shop = Shop(cause, network, shards, replicas, HeadSampler(head_rate), random.Random(seed))
            for instance in shop.instances.values():
                await network.add(instance)
            return await shop.serve(requests, rate)

    return run_in_thread(run, None if real else VirtualTimeLoop)


class Shop:
    """The instances, and the load on them.

    Args:
        cause: one of CAUSES.
        network: between the instances.
        shards, replicas: of store and recommend.
        sampler: of requests whose traces are recorded.
        rng: of everything that is drawn.

    Attributes:
        instances: by process.
    """

    def __init__(
        self,
        cause: str,
        network: DirectNetwork | HttpNetwork,
        shards: int,
        replicas: int,
        sampler: HeadSampler,
        rng: random.Random,
    ) -> None:
        self.cause, self._rng, self._network, self._spans = cause, rng, network, []
        self._leaves = [f"store/{number}" for number in range(shards)]
        self._replicas = [f"recommend/{number}" for number in range(replicas)]
        self.instances: dict[str, Instance] = {}
        self._add("front/0", self._front, workers=256, sampler=sampler)
        self._add("auth/0", self._auth)
        self._add("catalog/0", self._catalog)
        for process in self._leaves:
            paused = cause == "pause" and process == self._leaves[-1]
            self._add(process, self._store, pause=PAUSE if paused else None)
        for process in self._replicas:
            slow = cause in ("slow replica", "slow canary") and process == self._replicas[-1]
            self._add(process, self._recommend, speed=SLOW_SPEED if slow else 1.0)

    def _add(self, process: str, handle: Callable[[Instance], Awaitable[None]], **options) -> None:
        self.instances[process] = Instance(process, handle, self._network, self._spans, self._rng, **options)

    async def serve(self, requests: int, rate: float) -> Observation:
        """Send the requests, wait for their answers, and read the instruments."""
        clock = asyncio.get_running_loop().time
        start = due = clock()
        async with asyncio.TaskGroup() as group:
            jobs = group.create_task(self._batches()) if self.cause == "queue" else None
            answers = []
            for _ in range(requests):
                due += self._rng.expovariate(rate)
                await asyncio.sleep(due - clock())
                answers.append(group.create_task(self._request()))
            lost = requests - sum([await answer for answer in answers])
            if jobs:
                jobs.cancel()
        return self._read(clock() - start, lost)

    async def _request(self) -> bool:
        """Whether a request was answered, with success or an error."""
        with suppress(OSError, HttpError):
            await self._network.call("front/0", "/", {})
            return True
        return False

    def _read(self, seconds: float, lost: int) -> Observation:
        red, use, logs = {}, {}, {}
        for process, instance in self.instances.items():
            red[process], logs[process] = instance.red, instance.log.records()
            for resource in (instance.workers, instance.lock):
                resource.check_invariants()
                if resource.acquired:
                    use[f"{process} {resource.name}"] = resource.use()
        return Observation(tuple(self._spans), red, use, logs, seconds, lost)

    async def _front(self, front: Instance) -> None:
        replica = self._replica_for(front.requests)  # others come while this one waits
        await front.work(0.001)
        await front.call_with_retry("auth/0", BACKOFF)
        await front.call_all(["catalog/0", replica])
        await front.work(0.001)

    def _replica_for(self, request: int) -> str:
        if self.cause != "slow canary" or len(self._replicas) == 1:
            return self._replicas[request % len(self._replicas)]
        *others, canary = self._replicas
        return canary if request % ONE_CANARY_IN == 0 else others[request % len(others)]

    async def _auth(self, auth: Instance) -> None:
        fails = self.cause == "retry" and auth.requests % ONE_IN == 0
        await auth.work(0.002)
        if fails:
            raise HttpError(503, "auth has lost its connection to the directory")

    async def _catalog(self, catalog: Instance) -> None:
        long = self.cause == "lock" and catalog.requests % ONE_IN == 0
        async with catalog.lock.hold():
            await catalog.work(LONG if long else 0.0002, "hold lock")
        await catalog.call_all(self._leaves)
        await catalog.work(0.001)

    async def _store(self, store: Instance) -> None:
        slow = self.cause == "slow leaves" and self._rng.randrange(ONE_LEAF_IN) == 0
        await store.work(LONG if slow else 0.003)

    async def _recommend(self, recommend: Instance) -> None:
        await recommend.work(0.004)

    async def _batches(self) -> None:
        """Batch after batch of jobs that share the workers with requests, and belong to no trace."""
        catalog = self.instances["catalog/0"]

        async def job() -> None:
            async with catalog.workers.hold():
                await asyncio.sleep(LONG / 2)

        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(JOBS_EVERY / 2)
                for _ in range(JOBS):
                    group.create_task(job())
                await asyncio.sleep(JOBS_EVERY / 2)
