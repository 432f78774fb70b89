"""Orders of eviction against simulators written another way, and a pager whose pages have real content."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.swapping import Clock, Fifo, Lru, Pager
from minilib.mechanisms.paging import OutOfPages, PagePool

BELADY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


def naive_fifo(references, frames):
    """A list in order of arrival. Returns the victims, None for a fault into a free frame; hits leave no entry."""
    held, victims = [], []
    for page in references:
        if page not in held:
            victims.append(held.pop(0) if len(held) == frames else None)
            held.append(page)
    return victims


def naive_lru(references, frames):
    """Look back through all references for the page whose last use is farthest away."""
    held, victims = set(), []
    for time, page in enumerate(references):
        if page not in held:
            victim = None
            if len(held) == frames:
                victim = min(held, key=lambda p: max(t for t in range(time) if references[t] == p))
                held.remove(victim)
            victims.append(victim)
            held.add(page)
    return victims


def naive_clock(references, frames):
    """The textbook's ring: frames at fixed places, a hand that moves over them and clears bits."""
    ring, bits, hand, victims = [None] * frames, [0] * frames, 0, []
    for page in references:
        if page in ring:
            bits[ring.index(page)] = 1
            continue
        while bits[hand]:
            bits[hand] = 0
            hand = (hand + 1) % frames
        victims.append(ring[hand])
        ring[hand], bits[hand] = page, 0
        hand = (hand + 1) % frames
    return victims


ORDERS = {"fifo": (Fifo, naive_fifo), "lru": (Lru, naive_lru), "clock": (Clock, naive_clock)}


def victims(order, references, frames):
    """What a Pager with so many frames evicts, and the pager."""
    evicted = []
    evict = order.evict

    def watched():
        evicted.append(evict())
        return evicted[-1]

    order.evict = watched
    pager, seen = Pager(PagePool(frames), PagePool(len(set(references))), order), []
    for page in references:
        faults, evicted[:] = pager.faults, []
        pager.use(page)
        pager.check_invariants()
        if pager.faults > faults:
            seen.append(evicted[0] if evicted else None)
    return seen, pager


@pytest.mark.parametrize("name", ORDERS)
@given(references=st.lists(st.integers(0, 7), max_size=60), frames=st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_the_same_victims_as_a_naive_simulator(name, references, frames):
    order, naive = ORDERS[name]
    expected = naive(references, frames)
    seen, pager = victims(order(), references, frames)
    assert seen == expected
    assert pager.faults == len(expected)


@pytest.mark.parametrize("name", ORDERS)
def test_long_strings_with_working_sets(name):
    order, naive = ORDERS[name]
    for seed in range(5):
        choices = random.Random(seed)
        references = [choices.randrange(6) + 4 * (time // 100) for time in range(600)]
        for frames in (1, 3, 5, 6, 7):
            assert victims(order(), references, frames)[0] == naive(references, frames)


def faults(order, references, frames):
    return victims(order(), references, frames)[1].faults


def test_belady_s_anomaly_fifo_faults_more_with_more_frames():
    assert faults(Fifo, BELADY, 3) == 9
    assert faults(Fifo, BELADY, 4) == 10
    assert faults(Lru, BELADY, 3) == 10
    assert faults(Lru, BELADY, 4) == 8


@given(st.lists(st.integers(0, 6), max_size=40))
@settings(deadline=None)
def test_lru_never_faults_more_with_more_frames(references):
    counts = [faults(Lru, references, frames) for frames in range(1, 8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(set(references))


@pytest.mark.parametrize("name", ORDERS)
@given(
    operations=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=80),
    fast=st.integers(0, 5),
    slow=st.integers(0, 6),
)
@settings(deadline=None)
def test_a_pager_moves_exactly_the_content(name, operations, fast, slow):
    """Pages are written and read through frames; the copies are carried out in their order."""
    pager = Pager(PagePool(fast), PagePool(slow), ORDERS[name][0]())
    frames, store, expected = ["garbage"] * fast, ["garbage"] * slow, {}
    for time, (page, write) in enumerate(operations):
        before = (dict(pager.resident), dict(pager.swapped), pager.faults, pager.fast.num_free, pager.slow.num_free)
        hit = page in pager.resident
        try:
            out, back = pager.use(page)
        except OutOfPages:
            assert not hit and not pager.fast.num_free and (not fast or not pager.slow.num_free)
            after = (dict(pager.resident), dict(pager.swapped), pager.faults, pager.fast.num_free, pager.slow.num_free)
            assert after == before
            pager.check_invariants()
            continue
        pager.check_invariants()
        assert pager.faults == before[2] + (not hit)
        assert (out is None) == (hit or before[3] > 0)
        assert (back is None) == (page not in before[1])
        if out:
            store[out.target] = frames[out.source]
            frames[out.source] = "garbage"
        if back:
            frames[back.target] = store[back.source]
            store[back.source] = "garbage"
        if write or page not in expected:
            frames[pager.resident[page]] = expected[page] = (page, time)
        assert frames[pager.resident[page]] == expected[page]
        assert {p: frames[f] for p, f in pager.resident.items()} | {
            p: store[f] for p, f in pager.swapped.items()
        } == expected


@pytest.mark.parametrize("name", ORDERS)
def test_a_page_that_is_used_is_evicted_once_or_not_at_all(name):
    order = ORDERS[name][0]()
    with pytest.raises(LookupError, match="no page"):
        order.evict()
    for page in range(5):
        order.add(page)
    order.use(0)
    assert len(order) == 5
    assert sorted(order.evict() for _ in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(LookupError):
        order.evict()


def test_each_order_has_its_own_victim():
    first = {}
    for name, (order, _) in ORDERS.items():
        order = order()
        for page in "abc":
            order.add(page)
        order.use("a")
        order.use("b")
        order.use("a")
        first[name] = [order.evict() for _ in range(3)]
    assert first == {"fifo": ["a", "b", "c"], "lru": ["c", "b", "a"], "clock": ["c", "a", "b"]}


def test_a_clock_whose_pages_were_all_used_is_first_come_first_gone():
    clock = Clock()
    for page in range(4):
        clock.add(page)
        clock.use(page)
    assert [clock.evict() for _ in range(4)] == [0, 1, 2, 3]


def test_the_first_fault_into_full_pools_says_so():
    pager = Pager(PagePool(1), PagePool(0), Lru())
    assert pager.use("a") == (None, None)
    with pytest.raises(OutOfPages, match="page b needs a frame"):
        pager.use("b")
    assert pager.use("a") == (None, None) and pager.faults == 1
