"""A pipeline schedule as data: for each rank the actions that it takes in a training step, in order.

    action    what is done with one microbatch on one stage            needs
    F         forward                                                   F of the stage before
    B         backward: gradients of the input and of the weights       F here, and B or I of the next stage
    I         gradient of the input alone                               as B
    W         gradients of the weights alone, some time after I         I here

Written as stage, kind, microbatch, "2F3" is the forward of microbatch 3 on stage 2, as in torch.distributed.pipelining.
Results go to other ranks as messages; which ones, in what order, follows from the actions.

Which schedules there are: schedules.py. What is wrong with one: checking.py. What it costs: pricing.py. It runs on
ranks in pipeline_parallel.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from minilib.mechanisms.pipelining import Operation

KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class Action(NamedTuple):
    """What a rank does with one microbatch on one stage.

    Args:
        stage: number of the stage.
        kind: one of KINDS.
        microbatch: number of the microbatch.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class PipelineSchedule:
    """Who does what in which order.

    Args:
        name: such as "1f1b".
        num_microbatches: that a step's batch is cut into.
        rank_of: for each stage the rank that has it.
        actions: for each rank its actions.
    """

    name: str
    num_microbatches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...] = field(repr=False)

    @classmethod
    def read(cls, name: str, text: str, rank_of: Sequence[int]) -> PipelineSchedule:
        """A schedule as `str` writes it: a line a rank, such as "0F0 0B0"; the last microbatch is the largest number.

        An empty line is a rank without a stage, also the line after a last line break: strip what a file ends with.

        Raises:
            ValueError: if a word is no action, or there is none.
        """
        rows = [tuple(map(_action, line.split())) for line in text.split("\n")]
        if not any(rows):
            raise ValueError(f"{name}: there is no action in {text!r}; a schedule has a line of them for each rank")
        last = max(action.microbatch for row in rows for action in row)
        return cls(name, last + 1, tuple(rank_of), tuple(rows))

    @property
    def num_ranks(self) -> int:
        """How many ranks take part."""
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.rank_of)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank has."""
        return [stage for stage, owner in enumerate(self.rank_of) if owner == rank]

    def source_of(self, action: Action) -> Action | None:
        """The action whose result an action reads from the stage before or after; None for its own stage's or none."""
        if action.kind == "F" and action.stage > 0:
            return Action(action.stage - 1, "F", action.microbatch)
        if action.kind in "BI" and action.stage < self.num_stages - 1:
            whole = Action(action.stage + 1, "B", action.microbatch)
            return whole if whole in self._all else Action(action.stage + 1, "I", action.microbatch)
        return None

    def reader_of(self, action: Action) -> Action | None:
        """The action on another stage that reads an action's result; None if there is none."""
        return self._readers.get(action)

    def messages(self, source: int, target: int) -> Iterator[Action]:
        """The actions of one rank whose results go to another, in the order in which they are sent."""
        for action in self.actions[source]:
            reader = self.reader_of(action)
            if reader is not None and self.rank_of[reader.stage] == target != source:
                yield action

    def plan(self, blocking: bool = False) -> list[list[Operation]]:
        """What each action waits for, as minilib.mechanisms.pipelining has it; keys are actions.

        Args:
            blocking: a rank that sends goes on only when the other rank receives. Most schedules deadlock so.
        """
        return [[self._operation(rank, number, blocking) for number in range(len(actions))]
                for rank, actions in enumerate(self.actions)]  # fmt: skip

    def __str__(self) -> str:
        """A line a rank."""
        return "\n".join(" ".join(map(str, actions)) for actions in self.actions)

    @cached_property
    def _all(self) -> frozenset[Action]:
        return frozenset(action for actions in self.actions for action in actions)

    @cached_property
    def _readers(self) -> dict[Action, Action]:
        return {source: action for action in self._all if (source := self.source_of(action)) is not None}

    def _operation(self, rank: int, number: int, blocking: bool) -> Operation:
        action = self.actions[rank][number]
        source, after = self.source_of(action), []
        if source is not None:
            after.append(source)
        if action.kind != "F":
            after.append(action._replace(kind="I" if action.kind == "W" else "F"))
        room: tuple[Action, ...] = ()
        if blocking and number:
            reader = self.reader_of(self.actions[rank][number - 1])
            room = (reader,) if reader is not None and self.rank_of[reader.stage] != rank else ()
        return Operation(action, tuple(after), room)


def _action(word: str) -> Action:
    found = re.fullmatch(r"(\d+)([A-Z])(\d+)", word)
    if not found:
        raise ValueError(f"an action is stage, kind and microbatch, such as 2F3; got {word!r}")
    return Action(int(found[1]), found[2], int(found[3]))
