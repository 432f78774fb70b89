"""Process scheduling for real: worker processes that are stopped (SIGSTOP) and continued (SIGCONT), in the order of a
policy, the same object that schedules requests to a language model (serving/scheduler.py).

    process   a worker process of counted_work.py, in a process group of its own
    slice     units of work that one process does before another goes on; slices are counted, never timed
    token     what a worker waits for before each unit, so that nobody does a unit that it was not given

At every moment one worker goes on, and the kernel holds all others stopped. Clock and costs count units of work, so
that the same tasks under the same policy give the same slices on every machine, however busy it is.

Source: Arpaci-Dusseau, "Operating Systems: Three Easy Pieces", chapters 7 to 9 (turnaround, context switches).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from minilib.classic.worker_process import TIMEOUT, WorkerFailed, WorkerProcess
from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.basics.interrupts import held
from minilib.mechanisms.scheduling import SchedulingPolicy, Task, make_policy


@dataclass
class Slices:
    """What became of the tasks, by count.

    Args:
        slices: who went on, and for how many units, in order; two slices in a row are of two tasks.
        arrived: task → time of its arrival, in units.
        ended: task → time of its completion, in units; in order of completion.
        results: task → what its process computed.
        failed: task → how its process failed.
    """

    slices: list[tuple[Hashable, int]] = field(default_factory=list)
    arrived: dict[Hashable, float] = field(default_factory=dict)
    ended: dict[Hashable, int] = field(default_factory=dict)
    results: dict[Hashable, bytes] = field(default_factory=dict)
    failed: dict[Hashable, str] = field(default_factory=dict)

    @property
    def order(self) -> list[Hashable]:
        """Tasks in the order of completion."""
        return list(self.ended)

    @property
    def switches(self) -> int:
        """How often another process went on than before."""
        return max(0, len(self.slices) - 1)

    @property
    def turnaround(self) -> dict[Hashable, float]:
        """Task → units from its arrival to its completion."""
        return {key: ended - self.arrived[key] for key, ended in self.ended.items()}


def run_processes(
    policy: str | SchedulingPolicy,
    tasks: Iterable[tuple[Task, int]],
    preemptive: bool = True,
    timeout: float = TIMEOUT,
    watch: Callable[[dict[Hashable, WorkerProcess], Hashable], None] | None = None,
) -> Slices:
    """Run a worker process for each task, one unit of one process at a time, in the order of a policy.

    A process that fails ends its own task alone. Whatever happens, no process is left behind.

    Args:
        policy: a name of `POLICIES`, or a policy without tasks.
        tasks: each with the units of work that it really takes; arrivals are on the clock that counts units.
        preemptive: ask the policy before every unit; if not, whoever has begun goes on until it is done.
        timeout: seconds for each answer of a process.
        watch: called after each unit with the processes by key, all stopped but one, and the key of that one.

    Raises:
        ValueError: if a task takes less than one unit, two tasks have the same key, or the policy is in use.
        InvalidTask: if the policy cannot schedule one of them.
    """
    tasks = sorted(tasks, key=lambda pair: pair[0].arrival)
    given = [(task.key, units) for task, units in tasks]
    if len(dict(given)) < len(given) or not all(is_whole(units, 1) for _, units in given):
        raise ValueError(f"every task takes 1 unit or more and has a key of its own, got {given}")
    queue = _Queue(make_policy(policy), timeout)
    try:
        while tasks or queue.processes:
            if not queue.processes:
                queue.clock = max(queue.clock, -int(-tasks[0][0].arrival // 1))  # nobody is there: wait for the next
            while tasks and tasks[0][0].arrival <= queue.clock:
                queue.start(*tasks.pop(0))
            queue.go_on(preemptive)
            if watch and queue.current:
                watch({task.key: process for task, process in queue.processes.items()}, queue.current.key)
    finally:
        queue.end()
    return queue.done


class _Queue:
    """The processes that are there, and the one of them that is not stopped."""

    def __init__(self, policy: SchedulingPolicy, timeout: float) -> None:
        self.policy, self._timeout = policy, timeout
        self.clock = 0
        self.processes: dict[Task, WorkerProcess] = {}
        self.current: Task | None = None
        self.done = Slices()

    def start(self, task: Task, units: int) -> None:
        """Let the policy know of a task, and start its process."""
        self.policy.arrive(task)
        self.done.arrived[task.key] = task.arrival
        try:
            with held():  # an interrupt must not come between the process and the note of it
                self.processes[task] = WorkerProcess(str(task.key), units, self._timeout)
        except WorkerFailed as error:
            self.policy.remove(task)
            self.done.failed[task.key] = str(error)

    def go_on(self, preemptive: bool) -> None:
        """Let whoever is first do a unit."""
        task = self.current if self.current and not preemptive else self.policy.first()
        if task is None:
            return
        try:
            self._switch_to(task)
            finished, result = self.processes[task].do_unit()
        except WorkerFailed as error:
            self.done.failed[task.key] = str(error)
            self._forget(task)
            return
        self.clock += 1
        self._count(task)
        self.policy.serve(task, 1)
        if finished:
            self.done.ended[task.key], self.done.results[task.key] = self.clock, result
            self._forget(task)

    def end(self) -> None:
        """Leave no process and no task behind."""
        with held():
            for task in list(self.processes):
                self._forget(task)

    def _switch_to(self, task: Task) -> None:
        if task is self.current:
            return
        before, self.current = self.current, task
        if before:
            try:
                self.processes[before].stop()
            except WorkerFailed as error:
                self.done.failed[before.key] = str(error)
                self._forget(before)
        self.processes[task].resume()

    def _count(self, task: Task) -> None:
        slices = self.done.slices
        if slices and slices[-1][0] == task.key:
            slices[-1] = (task.key, slices[-1][1] + 1)
        else:
            slices.append((task.key, 1))

    def _forget(self, task: Task) -> None:
        self.processes.pop(task).end()
        self.policy.remove(task)
        if task is self.current:
            self.current = None
