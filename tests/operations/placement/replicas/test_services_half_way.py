"""Services that cannot join, that are scaled while replicas close, and drained hosts whose GPUs are repaired."""

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.controller import ReplicaController
from minilib.operations.placement.replicas.replica_set import ReplicaSet
from minilib.operations.placement.replicas.spread import SpreadPlacement
from tests.operations.placement.replicas.test_controller import RACKS, serving


def test_a_service_that_cannot_join_leaves_nothing_and_may_come_again():
    controller = ReplicaController(GangScheduler(RACKS, place=SpreadPlacement()))
    assert controller.add(ReplicaSet("wide", 2, gpus=16), 0.0) is not None
    assert controller.add(ReplicaSet("wide", 2, gpus=8), 0.0) is None
    controller.scheduler.submit(GangJob("chat-1", 1), 0.0)
    for service in (ReplicaSet("chat", 3), ReplicaSet("odd", 3, priority=-1)):
        with pytest.raises(ValueError):
            controller.add(service, 0.0)
        assert controller.replicas(service.name) == []
        controller.check_invariants()
    assert controller.add(ReplicaSet("chat", 3), 0.0) is None
    controller.check_invariants()


def test_scaling_down_twice_revives_no_replica_that_closes():
    controller = serving(ReplicaSet("chat", 5))
    controller.in_flight = lambda name: 1
    controller.scale("chat", 3, 0.0)
    first = set(controller.ready("chat", 0.0))
    controller.scale("chat", 2, 0.0)
    assert len(controller.ready("chat", 0.0)) == 2 and set(controller.ready("chat", 0.0)) < first


def test_gpus_repaired_on_a_drained_host_stay_out_of_use():
    controller = ReplicaController(GangScheduler(GpuCluster.regular(1, 1, 8), place=SpreadPlacement()))
    controller.scheduler.fail(range(8), 0.0)
    controller.drain(0)
    controller.add(ReplicaSet("chat", 1), 0.0)
    controller.scheduler.restore(range(8))
    assert controller.step(1.0) == []
    controller.undrain(0)
    assert len(controller.step(2.0)) == 1
