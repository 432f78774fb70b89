"""A reverse proxy: one port in front of many backends, and a policy of balancing.py that says which gets a request.

    client ──► proxy ──► backend 0     up      in flight 2
                    ├──► backend 1     down    ∞              probed until it answers
                    └──► backend 2     up      in flight 1

The load of a backend is the number of requests that it has and has not answered. One that breaks a connection, answers
garbage or takes too long is marked down, and the request goes to another one: only GET is forwarded, which may be sent
twice without harm. So a client gets one answer to each request, even if two backends worked on it.

Source: RFC 9110, sections 9.2.2 (idempotent methods) and 15.6 (what 502, 503 and 504 mean).
"""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from urllib.parse import unquote

from minilib.classic.http.backend import HEALTH
from minilib.classic.http.connection import Client
from minilib.classic.http.server import HttpServer, error
from minilib.classic.http.wire import BadMessage, Request, Response
from minilib.mechanisms.balancing import NoTarget, Policy

STATUS = "/-/status"
SIGNALS = ("requests", "in_flight")


@dataclass
class BackendHealth:
    """What the proxy knows of a backend.

    Args:
        up: it may be chosen.
        in_flight: requests that it has and has not answered.
        forwarded: requests sent to it so far.
        failures: how many of them it did not answer.
        reason: what marked it down last, for people.
    """

    up: bool = True
    in_flight: int = 0
    forwarded: int = 0
    failures: int = 0
    reason: str = ""


class Proxy(HttpServer):
    """Forwards each GET to the backend that a policy chooses; GET /-/status says how the backends are.

    Args:
        policy: it gets the path without its first slash as key, and in-flight counts as loads.
        ports: of the backends, whose targets they are in this order.
        window: requests after which the policy observes.
        signal: what it then observes of each backend: "requests" that were sent there in the window, or those
            "in_flight" there, added up over the window's requests; a slow backend shows in the second only.
        answer_within: seconds that a backend has to answer.
        probe_every: seconds between two questions to a backend that is down.
        timeout: as of HttpServer.

    Attributes:
        backends: health of each.
        retries: attempts beyond the first, so far.

    Raises:
        ValueError: if there is no backend, or an argument is out of range.

    Cost: one more HTTP exchange a request, and what the policy costs.
    """

    def __init__(
        self,
        policy: Policy,
        ports: list[int],
        *,
        window: int = 64,
        signal: str = "requests",
        answer_within: float = 2.0,
        probe_every: float = 0.02,
        timeout: float = 5.0,
    ) -> None:
        if not ports or window < 1 or signal not in SIGNALS or min(answer_within, probe_every) <= 0:
            raise ValueError(
                f"needs a port or more, window ≥ 1, a signal of {SIGNALS} and times above 0; got {ports=}, {window=}, "
                f"{signal=}, {answer_within=}, {probe_every=}"
            )
        super().__init__(self._forward, timeout)
        self.policy, self.backends, self.retries = policy, [BackendHealth() for _ in ports], 0
        self._clients = [Client(port) for port in ports]
        self._window, self._signal, self._seen, self._left = window, signal, [0] * len(ports), window
        self._answer_within, self._probe_every = answer_within, probe_every
        self._probes: dict[int, asyncio.Task] = {}

    def loads(self) -> list[float]:
        """Requests in flight at each backend, math.inf for one that is down."""
        return [backend.in_flight if backend.up else math.inf for backend in self.backends]

    async def close(self, grace: float = 1.0) -> None:
        """As HttpServer does; and close the connections to the backends."""
        await super().close(grace)
        probes = [*self._probes.values()]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        for client in self._clients:
            await client.close()

    def check_invariants(self) -> None:
        """In-flight counts add up to the requests being answered at most, and whoever is down is being probed."""
        super().check_invariants()
        in_flight = [backend.in_flight for backend in self.backends]
        assert min(in_flight) >= 0 and sum(in_flight) <= len(self._answering), f"{in_flight} requests in flight"
        down = {target for target, backend in enumerate(self.backends) if not backend.up}
        assert down == self._probes.keys() or not self.listening, f"{down} are down, {set(self._probes)} are probed"
        assert 0 < self._left <= self._window, f"{self._left} requests left of a window of {self._window}"
        for client in self._clients:
            client.check_invariants()

    async def _forward(self, request: Request) -> Response:
        """Try one backend after the other, none twice."""
        if request.target == STATUS:
            health = [asdict(backend) for backend in self.backends]
            return Response(200, json.dumps(health).encode(), {"Content-Type": "application/json"})
        key = unquote(request.target.partition("?")[0][1:])
        tried: set[int] = set()
        failure: Exception | None = None
        while True:
            loads = [math.inf if target in tried else load for target, load in enumerate(self.loads())]
            try:
                target = self.policy.choose(key, loads)
            except NoTarget:
                return _give_up(failure, len(tried))
            self._count(target)
            self.retries += bool(tried)
            try:
                return await self._ask(target, request.target)
            except (OSError, BadMessage) as wrong:  # TimeoutError is an OSError
                failure = wrong
                tried.add(target)
                self._mark_down(target, wrong)

    async def _ask(self, target: int, path: str) -> Response:
        """One attempt at one backend."""
        backend = self.backends[target]
        backend.forwarded += 1
        backend.in_flight += 1
        try:
            answer = await self._clients[target].get(path, self._answer_within)
        except (OSError, BadMessage):
            backend.failures += 1
            raise
        finally:
            backend.in_flight -= 1
        kind = answer.headers.get("content-type", "application/octet-stream")
        return Response(answer.status, answer.body, {"Content-Type": kind, "X-Backend": str(target)})

    def _count(self, target: int) -> None:
        """Add a choice to the window, and let the policy observe when that is full."""
        for other, backend in enumerate(self.backends):
            self._seen[other] += backend.in_flight if self._signal == "in_flight" else other == target
        self._left -= 1
        if not self._left:
            pairs = zip(self._seen, self.backends, strict=True)
            seen = [count if backend.up else math.inf for count, backend in pairs]
            self._seen, self._left = [0] * len(seen), self._window
            self.policy.observe(seen)

    def _mark_down(self, target: int, reason: Exception) -> None:
        backend = self.backends[target]
        backend.up, backend.reason = False, str(reason) or type(reason).__name__
        if target not in self._probes and self.listening:
            self._probes[target] = asyncio.get_running_loop().create_task(self._probe(target))

    async def _probe(self, target: int) -> None:
        """Ask a backend that is down how it is, until it is well."""
        while True:
            await asyncio.sleep(self._probe_every)
            with suppress(OSError, BadMessage):
                if (await self._clients[target].get(HEALTH, self._answer_within)).status == 200:
                    break
        self.backends[target].up = True
        del self._probes[target]


def _give_up(failure: Exception | None, attempts: int) -> Response:
    """What to answer when no backend is left."""
    if failure is None:
        return error(503, "no backend is up", {"Retry-After": "1"})
    if isinstance(failure, TimeoutError):
        return error(504, f"{attempts} backends failed, the last one by not answering in time")
    return error(502, f"{attempts} backends failed, the last one: {failure}")
