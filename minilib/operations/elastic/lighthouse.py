"""The coordinator of replicas: hears who lives, and tells who takes the next step together and whether it was taken.

Replicas connect to a Unix socket and exchange lines of JSON; `QuorumDecisions` decides what is answered.

    replica ─▶ join, beat (now and then), ready, vote, leave
    replica ◀─ quorum, commit, void, dropped, no quorum, finished

In production: torchft's lighthouse, over gRPC; a store with leases such as etcd.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from minilib.operations.elastic.quorum import CommittedStep, QuorumDecisions, QuorumMember, VoidedStep

TICK = 0.05  # seconds between two looks at the clock
Told = list[tuple[int, dict]]


@dataclass(frozen=True)
class StateTransfer:
    """A state that went from a living peer to a process that was behind.

    Args:
        step: before which the state stands.
        replica: who received it.
        bytes: how many.
    """

    step: int
    replica: int
    bytes: int


@dataclass
class _Connection:
    """A process's socket, and what is known of the process."""

    socket: socket.socket
    replica: int = -1  # before it has joined
    address: str = ""
    heard: float = 0.0
    unread: bytes = b""
    silent: bool = False


@dataclass
class LighthouseTally:
    """What was sent, and what a loss cost.

    Args:
        messages: received and sent, heartbeats not counted.
        transfers: of states.
        stalled: seconds from each void to the next commit.
    """

    messages: int = 0
    transfers: list[StateTransfer] = field(default_factory=list)
    stalled: list[float] = field(default_factory=list)


class Lighthouse:
    """The coordinator, on a thread of its own until `close`.

    Args:
        path: of its socket.
        expected: the replicas that begin the run.
        silence: seconds without a heartbeat after which a process is taken for lost.
        patience: seconds to wait for a majority, or for a process that lives and does nothing.
    """

    def __init__(self, path: Path, expected: frozenset[int], silence: float, patience: float) -> None:
        self.path, self.tally = path, LighthouseTally()
        self._decisions = QuorumDecisions(expected, patience)
        self._silence, self._changed, self._void_since = silence, threading.Condition(), None
        self._connections: dict[socket.socket, _Connection] = {}
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(path))
        self._door.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="lighthouse", daemon=True)
        self._thread.start()

    @property
    def committed(self) -> list[CommittedStep]:
        """Steps that count, in order."""
        with self._changed:
            return list(self._decisions.committed)

    @property
    def voided(self) -> list[VoidedStep]:
        """Steps that had to be repeated."""
        with self._changed:
            return list(self._decisions.voided)

    @property
    def refused(self) -> int:
        """Votes for a quorum that was over."""
        return self._decisions.refused

    @property
    def finished(self) -> bool:
        """Whether a replica has come to the end of the run."""
        return self._decisions.finished

    @property
    def ready(self) -> set[int]:
        """Replicas that wait for their next quorum."""
        with self._changed:
            return self._decisions.waiting

    def expect(self, replica: int) -> None:
        """See `QuorumDecisions`."""
        with self._changed:
            self._decisions.expect(replica)

    def is_silent(self, replica: int) -> bool:
        """Whether a process of this replica is there, and has not been heard of for too long."""
        with self._changed:
            return any(each.replica == replica and each.silent for each in self._connections.values())

    def wait_for(self, step: int, timeout: float) -> bool:
        """Return once all steps before this one are committed; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._decisions.step >= step and self._decisions.quorum, timeout)

    def close(self) -> None:
        """End; replicas that are connected hear of it."""
        self._closing = True
        self._thread.join()

    def check_invariants(self) -> None:
        """See `QuorumDecisions`."""
        with self._changed:
            self._decisions.check_invariants()

    def _serve(self) -> None:
        looked = time.monotonic()
        try:
            while not self._closing:
                ready = self._selector.select(TICK)
                with self._changed:
                    now = time.monotonic()
                    if now - looked > self._silence / 2:  # this process was stopped itself, and heard nobody
                        for connection in self._connections.values():
                            connection.heard = now
                    looked = now
                    for key, _ in ready:
                        if key.fileobj is self._door:
                            self._accept()
                        elif key.fileobj in self._connections:  # it may have been replaced in this very look
                            self._receive(self._connections[key.fileobj])
                    self._look_at_the_clock(now)
                    self._changed.notify_all()
        finally:
            for open_socket in (self._door, *self._connections):
                open_socket.close()
            self._selector.close()

    def _accept(self) -> None:
        accepted, _ = self._door.accept()
        accepted.setblocking(False)
        self._connections[accepted] = _Connection(accepted, heard=time.monotonic())
        self._selector.register(accepted, selectors.EVENT_READ)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(connection, "is gone")
            return
        connection.heard, connection.silent = time.monotonic(), False
        *lines, connection.unread = (connection.unread + data).split(b"\n")
        for line in lines:
            self._send(self._answer(connection, json.loads(line)))

    def _answer(self, connection: _Connection, said: dict) -> Told:
        """What a message leads to."""
        now, decisions = time.monotonic(), self._decisions
        self.tally.messages += said["kind"] != "beat"
        if said["kind"] == "join":
            self._replace_older(said["replica"])
            connection.replica, connection.address = said["replica"], said["address"]
        replica, address = connection.replica, connection.address
        decisions.alive(replica, address)
        match said["kind"]:
            case "ready":
                return decisions.ready(QuorumMember(replica, address, said["step"]), now)
            case "vote":
                if said["received"]:
                    self.tally.transfers.append(StateTransfer(decisions.step, replica, said["received"]))
                return decisions.vote(replica, said["number"], said["yes"], said["why"], now)
            case "leave":
                return decisions.leave(replica, address)
        return []

    def _replace_older(self, replica: int) -> None:
        """A new process of a replica has come: whatever the older one says from now on is not heard."""
        for older in [each for each in self._connections.values() if each.replica == replica]:
            self._hang_up(older, "was replaced by a new process")

    def _hang_up(self, connection: _Connection, why: str) -> None:
        self._selector.unregister(connection.socket)
        del self._connections[connection.socket]
        connection.socket.close()
        self._send(self._decisions.lost(connection.replica, connection.address, why, time.monotonic()))

    def _look_at_the_clock(self, now: float) -> None:
        for connection in list(self._connections.values()):
            if not connection.silent and now - connection.heard > self._silence:
                connection.silent = True
                why = f"was not heard of for {self._silence:g} s"
                self._send(self._decisions.lost(connection.replica, connection.address, why, now))
        self._send(self._decisions.tick(now))

    def _send(self, told: Told) -> None:
        for replica, message in told:
            self._time(message["kind"])
            for connection in [each for each in self._connections.values() if each.replica == replica]:
                with contextlib.suppress(OSError):  # it is gone, which the next look at its socket tells
                    connection.socket.send(json.dumps(message).encode() + b"\n")
                    self.tally.messages += 1

    def _time(self, kind: str) -> None:
        """Note how long no step is taken after a void."""
        if kind == "void":
            self._void_since = self._void_since or time.monotonic()
        elif kind == "commit" and self._void_since is not None:
            self.tally.stalled.append(time.monotonic() - self._void_since)
            self._void_since = None
