"""One rank's part of a plan, round by round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from minilib.mechanisms.replication import Plan, Transfer


@dataclass(frozen=True)
class Step:
    """A rank's part of a round.

    Args:
        out, into: what it sends and what it receives.
        keep: it receives where it sends from.
        ahead: what it receives from the same rank in its next step, if nothing is sent from there before.
    """

    out: Transfer | None
    into: Transfer | None
    keep: bool
    ahead: Transfer | None


@lru_cache(maxsize=256)
def steps_of(plan: Plan, rank: int) -> tuple[Step, ...]:
    """What a rank sends and receives in each round in which it does either."""
    rounds = []
    for transfers in plan.rounds:
        send = next((t for t in transfers if t.src == rank), None)
        receive = next((t for t in transfers if t.dst == rank), None)
        if send or receive:
            rounds.append((send, receive))
    steps = []
    for (out, into), (next_out, then) in pairwise([*rounds, (None, None)]):
        same = into and then and into.src == then.src and not _overlap(next_out, then)
        steps.append(Step(out, into, _overlap(out, into), then if same else None))
    return tuple(steps)


def _overlap(a: Transfer | None, b: Transfer | None) -> bool:
    """Whether two transfers have a chunk in common."""
    return bool(a and b and a.chunk < b.chunk + b.count and b.chunk < a.chunk + a.count)
