"""The ledger: nothing is given twice, what is undone is undone wholly, and what cannot be is refused by name."""

import random

import numpy as np
import pytest

from minilib.mechanisms.scheduling.placing import (
    FILTERS,
    BinPacking,
    Claim,
    InsufficientCapacity,
    InvalidClaim,
    InvalidNode,
    Ledger,
    Node,
    Refusal,
    Spreading,
    Taint,
    UnknownName,
    place_all,
)


def small():
    return Ledger([Node("a", {"gpu": 4, "cpu": 8}), Node("b", {"gpu": 2, "cpu": 8})])


def picture(ledger):
    """All that an attempt may change and has to give back."""
    held = {claim.name: ledger.holding(claim.name) for claim in ledger.claims}
    state = {name: (item.claim, item.node, item.since, item.bound) for name, item in held.items()}
    free = {node.name: ledger.free(node.name) for node in ledger.nodes}
    return state, free, {resource: ledger.index(resource).items() for resource in ("gpu", "cpu")}


def test_a_claim_is_reserved_bound_and_released():
    ledger = small()
    ledger.reserve(Claim("job", {"gpu": 3}), "a")
    assert ledger.free("a") == {"gpu": 1, "cpu": 8} and "job" in ledger and ledger.node_of("job") == "a"
    assert not ledger.holding("job").bound
    ledger.bind("job")
    assert ledger.holding("job").bound
    ledger.release("job")
    assert ledger.free("a") == {"gpu": 4, "cpu": 8} and "job" not in ledger and not ledger.claims
    ledger.check_invariants()


def test_nothing_is_given_twice_and_refusals_change_nothing():
    ledger = small()
    ledger.reserve(Claim("job", {"gpu": 3}), "a")
    before = picture(ledger)
    with pytest.raises(InvalidClaim, match="'job' has node 'a' already"):
        ledger.reserve(Claim("job", {"gpu": 1}), "b")
    with pytest.raises(InsufficientCapacity, match="asks for 2 gpu, and node 'a' has 1 free"):
        ledger.reserve(Claim("other", {"gpu": 2}), "a")
    with pytest.raises(InsufficientCapacity, match="asks for 1 tpu, and node 'a' has 0 free"):
        ledger.reserve(Claim("other", {"tpu": 1}), "a")
    with pytest.raises(InsufficientCapacity, match="asks for 5 gpu, and node 'a' has 4 free"):
        ledger.resize("job", {"gpu": 5})
    for ask in (ledger.release, ledger.bind, ledger.node_of):
        with pytest.raises(UnknownName, match="'nobody' has no node"):
            ask("nobody")
    with pytest.raises(UnknownName, match="no node is called 'c'"):
        ledger.reserve(Claim("other", {"gpu": 1}), "c")
    ledger.close("b")
    with pytest.raises(InsufficientCapacity, match="'b' takes no claims"):
        ledger.reserve(Claim("other", {"gpu": 1}), "b")
    ledger.open("b")
    assert picture(ledger) == before
    ledger.check_invariants()


@pytest.mark.parametrize("amount", [1.5, -1, True, "2", float("nan"), float("inf"), None])
def test_only_whole_amounts_can_be_claimed(amount):
    with pytest.raises(InvalidClaim, match="gpu of claim 'job' is a whole number ≥ 0, got"):
        Claim("job", {"gpu": amount})
    with pytest.raises(InvalidNode, match="gpu of node 'n' is a whole number ≥ 0, got"):
        Node("n", {"gpu": amount})
    ledger = small()
    ledger.reserve(Claim("job", {"gpu": 1}), "a")
    with pytest.raises(InvalidClaim):
        ledger.resize("job", {"gpu": amount})
    assert ledger.free("a")["gpu"] == 3
    assert Claim("job", {"gpu": np.int64(2)}).requests == {"gpu": 2}


def test_what_is_no_node_no_claim_and_no_taint_is_refused():
    with pytest.raises(InvalidClaim, match="name of its own"):
        Claim("", {})
    with pytest.raises(InvalidClaim, match="priority of claim 'job' is a whole number, got 0.5"):
        Claim("job", {}, priority=0.5)
    with pytest.raises(InvalidNode, match="name of its own"):
        Node("", {})
    with pytest.raises(InvalidNode, match="two nodes are called 'a'"):
        Ledger([Node("a", {}), Node("a", {})])
    with pytest.raises(InvalidNode, match="NoSchedule and NoExecute"):
        Taint("gpu", effect="Never")
    with pytest.raises(InvalidNode, match="labels and taints change"):
        small().relabel(Node("a", {"gpu": 5, "cpu": 8}))


def test_an_attempt_is_undone_unless_it_is_committed():
    ledger = small()
    ledger.reserve(Claim("old", {"gpu": 1}), "a")
    ledger.reserve(Claim("older", {"gpu": 1, "cpu": 2}), "a")
    before = picture(ledger)
    with ledger.attempt():
        ledger.release("old")
        ledger.bind("older")
        ledger.reserve(Claim("new", {"gpu": 2}), "b")
        ledger.resize("new", {"gpu": 1})
    assert picture(ledger) == before
    with pytest.raises(ZeroDivisionError), ledger.attempt():
        ledger.release("old")
        raise ZeroDivisionError
    assert picture(ledger) == before
    with ledger.attempt() as trial:
        ledger.release("old")
        trial.commit()
    assert "old" not in ledger
    ledger.check_invariants()


def test_an_attempt_within_an_attempt_is_part_of_it():
    ledger = small()
    with ledger.attempt() as outer:
        ledger.reserve(Claim("kept", {"gpu": 1}), "a")
        with ledger.attempt():
            ledger.reserve(Claim("dropped", {"gpu": 1}), "a")
            ledger.release("kept")
        assert "kept" in ledger and "dropped" not in ledger
        with ledger.attempt() as inner:
            ledger.reserve(Claim("also kept", {"gpu": 1}), "a")
            inner.commit()
        outer.commit()
    assert [claim.name for claim in ledger.claims] == ["kept", "also kept"]
    with ledger.attempt():
        with ledger.attempt() as inner:
            ledger.release("kept")
            inner.commit()
        assert "kept" not in ledger
    assert "kept" in ledger
    ledger.check_invariants()


def test_nodes_do_not_change_within_an_attempt():
    ledger = small()
    for change in (ledger.close, ledger.open, ledger.remove, lambda name: ledger.add(Node("c", {}))):
        with pytest.raises(RuntimeError, match="outside of attempts"), ledger.attempt():
            change("a")
    assert len(ledger) == 2


def test_a_node_that_is_gone_takes_its_claims_and_its_name_can_come_back():
    ledger = small()
    claims = [Claim("one", {"gpu": 1}), Claim("two", {"gpu": 1})]
    for claim in claims:
        ledger.reserve(claim, "a")
    assert ledger.remove("a") == claims and not ledger.claims and len(ledger) == 1
    ledger.check_invariants()
    ledger.add(Node("a", {"gpu": 1}))
    assert ledger.free("a") == {"gpu": 1}
    ledger.check_invariants()


def test_20_000_operations_give_nothing_twice_and_no_gang_half():
    """Submit, finish, fail, drain, preempt and resize, together; who holds what is counted a second time, naively."""
    dice = random.Random(20)
    sizes = {f"n{number}": dice.choice([4, 8]) for number in range(10)}
    ledger = Ledger(Node(name, {"gpu": size, "pods": 6}) for name, size in sizes.items())
    gangs: dict[int, dict[str, int]] = {}  # gang → claim → GPUs
    seen = dict.fromkeys(("submit", "finish", "fail", "drain", "preempt", "resize", "refused", "repair"), 0)

    def drop(gang):
        for claim in gangs.pop(gang):
            if claim in ledger:
                ledger.release(claim)

    def submit(number):
        each = dice.randint(1, 8)
        claims = [Claim(f"{number}-{rank}", {"gpu": each, "pods": 1}) for rank in range(dice.choice([1, 1, 2, 4, 9]))]
        score = dice.choice([BinPacking("gpu"), Spreading("gpu"), lambda claim, node, ledger: -len(node.name)])
        before = {node.name: ledger.free(node.name) for node in ledger.nodes}
        placed = place_all(claims, ledger, FILTERS, score)
        if isinstance(placed, Refusal):
            seen["refused"] += 1
            assert placed.reasons or not before
            assert {node.name: ledger.free(node.name) for node in ledger.nodes} == before
        else:
            gangs[number] = dict.fromkeys(placed, each)

    for number in range(20_000):
        action = dice.choice(["submit", "submit", "finish", "fail", "drain", "preempt", "resize", "repair"])
        name = dice.choice(list(sizes))
        present = any(node.name == name for node in ledger.nodes)
        seen[action] += 1
        if action == "submit":
            submit(number)
        elif action in ("finish", "preempt") and gangs:
            drop(dice.choice(list(gangs)) if action == "finish" else max(gangs))
        elif action == "fail" and present:
            for claim in ledger.remove(name):
                if (gang := int(claim.name.split("-")[0])) in gangs:
                    drop(gang)
        elif action == "drain" and present:
            ledger.close(name)
        elif action == "repair":
            ledger.open(name) if present else ledger.add(Node(name, {"gpu": sizes[name], "pods": 6}))
        elif action == "resize" and gangs:
            gang = dice.choice(list(gangs))
            claim, wanted = dice.choice(list(gangs[gang])), dice.randint(0, 8)
            if wanted <= gangs[gang][claim] + ledger.free(ledger.node_of(claim))["gpu"]:
                ledger.resize(claim, {"gpu": wanted, "pods": 1})
                gangs[gang][claim] = wanted
            else:
                with pytest.raises(InsufficientCapacity):
                    ledger.resize(claim, {"gpu": wanted, "pods": 1})
        if number % 4 == 0:
            ledger.check_invariants()
        held = {claim: gpus for gang in gangs.values() for claim, gpus in gang.items()}
        assert {claim.name: claim.requests["gpu"] for claim in ledger.claims} == held, "a gang is half-placed"
    for node in ledger.nodes:
        used = [held[claim.name] for claim in ledger.claims_on(node.name)]
        assert sum(used) + ledger.free(node.name)["gpu"] == sizes[node.name] and len(used) <= 6
    assert min(seen.values()) > 1_000, seen
