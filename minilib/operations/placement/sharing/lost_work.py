"""What is lost if a gang gives way: GPU-seconds since its last checkpoint, and those of its restart.

    ─ start ──── checkpoint ──── checkpoint ─── now      … restart
                                           └ lost ┘         └ lost ┘       × GPUs

A gang that shrinks goes on at once with fewer GPUs: the ranks that stay hold its state, so that it loses a restart and
no work. Both losses are badput of chapter 18: "lost work" and "restart".
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.shrinking import on_fewer_gpus, shrink_unit


class GangRun(NamedTuple):
    """A gang that runs.

    Args:
        job: which.
        seconds: since it started, or started again, less the restarts of moves: below 0 right after one.
        left: seconds until it ends, by the estimate; below 0 if it outlived that.
        resumed: whether it ran before; then a run begins with the restart.
    """

    job: GangJob
    seconds: float
    left: float
    resumed: bool = False

    @property
    def progress(self) -> float:
        """Seconds of work in this run."""
        return max(0.0, self.seconds - self.job.restart_seconds * self.resumed)

    @property
    def saved(self) -> float:
        """Of this run, seconds of work that a checkpoint holds."""
        every = self.job.checkpoint_every
        return 0.0 if every is None else math.floor(self.progress / every) * every

    @property
    def lost_gpu_seconds(self) -> float:
        """If it gives way as a whole: what no checkpoint holds, and the restart that follows."""
        lost = self.progress - self.saved if self.saved else max(0.0, self.seconds)
        return self.job.gpus * (lost + self.job.restart_seconds)

    @property
    def shrinking_gpu_seconds(self) -> float:
        """If it gives some of its GPUs: all of them stand still as long as a restart takes."""
        return self.job.gpus * self.job.restart_seconds

    @property
    def next_seconds(self) -> float:
        """How long it runs after it gave way, from its last checkpoint on; as at first if it outlived its estimate."""
        first = 0 if self.resumed else self.job.restart_seconds
        after = self.seconds + self.left - self.saved + first
        return after if self.left > 0 else self.job.seconds

    def on_fewer(self, gpus: int) -> GangJob:
        """The job as it goes on with so many GPUs, one of `shrink_sizes`; it takes longer in proportion."""
        job = self.job
        left = self.left if self.left > 0 else job.seconds
        return replace(on_fewer_gpus(job, gpus), seconds=left * job.gpus / gpus + job.restart_seconds)


def shrink_sizes(job: GangJob) -> range:
    """With how many GPUs fewer than now a gang goes on, the most first: whole workers, segments and replicas.

    A mesh gives replicas of the axis dp; one without that axis, and a job whose work is priced for its mesh, give none.
    """
    if job.work is not None:
        return range(0)
    unit = shrink_unit(job)
    least = -(-job.least_gpus // unit) * unit
    return range(job.gpus - unit, least - 1, -unit)  # a job's GPUs are whole units
