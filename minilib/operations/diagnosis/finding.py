"""What an instrument has found: a kind of fault, the rank that has it, and the numbers that say so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A verdict of an instrument, as data.

    Args:
        kind: of fault, such as "slow_rank".
        rank: that has the fault, not the rank that first reports it; None for a fault of the whole job.
        evidence: the numbers that led to the verdict, in one sentence.
        peer: the rank at the other end, for a fault of one link.
    """

    kind: str
    rank: int | None
    evidence: str
    peer: int | None = None

    def __str__(self) -> str:
        where = "job" if self.rank is None else f"rank {self.rank}"
        link = f" → rank {self.peer}" if self.peer is not None else ""
        return f"{self.kind}, {where}{link}: {self.evidence}"
