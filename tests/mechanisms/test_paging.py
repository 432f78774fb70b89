"""Pages with real content behind them: the copies that PageTable asks for are carried out and every slot is read back.

The oracle gives each table a dictionary of its own, where nothing is ever shared.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minilib.mechanisms.paging import Copy, Fault, FramePool, OutOfFrames, PageTable


def naive_pages(slots, page_size):
    """Pages that so many slots fill, counted one slot at a time."""
    return len({slot // page_size for slot in range(slots)})


class Paging(RuleBasedStateMachine):
    """Some tables are sequences that append, some are processes that reserve and touch; both fork, move and end."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4, 16]), fast=st.integers(0, 12), slow=st.integers(0, 8), other=st.data()
    )
    def start(self, page_size, fast, slow, other):
        self.page_size = page_size
        self.pools = [FramePool(fast), FramePool(slow)]
        self.memory = [[["garbage"] * page_size for _ in range(n)] for n in (fast, slow)]
        self.tables, self.written, self.processes = [], [], set()
        self.clock = 0

    def pick(self, data, only=lambda number: True):
        return data.draw(st.sampled_from([number for number in range(len(self.tables)) if only(number)]))

    def is_process(self, number):
        return self.tables[number] in self.processes

    def holders(self, frame, pool):
        return sum(table.pool is pool and frame in table.frames for table in self.tables)

    def carry_out(self, copies, source, target):
        for copy in copies:
            self.memory[target][copy.target] = list(self.memory[source][copy.source])

    def write(self, number, slots):
        table = self.tables[number]
        for slot in slots:
            frame, offset = table.translate(slot)
            self.clock += 1
            self.memory[self.pools.index(table.pool)][frame][offset] = self.clock
            self.written[number][slot] = self.clock

    def state(self):
        pools = [(list(pool.ref_counts), sorted(pool._free)) for pool in self.pools]
        return pools, [(list(table.frames), table.length, table.pool) for table in self.tables]

    def attempt(self, needed, pool, operation):
        """What the operation returns, or None if it was out of frames, rightly and without a trace."""
        before, free = self.state(), pool.num_free
        try:
            result = operation()
        except OutOfFrames:
            assert needed > free, f"{needed} frames are needed and {free} were free"
            assert self.state() == before
            return None
        assert needed <= free
        return result

    @precondition(lambda self: len(self.tables) < 6)
    @rule(process=st.booleans(), where=st.integers(0, 1), reserved=st.integers(0, 4))
    def begin(self, process, where, reserved):
        table = PageTable(self.pools[where], self.page_size)
        self.tables.append(table)
        self.written.append({})
        if process:
            self.processes.add(table)
            table.reserve(reserved)
            assert len(table.frames) == reserved and table.present() == []

    @precondition(lambda self: any(not self.is_process(number) for number in range(len(self.tables))))
    @rule(data=st.data(), pages=st.integers(0, 3), more=st.integers(-1, 1))
    def append(self, data, pages, more):
        number = self.pick(data, lambda number: not self.is_process(number))
        table, count = self.tables[number], max(1, pages * self.page_size + more)
        slots = range(table.length, table.length + count)
        needed = naive_pages(slots.stop, self.page_size) - naive_pages(slots.start, self.page_size)
        if slots.start % self.page_size and self.holders(table.frames[-1], table.pool) > 1:
            needed += 1
        assert table.frames_needed(count) == needed
        free = table.pool.num_free
        copies = self.attempt(needed, table.pool, lambda: table.append(count))
        if copies is not None:
            assert free - table.pool.num_free == needed and table.length == slots.stop
            where = self.pools.index(table.pool)
            self.carry_out(copies, where, where)
            self.write(number, slots)

    @precondition(lambda self: any(table.frames for table in self.tables))
    @rule(data=st.data())
    def touch(self, data):
        number = self.pick(data, lambda number: bool(self.tables[number].frames))
        table = self.tables[number]
        index = data.draw(st.integers(0, len(table.frames) - 1))
        before, pool = table.frames[index], table.pool
        held = 0 if before is None else self.holders(before, pool)
        fault = self.attempt(int(held != 1), pool, lambda: (table.touch(index),))
        if fault is None:
            return
        (fault,) = fault
        frame, where = table.frames[index], self.pools.index(pool)
        assert fault == {0: Fault(frame), 1: None}.get(held, Fault(frame, Copy(before, frame)))
        self.carry_out([fault.copy] if fault and fault.copy else [], where, where)
        last = (index + 1) * self.page_size if self.is_process(number) else table.length
        self.write(number, range(index * self.page_size, min(last, (index + 1) * self.page_size)))

    @precondition(lambda self: 0 < len(self.tables) < 6)
    @rule(data=st.data())
    def fork(self, data):
        number = self.pick(data)
        free = [pool.num_free for pool in self.pools]
        child = self.tables[number].fork()
        assert [pool.num_free for pool in self.pools] == free, "a fork takes no frame"
        self.tables.append(child)
        self.written.append(dict(self.written[number]))
        if self.is_process(number):
            self.processes.add(child)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        number = self.pick(data)
        table = self.tables.pop(number)
        del self.written[number]
        table.release()
        assert (table.frames, table.length) == ([], 0)
        self.processes.discard(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def move(self, data):
        table = self.tables[self.pick(data)]
        source = self.pools.index(table.pool)
        target = 1 - source
        copies = self.attempt(len(table.present()), self.pools[target], lambda: table.move(self.pools[target]))
        if copies is not None:
            assert table.pool is self.pools[target]
            self.carry_out(copies, source, target)

    @invariant()
    def every_table_reads_what_it_wrote(self):
        for pool in getattr(self, "pools", []):
            pool.check_invariants(self.tables)
        for table, written in zip(getattr(self, "tables", []), getattr(self, "written", []), strict=True):
            memory = self.memory[self.pools.index(table.pool)]
            for slot, value in written.items():
                frame, offset = table.translate(slot)
                assert memory[frame][offset] == value
            if table not in self.processes:
                assert len(table.frames) == naive_pages(table.length, self.page_size)
                assert sorted(written) == list(range(table.length))

    def teardown(self):
        for table in getattr(self, "tables", []):
            table.release()
        for pool in getattr(self, "pools", []):
            pool.check_invariants([])
            assert pool.num_used == 0


TestPaging = Paging.TestCase
TestPaging.settings = settings(max_examples=150, stateful_step_count=50)


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
@pytest.mark.parametrize("k, more", [(k, more) for k in (1, 2, 3) for more in (-1, 0, 1)])
def test_lengths_around_a_multiple_of_the_page_size(page_size, k, more):
    """In one piece and slot by slot: as many pages, all slots mapped in order, and none behind the last page."""
    length = k * page_size + more
    whole, single = (PageTable(FramePool(8), page_size) for _ in "ab")
    whole.append(length)
    for slot in range(length):
        assert single.frames_needed(1) == (slot % page_size == 0)
        single.append(1)
    for table in (whole, single):
        assert len(table.frames) == naive_pages(length, page_size)
        assert [table.translate(slot) for slot in range(length)] == [
            (table.frames[slot // page_size], slot % page_size) for slot in range(length)
        ]
        for slot in (-1, len(table.frames) * page_size):
            with pytest.raises(IndexError, match="not mapped"):
                table.translate(slot)


@pytest.mark.parametrize("length, copied", [(15, True), (16, False), (17, True)])
def test_who_writes_first_copies_and_the_last_holder_does_not(length, copied):
    parent = PageTable(FramePool(8), 16)
    parent.append(length)
    first, second = parent.fork(), parent.fork()
    last = parent.frames[-1]
    for child in (first, second):
        assert child.append(1) == ([Copy(last, child.frames[length // 16])] if copied else [])
    assert parent.append(1) == []
    assert parent.frames[: length // 16] == first.frames[: length // 16] == second.frames[: length // 16]
    assert len({table.frames[length // 16] for table in (parent, first, second)}) == 3


def test_the_frame_freed_last_is_taken_first():
    pool = FramePool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    for frame in (2, 0):
        pool.release(frame)
    assert pool.allocate() == 0


def test_a_pool_without_frames_is_always_full():
    pool = FramePool(0)
    with pytest.raises(OutOfFrames, match="all 0 frames"):
        pool.allocate()
    table = PageTable(pool, 4)
    with pytest.raises(OutOfFrames, match="5 more slots take 2 frames, and 0 are free"):
        table.append(5)
    assert isinstance(OutOfFrames(), MemoryError)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="-1"):
        FramePool(-1)
    for page_size in (0, -1):
        with pytest.raises(ValueError, match="page_size"):
            PageTable(FramePool(1), page_size)
    table = PageTable(FramePool(1), 4)
    for index in (-1, 0):
        with pytest.raises(IndexError, match=f"page {index} is outside"):
            table.touch(index)
    table.reserve(1)
    with pytest.raises(IndexError, match="not mapped"):
        table.translate(0)


def test_freeing_twice_and_sharing_what_is_free_are_caught():
    pool = FramePool(2)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(0)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(0)


def test_invariants_see_every_kind_of_damage():
    def damaged(damage):
        table = PageTable(FramePool(4), 1)
        table.append(2)
        damage(table)
        with pytest.raises(AssertionError):
            table.pool.check_invariants([table])

    damaged(lambda table: table.pool._free.append(3))
    damaged(lambda table: table.pool._free.pop())
    damaged(lambda table: table.frames.pop())
    damaged(lambda table: table.frames.append(0))
    damaged(lambda table: table.pool.ref_counts.__setitem__(0, 2))
    damaged(lambda table: table.pool.ref_counts.__setitem__(0, 0))


def test_appending_nothing_takes_nothing():
    parent = PageTable(FramePool(4), 4)
    parent.append(5)
    child = parent.fork()
    assert child.frames_needed(0) == 0
    assert child.append(0) == []
    assert parent.pool.num_free == 2


@pytest.mark.parametrize("num_frames", [0, 1])
def test_appending_to_reserved_pages_counts_them(num_frames):
    table = PageTable(FramePool(num_frames), 4)
    table.reserve(2)
    assert table.frames_needed(5) == 2
    with pytest.raises(OutOfFrames):
        table.append(5)
    assert (table.frames, table.length, table.pool.num_free) == ([None, None], 0, num_frames)


@pytest.mark.parametrize("call", ["append", "frames_needed", "reserve"])
def test_a_negative_count_is_refused(call):
    table = PageTable(FramePool(4), 4)
    table.append(9)
    with pytest.raises(ValueError, match="-5"):
        getattr(table, call)(-5)
    assert table.length == 9


@pytest.mark.parametrize("breaks_at", range(3))
def test_a_move_that_breaks_off_gives_back_what_it_took(breaks_at):
    """A pool may do more than take a frame, and may fail at that."""
    table, other = PageTable(FramePool(3), 2), FramePool(3)
    table.append(6)
    frames, allocate = list(table.frames), other.allocate
    other.allocate = lambda: allocate() if other.num_used < breaks_at else 1 / 0
    with pytest.raises(ZeroDivisionError):
        table.move(other)
    assert other.num_free == 3 and table.frames == frames and table.pool is not other
    table.pool.check_invariants([table])
