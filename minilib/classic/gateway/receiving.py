"""Requests of clients, received within limits of size and time.

A client that sends a byte now and then ("slow loris") holds a connection as long as nobody counts its time: here a head
has a time from its first byte to its last, and a body a time that grows only with what has come of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import h11

from minilib.classic.gateway.connection import ClientLeft, HttpConnection
from minilib.classic.gateway.messages import GatewayError, GatewayRequest, accept
from minilib.classic.gateway.rules import GatewayLimits


async def receive_request(
    client: HttpConnection, limits: GatewayLimits, begins: Callable[[], None]
) -> GatewayRequest | None:
    """The next request, with its body or the beginning of it; None if the client begins none in time.

    Args:
        client: to receive from.
        limits: of size and time.
        begins: called at the first byte of the request.

    Raises:
        GatewayError: 400, 408, 413, 417, 431 or 501, after which the connection is of no use.
        ClientLeft: if the connection ends.
    """
    try:
        async with asyncio.timeout(limits.idle_within):
            await client.wait()
    except TimeoutError:
        return None
    except OSError as error:
        raise ClientLeft(str(error)) from error
    begins()
    with _refusing("head"):
        async with asyncio.timeout(limits.head_within):
            event = await client.receive()
    request = accept(event, client.peer, limits.max_body)
    body = bytearray()
    async for event in _body(client, request, limits, 0):
        if isinstance(event, h11.EndOfMessage):
            break
        body += event.data
        if len(body) > limits.replay_body:
            request.body_is_whole = False
            break
    request.body = bytes(body)
    return request


async def rest_of_body(
    client: HttpConnection, request: GatewayRequest, limits: GatewayLimits
) -> AsyncIterator[h11.Data | h11.EndOfMessage]:
    """The parts of a body after request.body, and its end; errors are those of receive_request."""
    async for event in _body(client, request, limits, len(request.body)):
        yield event


async def _body(
    client: HttpConnection, request: GatewayRequest, limits: GatewayLimits, size: int
) -> AsyncIterator[h11.Data | h11.EndOfMessage]:
    """Parts of a body of which `size` bytes are here already."""
    if client.wire.they_are_waiting_for_100_continue:
        await client.send(h11.InformationalResponse(status_code=100, headers=[]))
    clock, left = asyncio.get_running_loop().time, limits.body_within + size / limits.slowest_body
    while True:
        since = clock()
        with _refusing("body"):
            async with asyncio.timeout(left):
                event = await client.receive()
        left -= clock() - since
        if isinstance(event, h11.EndOfMessage):
            yield h11.EndOfMessage()  # trailers end here
            return
        size, left = size + len(event.data), left + len(event.data) / limits.slowest_body
        if size > limits.max_body:
            raise GatewayError(413, f"a body has at most {limits.max_body} bytes")
        yield event


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """What a client does wrong in the body is a GatewayError; that it leaves is ClientLeft."""
    try:
        yield
    except TimeoutError:
        raise GatewayError(408, f"the {what} of the request took too long") from None
    except h11.RemoteProtocolError as error:
        what = str(error).partition(":")[0]  # the rest repeats what the client sent
        raise GatewayError(error.error_status_hint, f"no valid HTTP/1.1: {what}") from error
    except OSError as error:
        raise ClientLeft(str(error)) from error
