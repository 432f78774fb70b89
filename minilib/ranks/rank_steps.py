"""The transfers of a plan that concern one rank, in the order of the rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from minilib.mechanisms.replication import Plan, Transfer


@dataclass(frozen=True)
class RankStep:
    """What one rank sends and receives in one round of a plan.

    Args:
        out: the transfer that the rank sends; None if the rank only receives.
        into: the transfer that the rank receives; None if the rank only sends.
        keep: whether the rank receives into a chunk that it also sends in this round, with the value from before.
    """

    out: Transfer | None
    into: Transfer | None
    keep: bool


@lru_cache(maxsize=256)
def steps_of(plan: Plan, rank: int) -> tuple[RankStep, ...]:
    """The steps of a rank, one for each round in which the rank sends or receives."""
    steps = []
    for transfers in plan.rounds:
        out = next((t for t in transfers if t.src == rank), None)
        into = next((t for t in transfers if t.dst == rank), None)
        if out or into:
            keep = bool(out and into and not set(out.chunks).isdisjoint(into.chunks))
            steps.append(RankStep(out, into, keep))
    return tuple(steps)
