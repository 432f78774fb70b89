"""One rank's part of a plan, round by round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from minilib.mechanisms.replication import Plan, Transfer


@dataclass(frozen=True)
class Step:
    """A rank's part of a round.

    Args:
        out: what the rank sends; None if it only receives.
        into: what the rank receives; None if it only sends.
        keep: whether the rank receives into a chunk that it also sends.
    """

    out: Transfer | None
    into: Transfer | None
    keep: bool


@lru_cache(maxsize=256)
def steps_of(plan: Plan, rank: int) -> tuple[Step, ...]:
    """What a rank sends and receives in each round in which it does either."""
    steps = []
    for transfers in plan.rounds:
        out = next((t for t in transfers if t.src == rank), None)
        into = next((t for t in transfers if t.dst == rank), None)
        if out or into:
            keep = bool(out and into and not set(out.chunks).isdisjoint(into.chunks))
            steps.append(Step(out, into, keep))
    return tuple(steps)
