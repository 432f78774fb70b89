"""Score a diagnosis, of a training job or of a server: over many seeded runs, how many faults it names, and how many of
its findings are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

HEALTHY = "healthy"
ELSEWHERE = "elsewhere"  # the right kind, of another rank or client


class NamesKind(Protocol):
    """A fault, or a finding."""

    @property
    def kind(self) -> str: ...


class DrilledRun(Protocol):
    """One run, and what was made of it."""

    @property
    def fault(self) -> NamesKind | None:
        """That was injected; None if the run was healthy."""

    @property
    def findings(self) -> Sequence[NamesKind]:
        """Of the diagnosis, which did not know."""

    def is_right(self, finding: NamesKind) -> bool:
        """Whether a finding names the kind of the fault, and who has it."""


@dataclass(frozen=True)
class DrillScore:
    """How good a diagnosis is.

    Args:
        faulty, healthy: runs of either.
        recall: share of faulty runs whose fault was named, its kind and who has it.
        precision: share of all findings that were right; 1 if there were none.
        false_alarms: healthy runs with a finding.
        confusion: (kind injected, kind named) → runs.
    """

    faulty: int
    healthy: int
    recall: float
    precision: float
    false_alarms: int
    confusion: dict[tuple[str, str], int]


def score_drills(runs: Iterable[DrilledRun]) -> DrillScore:
    """The score of some runs."""
    runs = list(runs)
    faulty = [run for run in runs if run.fault is not None]
    right = [run.is_right(finding) for run in runs for finding in run.findings]
    recalled = sum(any(map(run.is_right, run.findings)) for run in faulty)
    return DrillScore(
        len(faulty),
        len(runs) - len(faulty),
        recalled / len(faulty) if faulty else 1.0,
        sum(right) / len(right) if right else 1.0,
        sum(bool(run.findings) for run in runs if run.fault is None),
        dict(Counter((run.fault.kind if run.fault else HEALTHY, verdict(run)) for run in runs)),
    )


def verdict(run: DrilledRun) -> str:
    """What was made of a run, a kind: that of the fault only if who has it is named, too."""
    if not run.findings:
        return HEALTHY
    right = [finding for finding in run.findings if run.is_right(finding)]
    if right:
        return right[0].kind
    same = run.fault is not None and any(finding.kind == run.fault.kind for finding in run.findings)
    return ELSEWHERE if same else run.findings[0].kind
