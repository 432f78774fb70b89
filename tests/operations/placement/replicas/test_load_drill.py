"""A service under load: how late an autoscaler is that waits for weights, and what keeping replicas ready saves."""

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import UnknownJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.autoscaling import Autoscaler, ScalingRules
from minilib.operations.placement.replicas.controller import ReplicaController
from minilib.operations.placement.replicas.load_drill import LoadDrill, LoadDrillReport
from minilib.operations.placement.replicas.replica_set import ReplicaSet
from minilib.operations.placement.replicas.spread import SpreadPlacement

RUSH = [4] * 600 + [12] * 900 + [4] * 1200  # requests each second; a replica serves one each second


def drill(
    arrivals: list[int], start: int, cold: float = 0, rules: ScalingRules | None = None, **options
) -> LoadDrillReport:
    """A service that has served for a while before the load begins."""
    controller = ReplicaController(GangScheduler(GpuCluster.regular(4, 2, 8), place=SpreadPlacement()))
    controller.add(ReplicaSet("chat", start, start_seconds=cold), -600.0)
    controller.step(-600.0)
    report = LoadDrill(controller, "chat", rules and Autoscaler(rules), **options).run(arrivals)
    controller.check_invariants()
    controller.scheduler.check_invariants()
    return report


def test_enough_replicas_let_nobody_wait_and_too_few_let_the_rest_wait():
    """12 replicas of 8 slots and 8 s serve 12 requests a second; 11 are one short in each second of the rush."""
    enough, short = drill(RUSH, 12), drill(RUSH, 11)
    assert (enough.late, enough.longest, enough.served) == (0, 0, 18_000)
    assert short.served == 18_000 and short.dropped == 0 and 75 <= short.longest <= 82
    assert enough.replica_seconds == 12 * len(enough.history)


def test_a_cold_start_makes_the_reaction_late_and_headroom_does_not_wait_for_it():
    """Requests that wait longer than a second, of 18,000: without a cold start, with one, with 12 replicas kept."""
    warm = drill(RUSH, 6, 0, ScalingRules(6, most=64))
    cold = drill(RUSH, 6, 120, ScalingRules(6, most=64))
    kept = drill(RUSH, 12, 120, ScalingRules(6, least=12, most=64))
    assert [report.late for report in (warm, cold, kept)] == [248, 2032, 0]
    assert all(report.served == report.arrived == 18_000 and report.dropped == 0 for report in (warm, cold, kept))
    most = [max(wanted for wanted, _ in report.history) for report in (warm, cold, kept)]
    assert most == [26, 64, 16], "requests that wait for weights count as load: four times what is needed"
    assert cold.replica_seconds > 1.3 * kept.replica_seconds, "so that headroom is even cheaper here"
    assert warm.history[-1] == cold.history[-1] == (6, 6)


def test_a_constant_load_is_served_by_a_constant_number():
    report = drill([5] * 3_000, 7, 120, ScalingRules(6, most=64))
    assert {wanted for wanted, _ in report.history[60:3_000]} == {7} and report.late == 0


def test_scaling_down_drops_no_request():
    """The load ends at once: 12 replicas become one, and each ends what it has."""
    report = drill([12] * 300 + [0] * 700 + [1], 12, 30, ScalingRules(6, most=64), seconds_each=60, slots=60)
    assert report.served == 3_601 and report.dropped == 0 and report.history[-1][0] == 1


def test_to_zero_and_back():
    """Nobody asks: no replica has a GPU. The first request then waits for the whole cold start."""
    rules = ScalingRules(6, least=0, most=64)
    report = drill([1] * 10 + [0] * 600 + [1] + [0] * 10, 1, 120, rules)
    assert (0, 0) in report.history and report.served == 11 and report.late == 1 and report.longest in range(120, 136)
    assert drill([0] * 700, 2, 0, rules).history[-1] == (0, 0)
    assert drill([], 2).history == () and drill([], 2).late_share == 0


def test_a_host_that_fails_drops_what_its_replicas_had():
    controller = ReplicaController(GangScheduler(GpuCluster.regular(2, 1, 8), place=SpreadPlacement()))
    controller.add(ReplicaSet("chat", 2), -1.0)
    controller.step(-1.0)
    run = LoadDrill(controller, "chat", None, seconds_each=10)
    run.run([2, 2])
    step, failed = controller.step, []

    def fails_at_five(now: float) -> list:
        if now == 5.0 and not failed:
            failed.extend(controller.scheduler.fail(range(8), now))
        return step(now)

    controller.step = fails_at_five
    report = run.run([1] * 20)
    assert failed == ["chat-0"] and report.dropped in (2, 3) and report.served + report.dropped == 24


def test_a_load_that_nobody_ever_serves_is_no_endless_drill():
    with pytest.raises(RuntimeError, match="1 requests wait and no replica serves"):
        drill([1], 0)
    with pytest.raises(UnknownJob):
        LoadDrill(ReplicaController(GangScheduler(GpuCluster.regular(1, 1, 1), place=SpreadPlacement())), "chat", None)
    for wrong in ({"slots": 0}, {"seconds_each": 0.5}, {"patience": -1}, {"every": 0}):
        with pytest.raises(ValueError):
            drill([1], 1, **wrong)
