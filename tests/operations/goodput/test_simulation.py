"""The simulator against closed forms, and against what it must not do, whatever it draws."""

import math
import statistics

import pytest

from minilib.operations.goodput.failures import FailureCause, Fleet, LemonHosts
from minilib.operations.goodput.interval import CheckpointCosts, expected_goodput
from minilib.operations.goodput.plan import CheckpointLevel, JobPlan, RecoveryPlan, memory_level
from minilib.operations.goodput.simulation import simulate_job

HOUR = 3600
FLEET = Fleet(800, 8, 2)


def failing(mtbf: float, loses: str = "process") -> FailureCause:
    return FailureCause(f"lost {loses}", "job", HOUR / mtbf, loses)


def mean_and_error(plan: JobPlan, hours: float, seeds: int = 8) -> tuple[float, float]:
    runs = [simulate_job(plan, hours, seed) for seed in range(seeds)]
    for run in runs:
        run.check_invariants()
    mean = sum(run.goodput for run in runs) / seeds
    return mean, math.sqrt(sum((run.goodput - mean) ** 2 for run in runs) / (seeds - 1) / seeds)


@pytest.mark.parametrize("save, write, restart, every", [
    (10, 0, 0, 150), (30, 0, 300, 250), (2, 90, 300, 100), (60, 0, 2000, 400), (0, 0, 100, 50),
])  # fmt: skip
def test_one_level_is_the_exact_expectation(save, write, restart, every):
    costs = CheckpointCosts(save, restart, 1500, write)
    level = CheckpointLevel("disk", every, save, write, load=restart / 3)
    recovery = RecoveryPlan(detection=restart / 3, restart=restart / 3)
    plan = JobPlan(1.0, [level], recovery, FLEET, [failing(1500)])
    mean, error = mean_and_error(plan, 400)
    assert abs(mean - expected_goodput(every, costs)) < 5 * error and error < 0.015


def test_a_seed_decides_everything_and_every_second_has_a_kind():
    plan = JobPlan(2.0, [CheckpointLevel("disk", 100, 5)], RecoveryPlan(60, 60), FLEET, [failing(900)])
    one, same, other = (simulate_job(plan, 50, seed, with_timeline=True) for seed in (1, 1, 2))
    assert one == same and one != other
    assert set(one.badput) == {"save", "lost work", "detection", "waiting for a host", "restart"}
    assert sum(one.by_cause.values()) == pytest.approx(sum(one.badput.values()) - one.badput["save"])
    assert all(start < end for start, end, _ in one.timeline)
    assert all(before[1] <= after[0] for before, after in zip(one.timeline, one.timeline[1:], strict=False))
    for kind in ("save", "detection", "restart"):
        assert sum(end - start for start, end, each in one.timeline if each == kind) == pytest.approx(one.badput[kind])


def test_nothing_fails_and_nothing_is_saved():
    plan = JobPlan(1.0, [], RecoveryPlan(), Fleet(1), [])
    assert simulate_job(plan, 3, 0).goodput == 1
    never_saved = JobPlan(1.0, [], RecoveryPlan(), Fleet(1), [failing(60)])
    assert simulate_job(never_saved, 10, 0).goodput < 0.03  # back to the beginning each time
    with pytest.raises(ValueError, match="hours"):
        simulate_job(plan, 0, 0)


def test_a_save_waits_for_the_one_before():
    plan = JobPlan(1.0, [CheckpointLevel("disk", 10, 1, write=29)], RecoveryPlan(), Fleet(1), [])
    run = simulate_job(plan, 30, 0)
    assert run.goodput == pytest.approx(1 / 3, abs=1e-3) and run.badput["save"] == run.wall - run.useful


def test_a_copy_in_memory_saves_what_its_place_survives():
    """A minute between saves in memory, an hour between those on disk."""
    disk = CheckpointLevel("disk", HOUR, 0)
    lost = {}
    for copies, apart in ((0, ""), (1, "host"), (2, "host"), (2, "rack")):
        levels = [disk] + ([memory_level(60, 0, copies=copies, apart=apart)] if copies else [])
        for loses in ("process", "host", "rack"):
            plan = JobPlan(1.0, levels, RecoveryPlan(), FLEET, [failing(1e4, loses)])
            run = simulate_job(plan, 800, 3)
            lost[copies, apart, loses] = run.badput["lost work"] / sum(run.failures.values())
    saved = {key for key, seconds in lost.items() if seconds < 60}
    assert saved == {(1, "host", "process"), (2, "host", "process"), (2, "host", "host"),
                     (2, "rack", "process"), (2, "rack", "host"), (2, "rack", "rack")}  # fmt: skip
    assert all(24 < seconds < 36 for key, seconds in lost.items() if key in saved)
    assert all(seconds > 1200 for key, seconds in lost.items() if key not in saved)


def test_after_a_loss_that_memory_does_not_survive_it_holds_nothing_newer():
    levels = [CheckpointLevel("disk", 1000, 0), memory_level(10, 0)]
    causes = [failing(3000, "rack"), failing(400, "process")]
    run = simulate_job(JobPlan(1.0, levels, RecoveryPlan(), FLEET, causes), 400, 0)
    per_rack = run.by_cause["lost rack"] / run.failures["lost rack"]
    per_process = run.by_cause["lost process"] / run.failures["lost process"]
    assert per_rack > 300 and 3 < per_process < 8


def test_other_replicas_go_on():
    """Only a stall and a twelfth of the work until the replica is back; the work of half a step is lost."""
    fleet, mtbf, stall, rejoin = Fleet(96), 2000.0, 60.0, 400.0
    recovery = RecoveryPlan(detection=600, restart=600, replicas=12, stall=stall, rejoin=rejoin)
    plan = JobPlan(10.0, [CheckpointLevel("disk", 600, 0)], recovery, fleet, [failing(mtbf, "host")])
    run = simulate_job(plan, 3000, 0)
    run.check_invariants()
    failures = sum(run.failures.values())
    assert run.badput["stall"] == pytest.approx(stall * failures)
    assert run.badput["lost work"] / failures == pytest.approx(5, abs=0.3)
    assert run.badput["fewer replicas"] / failures == pytest.approx(rejoin / 12, rel=0.2)
    assert set(run.badput) == {"save", "stall", "lost work", "fewer replicas"}
    whole = JobPlan(10.0, plan.levels, RecoveryPlan(600, 600), fleet, plan.causes)
    assert run.goodput > 0.93 > 0.6 > simulate_job(whole, 3000, 0).goodput


def test_what_is_out_does_not_fail():
    """Each of forty replicas fails on its own, twice as long up as out: a third of them is out on average."""
    recovery = RecoveryPlan(replicas=40, rejoin=1000)
    run = simulate_job(JobPlan(1e-3, [], recovery, FLEET, [failing(50)]), 400, 0)
    assert run.badput["fewer replicas"] / run.wall == pytest.approx(1 / 3, abs=0.02)


def test_with_the_last_replica_the_job_restarts():
    recovery = RecoveryPlan(restart=100, replicas=2, rejoin=1e5)
    plan = JobPlan(1.0, [CheckpointLevel("disk", 50, 0)], recovery, FLEET, [failing(1000)])
    run = simulate_job(plan, 500, 0)
    run.check_invariants()
    assert run.badput["restart"] > 0 and run.badput["fewer replicas"] > 0


def test_without_spares_a_lost_host_is_waited_for():
    def waited(spares, loses):
        recovery = RecoveryPlan(replace=30, spares=spares, repair=24 * HOUR)
        plan = JobPlan(60.0, [CheckpointLevel("disk", HOUR, 0)], recovery, FLEET, [failing(120 * HOUR, loses)])
        run = simulate_job(plan, 60000, 0)
        run.check_invariants()
        return run.badput["waiting for a host"] / sum(run.failures.values())

    assert waited(None, "host") == pytest.approx(30) and waited(None, "process") == waited(0, "process") == 0
    assert 20 * HOUR < waited(0, "host") < 24 * HOUR + 30, "less where another host fails meanwhile"
    assert waited(0, "host") > waited(1, "host") > waited(2, "host") > 30
    assert waited(20, "host") == pytest.approx(30) and waited(20, "rack") == pytest.approx(30)


def test_a_job_that_lacks_a_host_does_not_start_because_something_else_failed():
    recovery = RecoveryPlan(spares=0, repair=24 * HOUR)
    causes = [failing(240 * HOUR, "host"), failing(4 * HOUR, "process")]
    run = simulate_job(JobPlan(60.0, [CheckpointLevel("disk", HOUR, 0)], recovery, FLEET, causes), 30000, 0)
    assert 20 * HOUR < run.badput["waiting for a host"] / run.failures["lost host"] <= 24 * HOUR


def test_evicting_lemons_brings_the_rate_down_to_that_of_other_hosts():
    cause = FailureCause("host", "host", 1e-3)
    lemons = LemonHosts(0.05, 20)

    def failures(lemons):
        plan = JobPlan(60.0, [CheckpointLevel("disk", HOUR, 0)], RecoveryPlan(), FLEET, [cause], lemons)
        return sum(simulate_job(plan, 20000, 0).failures.values())

    expected = 1e-3 * FLEET.hosts * 20000
    assert failures(LemonHosts()) == pytest.approx(expected, rel=0.06)
    assert failures(lemons) == pytest.approx(expected, rel=0.06), "the mean rate is as it was"
    evicted = failures(LemonHosts(0.05, 20, evict_after=3))
    left = expected * lemons.of_others(FLEET)
    assert evicted == pytest.approx(left + 5 * 3, rel=0.08) and evicted < 0.6 * expected


def test_a_lemon_is_evicted_at_the_failure_of_that_number_and_not_one_later():
    """One host, a lemon: at first it fails as often as the mean says, and once evicted a thousandth as often."""
    cause = FailureCause("host", "host", 1.0)

    def failures(evict_after):
        plan = JobPlan(60.0, [], RecoveryPlan(), Fleet(8), [cause], LemonHosts(1.0, 1000, evict_after))
        return [sum(simulate_job(plan, 20, seed).failures.values()) for seed in range(30)]

    for evict_after in (1, 2, 3):
        assert statistics.median(failures(evict_after)) == evict_after


@pytest.mark.parametrize("bad", [
    lambda: CheckpointLevel("x", 0, 1), lambda: CheckpointLevel("x", 1, -1), lambda: CheckpointLevel("x", 1, math.nan),
    lambda: CheckpointLevel("x", 1, 1, survives=("fire",)), lambda: memory_level(1, 1, copies=0),
    lambda: memory_level(1, 1, apart="desk"), lambda: RecoveryPlan(detection=-1), lambda: RecoveryPlan(replicas=0),
    lambda: RecoveryPlan(spares=-1), lambda: JobPlan(0, [], RecoveryPlan(), Fleet(8), []),
    lambda: JobPlan(1, [], RecoveryPlan(replicas=2), Fleet(8), []),
])  # fmt: skip
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError):
        bad()
