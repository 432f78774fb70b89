"""A pager under several policies of eviction: the victims they should choose, and pages that have real content."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.swapping import Pager, SwapFull
from minilib.mechanisms.caching import Clock, Fifo, Lru
from minilib.mechanisms.paging import FramePool, OutOfFrames
from tests.mechanisms.caching.naive import POLICIES

BELADY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


ORDERS = {name: POLICIES[name] for name in ("fifo", "lru", "clock")}


def pager_of(order, frames, slow_frames, num_pages, **copies):
    """A pager with one table of so many pages."""
    pager = Pager(FramePool(frames), FramePool(slow_frames), order, **copies)
    table = pager.new_table(page_size=1)
    table.reserve(num_pages)
    return pager, table


def victims(order, references, frames):
    """What a Pager with so many frames evicts, and the pager."""
    num_pages = 1 + max(references, default=0)
    pager, table = pager_of(order, frames, num_pages + 1, num_pages)
    seen = []
    for page in references:
        faults, before = pager.faults, set(pager.swapped[table]) | {page}
        pager.write(table, page)
        pager.check_invariants()
        if pager.faults > faults:
            seen.append(next(iter(set(pager.swapped[table]) - before), None))
    return seen, pager


@pytest.mark.parametrize("name", ORDERS)
@given(references=st.lists(st.integers(0, 7), max_size=60), frames=st.integers(1, 8))
@settings(max_examples=200)
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
def test_lru_never_faults_more_with_more_frames(references):
    counts = [faults(Lru, references, frames) for frames in range(1, 8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(set(references))


@pytest.mark.parametrize("name", ORDERS)
@given(
    operations=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=80),
    fast=st.integers(1, 5),
    slow=st.integers(0, 6),
)
def test_a_pager_moves_exactly_the_content(name, operations, fast, slow):
    """Pages are written and read through frames, and what a frame held before it was given up is spoilt."""
    frames, store, expected = ["garbage"] * fast, ["garbage"] * slow, {}

    def copy_out(copy):
        store[copy.target], frames[copy.source] = frames[copy.source], "garbage"

    def copy_in(copy):
        frames[copy.target], store[copy.source] = store[copy.source], "garbage"

    pager, table = pager_of(ORDERS[name][0](), fast, slow, 10, copy_out=copy_out, copy_in=copy_in)
    for time, (page, write) in enumerate(operations):
        before, faults = (list(table.frames), dict(pager.swapped[table]), list(frames), list(store)), pager.faults
        absent, full = table.frames[page] is None, len(expected) == fast + max(0, slow - 1)
        if write and page not in expected and full:
            with pytest.raises(SwapFull if slow else OutOfFrames, match="1 frames are needed"):
                pager.write(table, page)
            assert (table.frames, pager.swapped[table], frames, store) == before and pager.faults == faults
        elif write:
            frames[pager.write(table, page)] = expected[page] = (page, time)
            assert pager.faults == faults + absent
        else:
            frame = pager.read(table, page)
            assert (frame is None) == (page not in expected)
            assert pager.faults == faults + (absent and page in expected)
        pager.check_invariants()
        content = {p: frames[frame] for p, frame in enumerate(table.frames) if frame is not None}
        assert content | {p: store[frame] for p, frame in pager.swapped[table].items()} == expected


def test_the_first_fault_into_full_pools_says_so():
    pager, table = pager_of(Lru(), 1, 0, 2)
    assert pager.write(table, 0) == 0
    with pytest.raises(OutOfFrames, match="1 frames are needed, 0 are free, and there is no swap"):
        pager.write(table, 1)
    assert pager.write(table, 0) == 0 and pager.faults == 1
    with pytest.raises(OutOfFrames, match="2 pages are written at once, and memory has 1 frames"):
        pager.make_room(table, [0, 1])


def test_a_page_that_was_never_reserved_is_refused():
    pager, table = pager_of(Lru(), 2, 0, 2)
    for page in (-1, 2):
        for call in (pager.read, pager.write, pager.is_private):
            with pytest.raises(IndexError, match=f"page {page} is outside this table of 2 pages"):
                call(table, page)


def test_a_shared_page_moves_for_all_who_share_it():
    """Out and in as one page; and a write while it is out takes a copy and leaves it out for the others."""
    pager, table = pager_of(Fifo(), 2, 8, 4)
    pager.write(table, 0)
    tables = [table, pager.fork(table), pager.fork(table)]
    for page in (1, 2):
        pager.write(table, page)
    assert [pager.swapped[each] for each in tables] == [{0: 0}] * 3 and pager.slow.num_used == 1
    assert pager.write(tables[1], 0) == tables[1].frames[0] is not None
    assert [pager.swapped[each].get(0) for each in tables] == [0, None, 0]
    assert pager.read(tables[2], 0) == table.frames[0] == tables[2].frames[0]
    assert pager.counts == {"first touch": 3, "copy": 1, "move out": 3, "move in": 1}
    pager.check_invariants()
    for each in tables:
        pager.release(each)
        pager.check_invariants()
    assert pager.fast.num_used == pager.slow.num_used == 0


def test_invariants_see_every_kind_of_damage():
    def damaged(damage):
        pager, table = pager_of(Fifo(), 2, 8, 4)
        for page in range(3):
            pager.write(table, page)
        pager.check_invariants()
        damage(pager, table)
        with pytest.raises(AssertionError):
            pager.check_invariants()

    damaged(lambda pager, table: pager.order.remove(1))
    damaged(lambda pager, table: pager.swapped[table].clear())
    damaged(lambda pager, table: pager.swapped[table].update({1: 0}))
    damaged(lambda pager, table: pager.slow.share(0))
    damaged(lambda pager, table: table.frames.reverse())
    damaged(lambda pager, table: [pager.slow.allocate() for _ in range(7)])


def test_room_for_several_pages_keeps_those_that_just_came_in():
    """The clock would evict page 0, not used since it came in, before page 3, which was used."""
    pager, table = pager_of(Clock(), 2, 8, 4)
    for page in range(4):
        pager.write(table, page)
    pager.read(table, 3)
    pager.make_room(table, [0, 1])
    assert set(pager.swapped[table]) == {2, 3}
    pager.check_invariants()
