"""Pods that are worth nothing alone, one at a time and together; nodes that refuse them or change meanwhile."""

import pytest

from minilib.classic.pod_scheduler import Deployment, MostAllocated, PodScheduler
from minilib.mechanisms.scheduling import FairShare
from minilib.mechanisms.scheduling.placing import InvalidClaim, Taint, UnknownName
from tests.classic.pod_scheduler.clusters import nodes, pod, where


def gangs(size):
    return [[pod(f"{name}-{rank}") for rank in range(size)] for name in "ab"]


def placed(scheduler):
    names = [claim.name for claim in scheduler.ledger.claims]
    return {gang: sum(name.startswith(gang) for name in names) for gang in "ab"}


@pytest.mark.parametrize("size", [2, 7, 100])
def test_two_gangs_one_pod_at_a_time_are_half_placed_and_wait_for_ever(size):
    scheduler = PodScheduler(nodes(size))
    for pair in zip(*gangs(size), strict=True):
        scheduler.submit(*pair)
    scheduler.run()
    assert placed(scheduler) == {"a": size - size // 2, "b": size // 2} and len(scheduler.waiting) == size
    scheduler.advance(3600)
    assert placed(scheduler) == {"a": size - size // 2, "b": size // 2} and len(scheduler.waiting) == size
    assert str(scheduler.refusals[scheduler.waiting[0]]) == f"0/{size} nodes are available: {size} Insufficient cpu."
    scheduler.check_invariants()


@pytest.mark.parametrize("size", [2, 7, 100])
def test_as_groups_exactly_one_runs_and_the_other_follows(size):
    scheduler = PodScheduler(nodes(size))
    first, second = gangs(size)
    scheduler.submit_group("a", first)
    scheduler.submit_group("b", second)
    scheduler.run()
    assert placed(scheduler) == {"a": size, "b": 0} and len(scheduler.running) == size
    assert scheduler.cycles == 2
    for member in first:
        scheduler.finish(member.name)
    scheduler.advance(10)
    assert placed(scheduler) == {"a": 0, "b": size} and not scheduler.waiting
    scheduler.check_invariants()


def test_a_group_holds_only_while_it_is_placed():
    scheduler = PodScheduler(nodes(3))
    scheduler.submit_group("a", [pod(f"a-{rank}") for rank in range(3)])
    scheduler.run()
    scheduler.lose("n1")
    scheduler.advance(60)
    assert placed(scheduler)["a"] == 2 and scheduler.waiting == ["a-1"], "two thirds of a gang run on, and do nothing"


def test_a_group_has_pods_with_names_of_their_own():
    scheduler = PodScheduler(nodes(1))
    for pods in ([], [pod("x"), pod("x")]):
        with pytest.raises(InvalidClaim, match="each with a name of its own"):
            scheduler.submit_group("g", pods)
    scheduler.submit(pod("x"))
    with pytest.raises(InvalidClaim, match=r"got twice: \['x'\]"):
        scheduler.submit(pod("x"))
    assert scheduler.waiting == ["x"]


def test_a_node_that_rejects_a_pod_spawns_no_others_and_another_node_is_tried():
    """The kubelet refuses what the scheduler sends: with a new pod at once for each that failed, hundreds result."""
    scheduler = PodScheduler(nodes(2, cpu=4), score=MostAllocated())
    scheduler.submit(*Deployment("web", 1, pod("template")).pods)
    scheduler.cycle()
    assert where(scheduler) == {"web-0": "n0"}
    scheduler.reject("web-0")
    assert scheduler.cycle() is None, "it waits for its backoff"
    scheduler.now = 1
    scheduler.cycle()
    assert where(scheduler) == {"web-0": "n1"} and list(scheduler.pods) == ["web-0"]
    scheduler.check_invariants()


def test_a_cluster_that_rejects_everything_is_asked_ever_less_often():
    scheduler = PodScheduler(nodes(1, cpu=4))
    scheduler.submit(pod("p"))
    tries = []
    for second in range(600):
        scheduler.now = second
        scheduler.cycle()
        if "p" in scheduler.ledger:
            tries.append(second)
            scheduler.reject("p")
        assert list(scheduler.pods) == ["p"]
    scheduler.check_invariants()
    gaps = [later - earlier for earlier, later in zip(tries, tries[1:], strict=False)]
    backoffs = [1, 2, 4, 8, *[10] * 30]  # after a rejection; then no other node will do, and the next backoff follows
    assert gaps == [first + then for first, then in zip(backoffs, backoffs[1:], strict=False)][: len(gaps)]
    assert len(tries) == 33, "and not 600"


def test_a_node_tainted_between_assignment_and_start_sends_its_pods_back():
    scheduler = PodScheduler(nodes(2), score=MostAllocated())
    scheduler.submit(pod("p"))
    scheduler.cycle()
    assert where(scheduler) == {"p": "n0"}
    scheduler.taint("n0", Taint("broken"))
    assert not scheduler.start("p")
    assert scheduler.refusals["p"].reasons == {"node(s) had untolerated taint {broken: }": 1}
    scheduler.run()
    assert where(scheduler) == {"p": "n1"} and scheduler.running == ["p"]
    scheduler.taint("n1", Taint("worn"))
    assert scheduler.running == ["p"] and scheduler.start("p"), "NoSchedule leaves alone what runs"
    scheduler.check_invariants()


def test_a_node_lost_between_assignment_and_start_sends_its_pods_back():
    scheduler = PodScheduler(nodes(2))
    scheduler.submit(pod("p"))
    scheduler.cycle()
    scheduler.lose("n0")
    with pytest.raises(UnknownName):
        scheduler.start("p")
    scheduler.run()
    assert where(scheduler) == {"p": "n1"} and scheduler.running == ["p"]


def test_the_policies_that_schedule_requests_schedule_pods():
    scheduler = PodScheduler(nodes(4), policy=FairShare())
    scheduler.submit(*(pod(f"a{n}", namespace="a") for n in range(4)), *(pod(f"b{n}", namespace="b") for n in range(4)))
    scheduler.run()
    assert list(where(scheduler)) == ["a0", "b0", "a1", "b1"]
    scheduler.check_invariants()
