"""An HTTP client of one server that keeps its connections open for later requests."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from minilib.classic.http.wire import HOST, MAX_HEAD, Response, read_response

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """Sends GET requests to the server that listens on a port of this machine."""

    def __init__(self, port: int) -> None:
        self._port, self._closed = port, False
        self._idle: list[Connection] = []

    async def get(self, target: str, timeout: float) -> Response:
        """Send a request and receive its response within `timeout` seconds, connecting included.

        An idle connection that the server has closed meanwhile says nothing about the server: another one is tried.

        Raises:
            OSError: if the server refuses, resets or closes the connection, or is too slow (TimeoutError).
            BadMessage: if the response is malformed.
        """
        request = f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("ascii")
        async with asyncio.timeout(timeout):
            while self._idle:
                reader, writer = self._idle.pop()
                if _is_quiet(reader):
                    with suppress(ConnectionError):
                        return await self._exchange(reader, writer, request)
                writer.transport.abort()
            connection = await asyncio.open_connection(HOST, self._port, limit=MAX_HEAD)
            return await self._exchange(*connection, request)

    async def close(self) -> None:
        """Close the idle connections; one in use is closed after its response."""
        self._closed = True
        writers = [writer for _, writer in self._idle]
        self._idle.clear()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    def check_invariants(self) -> None:
        """No connection is idle twice, and none is once the client is closed."""
        assert len({writer for _, writer in self._idle}) == len(self._idle), "a connection is idle twice"
        assert not (self._closed and self._idle), "a closed client has open connections"

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Response:
        keep_alive = False
        try:
            writer.write(request)
            await writer.drain()
            response = await read_response(reader)
            keep_alive = response.keep_alive and not self._closed
        finally:  # after a timeout the response may still come, and must not be taken for that to a later request
            if keep_alive:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()
        return response


def _is_quiet(reader: asyncio.StreamReader) -> bool:
    """Whether an idle connection has neither ended nor received bytes that no request asked for."""
    peek = reader.read(1)
    try:
        peek.send(None)  # runs read until it returns, or until it would wait
    except (StopIteration, ConnectionError):
        return False
    finally:
        peek.close()
    return True
