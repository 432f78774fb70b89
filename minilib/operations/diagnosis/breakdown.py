"""Where each rank's step goes: its own phases, its wait for other ranks, its wait for a core.

    rows = step_breakdown(evidence.steps)
    draw_breakdown(rows, "All ranks take as long; one of them does not wait")

The whole is the same for all ranks of a synchronous job, so that neither its mean nor its percentiles name a slow rank.
The parts do.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilib.book import plot
from minilib.mechanisms.telemetry import Histogram
from minilib.operations.diagnosis.step_record import StepRecord
from minilib.training.phases import PHASES

WAIT, READY, REST = "wait for ranks", "wait for a core", "between phases"


@dataclass(frozen=True)
class RankBreakdown:
    """The median step of a rank.

    Args:
        rank: which.
        step_ns: of the whole step.
        parts: name → ns: each phase without its waits, then WAIT, READY and REST; medians, which need not add up.
    """

    rank: int
    step_ns: float
    parts: Mapping[str, float]


def step_breakdown(steps: Sequence[Sequence[StepRecord]]) -> list[RankBreakdown]:
    """The median step of each rank.

    Args:
        steps: for each step the records of all ranks; see `in_step`.

    Raises:
        ValueError: if there is no step.
    """
    if not steps:
        raise ValueError("a breakdown needs at least one step that all ranks have recorded")
    rows = []
    for records in zip(*steps, strict=True):
        parts = [_parts(record) for record in records]
        medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
        rows.append(RankBreakdown(records[0].rank, statistics.median(record.wall_ns for record in records), medians))
    return rows


def step_durations(steps: Sequence[Sequence[StepRecord]]) -> list[Histogram]:
    """How long steps took on each rank, in ns; merged they are the job's.

    Args:
        steps: for each step the records of all ranks.
    """
    return [Histogram.of(record.wall_ns for record in records) for records in zip(*steps, strict=True)]


def draw_breakdown(rows: Sequence[RankBreakdown], title: str, ax=None):
    """A bar for each rank, cut into the parts of its median step.

    Args:
        rows: see `step_breakdown`.
        title: the finding.
        ax: draw on these axes instead of making a figure.

    Returns:
        The axes.
    """
    ax = plot.axes(title, height=1.2 + 0.5 * len(rows), ax=ax)
    shown = {
        "data": ("data",),
        "compute": ("forward", "backward", "optimizer"),
        "gradients, loss": ("gradients", "loss"),
        WAIT: (WAIT,),
        READY: (READY,),
        REST: (REST,),
    }
    left = [0.0] * len(rows)
    for (label, names), color in zip(shown.items(), plot.SERIES, strict=False):
        widths = [sum(row.parts[name] for name in names) / 1e6 for row in rows]
        ax.barh([f"rank {row.rank}" for row in rows], widths, left=left, color=color, label=label)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.set_xlabel("ms of the median step")
    with plot.style():
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def _parts(record: StepRecord) -> dict[str, float]:
    own = {name: record.phases[name].own_ns if name in record.phases else 0 for name in PHASES}
    ready = sum(phase.ready_ns for phase in record.phases.values())
    inside = sum(phase.wall_ns for phase in record.phases.values())
    return own | {WAIT: record.wait_ns, READY: ready, REST: record.wall_ns - inside}
