"""Kubernetes' scores against the rows of its own tests, which state what its code computes."""

import pytest

from minilib.classic.pod_scheduler import LeastAllocated, MostAllocated, Pod, num_nodes_to_find
from minilib.mechanisms.scheduling.placing import Claim, Ledger, Node

GPU = "nvidia.com/gpu"


def scores(score, request, capacities, used=((), ())):
    """Scores of two nodes with (cpu, memory) each, on which others use (cpu, memory)."""
    nodes = [Node(f"n{n}", {"cpu": cpu, "memory": memory, "pods": 110}) for n, (cpu, memory) in enumerate(capacities)]
    ledger = Ledger(nodes)
    for node, taken in zip(nodes, used, strict=True):
        if taken:
            ledger.reserve(Claim(f"on {node.name}", dict(zip(("cpu", "memory"), taken, strict=True))), node.name)
    pod = Pod("pod", dict(zip(("cpu", "memory"), request, strict=True)))
    return [score(pod.claim, node, ledger) for node in nodes]


SAME, DIFFERENT = ((10000, 20000), (10000, 20000)), ((4000, 10000), (6000, 10000))


@pytest.mark.parametrize(
    ("request_", "capacities", "used", "least"),
    [
        ((0, 0), ((4000, 10000),) * 2, ((), ()), [100, 100]),
        ((3000, 5000), DIFFERENT, ((), ()), [37, 50]),
        ((0, 0), SAME, ((6000, 0), (6000, 5000)), [70, 57]),
        ((3000, 5000), SAME, ((3000, 0), (3000, 5000)), [57, 45]),
        ((3000, 5000), ((10000, 20000), (10000, 50000)), ((3000, 0), (3000, 5000)), [57, 60]),
        ((3000, 0), ((4000, 10000),) * 2, ((3000, 0), (3000, 5000)), [50, 25]),
        ((0, 0), ((0, 0), (0, 0)), ((), ()), [0, 0]),
    ],
)
def test_least_allocated(request_, capacities, used, least):
    assert scores(LeastAllocated(), request_, capacities, used) == least


@pytest.mark.parametrize(
    ("request_", "capacities", "used", "most"),
    [
        ((0, 0), ((4000, 10000),) * 2, ((), ()), [0, 0]),
        ((3000, 5000), DIFFERENT, ((), ()), [62, 50]),
        ((0, 0), SAME, ((6000, 0), (6000, 5000)), [30, 42]),
        ((3000, 5000), SAME, ((3000, 0), (3000, 5000)), [42, 55]),
        ((5000, 9000), ((5000, 10000), (10000, 9000)), ((), ()), [95, 75]),
    ],
)
def test_most_allocated(request_, capacities, used, most):
    assert scores(MostAllocated(), request_, capacities, used) == most


def test_weights_count():
    weights = {"memory": 2, "cpu": 1}
    assert scores(LeastAllocated(weights), (3000, 5000), DIFFERENT) == [41, 50]
    assert scores(MostAllocated(weights), (3000, 5000), DIFFERENT) == [58, 50]
    assert scores(LeastAllocated({}), (3000, 5000), DIFFERENT) == [0, 0]


def test_an_extended_resource_counts_only_for_pods_that_ask_for_it():
    weights = {"cpu": 1, "memory": 1, GPU: 1}
    nodes = [Node(f"n{n}", {"cpu": 6000, "memory": 10000, GPU: gpus}) for n, gpus in enumerate((4, 10))]
    ledger, asks = Ledger(nodes), {"cpu": 3000, "memory": 5000}
    without, with_gpus = Pod("without", asks).claim, Pod("with", {**asks, GPU: 2}).claim
    assert [LeastAllocated(weights)(without, node, ledger) for node in nodes] == [50, 50]
    assert [LeastAllocated(weights)(with_gpus, node, ledger) for node in nodes] == [50, 60]
    assert [MostAllocated(weights)(with_gpus, node, ledger) for node in nodes] == [50, 40]


def test_how_many_nodes_are_enough():
    """The table of `numFeasibleNodesToFind` in Kubernetes' tests, with the percentage that adapts."""
    found = {10: 10, 100: 100, 1000: 420, 6000: 300, 10_000: 500, 0: 0}
    assert {nodes: num_nodes_to_find(nodes) for nodes in found} == found
