"""A streaming reverse proxy: any method, responses passed on as they come, and nothing that can be held for ever.

    client ──► gateway ──► policy ──► backend 0     up          in flight 2
                                 ├──► backend 1     paused      ∞             failed; later on trial, then up again
                                 ├──► backend 2     draining    ∞             no new requests, present ones finish
                                 └──► backend 3     unhealthy   ∞             by active checks

What it promises:

* a response that a client sees end properly is the whole response: if its backend dies, the client's connection is cut;
* a client that leaves ends the request at the backend at once;
* a request is sent again only before a byte of a response has left, only if it may be, and within the retry budget;
* loads count at dispatch and are never negative, whatever ends how.

A client that ends its half of the connection has left, as for nginx: the two cannot be told apart.

Source: RFC 9110 and RFC 9112, framing by h11.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import h11

from minilib.classic.gateway.backends import Backends, becomes
from minilib.classic.gateway.connection import ClientLeft, HttpConnection, WatchedProtocol, listen
from minilib.classic.gateway.forwarding import Forwarder
from minilib.classic.gateway.hooks import GatewayHooks
from minilib.classic.gateway.messages import GatewayError, GatewayRequest, Reply, render_plainly, reply_to_send
from minilib.classic.gateway.receiving import receive_request
from minilib.classic.gateway.rules import CheckRule, GatewayLimits, RetryRule
from minilib.classic.http.wire import HOST, connections_end
from minilib.mechanisms.balancing import HealthRule, Policy, RetryBudget

log = logging.getLogger(__name__)


def path_of(request: GatewayRequest) -> str:
    """The path of a request without its first slash and without its query, as key of a policy."""
    return unquote(request.target.partition("?")[0][1:])


class Gateway:
    """Forwards each request to the backend that a policy chooses.

    Args:
        policy: its loads are requests in flight; target i is the i-th backend.
        backends: host and port of each; more can be added later.
        key_of: request → key of the policy; may raise GatewayError to refuse a request.
        hooks: where others take part.
        limits, retries, budget: sizes and times; what may be sent twice, and how often.
        checks: active health checks; None for none.
        health: thresholds of active and passive checks.
        hold: bytes of a response that are held back until it is complete; 0 passes each piece on as it comes.
        render_error: the answer to a request that fails here.
        window: requests between two calls of policy.observe.

    Attributes:
        backends: to add, drain and remove some; their loads and health.
        port: 0 before `start`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        backends: Sequence[tuple[str, int]] = (),
        *,
        key_of: Callable[[GatewayRequest], Any] = path_of,
        hooks: GatewayHooks | None = None,
        limits: GatewayLimits | None = None,
        retries: RetryRule | None = None,
        budget: RetryBudget | None = None,
        checks: CheckRule | None = None,
        health: HealthRule | None = None,
        hold: int = 0,
        render_error: Callable[[GatewayError], Reply] = render_plainly,
        window: int = 64,
    ) -> None:
        if hold < 0:
            raise ValueError(f"hold is 0 bytes or more, got {hold!r}")
        self.limits, self.hooks, self.render_error = limits or GatewayLimits(), hooks or GatewayHooks(), render_error
        self.backends = Backends(policy, self.limits, checks, health, window)
        self.budget = budget or RetryBudget()
        retries = retries or RetryRule()
        self._forwarder = Forwarder(self.backends, key_of, self.hooks, self.limits, retries, self.budget, hold)
        self.port, self._server, self._stopping = 0, None, False
        self._connections: dict[asyncio.Task, HttpConnection] = {}
        self._busy: set[asyncio.Task] = set()  # connections with a request
        for host, port in backends:
            self.backends.add(host, port)

    async def start(self, host: str = HOST, port: int = 0) -> int:
        """Listen, and begin the checks; returns the port."""
        if self._server:
            raise RuntimeError(f"it listens on port {self.port} already")
        self._server = await listen(self._serve, host, port or self.port)
        self.port, self._stopping = self._server.sockets[0].getsockname()[1], False
        self.backends.open()
        return self.port

    async def stop(self, within: float) -> int:
        """Accept no connection, close idle ones, let requests finish for `within` seconds, then `kill`.

        Returns:
            How many requests were cut.
        """
        self._stopping = True
        if self._server:
            self._server.close()
        for task in self._connections.keys() - self._busy:
            task.cancel()
        await becomes(lambda: not self._busy, within)
        cut = len(self._busy)
        await self.kill()
        return cut

    async def kill(self) -> None:
        """Stop at once, whatever goes on; returns when nothing is left of it."""
        self._stopping = True
        if self._server:
            self._server.close()
            self._server = None
        for task in self._connections:
            task.cancel()
        await connections_end(self._connections)
        await self.backends.close()
        await asyncio.sleep(0)  # transports close their sockets in the next turn

    def check_invariants(self) -> None:
        """Each request in flight at a backend has a connection of a client, and the books are in order."""
        self.backends.check_invariants()
        self.budget.check_invariants()
        assert self._busy <= self._connections.keys(), "a request without a connection"
        assert sum(self.backends.dispatcher.in_flight) <= len(self._busy), "a request in flight without a client"

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: WatchedProtocol
    ) -> None:
        """Answer the requests of a connection one after the other."""
        client, task = HttpConnection(reader, writer, h11.SERVER, self.limits.max_head), asyncio.current_task()
        self._connections[task] = client
        try:
            if len(self._connections) > self.limits.max_connections:
                if len(self._connections) <= 2 * self.limits.max_connections:  # to be told takes time, too
                    await self._refuse(client, GatewayError(503, "too many connections", retry_after=1))
                return
            while not self._stopping and await self._serve_next(client, protocol, task):
                pass
        except (asyncio.CancelledError, ClientLeft, OSError):
            pass  # killed, or the client has left: there is nobody to tell
        except Exception:
            log.exception("a connection failed")
        finally:
            protocol.left = None
            self._busy.discard(task)
            del self._connections[task]
            client.abort()

    async def _serve_next(self, client: HttpConnection, protocol: WatchedProtocol, task: asyncio.Task) -> bool:
        """Receive a request and have it answered; whether the connection stays open."""
        try:
            request = await receive_request(client, self.limits, begins=lambda: self._busy.add(task))
        except GatewayError as error:
            await self._refuse(client, error)
            return False
        if request is None:
            return False
        protocol.left = task.cancel
        if protocol.has_left:
            return False
        await self._respond(client, request)
        protocol.left = None
        self._busy.discard(task)
        if client.is_reusable():
            return True
        await client.close_after_reading()
        return False

    async def _respond(self, client: HttpConnection, request: GatewayRequest) -> None:
        """Answer a request: by a hook, by a backend, or by an error."""
        try:
            reply = await self.hooks.answer(request)
            if reply is None:
                await self._forwarder.forward(client, request)
            else:
                await self._send_reply(client, reply)
            return
        except GatewayError as failure:
            error = failure
        except ClientLeft:
            raise
        except Exception:
            log.exception("no answer to %s %s", request.method, request.target)
            error = GatewayError(500, "an internal error, which the log of this gateway describes")
        if client.wire.our_state is not h11.SEND_RESPONSE:
            raise ClientLeft("a response that has begun cannot become another")
        await self._send_reply(client, self.render_error(error), error.retry_after)

    async def _refuse(self, client: HttpConnection, error: GatewayError) -> None:
        """Answer a request that was not received, and close: where the next one would begin nobody knows."""
        if client.wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send_reply(client, self.render_error(error), error.retry_after, close=True)
            await client.close_after_reading()

    async def _send_reply(
        self, client: HttpConnection, reply: Reply, retry_after: int | None = None, close: bool = False
    ) -> None:
        head, body = reply_to_send(reply, retry_after, close)
        events = [head, h11.EndOfMessage()] if client.method == b"HEAD" else [head, body, h11.EndOfMessage()]
        try:
            async with asyncio.timeout(self.limits.send_within):
                await client.send(*events)
        except OSError as error:
            raise ClientLeft(str(error)) from error
