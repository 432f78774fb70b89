"""The scheduling queue: pods that are ready to be tried, in the order of a policy; pods that wait after a failed try.

    submit ─→ active ──next──→ in a cycle ──→ placed
                ↑ ↑                │
                │ └── backoff ←────┤  refused by a node: tried again after a while
                └── unschedulable ←┘  no node will do: tried again when something has changed, or after five minutes

A failed try is followed by a pause that doubles, from one second to ten; no change of the cluster cuts it short.

Source: kubernetes/kubernetes, pkg/scheduler/backend/queue/scheduling_queue.go (activeQ, backoffQ, unschedulablePods).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minilib.classic.pod_scheduler.objects import HIGHEST_PRIORITY, Pod
from minilib.mechanisms.scheduling import SchedulingPolicy, Task

INITIAL_BACKOFF, MAX_BACKOFF = 1, 10
MAX_UNSCHEDULABLE = 300  # seconds after which a pod is tried again although nothing has happened


@dataclass(eq=False)
class QueuedPods:
    """What is placed together: one pod, or the pods of a group.

    Args:
        pods: all of them.
        task: what the policy knows of them.
        attempts: how often it was tried to place them.
        backoff_until: no earlier time is good for another try.
        retry_at: the time of another try if nothing happens.
    """

    pods: tuple[Pod, ...]
    task: Task
    attempts: int = 0
    backoff_until: float = 0
    retry_at: float = 0


class BackoffQueue:
    """Pods that have no node.

    Args:
        policy: orders those that are ready; one without tasks.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self.policy = policy
        self._active: dict[Task, QueuedPods] = {}
        self._waiting: dict[Task, QueuedPods] = {}  # in backoff, or unschedulable

    def __len__(self) -> int:
        """Entries that have no node, ready or not."""
        return len(self._active) + len(self._waiting)

    @property
    def entries(self) -> list[QueuedPods]:
        """Those that are ready, and those that wait."""
        return [*self._active.values(), *self._waiting.values()]

    @property
    def num_active(self) -> int:
        """Entries that are ready."""
        return len(self._active)

    def submit(self, pods: tuple[Pod, ...], now: float, name: str, attempts: int = 0) -> QueuedPods:
        """Pods arrive, to be placed together.

        Args:
            pods: one or more.
            now: the time.
            name: of the entry.
            attempts: how often they were tried before.

        Raises:
            InvalidTask: if the policy cannot order them.
        """
        # Kubernetes counts priorities upwards, a task counts urgency downwards.
        priority = HIGHEST_PRIORITY - min(pod.priority for pod in pods)
        task = Task(key=name, arrival=now, tenant=pods[0].namespace, priority=priority)
        self.policy.arrive(task)
        self._active[task] = entry = QueuedPods(pods, task, attempts)
        return entry

    def next(self) -> QueuedPods | None:
        """Take out the first that is ready."""
        task = self.policy.first()
        if task is None:
            return None
        self.policy.admit(task)
        return self._active.pop(task)

    def placed(self, entry: QueuedPods) -> None:
        """All pods of an entry have nodes: it is served, and leaves."""
        self.policy.serve(entry.task, len(entry.pods))
        self.policy.remove(entry.task)

    def postpone(self, entry: QueuedPods, now: float) -> None:
        """Pods that are ready are put off, until their backoff is over."""
        self.policy.admit(entry.task)
        del self._active[entry.task]
        self.failed(entry, now, again=True)

    def failed(self, entry: QueuedPods, now: float, again: bool = False) -> None:
        """No node will do; whatever changes may help, and time alone if it is worth to try `again`."""
        entry.attempts += 1
        entry.backoff_until = now + min(MAX_BACKOFF, INITIAL_BACKOFF * 2 ** (entry.attempts - 1))
        entry.retry_at = entry.backoff_until if again else now + MAX_UNSCHEDULABLE
        self._waiting[entry.task] = entry

    def withdraw(self, pod: str) -> None:
        """A pod is deleted while it waits; the rest of its group goes on waiting.

        Raises:
            LookupError: if no pod of that name waits.
        """
        for line in (self._active, self._waiting):
            for task, entry in line.items():
                left = tuple(other for other in entry.pods if other.name != pod)
                if len(left) < len(entry.pods):
                    entry.pods = left
                    if not left:
                        del line[task]
                        self.policy.remove(task)
                    return
        raise LookupError(f"no pod called {pod!r} waits")

    def cluster_changed(self) -> None:
        """Something was freed, added or altered: whoever waits is tried again as soon as its backoff is over."""
        for entry in self._waiting.values():
            entry.retry_at = entry.backoff_until

    def wake(self, now: float) -> None:
        """Whoever's time has come is ready, at the place in the line that it had."""
        for task, entry in list(self._waiting.items()):
            if max(entry.retry_at, entry.backoff_until) <= now:
                self._active[task] = self._waiting.pop(task)
                self.policy.preempt(task)

    def next_time(self) -> float:
        """When somebody will be ready again; math.inf if nobody waits."""
        return min((max(entry.retry_at, entry.backoff_until) for entry in self._waiting.values()), default=math.inf)

    def check_invariants(self) -> None:
        """Whoever is ready stands in the policy's line, and nobody else; nobody is in two places."""
        self.policy.check_invariants()
        assert sorted(map(id, self.policy)) == sorted(map(id, self._active)), "the policy's line differs"
        assert not self._active.keys() & self._waiting.keys()
        names = [pod.name for entry in self.entries for pod in entry.pods]
        assert len(set(names)) == len(names), "a pod waits twice"
