"""A pod scheduler: Kubernetes' cycle over pods and nodes."""

from minilib.classic.pod_scheduler.deployment import Deployment, NodeEvent, serving_over_time
from minilib.classic.pod_scheduler.objects import Pod, PodDisruptionBudget, TopologySpreadConstraint
from minilib.classic.pod_scheduler.preemption import Preemption, find_preemption
from minilib.classic.pod_scheduler.queue import BackoffQueue, QueuedPods
from minilib.classic.pod_scheduler.scheduler import PodScheduler
from minilib.classic.pod_scheduler.scoring import LeastAllocated, MostAllocated, num_nodes_to_find

__all__ = [
    "BackoffQueue",
    "Deployment",
    "LeastAllocated",
    "MostAllocated",
    "NodeEvent",
    "Pod",
    "PodDisruptionBudget",
    "PodScheduler",
    "Preemption",
    "QueuedPods",
    "TopologySpreadConstraint",
    "find_preemption",
    "num_nodes_to_find",
    "serving_over_time",
]
