"""Items that flow through stages, one worker a stage, with a buffer before each stage but the first.

    item           0     1     2     3                     stage times 1, 2, 1
    stage 0        █  █  █  █                              fill     until the last stage has its first item
    stage 1           ██ ██ ██ ██                          the slowest stage sets the pace
    stage 2              █  █  █  █                        drain    after the first stage is done

A buffer with room for c items keeps its writer waiting when it is full (back-pressure): the writer begins item i + 1
once item i is in the buffer, so once its reader has begun item i - c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minilib.mechanisms.pipelining.plan import Operation, Timeline


def flow(num_items: int, num_stages: int, capacity: int | None = None) -> list[list[Operation]]:
    """The plan of a flow; keys are (stage, item).

    Args:
        num_items: items, 0 or more.
        num_stages: stages, 1 or more.
        capacity: items that each buffer has room for, 0 for a hand-over without one, None for no bound.

    Raises:
        ValueError: if a number is too small.
    """
    if num_items < 0 or num_stages < 1 or (capacity is not None and capacity < 0):
        raise ValueError(f"needs num_items ≥ 0, num_stages ≥ 1, capacity ≥ 0 or None; "
                         f"got {num_items!r}, {num_stages!r}, {capacity!r}")  # fmt: skip
    return [[_operation(stage, item, num_stages, capacity) for item in range(num_items)] for stage in range(num_stages)]


def flow_seconds(stage_seconds: Sequence[float], num_items: int) -> float:
    """Time of a flow whose stages take the same time for every item: Σt + (n-1)·max t, whatever the buffers' sizes.

    Raises:
        ValueError: if there is no stage, or for fewer items than none.
    """
    if len(stage_seconds) < 1 or num_items < 0:
        raise ValueError(f"needs the time of 1 stage or more, and num_items ≥ 0; got {stage_seconds!r}, {num_items!r}")
    return sum(stage_seconds) + (num_items - 1) * max(stage_seconds) if num_items else 0.0


def most_in_flight(timeline: Timeline) -> int:
    """Most items of a flow that had begun in the first stage and not ended in the last, at one time.

    At most the stages, which each have an item in hand, and all places in buffers.
    """
    first, last = timeline.workers[:1], timeline.workers[-1:]  # none of an empty plan
    moments = [(span.start, 1) for spans in first for span in spans]
    moments += [(span.end, -1) for spans in last for span in spans]
    here = most = 0
    for _, change in sorted(moments):  # who leaves at a moment leaves before who comes
        here += change
        most = max(most, here)
    return most


class Waiting(NamedTuple):
    """How long a stage of a flow waits.

    Args:
        starved: for an item, from the beginning or from when the item before has left.
        blocked: with an item that it has finished, until the next buffer has room.
    """

    starved: float
    blocked: float


def waiting(timeline: Timeline, capacity: int | None = None) -> list[Waiting]:
    """How long each stage of a flow waits, until its last item has left.

    Args:
        timeline: of the flow.
        capacity: items that each buffer has room for, as in `flow`.
    """
    found = []
    for stage, spans in enumerate(timeline.workers):
        starved = blocked = left = 0.0
        for item, span in enumerate(spans):
            starved += span.start - left
            left = span.end
            if capacity is not None and item >= capacity and stage + 1 < len(timeline.workers):
                left = max(left, timeline.workers[stage + 1][item - capacity].start)
            blocked += left - span.end
        found.append(Waiting(starved, blocked))
    return found


def _operation(stage: int, item: int, num_stages: int, capacity: int | None) -> Operation:
    after = ((stage - 1, item),) if stage else ()
    taken = -1 if capacity is None else item - 1 - capacity  # by the next stage, to make room for what came before
    room = ((stage + 1, taken),) if taken >= 0 and stage + 1 < num_stages else ()
    return Operation((stage, item), after, room)
