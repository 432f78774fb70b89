"""Which rank makes the others wait: by computing slowly, or by waiting for its data.

The time of a step is the same on all ranks of a synchronous job, and so are its percentiles: whoever is early waits in
a collective. What differs is a rank's own time: its phases without its waits for others, and for a core.

Thresholds are those of NVIDIA's resiliency extension: a rank is slow if its performance is below 0.7 of what it should
be, compared with other ranks (relative) or with its own best so far (individual).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from minilib.mechanisms.telemetry import outliers
from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.step_record import StepRecord

WINDOW = 6  # newest steps of which medians are taken
SLOW = 0.7  # a score below this is slow
FLOOR = 5_000_000  # ns a step that are too few to matter
Steps = Sequence[Sequence[StepRecord]]  # for each step the records of all ranks


@dataclass(frozen=True)
class PaceScore:
    """How fast a rank computes now.

    Args:
        rank: which.
        compute_ns: of a step, median of the window.
        relative: median of all ranks over that; 1 is as fast as the others, 0.5 half as fast.
        individual: the rank's own quickest window so far over that.
    """

    rank: int
    compute_ns: float
    relative: float
    individual: float


def pace_scores(steps: Steps, window: int = WINDOW) -> list[PaceScore]:
    """The scores of all ranks at the end of some steps; none if there are fewer steps than the window has."""
    if len(steps) < window:
        return []
    by_rank = [[record.compute_ns for record in records] for records in zip(*steps, strict=True)]
    medians = [_windows(values, window) for values in by_rank]
    middle = statistics.median(of_rank[-1] for of_rank in medians)
    return [
        PaceScore(rank, of_rank[-1], middle / max(1, of_rank[-1]), min(of_rank) / max(1, of_rank[-1]))
        for rank, of_rank in enumerate(medians)
    ]


def slow_ranks(steps: Steps, window: int = WINDOW) -> list[Finding]:
    """Ranks that compute more slowly than the others. A job whose ranks all slow down at once has no slow rank."""
    return [
        Finding("slow_rank", score.rank, f"it computes {score.compute_ns / 1e6:.1f} ms a step: {score.relative:.2f} of "
                f"the pace of the median rank, {score.individual:.2f} of its own best")
        for score in pace_scores(steps, window)
        if score.relative < SLOW and score.compute_ns * (1 - score.relative) > FLOOR
    ]  # fmt: skip


def starved_loaders(steps: Steps, window: int = WINDOW) -> list[Finding]:
    """Ranks that wait for their data longer than the others; rank None if all wait for data a third of the step.

    Waiting is what counts: a loader that computes in the rank's own thread, or gets new memory there, does not starve.
    """
    if len(steps) < window:
        return []
    ranks = list(zip(*steps[-window:], strict=True))
    waits = [statistics.median(record.phases["data"].asleep_ns for record in records) for records in ranks]
    walls = [statistics.median(record.wall_ns for record in records) for records in ranks]
    middle = statistics.median(waits)
    if middle > max(FLOOR, statistics.median(walls) / 3):
        return [Finding("starved_loader", None, f"the median rank waits {middle / 1e6:.1f} ms a step for data")]
    return [
        Finding("starved_loader", rank, f"it waits {waits[rank] / 1e6:.1f} ms a step for data, "
                f"the median rank {middle / 1e6:.1f} ms")
        for rank in outliers(waits, floor=FLOOR, side="above")
    ]  # fmt: skip


def _windows(values: Sequence[float], window: int) -> list[float]:
    """The median of each `window` values in a row."""
    return [statistics.median(values[end - window : end]) for end in range(window, len(values) + 1)]
