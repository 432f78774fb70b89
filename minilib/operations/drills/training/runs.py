"""Runs of the training job with the faults of some seeds, and whether a finding is right; ../score.py scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.drills.training.fault import InjectedFault, fault_of_seed


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

    def is_right(self, finding: Finding) -> bool:
        """Whether a finding names the kind and the rank, and of a link both ranks."""
        fault = self.fault
        if fault is None:
            return False
        where = fault.link if fault.kind == "slow_link" else (fault.rank, None)
        return (finding.kind, finding.rank, finding.peer) == (fault.kind, *where)


def drill(seeds: Iterable[int], examine: Callable[[InjectedFault | None], Sequence[Finding]]) -> list[DrillRun]:
    """Run the faults of some seeds, healthy runs between.

    Args:
        seeds: those below 1000 are for developing rules, those from 2000 on for scoring them; see `fault_of_seed`.
        examine: runs the job with a fault, and returns what was found.
    """
    return [DrillRun(seed, fault, examine(fault)) for seed in seeds for fault in [fault_of_seed(seed)]]
