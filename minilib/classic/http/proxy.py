"""A reverse proxy: one port in front of many backends, and a balancing policy that chooses one for each request.

    client ──► proxy ──► backend 0     up      in flight 2
                    ├──► backend 1     down    ∞              probed until it answers
                    └──► backend 2     up      in flight 1

A backend that ends a connection, sends a malformed response or exceeds the timeout is marked down, and the request is
sent to another one: only GET is forwarded, which is idempotent. A client gets one response to each request.

Source: RFC 9110, sections 9.2.2 (idempotent methods) and 15.6 (502, 503 and 504).
"""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from urllib.parse import unquote

from minilib.classic.http.backend import HEALTH
from minilib.classic.http.client import Client
from minilib.classic.http.server import HttpServer, error
from minilib.classic.http.wire import BadMessage, Request, Response
from minilib.mechanisms.balancing import NoTarget, Policy

STATUS = "/-/status"
SIGNALS = ("requests", "in_flight")


@dataclass
class BackendHealth:
    """A backend as the proxy sees it; `reason` is the failure that marked it down last."""

    up: bool = True
    in_flight: int = 0
    forwarded: int = 0
    failures: int = 0
    reason: str = ""


class Proxy(HttpServer):
    """Forwards each GET to the backend that a policy chooses; GET /-/status returns the backends' health as JSON.

    Args:
        policy: its keys are request paths without the first slash, its loads those of `loads`.
        ports: of the backends; target i of the policy is the i-th.
        window: requests between two calls of policy.observe.
        signal: the loads that the policy observes: "requests" sent to each backend, or "in_flight", the requests in
            flight there summed over the window's requests, which shows a slow backend.
        answer_within, probe_every: seconds that a backend has to respond, and between health checks if it is down.
        timeout: as of HttpServer.

    Attributes:
        backends: the BackendHealth of each.
        retries: attempts beyond the first, over all requests.

    Raises:
        ValueError: if there is no backend, or an argument is out of range.
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
        """As HttpServer, then end the probes and the connections to the backends."""
        await super().close(grace)
        probes = [*self._probes.values()]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, *(client.close() for client in self._clients), return_exceptions=True)

    def check_invariants(self) -> None:
        """Requests in flight are being answered, and a backend that is down is being probed."""
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
        failures: dict[int, Exception] = {}
        while True:
            loads = [math.inf if target in failures else load for target, load in enumerate(self.loads())]
            try:
                target = self.policy.choose(key, loads)
            except NoTarget:
                return _no_answer([*failures.values()])
            self._observe(target)
            self.retries += bool(failures)
            backend = self.backends[target]
            backend.forwarded += 1
            backend.in_flight += 1
            try:
                answer = await self._clients[target].get(request.target, self._answer_within)
            except (OSError, BadMessage) as failure:  # TimeoutError is an OSError
                failures[target] = failure
                self._mark_down(target, failure)
            else:
                kind = answer.headers.get("content-type", "application/octet-stream")
                return Response(answer.status, answer.body, {"Content-Type": kind, "X-Backend": str(target)})
            finally:
                backend.in_flight -= 1

    def _observe(self, target: int) -> None:
        """Add a choice to the window, and let the policy observe a full one."""
        for other, backend in enumerate(self.backends):
            self._seen[other] += backend.in_flight if self._signal == "in_flight" else other == target
        self._left -= 1
        if not self._left:
            seen = [count if health.up else math.inf for count, health in zip(self._seen, self.backends, strict=True)]
            self._seen, self._left = [0] * len(seen), self._window
            self.policy.observe(seen)

    def _mark_down(self, target: int, failure: Exception) -> None:
        backend = self.backends[target]
        backend.failures += 1
        backend.up, backend.reason = False, str(failure) or type(failure).__name__
        if target not in self._probes and self.listening:
            self._probes[target] = asyncio.get_running_loop().create_task(self._probe(target))

    async def _probe(self, target: int) -> None:
        """Check the health of a backend that is down until it is up."""
        while not self.backends[target].up:
            await asyncio.sleep(self._probe_every)
            with suppress(OSError, BadMessage):
                response = await self._clients[target].get(HEALTH, self._answer_within)
                self.backends[target].up = response.status == 200
        del self._probes[target]


def _no_answer(failures: list[Exception]) -> Response:
    """The response when no backend is left to try."""
    if not failures:
        return error(503, "no backend is up", {"Retry-After": "1"})
    if isinstance(failures[-1], TimeoutError):
        return error(504, f"{len(failures)} backends failed, the last one by not answering in time")
    return error(502, f"{len(failures)} backends failed, the last one: {failures[-1]}")
