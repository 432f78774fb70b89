"""A scheduler of gangs: who goes next is said by a policy of mechanisms/scheduling, where by topology and price.

    submit ─→ waits ──start──→ runs ──finish──→ gone
      │         ↑  └── fail, preempt, reject ──┘
      └─→ refused, with the reason

A gang that loses one GPU has lost its step on all: it gives back all of them and waits at the place that it had earned.
So does a gang whose host fails between the decision and the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.scheduling import FirstComeFirstServed, SchedulingPolicy, Task
from minilib.operations.placement.cluster.capacity import FreeGpus, NotFree
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.backfill import KEPT, HeadRoom, Reservation
from minilib.operations.placement.gangs.fitting import Placer, best_placement, fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, InvalidJob, Refused, UnknownJob
from minilib.operations.placement.gangs.refusal import Feasibility


@dataclass
class _Entry:
    """A job that is here."""

    job: GangJob
    task: Task
    seconds: float  # how long its next run takes at most
    placement: GangPlacement | None = None
    end: float = 0.0  # of the run, by the estimate
    charged: float = 0.0  # until when the policy was told


class GangScheduler:
    """All or nothing for each job, on a clock that the caller advances.

    Args:
        cluster: whose GPUs.
        policy: who goes next; first come, first served if left out. A unit of work is a GPU-second.
        backfill: let later jobs start as long as they do not delay the first that waits.
        depth: how many later jobs a decision looks at.
        place: chooses the GPUs of a gang among the free ones.

    Attributes:
        free: who has which GPU.
        refused: jobs that never start here, by name.

    Raises:
        ValueError: if depth is no whole number ≥ 0.
    """

    def __init__(
        self,
        cluster: GpuCluster,
        policy: SchedulingPolicy | None = None,
        backfill: bool = True,
        depth: int = 100,
        place: Placer = best_placement,
    ) -> None:
        check_whole("depth", depth)
        self.cluster, self.free = cluster, FreeGpus(cluster)
        self.policy = FirstComeFirstServed() if policy is None else policy
        self.backfill, self.depth, self.place = backfill, depth, place
        self.refused: dict[str, Refused] = {}
        self._feasible = Feasibility(cluster)
        self._entries: dict[str, _Entry] = {}
        self._room = HeadRoom(place)

    @property
    def reservation(self) -> Reservation | None:
        """What is kept for the first job in line that does not fit; None if nobody waits but for a repair."""
        return self._room.reservation

    @property
    def running(self) -> dict[str, GangPlacement]:
        """Where each job runs."""
        return {name: entry.placement for name, entry in self._entries.items() if entry.placement is not None}

    @property
    def waiting(self) -> list[GangJob]:
        """Jobs in the line, in order."""
        return [self._entries[task.key].job for task in self.policy]

    def submit(self, job: GangJob, now: float = 0.0) -> Refused | None:
        """A new job joins the line, or is refused.

        Raises:
            InvalidJob: if a job of this name is here, or was refused.
        """
        if job.name in self._entries or job.name in self.refused:
            raise InvalidJob(f"a job {job.name!r} was submitted already; give each its own name")
        if (refused := self._feasible.refusal(job)) is not None:
            self.refused[job.name] = refused
            return refused
        work = job.gpus * job.seconds
        task = Task(key=job.name, arrival=now, tenant=job.tenant, priority=job.priority, predicted=work)
        self.policy.arrive(task)
        self._entries[job.name] = _Entry(job, task, job.seconds)
        return None

    def start(self, now: float) -> list[GangPlacement]:
        """Start what can start now: the first in line as long as it fits, then those that do not delay it."""
        if self.policy.reorders:
            self.charge(now)
        started = self._start_first(now)
        line = list(islice(self.policy, self.depth + 1)) if len(self.policy) else []
        for at, task in enumerate(line):
            entry = self._entries[task.key]
            if (placement := self.place(entry.job, self.free)) is not None:
                started.append(self._begin(placement, now))
            elif self._room.keep(entry.job, self.free, self._ends, now):
                return started + (self._fill(line[at + 1 :], now) if self.backfill else [])
        self._room.reservation = None
        return started

    def finish(self, name: str, now: float) -> None:
        """A job has ended, or is cancelled while it waits."""
        entry = self._entry(name)
        if entry.placement is not None:
            self._stop(entry, now)
        self.policy.remove(entry.task)
        self._room.drop(name)
        del self._entries[name]

    def preempt(self, name: str, now: float, seconds: float | None = None) -> None:
        """A job that runs gives way; it waits at the place that it has earned.

        Args:
            name: of the job.
            now: the time.
            seconds: how long its next run takes at most; if left out, a restart and all that its last run had to do,
                since how much of that was saved is not known here. So backfill's promises stay upper bounds.

        Raises:
            UnknownJob: if it does not run.
        """
        entry = self._entry(name, runs=True)
        self._stop(entry, now)
        self.policy.preempt(entry.task)
        again = min(entry.seconds, entry.job.seconds) + entry.job.restart_seconds
        entry.seconds = again if seconds is None else seconds

    def fail(self, gpus: Iterable[int], now: float, why: str = "failed") -> list[str]:
        """GPUs are lost. Jobs that ran on one of them give back all of theirs and wait again; their names."""
        self.free.take_out(lost := list(gpus), why)
        hit = [name for name in dict.fromkeys(map(self.free.owner, lost)) if name is not None]
        for name in hit:
            self.preempt(name, now)
        self._room.forget(lost)
        return hit

    def drain(self, gpus: Iterable[int], why: str = "drained") -> None:
        """GPUs get no new jobs; those that run there go on."""
        self.free.take_out(drained := list(gpus), why)
        self._room.forget(drained)

    def reject(self, name: str, host: int, now: float) -> None:
        """A host refuses to start its part of a job: the gang waits again, and nothing goes to this host until
        `restore`, so that the same decision is not made again. Whoever else runs there goes on.

        Raises:
            UnknownJob: if the job does not run on this host.
        """
        entry = self._entry(name, runs=True)
        if not set(entry.placement.gpus) & set(self.cluster.gpus_of(host)):
            raise UnknownJob(f"job {name!r} has no GPU on host {self.cluster.hosts[host].name!r}")
        self.drain(self.cluster.gpus_of(host))
        self.preempt(name, now)

    def restore(self, gpus: Iterable[int]) -> None:
        """GPUs are in use again."""
        self.free.restore(gpus)
        self._room.repaired()

    def move(self, placement: GangPlacement) -> None:
        """A job that runs restarts elsewhere, on its own GPUs and free ones: after a replacement, or to defragment.

        Raises:
            UnknownJob: if it does not run.
            NotFree: if a GPU is another's; nothing was changed.
        """
        entry = self._entry(placement.job.name, runs=True)
        if placement.job != entry.job:
            raise InvalidJob(f"{placement.job.name} moves as it is; another number of GPUs or mesh is for `resize`")
        for gpu in placement.gpus:
            if self.free.out(gpu) or self.free.owner(gpu) not in (None, entry.job.name):
                raise NotFree(f"GPU {gpu} is no free one, and none in use by {entry.job.name!r}")
        self.free.give_back(entry.job.name)
        self.free.take(entry.job.name, placement.gpus)
        entry.placement, entry.end = placement, entry.end + entry.job.restart_seconds
        self._room.forget(placement.gpus)

    def resize(self, job: GangJob, now: float) -> GangPlacement | Refused | None:
        """A job goes on with another number of GPUs, or another mesh; it restarts where it was, or elsewhere.

        Args:
            job: of the same name.
            now: the time.

        Returns:
            Where it runs now; None if it waits; or why it stays as it was.

        Raises:
            UnknownJob: if there is no job of this name.
        """
        entry = self._entry(job.name)
        if job.gpus < entry.job.least_gpus:
            few = entry.job.least_gpus - job.gpus
            return Refused(job, f"{job.name} goes on with {entry.job.least_gpus} GPUs or more: {few} too few")
        if (refused := self._feasible.refusal(job)) is not None:
            return refused
        if entry.placement is not None:
            return self._resize_running(entry, job, now)
        entry.job, entry.seconds = job, job.seconds
        self._room.drop(job.name)
        return None

    def charge(self, now: float) -> None:
        """Tell the policy what jobs that run have received; `start` does so where the policy's order depends on it."""
        for entry in self._entries.values():
            if entry.placement is not None:
                self._charge(entry, now)

    def _start_first(self, now: float) -> list[GangPlacement]:
        """Start the first in line as long as it fits."""
        started = []
        while (task := self.policy.first()) is not None:
            if (placement := self.place(self._entries[task.key].job, self.free)) is None:
                break
            started.append(self._begin(placement, now))
        return started

    def _ends(self) -> list[tuple[float, str]]:
        """When jobs that run end, by their estimates."""
        return [(entry.end, name) for name, entry in self._entries.items() if entry.placement is not None]

    def _fill(self, line: Iterable[Task], now: float) -> list[GangPlacement]:
        """Start those that end before the head of the line starts, or that stay off its GPUs."""
        started, held = [], False
        for task in line:
            entry = self._entries[task.key]
            if held == (now + entry.seconds <= self.reservation.time):
                held = self._room.hold(not held, self.free)
            if (placement := self.place(entry.job, self.free)) is not None:
                started.append(self._begin(placement, now))
        self._room.hold(False, self.free)
        return started

    def _begin(self, placement: GangPlacement, now: float) -> GangPlacement:
        entry = self._entries[placement.job.name]
        self.free.take(placement.job.name, placement.gpus)
        self.policy.admit(entry.task)
        entry.placement, entry.charged, entry.end = placement, now, now + entry.seconds
        return placement

    def _stop(self, entry: _Entry, now: float) -> None:
        self._charge(entry, now)
        self.free.give_back(entry.job.name)
        entry.placement = None

    def _charge(self, entry: _Entry, now: float) -> None:
        if now > entry.charged:
            self.policy.serve(entry.task, entry.job.gpus * (now - entry.charged))
            entry.charged = now

    def _resize_running(self, entry: _Entry, job: GangJob, now: float) -> GangPlacement | Refused:
        fit = fit_of(job, self.cluster.largest_host)
        trial = self.free.scratch(fit)
        self._room.hold(True, trial, beside=trial.give_back(job.name))
        placement = self.place(job, trial)
        if placement is None:
            usable = trial.index(fit).total
            return Refused(job, f"{job.name} has no room for {job.gpus} GPUs now: {usable} are free that it could use")
        self._stop(entry, now)
        self.free.take(job.name, placement.gpus)
        entry.job, entry.placement, entry.seconds, entry.end = job, placement, job.seconds, now + job.seconds
        return placement

    def _entry(self, name: str, runs: bool = False) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or (runs and entry.placement is None):
            what = "is not here" if entry is None else "waits, and does not run"
            raise UnknownJob(f"job {name!r} {what}; {len(self.running)} jobs run and {len(self.policy)} wait")
        return entry

    def check_invariants(self) -> None:
        """No GPU twice, no gang in part, everybody waits or runs, and what is kept for the head is kept from nobody."""
        self.free.check_invariants()
        self.policy.check_invariants()
        assert not self.free.owned(KEPT), "GPUs are still kept after a decision"
        tasks = {task.key for task in self.policy}
        for name, entry in self._entries.items():
            gpus = self.free.owned(name)
            assert (name in tasks) == (entry.placement is None) == (not gpus), f"{name} neither waits nor runs"
            if entry.placement is not None:
                assert entry.placement.gpus == gpus and len(gpus) == entry.job.gpus, f"{name} runs in part"
        assert self.policy.num_tasks == len(self._entries), "the policy knows other jobs"
        assert not self.refused.keys() & self._entries.keys(), "a job was refused, and is here"
