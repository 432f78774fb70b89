"""A job from failure to failure: what it has done at the end, and where the rest of its time went.

    run = simulate_job(plan, hours=54 * 24, seed=0)
    run.goodput           effective share of the wall clock
    run.badput            seconds by kind: saves, lost work, detection, restart, …
    run.by_cause          seconds by what failed

Events are drawn from one seeded generator: a failure after an exponential time, its cause in proportion to the rates.
Between failures the job steps and saves; nothing is averaged, and no formula of interval.py is used.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from minilib.mechanisms.basics.checks import check_quantity
from minilib.operations.goodput.failures import HOUR, FailureCause
from minilib.operations.goodput.plan import CheckpointLevel, JobPlan


@dataclass(frozen=True)
class GoodputRun:
    """What a simulated job did with its time, in seconds.

    Args:
        wall: simulated.
        useful: of it, work that counts at the end.
        badput: all the rest, by kind.
        by_cause: badput by the failures' causes; saves, and steps with fewer replicas, have none.
        failures: by cause.
        timeline: (start, end, kind) of what was no work, in order; where it was asked for.
    """

    wall: float
    useful: float
    badput: dict[str, float]
    by_cause: dict[str, float]
    failures: dict[str, int]
    timeline: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return self.useful / self.wall

    def check_invariants(self) -> None:
        """Every second is useful or of one kind of badput."""
        assert math.isclose(self.useful + sum(self.badput.values()), self.wall, rel_tol=1e-9)
        assert min(self.useful, *self.badput.values(), 0) >= -1e-6 * self.wall


def simulate_job(plan: JobPlan, hours: float, seed: int, with_timeline: bool = False) -> GoodputRun:
    """Run a job for some hours of wall clock.

    Args:
        plan: what it does.
        hours: how long.
        seed: decides every failure.
        with_timeline: keep what came when.

    Cost: time for each save and each failure.

    Raises:
        ValueError: if there are no hours.
    """
    check_quantity("hours", hours, above_zero=True)
    job = _Job(plan, hours * HOUR, seed, with_timeline)
    job.play()
    causes = {name: seconds for name, seconds in job.by_cause.items() if name}
    return GoodputRun(job.end, job.progress, dict(job.badput), causes, dict(job.failures), job.timeline)


class _Saved:
    """Checkpoints of one level: how far the newest durable one was, and the one that is being written."""

    def __init__(self, level: CheckpointLevel, every: float) -> None:
        self.level, self.every = level, every
        self.durable, self.pending, self.done_at, self.due = 0.0, 0.0, 0.0, every

    def settle(self, now: float) -> None:
        """Take what was written by now for durable."""
        if self.done_at <= now:
            self.durable = self.pending

    def go_back(self, position: float, ran: float) -> None:
        """The job was loaded from elsewhere, or from here: nothing newer than that is left."""
        self.durable = self.pending = min(self.durable, position)
        self.done_at, self.due = 0.0, ran + self.every


class _Job:
    def __init__(self, plan: JobPlan, end: float, seed: int, with_timeline: bool) -> None:
        self.plan, self.end, self._draw, self._keep = plan, end, random.Random(seed), with_timeline
        self.now = self.progress = self._ran = 0.0
        self.badput: dict[str, float] = defaultdict(float)
        self.by_cause: dict[str, float] = defaultdict(float)
        self.failures: Counter[str] = Counter()
        self.timeline: list[tuple[float, float, str]] = []
        self._saved = [_Saved(level, plan.seconds_between_saves(level)) for level in plan.levels]
        self._whole_at = 0.0  # when every lost host is replaced
        self._spares = [0.0] * (plan.recovery.spares or 0)  # when each is free
        self._absent: list[float] = []  # when each replica that is out comes back
        self._lemons = [0] * plan.lemons.count(plan.fleet)  # failures of each so far

    def play(self) -> None:
        while self.now < self.end:
            life = self._draw_life()
            self._run(min(self.now + life, self.end))
            if self.now < self.end:
                self._fail()

    def _draw_life(self) -> float:
        rate = sum(self._weights()) / HOUR
        return self._draw.expovariate(rate) if rate else math.inf

    def _weights(self) -> list[float]:
        """Failures per hour by cause; those of hosts and GPUs as far as lemons are still there."""
        fleet, lemons = self.plan.fleet, self.plan.lemons
        scale = lemons.of_others(fleet) * (1 + len(self._lemons) * (lemons.factor - 1) / fleet.hosts)
        return [
            cause.per_hour * fleet.count(cause.per) * (scale if cause.per in ("gpu", "host") else 1)
            for cause in self.plan.causes
        ]

    def _run(self, until: float) -> None:
        """Step and save, with as many replicas as there are."""
        while self.now < until:
            saved = min(self._saved, key=lambda each: each.due, default=None)
            to_save = self.now + saved.due - self._ran if saved else math.inf
            self._work(min(until, to_save, self._absent[0] if self._absent else math.inf))
            while self._absent and self._absent[0] <= self.now:
                heapq.heappop(self._absent)
            if saved and to_save <= self.now < until:
                self._save(saved, until)

    def _work(self, until: float) -> None:
        seconds = max(0.0, until - self.now)
        share = 1 - len(self._absent) / self.plan.recovery.replicas
        self.progress += seconds * share
        if self._absent:
            self._account("fewer replicas", seconds * (1 - share), None)
        self._ran += seconds
        self.now = max(self.now, until)

    def _save(self, saved: _Saved, until: float) -> None:
        """Wait for the save before, and for this one's stall; a failure may come first."""
        saved.due = self._ran + saved.every
        self._wait("save", min(max(saved.done_at - self.now, 0.0) + saved.level.stall, until - self.now))
        if self.now < until:
            saved.settle(self.now)
            saved.pending, saved.done_at = self.progress, self.now + saved.level.write

    def _fail(self) -> None:
        """A failure, and those that come before it is made up for."""
        cause = self._strike()
        replicas = self.plan.recovery.replicas
        if replicas > 1:
            if self._draw.random() < len(self._absent) / replicas:
                return  # it struck a replica that is out
            if len(self._absent) + 1 < replicas:
                self._go_on_without(cause)
                return
        self._absent.clear()
        while cause is not None and self.now < self.end:
            cause = self._restart(cause)

    def _go_on_without(self, cause: FailureCause) -> None:
        recovery = self.plan.recovery
        self.failures[cause.name] += 1
        lost = math.fmod(self.progress, self.plan.step_seconds)
        self.progress -= lost
        self._account("lost work", lost, cause)
        self._wait("stall", min(recovery.stall, self.end - self.now), cause)
        heapq.heappush(self._absent, self.now + recovery.rejoin + self._seconds_to_a_spare(cause))

    def _restart(self, cause: FailureCause) -> FailureCause | None:
        """Go back to the newest checkpoint that survives, and start again; the next failure if it comes before that."""
        recovery = self.plan.recovery
        self.failures[cause.name] += 1
        load = self._go_back(cause)
        self._whole_at = max(self._whole_at, self.now + self._seconds_to_a_spare(cause))
        waits, life = max(0.0, self._whole_at - self.now), self._draw_life()
        phases = {"detection": recovery.detection, "waiting for a host": waits, "restart": recovery.restart + load}
        for kind, seconds in phases.items():
            spent = min(seconds, life, self.end - self.now)
            self._wait(kind, spent, cause)
            life -= spent
            if life <= 0:
                return self._strike()
        return None

    def _go_back(self, cause: FailureCause) -> float:
        """Lose what no checkpoint has that survives; the seconds to load the one that has most."""
        for saved in self._saved:
            saved.settle(self.now)
        left = [saved for saved in self._saved if cause.loses in saved.level.survives]
        newest = max(left, key=lambda saved: (saved.durable, -saved.level.load), default=None)
        position = newest.durable if newest else 0.0
        self._account("lost work", self.progress - position, cause)
        self.progress = position
        for saved in self._saved:
            saved.go_back(position, self._ran)
        return newest.level.load if newest else 0.0

    def _seconds_to_a_spare(self, cause: FailureCause) -> float:
        recovery = self.plan.recovery
        hosts = {"process": 0, "host": 1, "rack": self.plan.fleet.hosts_per_rack}[cause.loses]
        free = self.now
        for _ in range(hosts):
            back = self.now + recovery.repair
            if recovery.spares is not None:
                taken = heapq.heappushpop(self._spares, back)
                free = max(free, taken)
        return free - self.now + (recovery.replace if hosts else 0.0)

    def _strike(self) -> FailureCause:
        """What fails; a lemon that has failed often enough is evicted."""
        cause = self._draw.choices(self.plan.causes, self._weights())[0]
        lemons, left = self.plan.lemons, len(self._lemons)
        weight = left * lemons.factor
        of_a_host = cause.per in ("gpu", "host")
        if left and of_a_host and self._draw.random() < weight / (self.plan.fleet.hosts - left + weight):
            number = self._draw.randrange(left)
            self._lemons[number] += 1
            if lemons.evict_after is not None and self._lemons[number] >= lemons.evict_after:
                self._lemons.pop(number)
        return cause

    def _wait(self, kind: str, seconds: float, cause: FailureCause | None = None) -> None:
        self._account(kind, seconds, cause)
        if self._keep and seconds:
            self.timeline.append((self.now, self.now + seconds, kind))
        self.now += seconds

    def _account(self, kind: str, seconds: float, cause: FailureCause | None) -> None:
        self.badput[kind] += seconds
        self.by_cause[cause.name if cause else ""] += seconds
