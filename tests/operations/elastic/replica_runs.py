"""The small run of runs.py on replicas, some of which end themselves at chosen moments."""

import json
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from minilib.model.decoder import Decoder
from minilib.operations.elastic import CommittedStep, ElasticReplica, Quorum, ReplicaTrainer
from minilib.operations.elastic.links import Links
from minilib.ranks.collectives import Communicator
from tests.operations.elastic.runs import CONFIG, CONTEXT, HELD_OUT, ROW, SHAPE, outcome_of

GATE = 6  # the step before which members wait for the file of this name, so that a test has time to bring one back


class ReplicaFault(NamedTuple):
    """What a replica does to itself, once.

    Args:
        replica: which.
        step: the one that it is in, or waits for.
        moment: as `ElasticReplica.train` tells it, a phase of the trainer, or "message", which begins one.
        count: messages of the step before it.
        how: a signal, or 0 to raise ValueError.
        behind: only in a process that came later, before it has the state of a peer.
    """

    replica: int
    step: int
    moment: str
    count: int = 0
    how: int = signal.SIGKILL
    behind: bool = False


class Striker:
    """Strikes in one process of a replica, once whatever process it is in.

    Args:
        faults: of all replicas.
        folder: remembers which have come.
        number: of the replica.
        trainer: of this process.
    """

    def __init__(self, faults: tuple[ReplicaFault, ...], folder: Path, number: int, trainer: ReplicaTrainer) -> None:
        self._faults = {n: fault for n, fault in enumerate(faults) if fault.replica == number}
        self._folder, self._trainer, self._messages, self.quorum = folder, trainer, 0, None

    def __call__(self, moment: str) -> None:
        step = self.quorum.step if self.quorum and moment != "quorum" else self._trainer.step
        self._messages = self._messages + 1 if moment == "message" else 0
        for number, fault in self._faults.items():
            mark, count = self._folder / f"struck-{number}", max(0, self._messages - 1)
            if (fault.moment, fault.step, fault.count) != (moment, step, count) or mark.exists():
                continue
            if fault.behind and self._trainer.step == step:
                continue
            mark.touch()
            if not fault.how:
                raise ValueError(f"a bad batch in step {step}")
            os.kill(os.getpid(), fault.how)


def trains_as_replica(replica: ElasticReplica, folder: str, faults: tuple[ReplicaFault, ...] = ()) -> dict:
    """Train; write down what each try of a step trained on."""
    trainer, base = small_replica(), Path(folder)
    strike = Striker(faults, base, replica.number, trainer)

    def watch(moment: str, quorum: Quorum | None) -> None:
        strike.quorum = quorum
        while moment == "quorum" and trainer.step == GATE and faults and not (base / "gate").exists():
            time.sleep(0.01)
        if moment != "all_reduce":
            strike(moment)
        if moment == "vote":
            row = [quorum.step, quorum.number, [start // CONTEXT for start in trainer.starts]]
            with (base / f"ledger-{replica.number}-{os.getpid()}").open("a") as file:
                file.write(json.dumps(row) + "\n")

    inner, make = trainer._phase, Links.communicator
    trainer._phase = lambda name: strike(name) or inner(name)
    Links.communicator = lambda links, quorum: telling_messages(make(links, quorum), strike)
    replica.train(trainer, watch)
    return outcome_of(trainer) | {"pid": os.getpid(), "step": trainer.step, "grad_norms": trainer.grad_norms}


def telling_messages(comm: Communicator, strike: Striker) -> Communicator:
    transport, exchange = comm.transport, comm.transport.exchange
    if "exchange" not in vars(transport):
        transport.exchange = lambda *message: strike("message") or exchange(*message)
    return comm


def small_replica() -> ReplicaTrainer:
    model = Decoder(SHAPE)
    model.initialize(0)
    return ReplicaTrainer(model, ROW, HELD_OUT, CONFIG)


def committed_windows(folder: Path, committed: list[CommittedStep]) -> dict[int, list[int]]:
    """The windows of each committed step, as the members of its quorum wrote them down before they voted."""
    quorums = {each.step: each.quorum for each in committed}
    found: dict[int, list[int]] = {}
    for path in Path(folder).glob("ledger-*"):
        for step, quorum, windows in map(json.loads, path.read_text().splitlines()):
            if quorums.get(step) == quorum:
                found.setdefault(step, []).extend(windows)
    return found
