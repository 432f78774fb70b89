"""Packets between two workers: over TCP, or through memory that both map. Neither end ever waits for the other.

    packet     magic │ length of the head │ length of the content │ head (JSON) │ content (bytes of a tensor)

`post` hands a packet to the channel and returns; what the way does not take at once leaves at later calls, as a network
card would send it. So a worker computes while its packets travel, and looks at what has arrived when that suits.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minilib.mechanisms.basics.checks import is_whole
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.shared_memory import SLOT_BYTES, Peer

PREFIX = struct.Struct("<4sIQ")
MAGIC = b"kv 1"
MOST_HEAD_BYTES, MOST_CONTENT_BYTES = 2**16, 2**31
NOTHING = torch.empty(0, dtype=torch.uint8)


class ChannelClosed(ConnectionError):
    """The worker at the other end is gone, or does not speak this protocol; the message says which."""


@dataclass(frozen=True)
class Packet:
    """What one worker tells another.

    Args:
        kind: what it says.
        fields: JSON values that belong to it.
        content: bytes, uint8, for values that are many.
    """

    kind: str
    fields: dict = field(default_factory=dict)
    content: Tensor = NOTHING

    def field(self, name: str, kind: type):
        """A field, looked at before it is used: the other end may be another program, or another version of this one.

        Args:
            name: of the field.
            kind: int for a whole number from 0, float for a number above 0, list for whole numbers from 0, str, dict.

        Raises:
            ChannelClosed: if the field is missing or of another kind.
        """
        value = self.fields.get(name)
        if kind is int:
            fits = is_whole(value, 0)
        elif kind is float:
            fits = isinstance(value, int | float) and value > 0
        else:
            fits = isinstance(value, kind) and (kind is not list or all(is_whole(each, 0) for each in value))
        if not fits:
            raise ChannelClosed(f"a packet {self.kind!r} came with {name} = {value!r}, which is not of this protocol")
        return value


class PacketChannel:
    """One end of a way between two workers; subclasses move bytes.

    Args:
        connection: a socket that is readable when something has come; it belongs to the channel from now on.
        name: of the worker at the other end, for messages.

    Attributes:
        num_sent, num_received: packets, by kind.
        content_bytes_sent, content_bytes_received: bytes of their contents.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.setblocking(False)
        self.socket, self.name = connection, name
        self.num_sent: dict[str, int] = {}
        self.num_received: dict[str, int] = {}
        self.content_bytes_sent = self.content_bytes_received = 0
        self._leaving: deque[memoryview] = deque()
        self._arriving = self._parts()
        self._place = memoryview(next(self._arriving))
        self._arrived: list[Packet] = []
        self._failure: ChannelClosed | None = None  # raised when all that came before has been handed out

    def post(self, packet: Packet) -> None:
        """Send a packet and return at once; its content must not change until `idle`.

        Raises:
            ChannelClosed: if the other end is gone.
        """
        head = json.dumps({"kind": packet.kind, **packet.fields}).encode()
        content = memoryview(packet.content.numpy())
        self._leaving.append(memoryview(PREFIX.pack(MAGIC, len(head), len(content)) + head))
        if len(content):
            self._leaving.append(content)
        self.num_sent[packet.kind] = self.num_sent.get(packet.kind, 0) + 1
        self.content_bytes_sent += len(content)
        self.push()

    def push(self) -> None:
        """Let posted packets leave as far as the way takes them now.

        Raises:
            ChannelClosed: if the other end is gone.
        """
        while self._leaving and (count := self._write(self._leaving)):
            while count and count >= len(self._leaving[0]):
                count -= len(self._leaving.popleft())
            if count:
                self._leaving[0] = self._leaving[0][count:]

    def receive(self) -> list[Packet]:
        """The packets that have come whole since the last call, in their order; posted ones leave meanwhile.

        Raises:
            ChannelClosed: if the other end is gone and no packet is left, or if what came is no packet.
        """
        try:
            self._fill()
            self.push()
        except ChannelClosed as error:
            self._failure = self._failure or error
        if self._failure and not self._arrived:
            raise self._failure
        arrived, self._arrived = self._arrived, []
        return arrived

    @property
    def idle(self) -> bool:
        """Whether all posted packets have left."""
        return not self._leaving

    @property
    def has_received(self) -> bool:
        """Whether `receive` has something to do that the socket does not show."""
        return False

    def close(self) -> None:
        """Close this end, which the other one notices, and free what it holds."""
        self.socket.close()
        self._leaving.clear()
        self._arriving.close()
        self._failure = self._failure or ChannelClosed(f"the channel to {self.name} was closed here")

    def _fill(self) -> None:
        """Read what has come."""
        while not self._failure and (count := self._read(self._place)):
            self._place = self._place[count:]
            while not self._place:
                self._place = memoryview(next(self._arriving))

    def _parts(self) -> Iterator[bytearray]:
        """The buffers to be filled next: of a prefix, then of its head and content; notes packets that are whole."""
        while True:
            prefix = bytearray(PREFIX.size)
            yield prefix
            magic, head_bytes, content_bytes = PREFIX.unpack(prefix)
            if magic != MAGIC or not 0 < head_bytes <= MOST_HEAD_BYTES or content_bytes > MOST_CONTENT_BYTES:
                raise ChannelClosed(f"{self.name} sent {bytes(prefix)!r}, which begins no packet of this protocol")
            head, content = bytearray(head_bytes), bytearray(content_bytes)
            yield head
            if content_bytes:
                yield content
            try:
                fields = json.loads(head)
                kind = fields.pop("kind")
                self.num_received[kind] = self.num_received.get(kind, 0) + 1
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ChannelClosed(f"{self.name} sent {bytes(head)[:80]!r}, which is no head of a packet") from error
            self.content_bytes_received += content_bytes
            tensor = torch.frombuffer(content, dtype=torch.uint8) if content_bytes else NOTHING
            self._arrived.append(Packet(kind, fields, tensor))

    def _write(self, buffers: Iterable[memoryview]) -> int:
        """Send the first bytes of some buffers, as many as the way takes without waiting; returns their number."""
        raise NotImplementedError

    def _read(self, place: memoryview) -> int:
        """Fill the beginning of a buffer with what has come; returns the number of bytes, 0 if nothing has."""
        raise NotImplementedError


class StreamChannel(PacketChannel):
    """Over a stream socket: TCP between hosts."""

    def _write(self, buffers):
        try:
            return self.socket.send(buffers[0])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosed(f"{self.name} is gone: {error}") from error

    def _read(self, place):
        try:
            count = self.socket.recv_into(place)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosed(f"{self.name} is gone: {error}") from error
        if not count:
            raise ChannelClosed(f"{self.name} is gone: it closed the connection")
        return count


class SharedMemoryChannel(PacketChannel):
    """Through slots of memory that both processes map, as ranks of one host exchange messages.

    Args:
        peer: the worker at the other end, its slots and the socket for notices about them.
        name: see `PacketChannel`.
    """

    def __init__(self, peer: Peer, name: str) -> None:
        super().__init__(peer.socket, name)
        self._peer: Peer | None = peer
        self._slot, self._gone = memoryview(b""), ""

    @property
    def has_received(self):
        return bool(self._slot or (self._peer and self._peer.filled))

    def close(self):
        super().close()
        self._gone = self._gone or str(self._failure)
        if self._peer:
            self._peer.close()
        self._slot, self._peer = memoryview(b""), None  # the last to map the slots

    def _write(self, buffers):
        self._hear()
        if self._gone:
            raise ChannelClosed(self._gone)
        if not self._peer.free:
            return 0
        slot, at = next(self._peer.to_fill), 0
        place = memoryview(slot.content.numpy())
        for buffer in buffers:  # small packets share a slot
            part = buffer[: SLOT_BYTES - at]
            place[at : at + len(part)] = part
            at += len(part)
        slot.write_head(b"", -1, at)
        try:
            self._peer.say_filled()
        except CollectiveFailed as error:
            raise ChannelClosed(f"{self.name} is gone: {error}") from error
        return at

    def _read(self, place):
        if not self._slot:
            self._hear()
            if not self._peer.filled:
                if self._gone:
                    raise ChannelClosed(self._gone)
                return 0
            slot = next(self._peer.to_empty)
            self._slot = memoryview(slot.content.numpy())[: slot.read_head()[2]]
        count = min(len(place), len(self._slot))
        place[:count] = self._slot[:count]
        self._slot = self._slot[count:]
        if not self._slot:
            self._peer.say_free()
        return count

    def _hear(self) -> None:
        """Notices about slots; what was sent before the other end was closed can be read still."""
        if self._gone:
            return
        try:
            self._peer.hear()
        except CollectiveFailed as error:
            self._gone = f"{self.name} is gone: {error}"


def wait_for_packets(channels: Iterable[PacketChannel], timeout: float) -> None:
    """Sleep until one of the channels has received something or can send more, at most `timeout` seconds."""
    channels = list(channels)
    if any(channel.has_received for channel in channels):
        return
    poll = select.poll()
    for channel in channels:
        stuck = not channel.idle and isinstance(channel, StreamChannel)  # slots tell by a notice that they are free
        poll.register(channel.socket, select.POLLIN | (select.POLLOUT if stuck else 0))
    poll.poll(timeout * 1000)
