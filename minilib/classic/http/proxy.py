"""A reverse proxy: one port in front of many backends, and a balancing policy that chooses one for each request.

    client ──► proxy ──► backend 0     up      in flight 2
                    ├──► backend 1     down    ∞              after a pause tried again, with one request at a time
                    └──► backend 2     up      in flight 1

A backend that ends a connection, sends a malformed response or exceeds the timeout is marked down, and the request is
sent to another one: only GET is forwarded, which is idempotent. A client gets one response to each request.

Source: RFC 9110, sections 9.2.2 (idempotent methods) and 15.6 (502, 503 and 504).
"""

from __future__ import annotations

import asyncio
import math
from urllib.parse import unquote

from minilib.classic.http.wire import Client, HttpError, HttpServer, Response
from minilib.mechanisms.balancing import NoTarget, Policy

PAUSE = 0.02  # seconds that a backend which failed gets no request


class Proxy(HttpServer):
    """Forwards each GET to the backend that a policy chooses.

    Args:
        policy: its keys are request paths without the first slash, its loads those of `loads`.
        ports: of the backends; target i of the policy is the i-th.
        window: requests between two calls of policy.observe, which gets how many of them were sent to each backend.
        answer_within: seconds that a backend has to respond.

    Raises:
        ValueError: if there is no backend, or an argument is out of range.
    """

    def __init__(self, policy: Policy, ports: list[int], window: int = 64, answer_within: float = 2.0) -> None:
        if not ports or window < 1 or answer_within <= 0:
            raise ValueError(f"needs a port or more, window ≥ 1 and a time, got {ports}, {window} and {answer_within}")
        super().__init__(self._forward)
        self._clients = [Client(port, answer_within) for port in ports]
        self._in_flight, self._retry_at = [0] * len(ports), [0.0] * len(ports)  # when to try again, 0.0 if it is up
        self.policy, self._window, self._sent = policy, window, [0] * len(ports)

    def loads(self) -> list[float]:
        """Requests in flight at each backend, math.inf for one that is down."""
        now = asyncio.get_running_loop().time()
        return [
            in_flight if not retry_at or (now > retry_at and not in_flight) else math.inf
            for in_flight, retry_at in zip(self._in_flight, self._retry_at, strict=True)
        ]

    async def kill(self) -> None:
        """As HttpServer, then end the connections to the backends."""
        await super().kill()
        await asyncio.gather(*(client.close() for client in self._clients))

    def check_invariants(self) -> None:
        """A request in flight has a connection that waits for it, and no window is too full."""
        assert min(self._in_flight) >= 0 and sum(self._in_flight) <= len(self._connections), f"{self._in_flight}"
        assert sum(self._sent) < self._window, f"{self._sent} requests in a window of {self._window}"
        for client in self._clients:
            client.check_invariants()

    async def _forward(self, target: str) -> Response:
        """Try one backend after the other, none twice."""
        key = unquote(target.partition("?")[0][1:])
        failed, error = set(), HttpError(503, "no backend is up")
        while True:
            loads = [math.inf if backend in failed else load for backend, load in enumerate(self.loads())]
            try:
                backend = self.policy.choose(key, loads)
            except NoTarget:
                raise error from None
            self._observe(backend)
            self._in_flight[backend] += 1
            try:
                response = await self._clients[backend].get(target)
            except (OSError, HttpError) as failure:  # TimeoutError is an OSError
                failed.add(backend)
                self._retry_at[backend] = asyncio.get_running_loop().time() + PAUSE
                status = 504 if isinstance(failure, TimeoutError) else 502
                error = HttpError(status, f"{len(failed)} backends failed, the last one: {failure}")
            else:
                self._retry_at[backend] = 0.0
                return response
            finally:
                self._in_flight[backend] -= 1

    def _observe(self, backend: int) -> None:
        """Add a choice to the window, and let the policy observe a full one."""
        self._sent[backend] += 1
        if sum(self._sent) == self._window:
            seen = [sent if load < math.inf else load for sent, load in zip(self._sent, self.loads(), strict=True)]
            self._sent = [0] * len(seen)
            self.policy.observe(seen)
