"""A TCP connection that speaks HTTP/1.1: h11 knows the framing, asyncio's streams hold bounded buffers."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

import h11

from minilib.classic.gateway.rules import CHUNK
from minilib.classic.http.wire import is_quiet

LINGER = 0.5  # seconds that a client has to read the last response before its connection is closed
MAX_LINGER = 4 << 20  # bytes that are read and thrown away meanwhile


class PeerGone(ConnectionError):
    """The other side has closed the connection, or has sent what is no HTTP."""


class ClientLeft(Exception):
    """The client has closed its connection, or does not read: nobody waits for an answer."""


class HttpConnection:
    """One side of HTTP/1.1 on a connection.

    Args:
        role: h11.SERVER to receive requests, h11.CLIENT to send them.
        max_head: bytes of a start line and headers.

    Attributes:
        wire: state of h11.
        method: of the request at work; b"" before its head was received.
        is_chunked: whether the last response sent is chunked.
        bytes_received: so far.
        since: when it was last used, for whoever keeps it.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, role: type[h11.Sentinel], max_head: int
    ) -> None:
        self.reader, self.writer, self.bytes_received, self.since = reader, writer, 0, 0.0
        self._max_head, self._ended = max_head, False
        self.method, self.is_chunked = b"", False
        self.wire = h11.Connection(role, max_incomplete_event_size=max_head)
        writer.transport.set_write_buffer_limits(CHUNK)

    @property
    def peer(self) -> str:
        """Address of the other side."""
        return (self.writer.get_extra_info("peername") or ("unknown",))[0]

    async def receive(self) -> h11.Event:
        """The next event.

        Raises:
            PeerGone: if the connection ends, in the middle of a message or between two.
            h11.RemoteProtocolError: if the bytes are no HTTP, or a head is too long.
        """
        while True:
            try:
                event = self.wire.next_event()
            except h11.RemoteProtocolError as error:
                if self._ended:
                    raise PeerGone(f"the connection ended too early: {error}") from None
                raise
            if event is h11.NEED_DATA:
                await self._read()
            elif isinstance(event, h11.ConnectionClosed):
                raise PeerGone("the connection has ended")
            else:
                if isinstance(event, h11.Request | h11.Response | h11.InformationalResponse):
                    self._check_head(event)
                self.method = getattr(event, "method", self.method)
                return event

    async def wait(self) -> None:
        """Wait until the other side has sent something; PeerGone if it ends the connection instead."""
        while not self.wire.trailing_data[0]:
            if self._ended:
                raise PeerGone("the connection has ended")
            await self._read()

    def received(self) -> list[h11.Data | h11.EndOfMessage]:
        """Parts of a body that have arrived and were not received yet, with no wait for more."""
        events = []
        with suppress(h11.RemoteProtocolError):  # receive raises it, once what was good has been passed on
            while not events or isinstance(events[-1], h11.Data):
                event = self.wire.next_event()
                if not isinstance(event, h11.Data | h11.EndOfMessage):
                    break
                events.append(event)
        return events

    async def send(self, *events: h11.Event) -> None:
        """Send events in one write, and wait while the other side is too slow for the buffer."""
        data = b"".join(part for event in events if (part := self.wire.send(event)))
        if isinstance(events[0], h11.Response):
            self.is_chunked = b"transfer-encoding: chunked" in data[: data.index(b"\r\n\r\n")].lower()
        if data:
            self.writer.write(data)
        await self.writer.drain()

    def is_reusable(self) -> bool:
        """Start the next request if both sides are done with this one and nothing was said in between."""
        if self.wire.our_state is not h11.DONE or self.wire.their_state is not h11.DONE:
            return False
        self.wire.start_next_cycle()
        self.method = b""
        return not self.writer.is_closing()

    def is_quiet(self) -> bool:
        """Whether an idle connection has neither ended nor received anything."""
        return is_quiet(self.reader) and not (self.wire.trailing_data[0] or self.writer.is_closing())

    def abort(self, reset: bool = False) -> None:
        """Close at once; with `reset` so that a peer sees an error to whom the end of a connection is an end."""
        if reset and (sock := self.writer.get_extra_info("socket")) is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close_after_reading(self) -> None:
        """Close so that the last response can be read: closed over unread bytes, a socket resets the connection."""
        with suppress(OSError, TimeoutError):
            self.writer.write_eof()
            async with asyncio.timeout(LINGER):
                left = MAX_LINGER
                while left > 0 and (data := await self.reader.read(CHUNK)):
                    left -= len(data)
        self.writer.transport.abort()

    def _check_head(self, event: h11.Request | h11.Response | h11.InformationalResponse) -> None:
        """h11 has a limit for what is incomplete; a long head that has arrived in one piece is complete."""
        size = sum(len(name) + len(value) + 4 for name, value in event.headers)
        if size + (len(event.target) if isinstance(event, h11.Request) else 0) > self._max_head:
            raise h11.RemoteProtocolError(f"a head has at most {self._max_head} bytes", error_status_hint=431)

    async def _read(self) -> None:
        try:
            data = await self.reader.read(CHUNK)
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error
        self.bytes_received, self._ended = self.bytes_received + len(data), not data
        self.wire.receive_data(data)


class WatchedProtocol(asyncio.StreamReaderProtocol):
    """Calls `left` as soon as the other side ends its half or the connection breaks, whoever reads at the time."""

    left: Callable[[], None] | None = None
    has_left = False

    def eof_received(self) -> bool | None:
        """As StreamReaderProtocol, and tell."""
        stays = super().eof_received()
        self._tell()
        return stays

    def connection_lost(self, exc: Exception | None) -> None:
        """As StreamReaderProtocol, and tell."""
        super().connection_lost(exc)
        self._tell()

    def _tell(self) -> None:
        self.has_left = True
        if self.left is not None:
            told, self.left = self.left, None
            told()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, WatchedProtocol], Awaitable[None]]


async def listen(serve: Serve, host: str, port: int) -> asyncio.Server:
    """As asyncio.start_server, with a protocol that is watched."""
    loop = asyncio.get_running_loop()

    def protocol() -> WatchedProtocol:
        reader = asyncio.StreamReader(limit=CHUNK, loop=loop)
        watched: WatchedProtocol = WatchedProtocol(reader, lambda r, w: serve(r, w, watched), loop=loop)
        return watched

    return await loop.create_server(protocol, host, port, backlog=1024)
