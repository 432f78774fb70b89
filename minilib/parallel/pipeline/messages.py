"""Activations and their gradients on their way between stages, on one rank or between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minilib.parallel.pipeline.schedule import Action, PipelineSchedule
from minilib.ranks.collectives import Communicator
from minilib.ranks.point_to_point import PointToPoint

_NUMBERS: WeakKeyDictionary[Communicator, Iterator[int]] = WeakKeyDictionary()  # for the pipelines of each communicator


class StageMessages:
    """Gives the results of actions to the actions that read them, in every step the same.

    Sends do not wait. A receive takes messages in the order in which the other rank sends them, which follows from the
    schedule, and keeps those that are needed later; so no order of actions that respects their needs can deadlock.

    A message's label names its step, its pipeline and its batch: ranks that step another pipeline of the same schedule,
    or were given another batch, find out with their first message.

    Args:
        schedule: who does what.
        comm: between the schedule's ranks.
    """

    def __init__(self, schedule: PipelineSchedule, comm: Communicator) -> None:
        self.mail = PointToPoint(comm)
        self._number = next(_NUMBERS.setdefault(comm, count(1)))
        self._schedule, self._rank = schedule, comm.rank
        others = [rank for rank in range(schedule.num_ranks) if rank != comm.rank]
        self._incoming = {other: tuple(schedule.messages(other, comm.rank)) for other in others}
        self._step = 0
        self._here: dict[Action, Tensor] = {}
        self._expected: dict[int, Iterator[Action]] = {}

    def begin(self, shapes: Sequence[torch.Size], dtype: torch.dtype, batch: str) -> None:
        """Before a step.

        Args:
            shapes: of each microbatch's activations.
            dtype: of all of them.
            batch: what tells this step's batch from others; the same on all ranks.
        """
        self._step += 1
        self._shapes, self._dtype, self._batch = shapes, dtype, batch
        self._here.clear()
        self._expected = {other: iter(actions) for other, actions in self._incoming.items()}

    def give(self, action: Action, result: Tensor) -> None:
        """Send an action's result to where it is read, if it is."""
        reader = self._schedule.reader_of(action)
        if reader is None:
            return
        target = self._schedule.rank_of[reader.stage]
        if target == self._rank:
            self._here[action] = result
        else:
            self.mail.send(result.contiguous(), target, self._label(action))

    def take(self, action: Action) -> Tensor:
        """The result of an action, once it is here."""
        source = self._schedule.rank_of[action.stage]
        while action not in self._here:
            arriving = next(self._expected[source])
            buffer = torch.empty(self._shapes[arriving.microbatch], dtype=self._dtype)
            self._here[arriving] = self.mail.receive(buffer, source, self._label(arriving))
        return self._here.pop(action)

    def end(self) -> None:
        """After a step: return when everything is sent."""
        self.mail.settle()
        assert not self._here, "results that nobody read"

    def _label(self, action: Action) -> str:
        return f"step {self._step} of {self._schedule.name}, {action}, pipeline {self._number}, batch {self._batch}"
