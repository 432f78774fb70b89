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
from urllib.parse import unquote

from minilib.classic.http.wire import Client, HttpError, HttpServer, Response
from minilib.mechanisms.balancing import Dispatcher, HealthRule, NoTarget, Policy

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
        self._dispatcher = Dispatcher(policy, len(ports), window, HealthRule(max_failures=1, pause=PAUSE))
        self.policy = policy

    def loads(self) -> list[float]:
        """Requests in flight at each backend, math.inf for one that is down."""
        return self._dispatcher.loads(asyncio.get_running_loop().time())

    async def kill(self) -> None:
        """As HttpServer, then end the connections to the backends."""
        await super().kill()
        await asyncio.gather(*(client.close() for client in self._clients))

    def check_invariants(self) -> None:
        """A request in flight has a connection that waits for it, and the books of the dispatcher are in order."""
        self._dispatcher.check_invariants()
        assert sum(self._dispatcher.in_flight) <= len(self._connections), f"{self._dispatcher.in_flight}"
        for client in self._clients:
            client.check_invariants()

    async def _forward(self, target: str) -> Response:
        """Try one backend after the other, none twice."""
        key, clock = unquote(target.partition("?")[0][1:]), asyncio.get_running_loop().time
        failed, error = set(), HttpError(503, "no backend is up")
        while True:
            try:
                request = self._dispatcher.dispatch(key, clock(), without=failed)
            except NoTarget:
                raise error from None
            try:
                response = await self._clients[request.target].get(target)
                request.began()
                return response
            except (OSError, HttpError) as failure:  # TimeoutError is an OSError
                failed.add(request.target)
                request.failed(clock())
                status = 504 if isinstance(failure, TimeoutError) else 502
                error = HttpError(status, f"{len(failed)} backends failed, the last one: {failure}")
            finally:
                request.ended()
