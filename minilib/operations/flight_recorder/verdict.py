"""What an analysis of recorded collectives says, as data."""

from __future__ import annotations

from dataclasses import dataclass

from minilib.operations.flight_recorder.recording import RecordedGroup

KINDS = ("mismatch", "dead", "deadlock", "not_entered", "stuck", "slow", "healthy")


@dataclass(frozen=True)
class Verdict:
    """Why a job does not go on, and whose fault it is.

    Args:
        kind: one of KINDS:
            mismatch     ranks of a group called different collectives, or with other shapes, dtypes, operations, roots
            dead         the process of a rank is gone, and others wait for it
            deadlock     ranks wait for each other in collectives of several groups: the ranks of the cycle
            not_entered  a rank has not called the collective that others wait in
            stuck        all have called it, and it does not end
            slow         a rank called it long after the others, and it ended
            healthy      none of these
        ranks: of the job, that have the fault, not those that report it; empty if healthy.
        evidence: what was recorded, in one or two sentences.
        group, sequence: the collective; None and -1 if healthy.
    """

    kind: str
    ranks: tuple[int, ...]
    evidence: str
    group: RecordedGroup | None = None
    sequence: int = -1

    def __str__(self) -> str:
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.kind}{ranks}: {self.evidence}"
