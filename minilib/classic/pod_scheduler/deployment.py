"""A service of n replicas, and how many of them serve while nodes fail: n − 1 of n is nearly all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from minilib.classic.pod_scheduler.objects import Pod
from minilib.classic.pod_scheduler.scheduler import PodScheduler
from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.scheduling.placing import InvalidClaim, Node


@dataclass(frozen=True)
class Deployment:
    """Replicas of one pod, which are the same to whoever asks them.

    Args:
        name: of the deployment; replicas are called name-0, name-1, …
        replicas: how many.
        template: what each is like; its name is replaced, and the label "app" is added.

    Raises:
        InvalidClaim: if replicas is no whole number ≥ 0.
    """

    name: str
    replicas: int
    template: Pod

    def __post_init__(self) -> None:
        check_whole("replicas", self.replicas, 0, InvalidClaim)

    @property
    def pods(self) -> list[Pod]:
        """The replicas."""
        labels = {**self.template.labels, "app": self.name}
        return [replace(self.template, name=f"{self.name}-{n}", labels=labels) for n in range(self.replicas)]

    def serving(self, scheduler: PodScheduler) -> int:
        """How many of the replicas run."""
        running = set(scheduler.running)
        return sum(pod.name in running for pod in self.pods)


@dataclass(frozen=True)
class NodeEvent:
    """Something that happens to a node.

    Args:
        second: when, from the start of the experiment.
        node: its name, if it is lost; the node itself, if it joins.
    """

    second: int
    node: str | Node


def serving_over_time(
    deployment: Deployment,
    scheduler: PodScheduler,
    events: Iterable[NodeEvent],
    seconds: int,
    start_seconds: int = 1,
) -> list[int]:
    """How many replicas serve in each second, while nodes are lost and join.

    Args:
        deployment: is submitted first.
        scheduler: places the replicas; its clock goes on by `seconds`.
        events: what happens to nodes.
        seconds: for how long.
        start_seconds: from the second in which a pod is given a node to that in which it serves.

    Raises:
        ValueError: if a number of seconds is no whole number ≥ 0.
    """
    check_whole("seconds", seconds)
    check_whole("start_seconds", start_seconds)
    scheduler.submit(*deployment.pods)
    by_second: dict[int, list[NodeEvent]] = {}
    for event in events:
        by_second.setdefault(event.second, []).append(event)
    starting: dict[tuple[str, int], int] = {}  # pod and its reservation → when it serves
    counts = []
    for second in range(seconds):
        for event in by_second.get(second, []):
            if isinstance(event.node, Node):
                scheduler.add_node(event.node)
            else:
                scheduler.lose(event.node)
        while scheduler.cycle():
            pass
        for claim in scheduler.ledger.claims:
            key = (claim.name, scheduler.ledger.holding(claim.name).since)
            if starting.setdefault(key, second + start_seconds) <= second:
                scheduler.start(claim.name)
        counts.append(deployment.serving(scheduler))
        scheduler.now += 1
    return counts
