"""What one rank has recorded of one step, and the file of such records that outlives the rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

COMPUTE = ("forward", "backward", "optimizer")  # phases in which a rank works by itself


class PhaseTime(NamedTuple):
    """How long a phase of a step took one rank's thread.

    Args:
        wall_ns: from its beginning to its end.
        cpu_ns: of these, the thread ran.
        ready_ns: of these, the thread could have run and waited for a core: the work of neighbours.
        wait_ns: of these, the thread waited in collectives for other ranks, and for no core.
    """

    wall_ns: int = 0
    cpu_ns: int = 0
    ready_ns: int = 0
    wait_ns: int = 0

    @property
    def own_ns(self) -> int:
        """What the rank itself is answerable for: computing, and waiting for its own devices."""
        return max(0, self.wall_ns - self.ready_ns - self.wait_ns)

    @property
    def asleep_ns(self) -> int:
        """Of its own time, that in which it waited for a disk, a device or another process, and did not run."""
        return max(0, self.own_ns - self.cpu_ns)

    def plus(self, other: PhaseTime) -> PhaseTime:
        """Both, one after the other."""
        return PhaseTime(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class StepRecord:
    """One step of one rank.

    Args:
        rank, step: which.
        begun_ns, ended_ns: by time.monotonic_ns, which ranks of one host share.
        phases: name of each phase → its time.
        samples: sequences that the rank drew.
        loss: over all ranks.
        grad_norm: of the averaged gradients, before clipping.
        own_grad_norm: of the rank's own gradients, before they were averaged; None if nobody looked.
        rss_bytes: memory of the process at the end of the step.
        checksums: of each parameter at the end of the step, by name; empty in steps without a check.
    """

    rank: int
    step: int
    begun_ns: int
    ended_ns: int
    phases: Mapping[str, PhaseTime]
    samples: int
    loss: float
    grad_norm: float
    own_grad_norm: float | None
    rss_bytes: int
    checksums: Mapping[str, int]

    @property
    def wall_ns(self) -> int:
        """Of the whole step."""
        return self.ended_ns - self.begun_ns

    @property
    def wait_ns(self) -> int:
        """In collectives."""
        return sum(phase.wait_ns for phase in self.phases.values())

    @property
    def compute_ns(self) -> int:
        """The rank's own time in the phases in which it computes."""
        return sum(self.phases[name].own_ns for name in COMPUTE if name in self.phases)

    def packed(self) -> str:
        """One line of JSON."""
        return json.dumps(vars(self))

    @classmethod
    def unpacked(cls, line: str) -> StepRecord:
        """The inverse of `packed`."""
        values = json.loads(line)
        return cls(**values | {"phases": {name: PhaseTime(*phase) for name, phase in values["phases"].items()}})


def read_step_records(path: Path) -> list[StepRecord]:
    """The records in a rank's file, in order; a last line that a killed rank left half written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [StepRecord.unpacked(line) for line in lines if line.endswith("\n")]


def in_step(runs: Sequence[Sequence[StepRecord]]) -> list[tuple[StepRecord, ...]]:
    """For each step that all ranks have recorded, in order, the records of ranks 0, 1, …"""
    by_step = [{record.step: record for record in records} for records in runs]
    common = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [tuple(records[step] for records in by_step) for step in common]
