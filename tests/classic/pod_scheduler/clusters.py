"""Small clusters and pods for the tests."""

from minilib.classic.pod_scheduler import Pod
from minilib.mechanisms.scheduling.placing import Node

GPU = "nvidia.com/gpu"


def nodes(count, cpu=1, pods=110, **labels):
    """So many nodes n0, n1, …"""
    return [Node(f"n{number}", {"cpu": cpu, "memory": 100, "pods": pods}, labels) for number in range(count)]


def pod(name, cpu=1, **more):
    """A pod that asks for so many units of cpu."""
    return Pod(name, {"cpu": cpu}, **more)


def where(scheduler):
    """Pod → node."""
    return {claim.name: scheduler.ledger.node_of(claim.name) for claim in scheduler.ledger.claims}
