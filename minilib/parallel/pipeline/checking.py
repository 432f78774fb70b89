"""Is a schedule sound? Every action once and in its place, every gradient once, and no ranks that wait for one another.

Messages need no check of their own: both sides derive them from the same actions, so to every send belongs a receive.
"""

from __future__ import annotations

from collections.abc import Iterator

from minilib.mechanisms.pipelining import Deadlock, timeline_of
from minilib.parallel.pipeline.schedule import KINDS, Action, PipelineSchedule


class UnsoundSchedule(ValueError):
    """A schedule that would not train what one process trains; the message names the rank and the action.

    Args:
        message: what is wrong.
        rank: the rank at fault.
        action: the action at fault.
    """

    def __init__(self, message: str, rank: int, action: Action) -> None:
        super().__init__(message)
        self.rank, self.action = rank, action


class ScheduleDeadlock(UnsoundSchedule):
    """Ranks wait for one another for ever."""


def check_schedule(schedule: PipelineSchedule, blocking: bool = False) -> None:
    """Refuse a schedule that is not sound.

    Args:
        schedule: what to check.
        blocking: whether a rank that sends goes on only when the other rank receives, as with a plain send. Ours do
            not block.

    Raises:
        UnsoundSchedule: if an action is on a rank that does not have its stage, is there twice, is missing or is of
            no stage or microbatch there is, or if a gradient is computed twice.
        ScheduleDeadlock: if an action comes before one that it needs, on its rank or around several.
    """
    _check_places(schedule)
    _check_all_once(schedule)
    try:
        timeline_of(schedule.plan(blocking), lambda action: 1)
    except Deadlock as deadlock:
        rank, action = next(iter(deadlock.stuck.items()))
        said = str(deadlock).replace("worker", "rank")
        raise ScheduleDeadlock(f"{schedule.name}: {said}", rank, action) from deadlock


def _check_places(schedule: PipelineSchedule) -> None:
    for stage, rank in enumerate(schedule.rank_of):
        if not 0 <= rank < schedule.num_ranks:
            raise UnsoundSchedule(f"{schedule.name}: stage {stage} is on rank {rank}, and there are "
                                  f"{schedule.num_ranks} ranks", rank, Action(stage, "F", 0))  # fmt: skip
    for rank, number, action in _actions(schedule):
        where = f"{schedule.name}: rank {rank}, action {number}, {action}"
        if not 0 <= action.stage < schedule.num_stages or not 0 <= action.microbatch < schedule.num_microbatches:
            raise UnsoundSchedule(
                f"{where}: there are {schedule.num_stages} stages and {schedule.num_microbatches} microbatches, "
                "numbered from 0", rank, action,
            )  # fmt: skip
        if action.kind not in KINDS:
            raise UnsoundSchedule(f"{where}: an action is one of {', '.join(KINDS)}", rank, action)
        if schedule.rank_of[action.stage] != rank:
            owner = schedule.rank_of[action.stage]
            raise UnsoundSchedule(f"{where}: stage {action.stage} is on rank {owner}", rank, action)


def _check_all_once(schedule: PipelineSchedule) -> None:
    seen: set[Action] = set()
    for rank, number, action in _actions(schedule):
        where = f"{schedule.name}: rank {rank}, action {number}, {action}"
        if action in seen:
            raise UnsoundSchedule(f"{where}: is there a second time", rank, action)
        others = {"B": "IW", "I": "B", "W": "B"}.get(action.kind, "")
        twice = next((kind for kind in others if action._replace(kind=kind) in seen), None)
        if twice:
            raise UnsoundSchedule(f"{where}: would count a gradient a second time, which "
                                  f"{action._replace(kind=twice)} computes", rank, action)  # fmt: skip
        seen.add(action)
    for stage, rank in enumerate(schedule.rank_of):
        for microbatch in range(schedule.num_microbatches):
            split = Action(stage, "I", microbatch) in seen or Action(stage, "W", microbatch) in seen
            for kind in ("F", "I", "W") if split else ("F", "B"):
                action = Action(stage, kind, microbatch)
                if action not in seen:
                    raise UnsoundSchedule(f"{schedule.name}: rank {rank} lacks {action}, the {KINDS[kind]} of "
                                          f"microbatch {microbatch} on stage {stage}", rank, action)  # fmt: skip


def _actions(schedule: PipelineSchedule) -> Iterator[tuple[int, int, Action]]:
    """Rank, place and action of all."""
    return ((rank, number, action) for rank, actions in enumerate(schedule.actions)
            for number, action in enumerate(actions))  # fmt: skip
