"""What the numbers of a run say: NaN and who brought it, spikes, and memory that is not given back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from minilib.mechanisms.telemetry import outliers
from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.stragglers import WINDOW, Steps
from minilib.operations.metrics.trend import robust_slope

LEAK_FLOOR = 2**20  # bytes a step


def nan_ranks(steps: Steps) -> list[Finding]:
    """Who had a gradient that is not finite before anybody else, of its own, before gradients were averaged.

    One step later all replicas are NaN, and every rank reports one: only the first step tells who it was.
    """
    for records in steps:
        norms = [record.own_grad_norm for record in records]
        guilty = [rank for rank, norm in enumerate(norms) if norm is not None and not math.isfinite(norm)]
        if guilty:
            evidence = f"at step {records[0].step} its own gradient has the norm {norms[guilty[0]]}, before averaging"
            if len(guilty) == len(records):
                return [Finding("nan_everywhere", None, evidence)]
            return [Finding("nan_from_one_rank", rank, evidence) for rank in guilty]
    return []


def spikes(values: Sequence[float], factor: float = 8.0, least: float = 0.3, history: int = 24) -> list[int]:
    """Positions of values that stand far above those before them.

    A value is compared with the median of up to `history` finite values before it, so neither one spike nor the slow
    fall or rise of a warm-up moves the measure. The first 8 values are compared with nothing.

    Args:
        values: a loss or a norm for each step; NaN and infinity are spikes.
        factor: median absolute deviations that a value may be above the median.
        least: of the median, that a value may be above the median.
    """
    found, before = [], []
    for position, value in enumerate(values):
        if not math.isfinite(value):
            found.append(position)
            continue
        if len(before) >= 8:
            median = statistics.median(before[-history:])
            spread = statistics.median(abs(other - median) for other in before[-history:])
            if value - median > max(factor * spread, least * abs(median)):
                found.append(position)
        before.append(value)
    return found


def loss_spikes(steps: Steps) -> list[Finding]:
    """Spikes of the loss and of the norm of the averaged gradients, which all ranks share."""
    found = []
    for kind, values in (
        ("loss_spike", [records[0].loss for records in steps]),
        ("grad_norm_spike", [records[0].grad_norm for records in steps]),
    ):
        for position in spikes(values):
            found.append(Finding(kind, None, f"{values[position]:.3g} at step {steps[position][0].step}"))
    return found


def memory_leaks(steps: Steps, window: int = WINDOW) -> list[Finding]:
    """Ranks whose memory grows in the newest steps, and in nearly all of them, and by more than that of other ranks."""
    if len(steps) < window:
        return []
    rows = [[record.rss_bytes for record in records] for records in zip(*steps[-window:], strict=True)]
    slopes = [robust_slope(range(window), row) for row in rows]
    rises = [sum(later > earlier for earlier, later in zip(row, row[1:], strict=False)) for row in rows]
    return [
        Finding("memory_leak", rank, f"{slopes[rank] / 2**20:.1f} MiB more in each step, and more in {rises[rank]} of "
                f"{window - 1}; the median rank {statistics.median(slopes) / 2**20:.1f} MiB")
        for rank in outliers(slopes, floor=LEAK_FLOOR, side="above")
        if rises[rank] >= window - 2
    ]  # fmt: skip
