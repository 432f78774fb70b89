"""Who makes room: as few and as unimportant pods as can be, on the node where that is least."""

import itertools
import random

import pytest

from minilib.classic.pod_scheduler import PodDisruptionBudget, PodScheduler, find_preemption
from minilib.mechanisms.scheduling.placing import FILTERS, Ledger, Taint
from tests.classic.pod_scheduler.clusters import nodes, pod, where


def running(*per_node, cpu=4):
    """A ledger with (cpu, priority) pods, called a0, a1 … on the first node, b0 … on the second; and the pods."""
    ledger, pods = Ledger(nodes(len(per_node), cpu)), {}
    for number, given in enumerate(per_node):
        for place, (amount, priority) in enumerate(given):
            one = pod(f"{'abcdef'[number]}{place}", amount, priority=priority, labels={"app": "abcdef"[number]})
            pods[one.name] = one
            ledger.reserve(one.claim, f"n{number}")
    return ledger, pods


def victims(want, *per_node, budgets=(), priority=10):
    ledger, pods = running(*per_node)
    found = find_preemption(pod("new", want, priority=priority), pods, ledger, FILTERS, budgets)
    ledger.check_invariants()
    assert len(ledger.claims) == sum(map(len, per_node)), "it is only thought"
    return found and [victim.name for victim in found.victims]


def test_no_more_goes_than_has_to():
    assert victims(1, [(1, 0)] * 4) == ["a3"], "the youngest of equals"
    assert victims(2, [(1, 0)] * 4) == ["a2", "a3"]
    assert victims(2, [(1, 3), (2, 1), (1, 2)]) == ["a1"]
    assert victims(3, [(1, 3), (2, 1), (1, 2)]) == ["a2", "a1"]
    assert victims(4, [(3, 20), (1, 0)]) is None, "who is more important stays"
    assert victims(4, [(4, 10)]) is None, "and who is as important"
    assert victims(5, [(4, 0)]) is None


@pytest.mark.parametrize(
    ("per_node", "expected"),
    [
        (([(4, 5)], [(4, 2)]), ["b0"]),  # the lower priority
        (([(2, 5), (2, 1)], [(2, 5), (2, 0)]), ["b0", "b1"]),  # then the smaller sum
        (([(2, -1), (2, -1)], [(4, -1)]), ["b0"]),  # then fewer, although a sum of negative numbers is smaller
        (([(4, 1)], [(4, 1)]), ["b0"]),  # then whoever has run for the shortest time
    ],
)
def test_the_node_where_least_is_lost(per_node, expected):
    assert victims(4, *per_node) == expected


def test_budgets_are_kept_where_a_choice_is_left():
    keep_a = PodDisruptionBudget({"app": "a"}, 1)
    assert victims(4, [(4, 0)], [(4, 5)], budgets=[keep_a]) == ["b0"], "although b0 is more important"
    assert victims(4, [(4, 0)], budgets=[keep_a]) == ["a0"], "a budget does not stop preemption"
    assert victims(1, [(1, 0)] * 4, budgets=[PodDisruptionBudget({"app": "a"}, 3)]) == ["a0"]


@pytest.mark.parametrize("seed", range(30))
def test_victims_are_minimal(seed):
    """Nobody of the victims could stay; and with pods of one size no smaller set exists on any node."""
    dice = random.Random(seed)
    equal = seed % 2
    per_node = [[(1 if equal else dice.randint(1, 3), dice.choice([0, 20])) for _ in range(3)] for _ in range(3)]
    ledger, pods = running(*per_node, cpu=9)
    new = pod("new", dice.randint(4, 9), priority=10)
    found = find_preemption(new, pods, ledger, FILTERS)
    needed = {}
    for number, given in enumerate(per_node):
        free = ledger.free(f"n{number}")["cpu"]
        sizes = [amount for amount, priority in given if priority == 0]
        sets = itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(1, len(sizes) + 1))
        if enough := [len(chosen) for chosen in sets if free < new.requests["cpu"] <= free + sum(chosen)]:
            needed[f"n{number}"] = min(enough)
    assert bool(found) == bool(needed)
    if found:
        free = ledger.free(found.node)["cpu"] + sum(victim.requests["cpu"] for victim in found.victims)
        assert free >= new.requests["cpu"]
        assert all(free - victim.requests["cpu"] < new.requests["cpu"] for victim in found.victims)
        assert all(victim.priority < 10 for victim in found.victims)
        if equal:
            assert len(found.victims) == min(needed.values())


def test_victims_wait_and_may_preempt_others_in_turn():
    scheduler = PodScheduler(nodes(2, cpu=2))
    scheduler.submit(*(pod(f"p{n}", priority=n) for n in range(4)))
    scheduler.run()
    scheduler.submit(pod("urgent", 2, priority=100))
    scheduler.run()
    assert scheduler.preempted == ["p2", "p0", "p1"], "p2 gives way to the urgent one, and p1 to p2"
    assert where(scheduler) == {"p3": "n0", "urgent": "n1", "p2": "n0"} and set(scheduler.waiting) == {"p0", "p1"}
    scheduler.check_invariants()


def test_a_node_that_is_closed_or_tainted_is_no_candidate():
    scheduler = PodScheduler(nodes(2))
    scheduler.submit(pod("p0"), pod("p1"))
    scheduler.run()
    scheduler.taint("n1", Taint("t"))
    scheduler.ledger.close("n0")
    scheduler.submit(pod("urgent", priority=9))
    scheduler.run()
    assert not scheduler.preempted and scheduler.waiting == ["urgent"]


def test_preempting_one_pod_of_a_gang_leaves_the_rest_running_for_nothing():
    scheduler = PodScheduler(nodes(4))
    scheduler.submit_group("gang", [pod(f"g{n}") for n in range(4)])
    scheduler.run()
    scheduler.submit(pod("urgent", priority=1))
    scheduler.run()
    assert scheduler.preempted == ["g3"] and [name[0] for name in scheduler.running] == ["g", "g", "g", "u"]
