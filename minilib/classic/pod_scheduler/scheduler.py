"""Kubernetes' scheduler, over pods and nodes that are data: queue, filter, score, reserve, bind, one pod at a time.

    cycle   the first pod in the queue is given a node, or preempts others, or waits with the reason
    start   the pod's work begins on its node, if the node still suits it

A group of pods (`submit_group`) takes one cycle: all get nodes, or none, as coscheduling plugins and Kubernetes' own
PodGroup do. As there, that holds while the group is placed: a pod that is lost later comes back alone.

Time is simulated. Victims of preemption are gone at once, without a grace period, and whoever is evicted returns to
the queue, as its controller would create it again.

Source: kubernetes.io, "Scheduling Framework"; kubernetes/kubernetes, pkg/scheduler/schedule_one.go.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minilib.classic.pod_scheduler.objects import Pod, PodDisruptionBudget, selects
from minilib.classic.pod_scheduler.preemption import allowed_disruptions, find_preemption
from minilib.classic.pod_scheduler.queue import BackoffQueue, QueuedPods
from minilib.classic.pod_scheduler.scoring import LeastAllocated, num_nodes_to_find
from minilib.classic.pod_scheduler.spread import TopologySpread
from minilib.mechanisms.scheduling import AgedPriority, SchedulingPolicy
from minilib.mechanisms.scheduling.placing import (
    FILTERS,
    Claim,
    InvalidClaim,
    Ledger,
    Node,
    Refusal,
    Taint,
    choose,
    place_all,
)
from minilib.mechanisms.scheduling.placing.scores import Score

REJECTED = "node(s) rejected this pod"


class PodScheduler:
    """A cluster's pods, those that wait and those that have a node.

    Args:
        nodes: the cluster; a node takes as many pods as its capacity of "pods" says.
        score: which node is best.
        policy: which pod is next, one without tasks; by priority and age, if None is given.
        budgets: which pods should stay when others preempt or nodes are drained.

    Attributes:
        ledger: what is free, and who has what.
        now: seconds, on the simulated clock.
        refusals: pod → why its last cycle found no node.
        cycles: how many there were.
        preempted: victims by name, in order.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        score: Score | None = None,
        policy: SchedulingPolicy | None = None,
        budgets: Sequence[PodDisruptionBudget] = (),
    ) -> None:
        self.ledger = Ledger(nodes)
        self.score = score or LeastAllocated()
        self.budgets = tuple(budgets)
        self.pods: dict[str, Pod] = {}
        self.queue = BackoffQueue(AgedPriority(math.inf) if policy is None else policy)
        self.now: float = 0
        self.refusals: dict[str, Refusal] = {}
        self.cycles = 0
        self.preempted: list[str] = []
        self._rejected_by: dict[str, str] = {}  # pod → the node that refused it last
        self._rejections: Counter[str] = Counter()
        self._next_start = 0
        self._filters = (*FILTERS, self._was_rejected, TopologySpread(self.pods))

    @property
    def waiting(self) -> list[str]:
        """Pods without a node."""
        return [pod.name for entry in self.queue.entries for pod in entry.pods]

    @property
    def running(self) -> list[str]:
        """Pods whose work has begun, the oldest reservation first."""
        return [claim.name for claim in self.ledger.claims if self.ledger.holding(claim.name).bound]

    def use(self, namespace: str) -> Counter[str]:
        """What pods of a namespace have on their nodes, of each resource."""
        held: Counter[str] = Counter()
        for claim in self.ledger.claims:
            if self.pods[claim.name].namespace == namespace:
                held.update(claim.requests)
        return held

    def submit(self, *pods: Pod) -> None:
        """Pods arrive, each for itself.

        Raises:
            InvalidClaim: if there is a pod of that name.
        """
        for pod in pods:
            self.submit_group(pod.name, [pod])

    def submit_group(self, name: str, pods: Sequence[Pod]) -> None:
        """Pods arrive that are placed together or not at all.

        Raises:
            InvalidClaim: if there is no pod, or one has the name of another.
        """
        names = Counter(pod.name for pod in pods)
        taken = [pod for pod, count in names.items() if count > 1 or pod in self.pods]
        if not pods or taken:
            raise InvalidClaim(f"group {name!r} has 1 pod or more, each with a name of its own; got twice: {taken}")
        self.queue.submit(tuple(pods), self.now, name)
        self.pods.update({pod.name: pod for pod in pods})

    def cycle(self) -> QueuedPods | None:
        """Try to place whoever is first in the queue; returns that entry, None if nobody is ready."""
        self.queue.wake(self.now)
        entry = self.queue.next()
        if entry is None:
            return None
        self.cycles += 1
        refusal = self._place_group(entry) if len(entry.pods) > 1 else self._place_one(entry.pods[0])
        for pod in entry.pods:
            self._rejected_by.pop(pod.name, None)
            self.refusals.pop(pod.name, None)
        if refusal:
            self.refusals.update(dict.fromkeys((pod.name for pod in entry.pods), refusal))
            self.queue.failed(entry, self.now, again=REJECTED in refusal.reasons)
        else:
            self.queue.placed(entry)
        return entry

    def run(self) -> None:
        """Cycles until nobody is ready, then the start of every pod that has a node."""
        settled = False
        while not settled:
            while self.cycle():
                pass
            settled = all([self.start(claim.name) for claim in self.ledger.claims])

    def advance(self, seconds: float) -> None:
        """Let time pass; whoever is ready is tried at once, and whoever's backoff ends in between when it ends."""
        end = self.now + seconds
        self.run()
        while (due := self.queue.next_time()) <= end:
            self.now = max(self.now, due)
            self.run()
        self.now = end

    def start(self, pod: str) -> bool:
        """A pod's work begins on its node; if a taint or label has changed since, the pod goes back to the queue.

        Raises:
            UnknownName: if it has no node.
        """
        node, holding = self.ledger.node(self.ledger.node_of(pod)), self.ledger.holding(pod)
        if holding.bound:
            return True
        against = [reason for refuses in FILTERS for reason in refuses(holding.claim, node, self.ledger)]
        if against:
            self.refusals[pod] = Refusal(pod, len(self.ledger), Counter(against))
            self._send_back([holding.claim])
            return False
        self.ledger.bind(pod)
        self._rejections.pop(pod, None)
        return True

    def reject(self, pod: str) -> None:
        """A node refuses a pod that was sent there; the same pod is tried again after its backoff, first elsewhere.

        Raises:
            UnknownName: if it has no node.
        """
        self._rejected_by[pod] = self.ledger.node_of(pod)
        self.ledger.release(pod)
        entry = self.queue.submit((self.pods[pod],), self.now, pod, self._rejections[pod])
        self._rejections[pod] += 1
        self.queue.postpone(entry, self.now)
        self.queue.cluster_changed()

    def finish(self, pod: str) -> None:
        """A pod is done, or deleted, and gone.

        Raises:
            LookupError: if there is none of that name.
        """
        if pod in self.ledger:
            self.ledger.release(pod)
            self.queue.cluster_changed()
        else:
            self.queue.withdraw(pod)
        for notes in (self.pods, self.refusals, self._rejected_by, self._rejections):
            notes.pop(pod, None)

    def add_node(self, node: Node) -> None:
        """A node joins."""
        self.ledger.add(node)
        self.queue.cluster_changed()

    def lose(self, node: str) -> None:
        """A node is gone; its pods return to the queue."""
        self._enqueue(self.ledger.remove(node))

    def drain(self, node: str) -> list[str]:
        """A node takes no more pods, and those on it return to the queue, but for those that a budget keeps.

        Returns:
            Names of the pods that were kept.
        """
        self.ledger.close(node)
        kept = []
        for claim in self.ledger.claims_on(node):
            mine = [budget for budget in self.budgets if selects(budget.match_labels, self.pods[claim.name].labels)]
            if all(allowed_disruptions(budget, self.pods, self.ledger) > 0 for budget in mine):
                self._send_back([claim])
            else:
                kept.append(claim.name)
        return kept

    def uncordon(self, node: str) -> None:
        """A node takes pods again."""
        self.ledger.open(node)
        self.queue.cluster_changed()

    def taint(self, node: str, *taints: Taint) -> None:
        """A node has these taints from now on, and no others; "NoExecute" sends pods on it back to the queue."""
        self.ledger.relabel(replace(self.ledger.node(node), taints=taints))
        lasting = [taint for taint in taints if taint.effect == "NoExecute"]
        evicted = [claim for claim in self.ledger.claims_on(node) if not _tolerates_all(claim, lasting)]
        self._send_back(evicted)
        self.queue.cluster_changed()

    def check_invariants(self) -> None:
        """Every pod waits or has a node, and not both; nothing is given twice."""
        self.ledger.check_invariants()
        self.queue.check_invariants()
        placed = [claim.name for claim in self.ledger.claims]
        assert sorted([*placed, *self.waiting]) == sorted(self.pods), "a pod is lost, or is in two places"

    def _place_one(self, pod: Pod) -> Refusal | None:
        before, enough = self.ledger.visits, num_nodes_to_find(len(self.ledger))
        node = choose(pod.claim, self.ledger, self._filters, self.score, enough, self._next_start)
        self._next_start += self.ledger.visits - before
        if isinstance(node, Refusal):
            preemption = find_preemption(pod, self.pods, self.ledger, self._filters, self.budgets)
            if preemption is None:
                return node
            self.preempted += [victim.name for victim in preemption.victims]
            self._send_back(preemption.victims)
            node = preemption.node
        self.ledger.reserve(pod.claim, node)
        return None

    def _place_group(self, entry: QueuedPods) -> Refusal | None:
        placed = place_all([pod.claim for pod in entry.pods], self.ledger, self._filters, self.score)
        return placed if isinstance(placed, Refusal) else None

    def _send_back(self, claims: Iterable[Claim]) -> None:
        """Claims lose their nodes; their pods wait again."""
        claims = list(claims)
        for claim in claims:
            self.ledger.release(claim.name)
        self._enqueue(claims)

    def _enqueue(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            self.queue.submit((self.pods[claim.name],), self.now, claim.name)
        self.queue.cluster_changed()

    def _was_rejected(self, claim: Claim, node: Node, ledger: Ledger) -> list[str]:
        return [REJECTED] if self._rejected_by.get(claim.name) == node.name else []


def _tolerates_all(claim: Claim, taints: Iterable[Taint]) -> bool:
    return all(any(toleration.covers(taint) for toleration in claim.tolerations) for taint in taints)
