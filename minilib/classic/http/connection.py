"""Connections of HTTP/1.1 on asyncio, and a client that keeps them open.

A protocol and not asyncio's streams, whose layers cost more than the rest of a request here; what is to be measured is
the queueing at the backends. All of it is for loopback.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from minilib.classic.http.wire import MAX_BODY, MAX_HEAD, Response, take_response

HOST = "127.0.0.1"
ENOUGH = MAX_HEAD + 4 + MAX_BODY  # bytes that hold a whole message, or one that is refused
Message = TypeVar("Message")


class ConnectionEnded(ConnectionError):
    """The other end closed the connection, or reset it, before a message was whole."""


class Connection(asyncio.Protocol):
    """One end of a connection, as asyncio calls it; one task at a time uses it.

    Args:
        made: called with it once it is connected.
        lost: called with it once it is gone.

    Attributes:
        ended: nothing more will come.
    """

    def __init__(self, made: Callable[[Connection], object], lost: Callable[[Connection], object]) -> None:
        self._made, self._lost = made, lost
        self._buffer, self._transport = bytearray(), None
        self._wake: asyncio.Future | None = None
        self._gone, self._writable = asyncio.Event(), asyncio.Event()
        self._discarding = self.ended = False
        self._deadline, self._timer = math.inf, None

    @property
    def pending(self) -> bool:
        """Bytes have come that nobody has taken."""
        return bool(self._buffer)

    async def receive(self, take: Callable[[bytearray], Message | None], timeout: float) -> Message:
        """Wait for a message.

        Args:
            take: takes a message out of what has come, or returns None while it is not whole.
            timeout: seconds for all of it, however slowly it comes.

        Raises:
            BadMessage: from take.
            ConnectionEnded: if no whole message comes any more.
            TimeoutError: if it takes too long.
        """
        self._deadline = self._loop.time() + timeout
        while (message := take(self._buffer)) is None:
            if self._timer is None or self._timer.when() > self._deadline:
                self._set_timer()
            await self._more()
        self._deadline = math.inf
        self._transport.resume_reading()
        return message

    async def send(self, data: bytes, timeout: float) -> None:
        """Send, and wait until the kernel has all of it; it has at once, unless the other end does not read.

        Raises:
            ConnectionEnded: if it is gone.
            TimeoutError: if it does not catch up.
        """
        if self._transport.is_closing():
            raise ConnectionEnded("the connection is closed")
        self._transport.write(data)
        if not self._writable.is_set():
            async with asyncio.timeout(timeout):
                await self._writable.wait()

    async def linger(self, timeout: float) -> None:
        """Before `close`: say that nothing more is sent, and drop what comes until the other end closes, too.

        Closing at once, with bytes unread, would reset the connection and take away the answer to what was refused.
        """
        self._discarding = True
        self._buffer.clear()
        with suppress(OSError, TimeoutError):  # whoever is gone needs no goodbye
            if not self._transport.is_closing():
                self._transport.write_eof()
                self._transport.resume_reading()
            async with asyncio.timeout(timeout):
                while not self.ended:
                    await self._more()

    def close(self) -> None:
        """Close once what was sent is out."""
        self._transport.close()

    def reset(self) -> None:
        """Close at once; the other end finds the connection reset, as if this process had been killed."""
        raw = self._transport.get_extra_info("socket")
        if raw is not None and raw.fileno() >= 0:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    async def wait_gone(self) -> None:
        """Wait until asyncio has let go of it; comes soon after `reset`."""
        await self._gone.wait()

    async def _more(self) -> None:
        if self.ended:
            raise ConnectionEnded("the other end closed the connection" + " in mid-message" * self.pending)
        self._wake = self._loop.create_future()
        await self._wake

    def _set_timer(self) -> None:
        """One timer for many deadlines: a message that comes in time moves the deadline and leaves the timer alone."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if self._deadline == math.inf else self._loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        if self._loop.time() < self._deadline:
            self._set_timer()
            return
        self._timer = None
        if self._wake is not None and not self._wake.done():
            self._wake.set_exception(TimeoutError())

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:
        """It is connected."""
        self._transport, self._loop = transport, asyncio.get_running_loop()
        transport.set_write_buffer_limits(0)  # what `send` has sent is with the kernel
        self._writable.set()
        self._made(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came; more than a message needs wait in the kernel."""
        if not self._discarding:
            self._buffer += data
            if len(self._buffer) > ENOUGH:
                self._transport.pause_reading()
            self._rouse()

    def eof_received(self) -> bool:
        """The other end sends no more; it may still want an answer, so this end stays open."""
        self.ended = True
        self._rouse()
        return True

    def pause_writing(self) -> None:
        """Too much is waiting to be sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It is sent."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self.ended, self._deadline = True, math.inf
        self._set_timer()
        self._rouse()
        self._writable.set()
        self._gone.set()
        self._lost(self)


class Client:
    """Asks one server on this machine, on connections that it keeps for the next request.

    Args:
        port: where the server listens.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._closed = False

    async def get(self, target: str, timeout: float) -> Response:
        """Ask for a target.

        A connection that was kept and turns out to be dead says nothing about the server: another one is tried.

        Args:
            target: path and query.
            timeout: seconds to connect, if it must, and seconds to answer.

        Raises:
            OSError: if the server is not there, or goes away before the answer is whole; TimeoutError is one.
            BadMessage: if it answers what is none.
        """
        request = f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("ascii")
        while self._idle:
            connection = self._idle.pop()
            if connection.ended or connection.pending:
                connection.close()
                continue
            with suppress(ConnectionEnded):
                return await self._exchange(connection, request, timeout)
        async with asyncio.timeout(timeout):
            connection = await self._connect()
        return await self._exchange(connection, request, timeout)

    async def close(self) -> None:
        """Close all connections, and wait until they are gone."""
        self._closed = True
        self._idle.clear()
        for connection in [*self._open]:
            connection.reset()
            await connection.wait_gone()

    def check_invariants(self) -> None:
        """A connection is kept once, and is one that was made here."""
        assert len(set(self._idle)) == len(self._idle), "a connection is kept twice"
        assert all(connection in self._open or connection.ended for connection in self._idle), "a stranger is kept"

    async def _connect(self) -> Connection:
        if self._closed:
            raise ConnectionEnded("this client is closed")
        connect = asyncio.get_running_loop().create_connection
        _, connection = await connect(lambda: Connection(self._open.add, self._open.discard), HOST, self._port)
        return connection

    async def _exchange(self, connection: Connection, request: bytes, timeout: float) -> Response:
        try:
            await connection.send(request, timeout)
            response = await connection.receive(take_response, timeout)
        except BaseException:  # cancelled as well: an answer that comes later must not be taken for that to another
            connection.reset()
            raise
        if response.keep_alive and not connection.ended and not connection.pending and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()
        return response
