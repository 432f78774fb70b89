"""A replica that outlives its peers: each step begins with a quorum and counts once all of its members agree.

    quorum      who is there, and who stands before which step
    transfer    whoever is behind receives weights, optimizer and step from a peer
    compute     this member's share of the batch: gradients and loss
    all_reduce  their sums over members
    vote        yes if this member has them
    commit      all have: everyone applies the same sums. Otherwise nobody does, and those who live repeat the step

Source: torchft (github.com/meta-pytorch/torchft), whose Manager does this around a model and an optimizer.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from minilib.operations.elastic.links import Links
from minilib.operations.elastic.quorum import Quorum
from minilib.operations.elastic.replica_trainer import ReplicaTrainer
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import CollectiveFailed

MOST_TRIES = 10  # of one step, by one process
Watch = Callable[[str, Quorum | None], None]


class NoQuorum(RuntimeError):
    """Too few replicas are there, or none with the newest state; the message says who is."""


class CoordinatorLost(ConnectionError):
    """The coordinator is gone, or has let a newer process take this one's place: nobody knows what counts."""


class StepNeverCommits(RuntimeError):
    """A step was begun again and again; the message says why it was void at last."""


class ElasticReplica:
    """One process's part. `Replicas` makes it, and passes it to the function that it runs.

    Args:
        number: of the replica.
        folder: of the lighthouse's socket, and of the members'.
        beat: seconds between heartbeats.
        timeout: seconds to wait for another member.
    """

    def __init__(self, number: int, folder: Path, beat: float, timeout: float) -> None:
        self.number, self._links = number, Links(folder, timeout)
        self._coordinator = Coordinator(folder / "lighthouse", number, self._links, beat)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._coordinator.close()
        self._links.close()

    def train(self, trainer: ReplicaTrainer, watch: Watch = lambda moment, quorum: None) -> None:
        """Train to the end, together with whoever is there at each step.

        Args:
            trainer: begins anew, or where a checkpoint stood, or behind; then it gets a peer's state.
            watch: told each moment (see above) as it begins, and the quorum, None before there is one.

        Raises:
            NoQuorum, CoordinatorLost, StepNeverCommits: see there.
        """
        tries, step = 0, trainer.step
        while trainer.step < trainer.config.steps:
            committed = self._take_step(trainer, watch)
            if committed is None:  # others have come to the end
                return
            tries = 0 if committed or trainer.step != step else tries + 1
            step = trainer.step
            if tries == MOST_TRIES:
                raise StepNeverCommits(f"step {step} was void {tries} times, at last since {self._coordinator.why}")
        self._coordinator.leave()

    def _take_step(self, trainer: ReplicaTrainer, watch: Watch) -> bool | None:
        """One try of a step: True if it counts, False if it is void, None if the run is over."""
        watch("quorum", None)
        quorum = self._coordinator.quorum(trainer.step)
        if quorum is None:
            return None
        total, why, received = None, "", 0
        try:
            comm = self._links.communicator(quorum)
            watch("transfer", quorum)
            received = catch_up(trainer, quorum, comm)
            watch("compute", quorum)
            total = trainer.compute(comm.rank, comm.world_size)
            watch("all_reduce", quorum)
            comm.all_reduce(total)
        except CollectiveFailed as error:
            total, why = None, str(error)
        watch("vote", quorum)
        committed = self._coordinator.decision(quorum, total is not None, why, received)
        if committed:
            watch("commit", quorum)
            trainer.apply(total)
        return committed


def catch_up(trainer: ReplicaTrainer, quorum: Quorum, comm: Communicator) -> int:
    """Give members that are behind the state of one that is not; bytes received here. A collective of the quorum.

    Cost: the bytes of one state for each member that is behind, from different peers where there are several.
    """
    behind = [rank for rank, member in enumerate(quorum.members) if member.step < quorum.step]
    if not behind:
        return 0
    current = [rank for rank in range(comm.world_size) if rank not in behind]
    donor = {rank: current[number % len(current)] for number, rank in enumerate(behind)}
    mine = trainer.packed() if comm.rank in donor.values() else _nothing(0)
    sizes = gather_numbers(len(mine), comm)
    inputs = [mine if donor.get(rank) == comm.rank else mine[:0] for rank in range(comm.world_size)]
    outputs = [_nothing(size if donor.get(comm.rank) == rank else 0) for rank, size in enumerate(sizes)]
    comm.all_to_all(outputs, inputs)
    if comm.rank in donor:
        trainer.unpack(outputs[donor[comm.rank]])
    return sum(map(len, outputs))


class Coordinator:
    """The lighthouse as a replica sees it. A thread tells it that this process lives, another one listens.

    Args:
        path: of the lighthouse's socket.
        replica: number of this one.
        links: woken when the quorum is void.
        beat: seconds between heartbeats.

    Attributes:
        why: what this replica said when it last had no result.
    """

    def __init__(self, path: Path, replica: int, links: Links, beat: float) -> None:
        self._links, self._beat, self.why = links, beat, "another replica had no result"
        self._socket, self._lock = socket.socket(socket.AF_UNIX), threading.Lock()
        self._said: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._socket.connect(str(path))
        self._send(kind="join", replica=replica, address=links.address)
        for work in (self._keep_beating, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def quorum(self, step: int) -> Quorum | None:
        """Wait for the members of the next step; None if the run is over.

        Raises:
            NoQuorum, CoordinatorLost: see there.
        """
        self._send(kind="ready", step=step)
        while True:
            said = self._next()
            match said["kind"]:
                case "quorum":
                    return Quorum.from_message(said)
                case "finished":
                    return None
                case "no quorum":
                    raise NoQuorum(f"no step is taken: {said['why']}")
                case "dropped":  # this process slept, and what it had said counts no more
                    self._send(kind="ready", step=step)

    def decision(self, quorum: Quorum, yes: bool, why: str, received: int) -> bool:
        """Vote, and wait for what becomes of the step.

        Raises:
            CoordinatorLost: see there.
        """
        self.why = why or self.why
        self._send(kind="vote", number=quorum.number, yes=yes, why=why, received=received)
        while True:
            said = self._next()
            if (said["kind"], said.get("number"), said.get("step")) == ("commit", quorum.number, quorum.step):
                return True
            if (said["kind"], said.get("number")) == ("void", quorum.number):
                return False

    def leave(self) -> None:
        """Tell that the run is over."""
        self._send(kind="leave")

    def close(self) -> None:
        """Hang up."""
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _next(self) -> dict:
        said = self._said.get()
        if said["kind"] == "gone":
            raise CoordinatorLost("the coordinator is gone, or has let a newer process of this replica take its place")
        return said

    def _send(self, **message: object) -> None:
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise CoordinatorLost(f"the coordinator is gone: {error}") from error

    def _keep_beating(self) -> None:
        with suppress(CoordinatorLost):
            while not self._closing.wait(self._beat):
                self._send(kind="beat")

    def _listen(self) -> None:
        unread = b""
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._said.put({"kind": "gone"})
                self._links.void(2**62)
                return
            *lines, unread = (unread + data).split(b"\n")
            for said in map(json.loads, lines):
                if said["kind"] == "void":
                    self._links.void(said["number"])
                self._said.put(said)


def _nothing(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
