"""A training run that is killed again and again: its goodput predicted from a short trial, then measured.

    plan = DrillPlan(kills=6)
    trial = rehearse(plan, folder)         a few short lives: what a step, a save's stall and a restart take here
    predicted = trial.predicted(plan)      before the run that it is about
    drill = carry_out(plan, folder, trial)
    drill.counted, drill.by_clock          goodput, in units of steps and of seconds

Two ranks train a small decoder and save behind the steps; one of them is killed with SIGKILL in the middle of a step.
How many steps each life has is the schedule's: the quantiles of an exponential distribution, in seeded order, so that
few kills already have its mean and spread. After the last kill the run goes on until it has taken kills · mean_life
steps in all, those that were lost included.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.journaling import DiskStep
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint import Checkpointer
from minilib.operations.checkpoint.format.folder import CheckpointFolder, committed_steps
from minilib.operations.goodput.interval import CheckpointCosts, expected_goodput
from minilib.operations.goodput.timeline import DrillTimeline, EventFile
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.trainer import TrainConfig, Trainer

SHAPE = ModelConfig(64, 48, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, max_position=64)
CONFIG = TrainConfig(10**6, batch_size=16, context=32, warmup=2, evaluate_every=10**6, validation_batches=1)
RANKS = 2
TRIAL_LIVES = (12, 12, 12)  # steps before each kill of a trial; a last life of as many is not killed


@dataclass(frozen=True)
class DrillPlan:
    """What is done to a run.

    Args:
        kills: how many times a rank is killed.
        mean_life: steps between two kills, on average.
        every: steps between two saves.
        seed: decides after how many steps, where in a step, and which rank.

    Raises:
        ValueError: if one is not a whole number of at least 1, or a life is shorter than the steps between two saves.
    """

    kills: int = 6
    mean_life: int = 48
    every: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kills", "mean_life", "every"):
            check_whole(name, getattr(self, name), 1)
        if self.mean_life < self.every:
            raise ValueError(f"a save every {self.every} steps and a kill every {self.mean_life}: the run would hardly "
                             "get on; let lives be longer, or save more often")  # fmt: skip

    @property
    def steps(self) -> int:
        """That the run takes in all, useful or lost."""
        return self.kills * self.mean_life

    def lives(self) -> list[Kill | int]:
        """For each life its kill; of the last one, which none ends, the steps that are left."""
        draw = random.Random(self.seed)
        quantiles = [-self.mean_life * math.log1p(-(number + 0.5) / self.kills) for number in range(self.kills)]
        draw.shuffle(quantiles)
        kills = [Kill(draw.randrange(RANKS), math.floor(q), q % 1) for q in quantiles]
        return [*kills, max(1, self.steps - sum(kill.after for kill in kills))]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Args:
        rank: to kill.
        after: steps of its life that it has completed by then.
        fraction: of the next step.
    """

    rank: int
    after: int
    fraction: float


@dataclass(frozen=True)
class DrillTrial:
    """What a short trial measured on this machine, in seconds: means, and of the few restarts the median.

    Args:
        step: a step.
        stall: that steps wait for a save.
        write: from there until it is durable.
        restart: from a kill to the end of the first new step, less a step.
    """

    step: float
    stall: float
    write: float
    restart: float

    def costs(self, plan: DrillPlan) -> CheckpointCosts:
        """As the formulas of interval.py take them; no kill comes during a restart."""
        mtbf = plan.mean_life * (self.step + self.stall / plan.every)
        return CheckpointCosts(self.stall, self.restart, mtbf, self.write, failing_restarts=False)

    def predicted(self, plan: DrillPlan) -> float:
        """Goodput of a run that is killed at the plan's rate, whatever its schedule.

        Raises:
            ImpossibleInterval: if saves come faster than they are written here.
        """
        return expected_goodput(plan.every * self.step, self.costs(plan))


def rehearse(plan: DrillPlan, folder: Path | str) -> DrillTrial:
    """Kill a run a few times after a few steps, and measure what that takes.

    Args:
        plan: of the drill; its saves are made as often.
        folder: for the trial alone; empty.

    Raises:
        FileExistsError: if another drill's events are there.
    """
    lives = [Kill(number % RANKS, after, 0.5) for number, after in enumerate(TRIAL_LIVES)]
    timeline = _live_and_die(Path(folder), plan, [*lives, TRIAL_LIVES[-1]], 0.0)
    return DrillTrial(timeline.step_seconds, timeline.mean_stall, timeline.mean_write, timeline.median_restart)


def carry_out(plan: DrillPlan, folder: Path | str, trial: DrillTrial) -> DrillTimeline:
    """Kill a run as planned; what happened when.

    Args:
        plan: of the drill.
        folder: for its checkpoints and events; empty.
        trial: says how long a step is, for kills within the first of a life; later ones go by the step before.

    Raises:
        FileExistsError: if another drill's events are there.
        RankFailed: if a rank fails that was not to be killed.
    """
    return _live_and_die(Path(folder), plan, plan.lives(), trial.step)


def _live_and_die(folder: Path, plan: DrillPlan, lives: Sequence[Kill | int], step: float) -> DrillTimeline:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "events.jsonl").exists():
        raise FileExistsError(f"{folder} has events of another drill, with which these would mix: pass an empty one")
    events = EventFile(folder / "events.jsonl")
    for number, life in enumerate(lives):
        events.write("start", number)
        try:
            run(_train, RANKS, str(folder), plan.every, number, life, step, timeout=120)
        except RankFailed as error:
            if not isinstance(life, Kill) or error.rank != life.rank:
                raise  # a failure that nobody planned
        events.write("ended", number)
    return DrillTimeline(tuple(events.read()))


def _train(folder: str, every: int, life: int, until: Kill | int, step: float) -> None:
    """One life of the run, on each rank: load the newest checkpoint, and train until killed."""
    comm, own = Communicator(SharedMemoryTransport()), Communicator(SharedMemoryTransport())
    events = EventFile(Path(folder) / "events.jsonl")
    trainer, began = _trainer(comm), 0
    checkpoints = Path(folder) / "checkpoints"
    watched = partial(_WatchedFolder, checkpoints, events, life) if comm.rank == 0 else None
    with Checkpointer(checkpoints, own, open_disk=watched) as checkpointer:
        if checkpointer.latest() is not None:
            began = checkpointer.load({"run": trainer}).step

        def after_step(trainer: Trainer) -> None:
            nonlocal step, stepped
            step, stepped = time.monotonic() - stepped, time.monotonic()
            if comm.rank == 0:
                events.write("step", life, trainer.step)
            if trainer.step % every == 0:
                events.write("save", life, trainer.step, comm.rank)
                checkpointer.save({"run": trainer}, trainer.step)
                events.write("saved", life, trainer.step, comm.rank)
                stepped = time.monotonic()
            arm(trainer.step)

        def arm(now: int) -> None:
            if isinstance(until, Kill) and (comm.rank, now - began) == (until.rank, until.after):
                threading.Timer(until.fraction * step, _die, (events, life, now, comm.rank)).start()

        if comm.rank == 0:
            events.write("loaded", life, began)
        stepped = time.monotonic()
        arm(began)
        trainer.run(began + until if isinstance(until, int) else None, after_step, bar=False)


def _die(events: EventFile, life: int, step: int, rank: int) -> None:
    events.write("kill", life, step, rank)
    os.kill(os.getpid(), signal.SIGKILL)


def _trainer(comm: Communicator) -> Trainer:
    model = Decoder(SHAPE)
    model.initialize(0)
    row = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0))
    return Trainer(model, row, row[:200], CONFIG, comm)


class _WatchedFolder(CheckpointFolder):
    """Tells when a checkpoint is durable."""

    def __init__(self, folder: Path, events: EventFile, life: int) -> None:
        super().__init__(folder)
        self._events, self._life, self._known = events, life, committed_steps(self)

    def run(self, steps: Iterable[DiskStep]) -> None:
        super().run(steps)
        for step in set(found := committed_steps(self)) - set(self._known):
            self._events.write("durable", self._life, step)
        self._known = found
