"""The cycle: queue, backoff, taints, spread, drain and loss, a service that loses one of n, and nothing given twice."""

import random

import pytest

from minilib.classic.pod_scheduler import (
    Deployment,
    LeastAllocated,
    MostAllocated,
    NodeEvent,
    Pod,
    PodDisruptionBudget,
    PodScheduler,
    TopologySpreadConstraint,
    serving_over_time,
)
from minilib.mechanisms.scheduling.placing import BinPacking, InvalidClaim, Node, Taint, Toleration
from tests.classic.pod_scheduler.clusters import nodes, pod, where

EVENTS = ("submit", "submit", "group", "finish", "fail", "drain", "repair", "taint", "cycle", "time")


def test_least_allocated_spreads_and_most_allocated_packs():
    for score, expected in [(LeastAllocated(), [1, 1, 1, 1]), (MostAllocated(), [4, 0, 0, 0])]:
        scheduler = PodScheduler(nodes(4, cpu=4), score)
        scheduler.submit(*(pod(f"p{n}") for n in range(4)))
        scheduler.run()
        assert [len(scheduler.ledger.claims_on(f"n{n}")) for n in range(4)] == expected


def test_an_index_looks_at_one_node_where_kubernetes_looks_at_500():
    cluster = nodes(10_000, cpu=4)
    for score, visits, second in [(LeastAllocated(), 500, "n500"), (BinPacking("cpu"), 1, "n0")]:
        scheduler = PodScheduler(cluster, score)
        scheduler.submit(pod("p"), pod("q"))
        scheduler.run()
        assert scheduler.ledger.visits == 2 * visits
        assert where(scheduler) == {"p": "n0", "q": second}, "Kubernetes goes on where it stopped"


def test_the_more_important_is_first_and_among_equals_the_older():
    scheduler = PodScheduler(nodes(9))
    scheduler.submit(pod("low", priority=-5), pod("old"), pod("new"), pod("system", priority=2_000_001_000))
    scheduler.run()
    assert list(where(scheduler)) == ["system", "old", "new", "low"]


def test_what_is_no_pod_is_refused():
    with pytest.raises(InvalidClaim, match="cpu of claim 'p' is a whole number ≥ 0, got 1.5"):
        pod("p", 1.5)
    with pytest.raises(InvalidClaim, match="asks for 'pods'"):
        Pod("p", {"pods": 1})
    with pytest.raises(InvalidClaim, match="at most 2000001000"):
        pod("p", priority=2**31)
    with pytest.raises(InvalidClaim, match="max_skew"):
        TopologySpreadConstraint("zone", {}, 0)
    with pytest.raises(InvalidClaim, match="min_available"):
        PodDisruptionBudget({}, -1)
    with pytest.raises(InvalidClaim, match="replicas"):
        Deployment("web", 1.5, pod("p"))
    with pytest.raises(LookupError, match="'nobody'"):
        PodScheduler([]).finish("nobody")


def test_a_node_takes_so_many_pods_even_if_they_ask_for_nothing():
    scheduler = PodScheduler(nodes(1, cpu=8, pods=2))
    scheduler.submit(*(pod(f"p{n}", 0) for n in range(3)))
    scheduler.run()
    assert scheduler.waiting == ["p2"] and scheduler.refusals["p2"].reasons == {"Too many pods": 1}


def test_a_failed_pod_is_tried_again_after_five_minutes_or_a_change_and_not_before_its_backoff():
    scheduler = PodScheduler(nodes(1, cpu=4))
    scheduler.submit(pod("first", 4), pod("second", 4))
    scheduler.run()
    assert scheduler.cycles == 2
    scheduler.advance(299)
    assert scheduler.cycles == 2
    scheduler.advance(1)
    assert scheduler.cycles == 3, "nothing has happened, and it is tried again"
    scheduler.finish("first")
    scheduler.run()
    assert scheduler.waiting == ["second"], "two tries have failed: two seconds of backoff"
    scheduler.advance(2)
    assert scheduler.running == ["second"]


def test_the_backoff_doubles_from_one_second_to_ten():
    scheduler = PodScheduler(nodes(1))
    scheduler.submit(pod("p", 2))
    times = []
    for second in range(50):
        scheduler.now, before = second, scheduler.cycles
        scheduler.queue.cluster_changed()
        scheduler.run()
        times += [second] * (scheduler.cycles - before)
    assert [later - earlier for earlier, later in zip(times, times[1:], strict=False)] == [1, 2, 4, 8, 10, 10, 10]


def test_smaller_pods_overtake_a_large_one_that_waits():
    scheduler = PodScheduler(nodes(2, cpu=4))
    scheduler.submit(pod("a", 3), pod("b", 3), pod("large", 4), pod("small", 1))
    scheduler.run()
    assert sorted(where(scheduler)) == ["a", "b", "small"]


def test_taints_keep_away_and_no_execute_ends_what_runs():
    scheduler = PodScheduler(
        [Node("n0", {"cpu": 4, "pods": 9}), Node("n1", {"cpu": 4, "pods": 9}, {}, (Taint("gpu"),))]
    )
    scheduler.submit(pod("plain", 3), pod("other", 3), pod("gpu", 3, tolerations=(Toleration("gpu"),)))
    scheduler.run()
    assert where(scheduler) == {"plain": "n0", "gpu": "n1"}
    assert scheduler.refusals["other"].reasons == {"Insufficient cpu": 1, "node(s) had untolerated taint {gpu: }": 1}
    scheduler.taint("n0", Taint("down", effect="NoExecute"))
    assert "plain" in scheduler.waiting
    scheduler.check_invariants()


def zones(*sizes):
    return [
        Node(f"{zone}{n}", {"cpu": 9, "pods": 9}, {"zone": zone})
        for zone, size in zip("abc", sizes, strict=False)
        for n in range(size)
    ]


def spread_pod(name, skew=1, **more):
    return pod(
        name, labels={"app": "web"}, topology_spread=(TopologySpreadConstraint("zone", {"app": "web"}, skew),), **more
    )


@pytest.mark.parametrize("skew", [1, 2])
def test_domains_differ_by_no_more_than_max_skew(skew):
    scheduler = PodScheduler([*zones(1, 3, 2), Node("bare", {"cpu": 9, "pods": 9})], MostAllocated())
    for number in range(12):
        scheduler.submit(spread_pod(f"p{number}", skew))
        scheduler.run()
        found = [sum(node.startswith(zone) for node in where(scheduler).values()) for zone in "abc"]
        assert sum(found) == number + 1 and max(found) - min(found) <= skew
    assert "bare" not in where(scheduler).values()


def test_a_domain_without_room_stops_the_others_from_growing():
    scheduler = PodScheduler(zones(1, 1))
    scheduler.submit(pod("full", 9, node_selector={"zone": "a"}), *(spread_pod(f"p{n}") for n in range(3)))
    scheduler.run()
    assert where(scheduler) == {"full": "a0", "p0": "b0"}
    expected = {"Insufficient cpu": 1, "node(s) didn't match pod topology spread constraints": 1}
    assert scheduler.refusals["p1"].reasons == expected
    scheduler.submit(spread_pod("chosen", node_selector={"zone": "b"}))
    scheduler.run()
    assert where(scheduler)["chosen"] == "b0", "only domains that the selector allows are compared"


def test_draining_sends_pods_away_as_far_as_budgets_allow():
    budget = PodDisruptionBudget({"app": "web"}, 2)
    scheduler = PodScheduler(nodes(2, cpu=4), MostAllocated(), budgets=[budget])
    scheduler.submit(*Deployment("web", 3, pod("t")).pods, pod("other"))
    scheduler.run()
    assert scheduler.drain("n0") == ["web-1", "web-2"] and not scheduler.ledger.is_open("n0")
    scheduler.run()
    assert where(scheduler) == {"web-1": "n0", "web-2": "n0", "web-0": "n1", "other": "n1"}
    assert scheduler.drain("n0") == ["web-2"], "the first one has moved, so that the next one may"
    scheduler.run()
    assert scheduler.drain("n0") == []
    scheduler.run()
    assert set(where(scheduler).values()) == {"n1"}
    scheduler.uncordon("n0")
    scheduler.check_invariants()


def test_a_service_that_loses_one_of_n_serves_on():
    web = Deployment("web", 10, pod("t"))
    events = [
        NodeEvent(5, "n3"),
        NodeEvent(12, Node("n10", {"cpu": 1, "pods": 9})),
        NodeEvent(20, "n0"),
        NodeEvent(20, "n1"),
    ]
    counts = serving_over_time(web, PodScheduler(nodes(10)), events, 30, start_seconds=2)
    assert counts == [0, 0] + [10] * 3 + [9] * 9 + [10] * 6 + [8] * 10
    gang = [count if count == 10 else 0 for count in counts]
    assert (sum(counts), sum(gang)) == (251, 90), "of 280: a service serves 90 %, a gang of the same pods 32 %"


def test_thousands_of_events_lose_no_pod_and_give_nothing_twice():
    dice = random.Random(7)
    budget = PodDisruptionBudget({"app": "x"}, 3)
    scheduler = PodScheduler(nodes(6, cpu=4, pods=6), budgets=[budget])
    names, gone = [], []
    for number in range(3_000):
        action = dice.choice(EVENTS)
        node, present = f"n{dice.randrange(6)}", {node.name for node in scheduler.ledger.nodes}
        label = {"app": dice.choice("xyz")}
        if action == "submit" and len(scheduler.pods) < 40:
            names.append(f"p{number}")
            scheduler.submit(pod(names[-1], dice.randint(0, 5), priority=dice.randrange(3), labels=label))
        elif action == "group" and len(scheduler.pods) < 40:
            names += (group := [f"g{number}-{rank}" for rank in range(dice.randint(2, 5))])
            scheduler.submit_group(f"g{number}", [pod(name, 2, labels=label) for name in group])
        elif action == "finish" and scheduler.pods:
            gone.append(dice.choice(list(scheduler.pods)))
            scheduler.finish(gone[-1])
        elif action == "fail" and node in present:
            scheduler.lose(node)
        elif action == "drain" and node in present:
            scheduler.drain(node)
        elif action == "repair" and node in present:
            scheduler.uncordon(node)
        elif action == "repair":
            scheduler.add_node(nodes(6, cpu=4, pods=6)[int(node[1])])
        elif action == "taint" and node in present:
            scheduler.taint(node, *[Taint("t", effect="NoExecute")] * dice.randrange(2))
        elif action == "cycle":
            scheduler.cycle()
        else:
            scheduler.advance(dice.randint(0, 20))
        scheduler.check_invariants()
        assert sorted([*scheduler.pods, *gone]) == sorted(names)
    assert len(gone) > 200 and len(scheduler.preempted) > 50
