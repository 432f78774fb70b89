"""What became of one job: its runs, what each of them did with its GPU-seconds, and how long it waited."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from minilib.operations.placement.simulation.traced_job import TracedJob


@dataclass
class JobRun:
    """GPUs of a job from a start to the end, a loss, or a move.

    Args:
        start: seconds on the simulated clock.
        gpus: rank r runs on gpus[r].
        restart_seconds: at the beginning, in which nothing is done.
        from_seconds: work that was kept from the runs before.
        end: None while it goes on.
        kept_seconds: work that the runs until here keep.
    """

    start: float
    gpus: tuple[int, ...]
    restart_seconds: float
    from_seconds: float
    end: float | None = None
    kept_seconds: float = 0.0

    def restarted(self, now: float) -> float:
        """Seconds of restarting until now."""
        return min(self.restart_seconds, now - self.start)

    def reached(self, now: float) -> float:
        """Work until now, kept or not."""
        return self.from_seconds + (now - self.start - self.restarted(now))

    def close(self, now: float, kept: float) -> None:
        """It ends, and the job keeps so much work."""
        self.end, self.kept_seconds = now, kept


@dataclass
class JobRecord:
    """A job's way through the simulation.

    Args:
        traced: the job.
        runs: in order.
        waited: seconds in the line in all, also after losses.
        in_line_since: None unless it waits.
        ended: when it was done; None if it never was.
        failures: how often it lost a host.
        moves: how often it was moved.
        preemptions: how often it gave way.
        refused: why it never starts; None unless it was refused.
    """

    traced: TracedJob
    runs: list[JobRun] = field(default_factory=list)
    waited: float = 0.0
    in_line_since: float | None = None
    ended: float | None = None
    failures: int = 0
    moves: int = 0
    preemptions: int = 0
    refused: str | None = None

    @property
    def gpus(self) -> int:
        """How many it runs on."""
        return self.traced.job.gpus

    @property
    def started(self) -> float | None:
        """When it ran first."""
        return self.runs[0].start if self.runs else None

    @property
    def running(self) -> JobRun | None:
        """The run that goes on."""
        return self.runs[-1] if self.runs and self.runs[-1].end is None else None

    @property
    def kept_seconds(self) -> float:
        """Work that is kept."""
        return self.runs[-1].kept_seconds if self.runs else 0.0

    @property
    def slowdown(self) -> float:
        """From arrival to end, over its work; work below 10 s counts as 10 s, so that tiny jobs do not decide all.

        Source: Feitelson and Rudolph, "Metrics and Benchmarking for Parallel Job Scheduling", 1998.
        """
        if self.ended is None:
            return math.inf
        return max(1.0, (self.ended - self.traced.arrival) / max(self.traced.seconds, 10.0))

    def kept_after_loss(self, now: float) -> float:
        """Work that is left if the run is lost now: that of the last checkpoint, and at least what it began with."""
        run, every = self.runs[-1], self.traced.job.checkpoint_every
        saved = run.reached(now) // every * every if every else 0
        return max(run.from_seconds, saved)

    def useful(self) -> float:
        """GPU-seconds of work that counts."""
        return self.gpus * sum(run.kept_seconds - run.from_seconds for run in self.runs if run.end is not None)

    def lost(self) -> float:
        """GPU-seconds of work that is done again."""
        return self.gpus * sum(run.reached(run.end) - run.kept_seconds for run in self.runs if run.end is not None)

    def restarting(self) -> float:
        """GPU-seconds of restarts."""
        return self.gpus * sum(run.restarted(run.end) for run in self.runs if run.end is not None)
