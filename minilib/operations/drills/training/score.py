"""Score a diagnosis: over many seeded runs, how many faults it names, and how many of its findings are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.drills.training.fault import InjectedFault, fault_of_seed

HEALTHY = "healthy"
OTHER_RANK = "another rank"  # the right kind


@dataclass(frozen=True)
class DrillRun:
    """One run, and what was made of it.

    Args:
        seed: of the fault.
        fault: that was injected; None if the run was healthy.
        findings: of the diagnosis, which did not know.
    """

    seed: int
    fault: InjectedFault | None
    findings: Sequence[Finding]

    @property
    def named(self) -> str:
        """The verdict, a kind: that of the fault only if its rank is named, too."""
        if not self.findings:
            return HEALTHY
        right = [finding for finding in self.findings if self.is_right(finding)]
        if right:
            return right[0].kind
        same = self.fault is not None and any(finding.kind == self.fault.kind for finding in self.findings)
        return OTHER_RANK if same else self.findings[0].kind

    def is_right(self, finding: Finding) -> bool:
        """Whether a finding names the kind and the rank, and of a link both ranks."""
        fault = self.fault
        if fault is None:
            return False
        where = fault.link if fault.kind == "slow_link" else (fault.rank, None)
        return (finding.kind, finding.rank, finding.peer) == (fault.kind, *where)


@dataclass(frozen=True)
class DrillScore:
    """How good a diagnosis is.

    Args:
        faulty, healthy: runs of either.
        recall: share of faulty runs whose fault was named, kind and rank.
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


def score_drills(runs: Iterable[DrillRun]) -> DrillScore:
    """The score of some runs."""
    runs = list(runs)
    faulty = [run for run in runs if run.fault is not None]
    findings = [run.is_right(finding) for run in runs for finding in run.findings]
    recalled = sum(any(map(run.is_right, run.findings)) for run in faulty)
    return DrillScore(
        len(faulty),
        len(runs) - len(faulty),
        recalled / len(faulty) if faulty else 1.0,
        sum(findings) / len(findings) if findings else 1.0,
        sum(bool(run.findings) for run in runs if run.fault is None),
        dict(Counter((run.fault.kind if run.fault else HEALTHY, run.named) for run in runs)),
    )


def drill(seeds: Iterable[int], examine: Callable[[InjectedFault | None], Sequence[Finding]]) -> list[DrillRun]:
    """Run the faults of some seeds, healthy runs between.

    Args:
        seeds: those below 1000 are for developing rules, those from 2000 on for scoring them; see `fault_of_seed`.
        examine: runs the job with a fault, and returns what was found.
    """
    return [DrillRun(seed, fault, examine(fault)) for seed in seeds for fault in [fault_of_seed(seed)]]
