"""A follower of a replicated log: a process with a file. The follower obeys its leader, and ends when the leader ends.

The follower's standard input is a socket on which it receives the leader's messages. A message names the follower's
parent and children in the plan: the follower receives records from its parent, byte for byte as they stand in the file,
and sends the records on to its children. Acknowledgements travel over the same connections in the other direction.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from minilib.classic.log.channel import Channel, exchange
from minilib.classic.log.file import LogFile

HALT, FILL, LINK, COUNT = b"H", b"F", b"L", b"C"  # what the leader may say
ACK = struct.Struct("!IQ")  # a replica, and how many records it has on its disk
GREETING = 24  # bytes that show a child that a connection belongs to the plan in force
CLOGGED = 1 << 20  # bytes that wait for a child before no more are taken from the parent
CONNECT_TIMEOUT = 5.0  # seconds


@dataclass
class Sent:
    """What a replica has sent along plans since it started.

    Args:
        messages: records, each counted once for each child that it went to.
        bytes: of those records as stored, 8 more than each has.
        acks: acknowledgements, its own and those it passed on.
    """

    messages: int = 0
    bytes: int = 0
    acks: int = 0


class Follower:
    """The process's one object.

    Args:
        rank: its number.
        file: its log.
        control: the way to the leader.
    """

    def __init__(self, rank: int, file: LogFile, control: Channel) -> None:
        self._rank, self._file, self._control = rank, file, control
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._greeting = b""  # of the parent that is awaited; empty if none is
        self._strangers: list[Channel] = []  # connected, and have not shown the greeting yet
        self._parent: Channel | None = None
        self._children: list[Channel] = []
        self._filled = bytearray()  # a part of a record that the leader is sending
        self._sent = Sent()

    def serve(self) -> None:
        """Work until the leader is gone."""
        while self._control.open:
            exchange(self._channels(), None, self._listener if self._greeting else None)
            for kind, body in self._control.messages():
                self._obey(kind, body)
            if self._greeting:
                self._await_parent()
            if self._parent:
                self._pass_on()

    def _channels(self) -> list[Channel]:
        """Where something may come or go. The parent has to wait while a child cannot keep up."""
        clogged = any(len(child.unsent) > CLOGGED for child in self._children)
        from_parent = [self._parent] if self._parent and not clogged else []
        return [self._control, *self._strangers, *self._children, *from_parent]

    def _obey(self, kind: bytes, body: bytes) -> None:
        if kind == FILL:
            self._filled += body
            while batch := self._file.take(self._filled):
                self._file.write(batch)
            return
        order = json.loads(body)
        if kind == HALT:
            self._halt()
        elif kind == LINK:
            self._link(bytes.fromhex(order["greeting"]), order["children"])
        self._control.post(kind, {"number": order["number"], **self._state()})

    def _state(self) -> dict:
        log = {"records": len(self._file), "crc": self._file.crc, "torn": self._file.torn_bytes}
        return {**log, "port": self._listener.getsockname()[1], "sent": asdict(self._sent)}

    def _halt(self) -> None:
        """Leave the plan. Whatever was under way is dropped: the leader has it."""
        for channel in (*self._strangers, *self._children, *([self._parent] if self._parent else [])):
            channel.close()
        self._strangers, self._children, self._parent, self._greeting = [], [], None, b""
        self._filled.clear()

    def _link(self, greeting: bytes, ports: list[int]) -> None:
        self._greeting = greeting
        for port in ports:
            with contextlib.suppress(OSError):  # it has died, and the leader knows
                self._children.append(connect(port, greeting))

    def _await_parent(self) -> None:
        """Let in whoever shows the greeting of the plan in force; leftovers of an older plan show another."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._strangers.append(Channel(self._listener.accept()[0]))
        for stranger in self._strangers:
            if stranger.received[:GREETING] == self._greeting:
                del stranger.received[:GREETING]
                self._parent, self._greeting = stranger, b""
                break
        for stranger in self._strangers:
            if stranger is not self._parent and (self._parent or len(stranger.received) >= GREETING):
                stranger.close()
        self._strangers = [stranger for stranger in self._strangers if stranger.open and stranger is not self._parent]

    def _pass_on(self) -> None:
        """Records down and to the disk, acknowledgements up."""
        while batch := self._file.take(self._parent.received):
            for child in self._children:
                child.send(batch.stored)
                self._sent.messages += len(batch.ends)
                self._sent.bytes += len(batch.stored)
            first = len(self._file)
            self._file.write(batch)
            acks = b"".join(ACK.pack(self._rank, records) for records in range(first + 1, len(self._file) + 1))
            self._acknowledge(acks)
        for child in self._children:
            self._acknowledge(child.take_whole(ACK.size))

    def _acknowledge(self, acks: bytes) -> None:
        self._sent.acks += len(acks) // ACK.size
        self._parent.send(acks)


def connect(port: int, greeting: bytes) -> Channel:
    """Become the parent of the replica that listens at a port of this machine.

    Raises:
        OSError: if nobody does.
    """
    channel = Channel(socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT))
    channel.send(greeting)
    return channel


def main() -> None:
    """The process: `python -m minilib.classic.log.follower <rank> <file> <fsync: 0 or 1>`, started by its leader."""
    rank, path, fsync = sys.argv[1:]
    control = Channel(socket.socket(fileno=os.dup(0)))
    Follower(int(rank), LogFile(Path(path), fsync == "1"), control).serve()


if __name__ == "__main__":
    main()
