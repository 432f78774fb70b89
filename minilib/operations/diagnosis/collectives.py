"""What the flight recorders say of a job that has stopped, as findings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.flight_recorder import Dump, Verdict, analyse

KINDS = {"dead": "lost_heartbeat", "not_entered": "hung_rank", "stuck": "hung_rank", "deadlock": "deadlock"}


def stopped_collectives(dumps: Sequence[Dump], dead: Collection[int] = ()) -> list[Finding]:
    """The ranks for which others wait in a collective, or that are in another one; none if the job has gone on.

    A rank that was late, and came, is no finding of this instrument: how late is late is for the paces to say.

    Args:
        dumps: of all ranks.
        dead: ranks whose process is known to be gone.
    """
    verdict = analyse(dumps, dead) if dumps else Verdict("healthy", (), "")
    kind = _mismatch(verdict, dumps) if verdict.kind == "mismatch" else KINDS.get(verdict.kind)
    return [Finding(kind, rank, verdict.evidence) for rank in verdict.ranks] if kind else []


def _mismatch(verdict: Verdict, dumps: Sequence[Dump]) -> str:
    """Whether ranks called one operation with other shapes or dtypes, or different operations."""
    place = verdict.group, verdict.sequence
    calls = [call for dump in dumps for call in dump.calls if (call.group, call.sequence) == place]
    operations = {(call.op, call.reduce_op, call.root) for call in calls}
    return "wrong_shape" if len(operations) == 1 else "mismatched_collective"
