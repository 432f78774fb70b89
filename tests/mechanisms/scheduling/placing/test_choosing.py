"""Choosing: against a look at all nodes, against what others reported as wrong, and how many nodes are looked at."""

import math
import random

import pytest

from minilib.mechanisms.scheduling.placing import (
    FILTERS,
    BinPacking,
    Claim,
    InvalidClaim,
    Ledger,
    Node,
    Refusal,
    Spreading,
    Taint,
    Toleration,
    choose,
    place_all,
    reasons_against,
)

SCORES = [BinPacking("gpu"), Spreading("gpu")]


def gpus(*free):
    return Ledger(Node(f"n{number}", {"gpu": amount}) for number, amount in enumerate(free))


def left(ledger):
    return [ledger.free(node.name)["gpu"] for node in ledger.nodes]


def test_a_2_gpu_job_on_free_4_and_2_leaves_4():
    ledger = gpus(4, 2)
    assert place_all([Claim("job", {"gpu": 2})], ledger, FILTERS, BinPacking("gpu")) == {"job": "n1"}
    assert left(ledger) == [4, 0]
    ledger = gpus(4, 2)
    place_all([Claim("job", {"gpu": 2})], ledger, FILTERS, Spreading("gpu"))
    assert left(ledger) == [2, 2], "spreading leaves no place for a job of 4"


def test_two_1_gpu_pods_on_2_1_1_leave_2():
    claims = [Claim("p0", {"gpu": 1}), Claim("p1", {"gpu": 1})]
    ledger = gpus(2, 1, 1)
    assert place_all(claims, ledger, FILTERS, BinPacking("gpu")) == {"p0": "n1", "p1": "n2"}
    assert left(ledger) == [2, 0, 0]
    ledger = gpus(2, 1, 1)
    place_all(claims, ledger, FILTERS, Spreading("gpu"))
    assert sorted(left(ledger)) == [0, 1, 1]


def test_the_refusal_counts_the_reason_of_every_node():
    taints = (Taint("dedicated", "infra"),)
    ledger = Ledger(
        [*(Node(f"full{n}", {"gpu": 1}) for n in range(3)), *(Node(f"t{n}", {"gpu": 8}, {}, taints) for n in range(2))]
    )
    for score in (*SCORES, lambda claim, node, ledger: 0):
        refusal = choose(Claim("job", {"gpu": 2}), ledger, FILTERS, score)
        assert refusal.reasons == {"Insufficient gpu": 3, "node(s) had untolerated taint {dedicated: infra}": 2}
        text = "0/5 nodes are available: 2 node(s) had untolerated taint {dedicated: infra}, 3 Insufficient gpu."
        assert str(refusal) == text
    ledger.close("full0")
    refusal = choose(Claim("job", {"gpu": 2}), ledger, FILTERS, BinPacking("gpu"))
    assert refusal.reasons["Insufficient gpu"] == 2 and refusal.reasons["node(s) were unschedulable"] == 1
    assert str(choose(Claim("job", {}), Ledger(), FILTERS, BinPacking("gpu"))) == "0/0 nodes are available."


def test_pods_are_counted_like_any_resource():
    ledger = Ledger([Node("n", {"gpu": 8, "pods": 2})])
    claims = [Claim(f"p{number}", {"gpu": 1, "pods": 1}) for number in range(3)]
    refusal = place_all(claims, ledger, FILTERS, BinPacking("gpu"))
    assert isinstance(refusal, Refusal) and refusal.reasons == {"Too many pods": 1} and refusal.placed == 2
    assert left(ledger) == [8]


def test_taints_and_labels_decide_where_a_claim_may_stand():
    node = Node("n", {}, {"gpu": "h200"}, (Taint("a", "1"), Taint("b", "2", "NoExecute")))
    ledger = Ledger([node])
    both = (Toleration("a"), Toleration("b", "2", "NoExecute"))
    for tolerations, refused in [
        ((), "{a: 1}"),
        ((Toleration("a"),), "{b: 2}"),
        ((Toleration("a", "0"), Toleration("b")), "{a: 1}"),
        ((Toleration("a"), Toleration("b", effect="NoSchedule")), "{b: 2}"),
        (both, None),
        ((Toleration(),), None),
    ]:
        expected = [f"node(s) had untolerated taint {refused}"] if refused else []
        assert reasons_against(Claim("job", {}, tolerations=tolerations), node, ledger) == expected
    for selector, passes in [({"gpu": "h200"}, True), ({"gpu": "b200"}, False), ({"zone": ""}, False), ({}, True)]:
        assert (not reasons_against(Claim("job", {}, selector, both), node, ledger)) == passes


def test_all_or_none():
    ledger = gpus(1, 1, 1)
    refusal = place_all([Claim(f"p{n}", {"gpu": 1}) for n in range(4)], ledger, FILTERS, BinPacking("gpu"))
    assert (refusal.claim, refusal.placed, refusal.reasons) == ("p3", 3, {"Insufficient gpu": 3})
    assert left(ledger) == [1, 1, 1] and not ledger.claims
    with pytest.raises(InvalidClaim, match="already"):
        place_all([Claim("p", {"gpu": 1})] * 2, ledger, FILTERS, BinPacking("gpu"))
    assert left(ledger) == [1, 1, 1]
    assert place_all([], ledger, FILTERS, BinPacking("gpu")) == {}
    ledger.check_invariants()


@pytest.mark.parametrize("seed", range(5))
def test_the_index_chooses_what_a_look_at_all_nodes_chooses(seed):
    dice = random.Random(seed)
    nodes = [
        Node(f"n{n}", {"gpu": dice.randint(0, 8)}, {"rack": dice.choice("ab")}, (Taint("t"),) * dice.randint(0, 1))
        for n in range(60)
    ]
    ledger = Ledger(nodes)
    for step in range(300):
        labels, tolerations = dice.choice([{}, {"rack": "a"}]), dice.choice([(), (Toleration("t"),)])
        claim = Claim(f"c{step}", {"gpu": dice.randint(0, 8)}, labels, tolerations)
        for score, sign in zip(SCORES, (-1, 1), strict=True):
            fast = choose(claim, ledger, FILTERS, score)
            slow = choose(claim, ledger, FILTERS, lambda c, node, book, sign=sign: sign * book.free(node.name)["gpu"])
            assert isinstance(slow, Refusal) if isinstance(fast, Refusal) else fast == slow
        if isinstance(fast, str):
            ledger.reserve(claim, fast)
        if ledger.claims and step % 2:
            ledger.release(dice.choice(ledger.claims).name)
        if step % 17 == 0:
            name = dice.choice(nodes).name
            ledger.close(name) if ledger.is_open(name) else ledger.open(name)
        ledger.check_invariants()


def test_a_decision_over_10_000_nodes_looks_at_one():
    ledger = gpus(*(number % 9 for number in range(10_000)))
    for score in SCORES:
        before = ledger.visits
        chosen = choose(Claim("job", {"gpu": 3}), ledger, FILTERS, score)
        assert ledger.visits - before == 1
        assert ledger.free(chosen)["gpu"] == (3 if score == SCORES[0] else 8)
    before = ledger.visits
    choose(Claim("job", {"gpu": 3}), ledger, FILTERS, lambda claim, node, book: 0)
    assert ledger.visits - before == 10_000
    before = ledger.visits
    assert str(choose(Claim("job", {"gpu": 9}), ledger, FILTERS, SCORES[0])).endswith("10000 Insufficient gpu.")
    assert ledger.visits == before


def test_the_order_is_searched_in_logarithmically_many_comparisons(monkeypatch):
    class Counted(tuple):
        compared = 0

        def __lt__(self, other):
            Counted.compared += 1
            return tuple.__lt__(self, other)

    ledger = gpus(*(number % 9 for number in range(10_000)))
    index = ledger.index("gpu")
    index._order = [Counted(place) for place in index._order]
    for amount in range(9):
        Counted.compared = 0
        next(index.least_first(amount))
        next(index.most_first(amount))
        assert Counted.compared <= 3 * (math.log2(10_000) + 1)


def test_a_score_that_is_a_function_may_stop_when_enough_nodes_have_passed():
    ledger = gpus(*[0, 1, 0, 1, 1, 1, 0, 1])
    seen = []
    score = lambda claim, node, book: seen.append(node.name) or len(seen)  # noqa: E731
    assert choose(Claim("job", {"gpu": 1}), ledger, FILTERS, score, enough=2, start=4) == "n5"
    assert seen == ["n4", "n5"] and ledger.visits == 2
    assert choose(Claim("job", {"gpu": 1}), ledger, FILTERS, score, enough=2, start=14) == "n1"
    assert seen[2:] == ["n7", "n1"] and ledger.visits == 2 + 4


def test_ties_are_broken_by_the_order_in_which_nodes_came():
    for score in (*SCORES, lambda claim, node, book: 7):
        ledger = gpus(2, 2, 2)
        ledger.close("n0")
        ledger.open("n0")
        assert choose(Claim("job", {"gpu": 1}), ledger, FILTERS, score) == "n0"
