"""A discrete-event simulator: jobs come and end, hosts fail and are repaired, and a scheduler decides who runs.

    at one instant:  ends → repairs → failures → arrivals → one decision

A job that has done its work ends, even if its host fails at that instant. What runs is what the scheduler says: after
each decision its `running` is compared with what ran before, so that schedulers that move jobs or make them give way
are simulated as well. A run that is lost keeps its last checkpoint; a move saves first, and loses nothing, unless the
job keeps nothing at all. After either a run begins with `restart_seconds` in which nothing is done. Saving is free.

Sums are exact if all times are whole numbers.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from tqdm.auto import tqdm

from minilib.mechanisms.basics.checks import check_quantity
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, Refused
from minilib.operations.placement.simulation.fragmentation import largest_gangs
from minilib.operations.placement.simulation.host_failures import HostFailure
from minilib.operations.placement.simulation.job_record import JobRecord, JobRun
from minilib.operations.placement.simulation.outcome import ClusterSeconds, Instant, SimulatedRun
from minilib.operations.placement.simulation.traced_job import TracedJob

END, REPAIR, FAIL, ARRIVE = range(4)  # the order within an instant
MOST_LOSSES = 1_000  # of one job in a row without more work kept


class NeverEnds(RuntimeError):
    """A job loses its work again and again; the message says how to mend it."""


class DecidesPlacements(Protocol):
    """What a simulation needs of a scheduler; GangScheduler has it."""

    cluster: GpuCluster
    free: FreeGpus

    @property
    def running(self) -> Mapping[str, GangPlacement]:
        """Where each job runs."""

    def submit(self, job: GangJob, now: float) -> Refused | None:
        """A new job joins the line, or is refused."""

    def start(self, now: float) -> object:
        """Start what can start now."""

    def finish(self, name: str, now: float) -> None:
        """A job has ended."""

    def fail(self, gpus: Iterable[int], now: float) -> object:
        """GPUs are lost, and jobs that ran there wait again."""

    def restore(self, gpus: Iterable[int]) -> None:
        """GPUs are in use again."""


def simulate_cluster(
    trace: Iterable[TracedJob],
    scheduler: DecidesPlacements,
    failures: Iterable[HostFailure] = (),
    until: float = math.inf,
    instants: bool = True,
    progress: bool = False,
) -> SimulatedRun:
    """Run a trace until every job has ended or cannot start any more.

    Args:
        trace: jobs, in any order; those that come at one instant are submitted in the order given.
        scheduler: that nothing was submitted to yet.
        failures: in order of time; they may have no end.
        until: stop then; what runs then keeps its work.
        instants: keep what is free after each instant, and the largest gangs.
        progress: show a bar of jobs that have ended.

    Returns:
        What became of all jobs and GPU-seconds; the clock starts at 0.

    Raises:
        ValueError: if two jobs share a name, or failures are not in order, of no host, or of one that is out.
        NeverEnds: if a job makes no progress between failures.
    """
    check_quantity("until", until, finite=False)
    jobs = sorted(trace, key=lambda each: each.arrival)
    clock = _Clock(scheduler, failures, until, instants)
    if len({each.job.name for each in jobs}) < len(jobs):
        raise ValueError("two jobs of the trace share a name; give each its own")
    with tqdm(total=len(jobs), desc="simulated jobs", disable=not progress) as shown:
        for each in jobs:
            clock.add(each.arrival, ARRIVE, each)
        clock.play(shown)
    return clock.outcome()


class _Clock:
    def __init__(self, scheduler: DecidesPlacements, failures: Iterable[HostFailure], until: float, keep: bool) -> None:
        self.scheduler, self.until, self.keep = scheduler, until, keep
        self.now: float = 0
        self.records: dict[str, JobRecord] = {}
        self.seconds = ClusterSeconds(scheduler.cluster.gpus)
        self.instants: list[Instant] = []
        self._events: list[tuple[float, int, int, Any]] = []
        self._order = itertools.count()
        self._failures: Iterator[HostFailure] = iter(failures)
        self._running: dict[str, GangPlacement] = {}
        self._in_line = self._left = 0
        self._down: set[int] = set()
        self._losses: dict[str, int] = {}
        self._next_failure()

    def add(self, at: float, kind: int, what: object) -> None:
        """Something will happen."""
        heapq.heappush(self._events, (at, kind, next(self._order), what))
        self._left += kind == ARRIVE

    def play(self, shown: tqdm) -> None:
        """Instant by instant, until nobody is left who could start."""
        while self._events and self._left and self._events[0][0] <= self.until:
            self._pass_time(self._events[0][0])
            before = self._left
            while self._events and self._events[0][0] == self.now:
                _, kind, _, what = heapq.heappop(self._events)
                (self._end, self._repair, self._fail, self._arrive)[kind](what)
            self.scheduler.start(self.now)
            self._follow(lost=False)
            self._note()
            shown.update(before - self._left)
        if self.until < math.inf and self._left:
            self._pass_time(self.until)
        for name in list(self._running):
            record = self.records[name]
            record.runs[-1].close(self.now, record.runs[-1].reached(self.now))

    def outcome(self) -> SimulatedRun:
        """All that was counted."""
        for record in self.records.values():
            if record.in_line_since is not None:
                record.waited += self.now - record.in_line_since
        return SimulatedRun(self.scheduler.cluster, self.now, list(self.records.values()), self.seconds, self.instants)

    def _pass_time(self, until: float) -> None:
        """Nothing happens until then: count what GPUs did."""
        busy = sum(len(placement.gpus) for placement in self._running.values())
        down = sum(len(self.scheduler.cluster.gpus_of(host)) for host in self._down)
        self.seconds.add(until - self.now, busy, self.scheduler.free.free, down, self._in_line)
        self.now = until

    def _arrive(self, traced: TracedJob) -> None:
        record = self.records[traced.job.name] = JobRecord(traced)
        refused = self.scheduler.submit(traced.job, self.now)
        if refused is not None:
            record.refused = refused.reason
            self._left -= 1
            return
        record.in_line_since = self.now
        self._in_line += 1

    def _end(self, what: tuple[str, JobRun]) -> None:
        name, run = what
        if run.end is None:
            record = self.records[name]
            run.close(self.now, record.traced.seconds)
            record.ended = self.now
            del self._running[name]
            self._left -= 1
            self.scheduler.finish(name, self.now)

    def _fail(self, failure: HostFailure) -> None:
        if failure.host in self._down:
            raise ValueError(f"host {failure.host} fails at {failure.at} and is out already: it is repaired later")
        self._down.add(failure.host)
        self.add(self.now + failure.repair_seconds, REPAIR, failure.host)
        self.scheduler.fail(self.scheduler.cluster.gpus_of(failure.host), self.now)
        self._follow(lost=True)
        self._next_failure()

    def _repair(self, host: int) -> None:
        self._down.remove(host)
        self.scheduler.restore(self.scheduler.cluster.gpus_of(host))

    def _next_failure(self) -> None:
        if (failure := next(self._failures, None)) is not None:
            if failure.at < self.now:
                raise ValueError(f"a failure at {failure.at} comes after one at {self.now}: give them in order of time")
            if failure.host >= len(hosts := self.scheduler.cluster.hosts):
                raise ValueError(f"host {failure.host} fails, and hosts are numbered 0 to {len(hosts) - 1}")
            self.add(failure.at, FAIL, failure)

    def _follow(self, lost: bool) -> None:
        """Take over what the scheduler says runs now."""
        after = dict(self.scheduler.running)
        for name, placement in list(self._running.items()):
            if name not in after:
                self._stop(name, lost)
            elif after[name].gpus != placement.gpus:
                self._move(name, after[name], lost)
        for name in after.keys() - self._running.keys():
            self._start(name, after[name])

    def _start(self, name: str, placement: GangPlacement) -> None:
        record = self.records[name]
        record.waited += self.now - record.in_line_since
        record.in_line_since = None
        self._in_line -= 1
        restart = record.traced.job.restart_seconds if record.runs else 0
        self._begin(record, placement, restart)

    def _begin(self, record: JobRecord, placement: GangPlacement, restart: float) -> None:
        run = JobRun(self.now, placement.gpus, restart, record.kept_seconds)
        record.runs.append(run)
        name = record.traced.job.name
        self._running[name] = placement
        self.add(self.now + restart + record.traced.seconds - run.from_seconds, END, (name, run))

    def _stop(self, name: str, lost: bool) -> None:
        record = self.records[name]
        self._close(record, record.kept_after_loss(self.now))
        record.failures += lost
        record.preemptions += not lost
        record.in_line_since = self.now
        self._in_line += 1
        del self._running[name]

    def _move(self, name: str, placement: GangPlacement, lost: bool) -> None:
        """It goes on elsewhere: after a loss from its checkpoint, else from where it is."""
        record = self.records[name]
        saves = not lost and record.traced.job.checkpoint_every is not None
        self._close(record, record.runs[-1].reached(self.now) if saves else record.kept_after_loss(self.now))
        record.failures += lost
        record.moves += not lost
        self._begin(record, placement, record.traced.job.restart_seconds)

    def _close(self, record: JobRecord, kept: float) -> None:
        name, run = record.traced.job.name, record.runs[-1]
        run.close(self.now, kept)
        self._losses[name] = 0 if kept > run.from_seconds else self._losses.get(name, 0) + 1
        if self._losses[name] > MOST_LOSSES:
            raise NeverEnds(
                f"{name} lost its run {MOST_LOSSES} times in a row without more work kept: set checkpoint_every below "
                "the time between failures, or give a time to stop, `until`"
            )

    def _note(self) -> None:
        if self.keep:
            free = self.scheduler.free
            self.instants.append(Instant(self.now, len(self._running), self._in_line, free.free, largest_gangs(free)))
