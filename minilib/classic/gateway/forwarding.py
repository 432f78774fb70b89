"""From a request to the end of its response: backends are tried one after the other, none twice, until one answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import h11

from minilib.classic.gateway.attempt import Attempt, BackendFailed
from minilib.classic.gateway.backends import Backends
from minilib.classic.gateway.connection import ClientLeft, HttpConnection
from minilib.classic.gateway.hooks import Ending, GatewayHooks
from minilib.classic.gateway.messages import GatewayError, GatewayRequest
from minilib.classic.gateway.receiving import rest_of_body
from minilib.classic.gateway.rules import GatewayLimits, RetryRule
from minilib.mechanisms.balancing import Dispatched, NoTarget, RetryBudget


@dataclass
class Forwarder:
    """Forwards requests to backends.

    Args:
        backends, limits, retries, budget, hooks, key_of, hold: those of Gateway.
    """

    backends: Backends
    key_of: Callable[[GatewayRequest], Any]
    hooks: GatewayHooks = field(default_factory=GatewayHooks)
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    retries: RetryRule = field(default_factory=RetryRule)
    budget: RetryBudget = field(default_factory=RetryBudget)
    hold: int = 0

    async def forward(self, client: HttpConnection, request: GatewayRequest) -> None:
        """Send the client the response of a backend.

        Raises:
            GatewayError: if there is none, and the client has been sent nothing.
            ClientLeft: if the client is gone, or its connection was cut.
        """
        error = None
        try:
            await self._forward(client, request)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.hooks.finished(request, error)

    async def _forward(self, client: HttpConnection, request: GatewayRequest) -> None:
        key, clock, dispatcher = self.key_of(request), asyncio.get_running_loop().time, self.backends.dispatcher
        error = GatewayError(503, "no backend takes requests", retry_after=1)
        self.budget.request()
        while True:
            try:
                dispatched = dispatcher.dispatch(key, clock(), request.tried)
            except NoTarget:
                raise error from None
            request.tried.append(dispatched.target)
            try:
                if await self._attempt(client, request, dispatched):
                    return
            except BackendFailed as failed:
                dispatched.failed(clock())
                if not self._may_repeat(request, failed) or not self._may_retry(request):
                    raise
                error = failed
            finally:
                dispatched.ended()

    async def _attempt(self, client: HttpConnection, request: GatewayRequest, dispatched: Dispatched) -> bool:
        """Try one backend; False if it refused, and another one is to be asked."""
        target, ending = dispatched.target, Ending.LEFT
        async with aclosing(rest_of_body(client, request, self.limits)) as rest:
            attempt = Attempt(request, self.backends.pools[target], self.limits, rest)
            try:
                response = await attempt.head(self.hooks.dispatched(request, target))
                dispatched.began()
                status, headers = response.status_code, list(response.headers)
                extra = self.hooks.answered(request, target, status, headers)
                if self.retries.after_refusal(status, headers) and self._may_retry(request):
                    ending = Ending.REFUSED
                    return False
                await attempt.pass_on(response, client, extra, self.hold)
                ending = Ending.COMPLETE
                return True
            except BackendFailed as failed:
                ending = Ending.CUT if attempt.sent_to_client else Ending.FAILED
                if not attempt.sent_to_client:
                    raise
                dispatched.failed(asyncio.get_running_loop().time())
                await self._cut(client, self.hooks.last_words(request, target))
                raise ClientLeft(f"cut: {failed}") from failed
            finally:
                await attempt.close()
                self.hooks.ended(request, target, ending)

    def _may_repeat(self, request: GatewayRequest, failed: BackendFailed) -> bool:
        return self.retries.after_failure(request.method, failed.was_sent, timed_out=failed.status == 504)

    def _may_retry(self, request: GatewayRequest) -> bool:
        """Whether there is another backend, the whole body to send it, and a retry in the budget."""
        now = asyncio.get_running_loop().time()
        loads = self.backends.dispatcher.loads(now, request.tried)
        possible = request.body_is_whole and len(request.tried) < self.retries.max_attempts
        return possible and min(loads) < float("inf") and self.budget.take(now)

    async def _cut(self, client: HttpConnection, last_words: bytes) -> None:
        """End a response that is not complete, so that no client can take it for one that is.

        What was sent can still be read. Where the end of the connection is the end of the body, it is reset instead.
        """
        if client.wire.their_http_version < b"1.1":
            client.abort(reset=True)
            return
        try:
            async with asyncio.timeout(self.limits.send_within):
                if last_words and client.is_chunked:
                    await client.send(h11.Data(data=last_words))
                client.writer.close()
                await client.writer.wait_closed()
        except OSError:
            client.abort()
