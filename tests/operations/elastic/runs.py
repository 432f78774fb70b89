"""A small training run on ranks that are killed at chosen moments, and a ledger of what its steps trained on."""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint.format.folder import CheckpointFolder
from minilib.operations.elastic import ElasticAttempt, restart_count, resume_and_train
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.trainer import TrainConfig, Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
CONTEXT, WINDOWS, STEPS, EVERY = 8, 44, 10, 3  # an epoch of 8 steps, the last one of 2 windows, and a part of another
ROW = torch.randint(31, (CONTEXT * WINDOWS + 1,), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(31, (40,), generator=torch.Generator().manual_seed(1))
CONFIG = TrainConfig(steps=STEPS, batch_size=6, context=CONTEXT, warmup=2, evaluate_every=5, validation_batches=1,
                     sampling="epoch")  # fmt: skip


class Fault(NamedTuple):
    """What happens to a rank, once.

    Args:
        rank: whose.
        step: the step it is in; of a save, the step that is saved.
        moment: a phase of the step, "collective" or "save".
        count: messages or steps of the disk before it.
        how: "kill", "stop" or "raise".
    """

    rank: int
    step: int
    moment: str
    count: int = 0
    how: str = "kill"

    def strike(self) -> None:
        if self.how == "raise":
            raise ValueError(f"a bad batch in step {self.step}")
        os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)


def small_trainer(comm: Communicator | None = None, phases=lambda name: nullcontext()) -> Trainer:
    model = Decoder(SHAPE)
    model.initialize(0)
    return Trainer(model, ROW, HELD_OUT, CONFIG, comm, phases=phases)


def trains(folder: str, faults: dict[int, Fault], timeout: float = 60.0) -> dict:
    """On a rank: train from the newest checkpoint to the end, but for the fault of this attempt."""
    comm, own = (Communicator(SharedMemoryTransport(timeout=timeout)) for _ in range(2))
    fault = faults.get(restart_count())
    fault = fault if fault and fault.rank == comm.rank else None

    def phases(name: str):
        if fault and (fault.step, fault.moment) == (trainer.step, name):
            fault.strike()
        return nullcontext()

    trainer = small_trainer(comm, phases)
    keep_ledger(trainer, Path(folder) / f"ledger-{restart_count()}-{comm.rank}")
    if fault and fault.moment == "collective":
        strike_in_collective(trainer, fault)
    if fault and fault.moment == "save":
        strike_in_save(fault)
    resume_and_train(trainer, Path(folder) / "checkpoints", EVERY, own)
    return outcome_of(trainer) | {"pid": os.getpid(), "world_size": dist.get_world_size()}


def outcome_of(trainer: Trainer) -> dict:
    model = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    return {"losses": trainer.losses, "validation": trainer.validation_losses, "model": model}


def keep_ledger(trainer: Trainer, path: Path) -> None:
    """Write down the windows of every step before it is taken."""
    draw = trainer._batches.draw

    def drawn(step: int):
        share = draw(step)
        with path.open("a") as file:
            file.write(json.dumps([step, share.starts]) + "\n")
        return share

    trainer._batches.draw = drawn


def strike_in_collective(trainer: Trainer, fault: Fault) -> None:
    exchange, sent = trainer.comm.transport.exchange, []

    def counted(*message) -> None:
        if trainer.step == fault.step:
            sent.append(1)
            if len(sent) > fault.count:
                fault.strike()
        exchange(*message)

    trainer.comm.transport.exchange = counted


def strike_in_save(fault: Fault) -> None:
    run, taken = CheckpointFolder.run, []

    def counted(folder, steps) -> None:
        for step in steps:
            if f"{fault.step:0>4}" in getattr(step, "name", "") or taken:
                taken.append(step)
                if len(taken) > fault.count:
                    fault.strike()
            run(folder, [step])

    CheckpointFolder.run = counted


def counted_windows(folder: Path, attempts: tuple[ElasticAttempt, ...]) -> dict[int, list[int]]:
    """The windows of each step that counts: those of an attempt before the step from which the next one went on."""
    ends = [each.from_step for each in attempts[1:]] + [STEPS]
    found: dict[int, list[int]] = {}
    for attempt, end in zip(attempts, ends, strict=True):
        for path in folder.glob(f"ledger-{attempt.number}-*"):
            for step, starts in map(json.loads, path.read_text().splitlines()):
                if attempt.from_step <= step < end:
                    found.setdefault(step, []).extend(start // CONTEXT for start in starts)
    return found


def check_each_window_once(counted: dict[int, list[int]]) -> None:
    """The first epoch has every window once, the part of the second none twice."""
    assert sorted(counted) == list(range(STEPS))
    assert sorted(window for step in range(8) for window in counted[step]) == list(range(WINDOWS))
    assert len(set(counted[8] + counted[9])) == len(counted[8] + counted[9]) == 12
