"""One request at one backend: sent, answered, and the answer passed on piece by piece.

    client ◄── at most CHUNK bytes ── gateway ◄── at most 2 · CHUNK bytes ── backend

A piece is received only after the piece before it has been taken by the client's side, so a slow client slows its
backend down and fills no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import h11

from minilib.classic.gateway.connection import ClientLeft, HttpConnection
from minilib.classic.gateway.messages import GatewayError, GatewayRequest, Headers, request_to_send, response_to_send
from minilib.classic.gateway.pool import BackendPool
from minilib.classic.gateway.rules import IDEMPOTENT, GatewayLimits

Rest = AsyncIterator[h11.Data | h11.EndOfMessage]


class BackendFailed(GatewayError):
    """A backend has not answered, or not to the end.

    Args:
        was_sent: whether it may have got a part of the request.
    """

    def __init__(self, status: int, reason: str, was_sent: bool) -> None:
        super().__init__(status, reason)
        self.was_sent = was_sent


class Attempt:
    """Sends a request to one backend.

    Args:
        request: to send.
        pool: of the backend.
        limits: of time.
        rest: what of the body is not in request.body.

    Attributes:
        sent_to_client: whether the client has been sent a part of the response.
    """

    def __init__(self, request: GatewayRequest, pool: BackendPool, limits: GatewayLimits, rest: Rest) -> None:
        self.request, self.sent_to_client = request, False
        self._pool, self._limits, self._clock = pool, limits, asyncio.get_running_loop().time
        self._backend: HttpConnection | None = None
        self._rest, self._uploading = rest, None

    async def head(self, extra: Headers) -> h11.Response:
        """Send the request and receive the head of the response.

        A kept connection that ends without a byte of response says nothing about the backend: a request that may be
        sent twice is sent again, to the same backend.

        Raises:
            BackendFailed: if the backend does not accept, does not answer, or answers what is no HTTP.
            GatewayError: if the rest of the body is too long or too slow.
            ClientLeft: if the client leaves before its body is complete.
        """
        while True:
            self._backend = self._pool.take(self._clock())
            was_kept = self._backend is not None
            with self._failing("does not accept connections", was_sent=False):
                self._backend = self._backend or await self._pool.connect()
            before = self._backend.bytes_received
            try:
                return await self._exchange(extra)
            except BackendFailed as failed:
                untouched = was_kept and failed.status == 502 and self._backend.bytes_received == before
                if not untouched or self.request.method not in IDEMPOTENT or not self.request.body_is_whole:
                    raise
                self._backend.abort()

    async def pass_on(self, response: h11.Response, client: HttpConnection, extra: Headers, hold: int) -> None:
        """Send the response to the client as it comes.

        Args:
            extra: headers to add.
            hold: bytes that are held back as long as the response is not complete.

        Raises:
            BackendFailed: if the backend fails before the end.
            ClientLeft: if the client leaves or does not read.
        """
        head, held = response_to_send(response), 0
        headers = [*head.headers, *extra]
        events: list[h11.Event] = [h11.Response(status_code=head.status_code, headers=headers, reason=head.reason)]
        new: list[h11.Event] = self._backend.received()
        while True:
            complete = bool(new) and isinstance(new[-1], h11.EndOfMessage)
            held += sum(len(event.data) for event in new if isinstance(event, h11.Data))
            events += [*new[:-1], h11.EndOfMessage()] if complete else new  # trailers end here
            if complete or held >= hold:
                await self._send(client, *events)
                events, hold = [], 0
            if complete:
                return
            with self._failing("stopped in the middle of its response", was_sent=True):
                async with asyncio.timeout(self._limits.stall_within):
                    new = [await self._backend.receive()]
            if isinstance(new[0], h11.Data):
                new += self._backend.received()

    async def close(self) -> None:
        """Keep the connection if both sides are done, else close it at once, so that the backend stops its work."""
        if self._uploading is not None:
            await _cancelled(self._uploading)
        if self._backend is not None:
            self._backend.received()  # the end of a short response that nobody wants
            self._pool.give_back(self._backend, self._clock())

    async def _exchange(self, extra: Headers) -> h11.Response:
        head = request_to_send(self.request, f"{self._pool.host}:{self._pool.port}", extra)
        body = h11.Data(data=self.request.body)
        with self._failing("does not answer", was_sent=True):
            if self.request.body_is_whole:
                async with asyncio.timeout(self._limits.send_within):
                    await self._backend.send(head, body, h11.EndOfMessage())
            else:
                self._uploading = asyncio.create_task(self._upload(head, body))
                return await self._head_while_uploading()
            return await self._final_head()

    async def _final_head(self) -> h11.Response:
        """The head of the response after those that only inform; 1xx are for this connection alone, and end here."""
        async with asyncio.timeout(self._limits.answer_within):
            while not isinstance(event := await self._backend.receive(), h11.Response):
                pass
        return event

    async def _head_while_uploading(self) -> h11.Response:
        """A backend may answer before it has the whole body, most often that it does not want it."""
        receiving = asyncio.create_task(self._final_head())
        try:
            await asyncio.wait({receiving, self._uploading}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                self._uploading.result()
            return await receiving
        finally:
            await _cancelled(receiving)

    async def _upload(self, *first: h11.Event) -> None:
        """Send the body as the client sends it; GatewayError and ClientLeft are those of the rest of the body."""
        try:
            async with asyncio.timeout(self._limits.send_within):
                await self._backend.send(*first)
            async for event in self._rest:
                async with asyncio.timeout(self._limits.send_within):
                    await self._backend.send(event)
        except TimeoutError:
            raise BackendFailed(504, "the backend does not take the body of the request", was_sent=True) from None
        except OSError:
            pass  # the backend has closed its half: what it has answered, if it has, says why

    async def _send(self, client: HttpConnection, *events: h11.Event) -> None:
        self.sent_to_client = True
        try:
            async with asyncio.timeout(self._limits.send_within):
                await client.send(*events)
        except OSError as error:
            raise ClientLeft(f"the client does not take its response: {error}") from error

    @contextmanager
    def _failing(self, how: str, was_sent: bool) -> Iterator[None]:
        """Errors of the backend's connection in the body are BackendFailed."""
        try:
            yield
        except TimeoutError:
            raise BackendFailed(504, f"the backend {how} in time", was_sent) from None
        except (OSError, h11.RemoteProtocolError) as error:
            raise BackendFailed(502, f"the backend {how}: {error}", was_sent) from error


async def _cancelled(task: asyncio.Task) -> None:
    """Cancel a task and wait for its end; what it raised is of no interest any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
