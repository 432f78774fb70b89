"""A communicator for each quorum: its members connect to each other anew, and a loss wakes whoever waits."""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import threading
import time
from pathlib import Path

from minilib.operations.elastic.quorum import Quorum
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.shared import SharedMemoryTransport

_GREETING = struct.Struct("<qq")  # number of the quorum, rank in it
_LOOK = 50  # milliseconds between looks at whether the quorum is void


class Links:
    """Connections of one process to the other members of its quorum.

    Args:
        folder: of the sockets of all members.
        timeout: seconds to wait for a member, in a connection or in a collective.

    Attributes:
        address: where other members reach this process; a path of no other process.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.address, self._timeout = str(folder / f"member-{secrets.token_hex(8)}"), timeout
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(self.address)
        self._door.listen(64)
        self._lock = threading.Lock()
        self._number, self._void = 0, 0  # of the quorum that is connected; up to which quorums are void
        self._sockets: list[socket.socket] = []
        self._comm: Communicator | None = None

    def communicator(self, quorum: Quorum) -> Communicator:
        """Between the members of a quorum; that of the step before if the quorum is the same.

        Raises:
            CollectiveFailed: if a member is lost, does not come in time, or the quorum is void.
        """
        if self._comm is not None and self._number == quorum.number:
            return self._comm
        self.hang_up()
        with self._lock:
            self._number = quorum.number
        rank = [member.address for member in quorum.members].index(self.address)
        try:
            connections = {other: self._connect(quorum, rank, other) for other in range(rank)}
            while len(connections) < len(quorum.members) - 1:
                other, accepted = self._accept(quorum)
                connections[other] = accepted
            self._comm = Communicator(SharedMemoryTransport.between(rank, connections, self._timeout))
        except OSError as error:
            raise CollectiveFailed(f"replicas could not meet for quorum {quorum.number}: {error}") from error
        return self._comm

    def void(self, number: int) -> None:
        """Wake whoever waits for a member of this quorum. Called on another thread."""
        with self._lock:
            self._void = max(self._void, number)
            if self._number <= number:
                for each in self._sockets:
                    with contextlib.suppress(OSError):  # it is closed, or its peer is gone
                        each.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Close the connections of the quorum; its members notice."""
        if self._comm is not None:
            self._comm.close()
        with self._lock:
            sockets, self._sockets, self._comm = self._sockets, [], None
        for each in sockets:
            each.close()

    def close(self) -> None:
        """Close everything."""
        self.hang_up()
        self._door.close()
        Path(self.address).unlink(missing_ok=True)

    def _connect(self, quorum: Quorum, rank: int, other: int) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        self._keep(connected)
        connected.settimeout(self._timeout)
        connected.connect(quorum.members[other].address)
        connected.sendall(_GREETING.pack(quorum.number, rank))
        return connected

    def _accept(self, quorum: Quorum) -> tuple[int, socket.socket]:
        """The next member to connect for this quorum; those that come for an earlier one are turned away."""
        deadline = time.monotonic() + self._timeout
        poll = select.poll()
        poll.register(self._door, select.POLLIN)
        while time.monotonic() < deadline:
            self._check_valid()
            if not poll.poll(_LOOK):
                continue
            accepted, _ = self._door.accept()
            accepted.settimeout(self._timeout)
            greeting = accepted.recv(_GREETING.size, socket.MSG_WAITALL)
            number, other = _GREETING.unpack(greeting) if len(greeting) == _GREETING.size else (0, 0)
            if number == quorum.number:
                self._keep(accepted)
                return other, accepted
            accepted.close()
        raise CollectiveFailed(f"a member of quorum {quorum.number} has not connected for {self._timeout:g} s")

    def _keep(self, opened: socket.socket) -> None:
        with self._lock:
            self._sockets.append(opened)
        self._check_valid()

    def _check_valid(self) -> None:
        if self._void >= self._number:
            raise CollectiveFailed(f"quorum {self._number} is void")
