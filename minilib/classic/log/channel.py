"""Sockets that never block: what cannot be sent yet waits, and so does what has come and was not looked at.

With blocking ones, two processes that send to each other while neither reads would wait for ever once the kernel's
buffers are full.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterable, Iterator

PIECE = 1 << 18  # bytes received at a time
PREFIX = struct.Struct("!cI")  # kind of a message and bytes of its body


class Channel:
    """One end of a connection.

    Args:
        connection: a connected stream socket; it belongs to the channel from now on.

    Attributes:
        unsent: bytes that the kernel has not taken yet.
        received: bytes that came and that nobody has taken out yet.
        open: False once the other end is gone; what it had sent is still in `received`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.unsent, self.received = bytearray(), bytearray()
        self.open = True
        connection.setblocking(False)
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an acknowledgement must not wait

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Send, now or as soon as the other end makes room."""
        self.unsent += data
        self.flush()

    def post(self, kind: bytes, body: bytes | dict) -> None:
        """Send a message: a kind of one byte, and bytes or what JSON can say."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send(PREFIX.pack(kind, len(data)) + data)

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """Take out the messages that have come: kinds and bodies."""
        while len(self.received) >= PREFIX.size:
            kind, length = PREFIX.unpack_from(self.received)
            if len(self.received) < PREFIX.size + length:
                return
            body = bytes(self.received[PREFIX.size : PREFIX.size + length])
            del self.received[: PREFIX.size + length]
            yield kind, body

    def take_whole(self, size: int) -> bytes:
        """Take out as many whole units of `size` bytes as have come."""
        whole = len(self.received) // size * size
        units = bytes(self.received[:whole])
        del self.received[:whole]
        return units

    def flush(self) -> None:
        """Send as much as the kernel takes."""
        try:
            while self.unsent and self.open:
                del self.unsent[: self._socket.send(self.unsent)]
        except BlockingIOError:
            return
        except OSError:  # nobody is there any more
            self.open = False
        if not self.open:
            self.unsent.clear()

    def receive(self) -> None:
        """Receive what has come, or that the other end is gone."""
        try:
            piece = self._socket.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self.received += piece
        if not piece:
            self.open = False

    def close(self) -> None:
        """Close this end."""
        self.open = False
        self.unsent.clear()
        self._socket.close()


def exchange(channels: Iterable[Channel], seconds: float | None, listener: socket.socket | None = None) -> None:
    """Wait until something can be sent or received on open channels, and do it.

    Args:
        channels: those to look at.
        seconds: how long to wait; None to wait for ever.
        listener: a socket at which a connection ends the wait, too.
    """
    poll, at = select.poll(), {channel.fileno(): channel for channel in channels if channel.open}
    for number, channel in at.items():
        poll.register(number, select.POLLIN | (select.POLLOUT if channel.unsent else 0))
    if listener is not None:
        poll.register(listener, select.POLLIN)
    for number, events in poll.poll(None if seconds is None else max(0.0, seconds) * 1000):
        if number in at and events & select.POLLOUT:
            at[number].flush()
        if number in at and events & ~select.POLLOUT:
            at[number].receive()
