"""A replicated log over racks: records cross a slow link, are counted there, and survive a lost rack.

    rack 0   leader ─▶ 1 ═══╗ slow link        laid well    0 → 1 ═ 2 → 3      a record crosses once
    rack 1   2 ◀════════════╝ ─▶ 3             laid badly   0 ═ 2 ═ 1 ═ 3      three times

Replicas are spread over racks so that a lost rack does not take all of them; how often a record crosses between racks
is up to the order of the chain that passes it on. The link is a thread that takes what one rack sends to another, keeps
it for as long as a link of its bandwidth would, and passes it on.

Source: Ghemawat, Gobioff and Leung, "The Google File System", SOSP 2003, sections 3.2 and 4.2.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minilib.classic.log.file import HEADER
from minilib.classic.log.follower import GREETING
from minilib.classic.log.replicated_log import ReplicatedLog
from minilib.mechanisms.basics.checks import check_quantity, check_whole, is_whole
from minilib.mechanisms.replication import plans
from minilib.mechanisms.sharding.placement import Crossing, crossing, lost_with

PIECE = 1 << 16  # bytes that the link takes at a time
LAST_PORT = 65535
LOOK_UP = 0.1  # seconds between two looks whether the link is closed


class LinkClosed(RuntimeError):
    """A link that is asked for a port after it was closed."""


class RackLink:
    """What lies between racks: TCP connections that are passed on at the speed of one link that all of them share.

    Args:
        bandwidth: bytes/s; unlimited if left out.
        latency: seconds that each piece takes on top.

    Attributes:
        connections: made so far.
        bytes: passed on from parents to children, the greetings at the beginning of connections not counted.

    Raises:
        ValueError: if the bandwidth is no number > 0, or the latency no finite number ≥ 0.
    """

    def __init__(self, bandwidth: float = float("inf"), latency: float = 0.0) -> None:
        check_quantity("bandwidth", bandwidth, above_zero=True, finite=False)
        check_quantity("latency", latency)
        self._bandwidth, self._latency = bandwidth, latency
        self._selector, self._closed = selectors.DefaultSelector(), threading.Event()
        self._received = self.connections = 0
        self._thread = threading.Thread(target=self._run, name="rack link", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """See above."""
        return self._received - self.connections * GREETING

    def port(self, behind: int) -> int:
        """A port whose connections come out at another one of this machine.

        Raises:
            ValueError: if that is no port.
            LinkClosed: after `close`.
        """
        if not is_whole(behind, 1) or behind > LAST_PORT:
            raise ValueError(f"a port is a whole number from 1 to {LAST_PORT}, got {behind!r}")
        if self._closed.is_set():
            raise LinkClosed("the link between the racks is closed; make another one")
        listener = socket.create_server(("127.0.0.1", 0))
        self._selector.register(listener, selectors.EVENT_READ, (listener, behind))
        return listener.getsockname()[1]

    def close(self) -> None:
        """Close all connections."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(LOOK_UP):
                if isinstance(key.data[1], int):
                    self._connect(*key.data)
                else:
                    self._pass_on(key.fileobj, *key.data)

    def _connect(self, listener: socket.socket, behind: int) -> None:
        parent, _ = listener.accept()
        try:
            child = socket.create_connection(("127.0.0.1", behind))
        except OSError:  # the child is dead, and the leader finds out by itself
            parent.close()
            return
        self.connections += 1
        for end in (parent, child):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(parent, selectors.EVENT_READ, ("down", child))
        self._selector.register(child, selectors.EVENT_READ, ("up", parent))

    def _pass_on(self, source: socket.socket, way: str, sink: socket.socket) -> None:
        try:
            piece = source.recv(PIECE)
            if piece and way == "down":
                time.sleep(self._latency + len(piece) / self._bandwidth)
                self._received += len(piece)
            sink.sendall(piece)
        except OSError:
            piece = b""
        if not piece:
            for end in (source, sink):
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()


@contextmanager
def log_in_racks(
    folder: Path | str, racks: Sequence[int], link: RackLink, timeout: float = 20.0
) -> Iterator[ReplicatedLog]:
    """A replicated log along a chain of replicas, whose connections between racks go through a link.

    Args:
        folder: see `ReplicatedLog`.
        racks: of each replica, in the order of the chain; the leader is the first.
        link: between any two racks.
        timeout: see `ReplicatedLog`.
    """

    def route(parent: int, child: int, port: int) -> int:
        return port if racks[parent] == racks[child] else link.port(port)

    with ReplicatedLog(folder, len(racks), plans.chain, timeout=timeout, route=route) as log:
        yield log


def expected_crossing(racks: Sequence[int], record_bytes: int) -> Crossing:
    """What one record sends between racks along the chain, with the bytes that a log adds to each record.

    Raises:
        ValueError: if there is no rack, or the record has no whole number of bytes.
    """
    check_whole("bytes of a record", record_bytes)
    return crossing(plans.chain("broadcast", len(racks)), [record_bytes + HEADER.size], racks)


def records_lost(rack: int, holders: Sequence[Sequence[int]], racks: Sequence[int]) -> int:
    """How many records have all their copies in a rack.

    Args:
        rack: that is lost.
        holders: hosts of each record's copies.
        racks: of each host.
    """
    return len(lost_with(rack, holders, racks))
