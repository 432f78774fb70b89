"""Prices of placements: the planner's where ranks lie in a row, its closed form where they do not, rings by plan."""

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.price import MeshTraffic, TrainingWork
from minilib.ranks.mesh_shape import MeshShape, NoSuchAxis
from minilib.training.planner.layout import LayoutDoesNotFit, ParallelLayout
from minilib.training.planner.shape import TrainedShape
from minilib.training.planner.step_time import price_step

LLAMA_8B = TrainedShape(32, 4096, 32, 8, 128, 14336, 128256)
CLUSTER = GpuCluster.regular(4, 4, 8)
WORK = TrainingWork(LLAMA_8B, ParallelLayout(4, pp=2, tp=8), batch=64, sequence=8192)


def test_in_a_row_it_is_the_planners_price():
    for layout in (WORK.layout, ParallelLayout(8, tp=4, cp=2), ParallelLayout(64)):
        work = TrainingWork(LLAMA_8B, layout, 64, 8192)
        assert work.price(range(64), CLUSTER) == price_step(LLAMA_8B, layout, CLUSTER.priced(64), 64, 8192)
        assert work.step_seconds(range(64, 128), CLUSTER) == work.step_seconds(range(64), CLUSTER)


def test_tp_over_two_hosts_is_a_cliff():
    """Each group of tp has half of its ranks on another host: its bytes leave through four ports of 50 GB/s."""
    near = WORK.price(range(64), CLUSTER)
    far = WORK.price([*range(4, 68)], CLUSTER)
    assert far.seconds / near.seconds == pytest.approx(1.157, abs=0.001)
    assert far.tensor > 2 * near.tensor and far.products == near.products
    one_port = WORK.price([*range(7, 71)], CLUSTER)
    assert one_port.tensor > far.tensor


def test_the_slowest_group_counts():
    """One group alone that spans two hosts is as bad as all: everybody waits for it."""
    one = [*range(56), *range(60, 64), *range(64, 68)]
    assert WORK.price(one, CLUSTER).tensor == WORK.price([*range(4, 68)], CLUSTER).tensor


def test_a_ring_costs_what_its_plan_costs():
    mesh = MeshShape.of(dp=4, tp=2)
    traffic = MeshTraffic(mesh, {"dp": 4_000_000, "tp": 8_000_000}, compute=1e-3)
    for gpus in (range(8), [0, 8, 1, 9, 2, 10, 3, 11], [0, 1, 8, 9, 64, 65, 96, 97]):
        expected = sum(
            mesh.seconds(axis, nbytes, lambda a, b, gpus=gpus: CLUSTER.link(gpus[a], gpus[b]))
            for axis, nbytes in traffic.nbytes.items()
        )
        assert traffic.step_seconds(gpus, CLUSTER) == pytest.approx(1e-3 + expected)
    cut = MeshTraffic(mesh, {"tp": 8_000_000}, calls=10)
    whole = MeshTraffic(mesh, {"tp": 8_000_000})
    latency = CLUSTER.links["domain"].latency
    assert cut.step_seconds(range(8), CLUSTER) - whole.step_seconds(range(8), CLUSTER) == pytest.approx(18 * latency)
    assert MeshTraffic(MeshShape.of(dp=1), {"dp": 5}).step_seconds([3], CLUSTER) == 0


def test_bad_input():
    with pytest.raises(NoSuchAxis):
        MeshTraffic(MeshShape.of(dp=2), {"tp": 1})
    with pytest.raises(ValueError, match="bytes along dp"):
        MeshTraffic(MeshShape.of(dp=2), {"dp": 1.5})
    with pytest.raises(LayoutDoesNotFit, match="heads"):
        TrainingWork(LLAMA_8B, ParallelLayout(1, tp=64), 64, 8192)
    with pytest.raises(LayoutDoesNotFit, match="one entry for each of 64 ranks, got 3"):
        price_step(LLAMA_8B, WORK.layout, CLUSTER.priced(64), 64, 8192, domains=[0, 0, 1])
