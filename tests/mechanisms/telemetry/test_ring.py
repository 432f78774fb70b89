"""A ring whose writer stops anywhere: the other records are whole, at most one is torn, and what is lost is counted."""

import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.telemetry.ring import Ring, RingRecord, slot_bytes

RECORD_BYTES, MARKS = 13, 2
SLOT = slot_bytes(RECORD_BYTES, MARKS)

WRITER = """
import mmap, sys
from minilib.mechanisms.telemetry.ring import Ring
with open(sys.argv[1], "r+b") as file:
    ring = Ring(mmap.mmap(file.fileno(), 0), 40, marks=2)
print("ready", flush=True)
number = 0
while True:
    sequence = ring.append(b"%d " % number * 3)
    ring.mark(sequence, 0, sequence * 0x0101010101)
    ring.mark(sequence, 1, ~(sequence * 0x0101010101))
    number += 1
"""


def filled(capacity: int, count: int) -> tuple[bytearray, Ring]:
    buffer = bytearray(capacity * SLOT + 5)  # a few bytes that no slot fits into
    ring = Ring(buffer, RECORD_BYTES, MARKS)
    for number in range(count):
        assert ring.append(body(number)) == number
        assert ring.mark(number, 1, number + 1000)
    return buffer, ring


def body(number: int) -> bytes:
    return f"r{number}".encode() * (number % 4)  # also of no bytes


def states_of_an_append(buffer: bytearray, sequence: int) -> list[bytes]:
    """The buffer after each byte that the next append stores, in the order of its stores."""
    before, capacity = bytes(buffer), len(buffer) // SLOT
    after = bytearray(before)
    Ring(after, RECORD_BYTES, MARKS).append(body(sequence))
    at = sequence % capacity * SLOT
    taken_back = before[:at] + b"\xff" * 8 + before[at + 8 :]
    order = [*range(at + 8, at + SLOT), *range(at, at + 8)]  # marks, body, checksum, then the sequence
    states = [before[:at] + b"\xff" * k + before[at + k :] for k in range(9)]
    for k in range(len(order) + 1):
        state = bytearray(taken_back)
        for place in order[:k]:
            state[place] = after[place]
        states.append(bytes(state))
    assert states[-1] == bytes(after)
    return states


@pytest.mark.parametrize("capacity", [1, 2, 3, 8])
@pytest.mark.parametrize("over", [-1, 0, 1, 2])
def test_the_last_records_are_there_and_what_was_overwritten_is_counted(capacity, over):
    count = max(capacity + over, 0)
    buffer, ring = filled(capacity, count)
    kept = range(max(count - capacity, 0), count)
    assert ring.capacity == capacity
    assert ring.records() == [(number, body(number)) for number in kept]
    assert ring.entries() == [RingRecord(number, body(number), (0, number + 1000)) for number in kept]
    assert (ring.lost, ring.torn) == (count - len(kept), 0)
    again = Ring(bytes(buffer), RECORD_BYTES, MARKS)  # a copy that can only be read
    assert (again.entries(), again.lost) == (ring.entries(), ring.lost)


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 11])
def test_a_writer_that_stops_at_any_byte_of_an_append_leaves_a_readable_ring(capacity, count):
    buffer, ring = filled(capacity, count)
    old = ring.entries()
    others = [record for record in old if record.sequence % capacity != count % capacity]
    new = RingRecord(count, body(count), (0, 0))
    states = states_of_an_append(buffer, count)
    seen = set()
    for state in states:
        stopped = Ring(bytearray(state), RECORD_BYTES, MARKS)
        found = stopped.entries()
        assert found in (old, others, [*others, new])
        assert stopped.torn <= (found == others)
        seen.add((len(found), stopped.torn))
        if found:  # a ring in which nothing is whole begins again
            assert stopped.append(b"next") == found[-1].sequence + 1
            assert stopped.entries()[-1].body == b"next" and stopped.torn == 0
    assert len(states) == 9 + SLOT + 1
    assert (len(others), 1) in seen  # the torn record was met


@given(st.integers(1, 4), st.integers(0, 9), st.data())
def test_stores_that_become_visible_in_any_order_tear_one_record_at_most(capacity, count, data):
    buffer, ring = filled(capacity, count)
    others = [record for record in ring.entries() if record.sequence % capacity != count % capacity]
    *_, taken_back = states_of_an_append(buffer, count)[:9]
    after = states_of_an_append(buffer, count)[-1]
    stored = data.draw(st.lists(st.booleans(), min_size=len(after), max_size=len(after)))
    state = bytes(new if done else old for new, old, done in zip(after, taken_back, stored, strict=True))
    found = Ring(state, RECORD_BYTES, MARKS).records()
    assert found in (
        [(r.sequence, r.body) for r in others],
        [*((r.sequence, r.body) for r in others), (count, body(count))],
    )


@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_a_flipped_bit_costs_the_record_that_it_is_in_and_no_other(capacity, count, data):
    buffer, ring = filled(capacity, count)
    whole = ring.records()
    place = data.draw(st.integers(0, min(capacity, count) * SLOT * 8 - 1))
    buffer[place // 8] ^= 1 << place % 8
    damaged = place // 8 // SLOT
    kept = [(sequence, content) for sequence, content in whole if sequence % capacity != damaged]
    assert ring.records() in (kept, whole)  # bits of marks and of the padding are no part of the record
    in_body = place // 8 % SLOT < 8 or place // 8 % SLOT >= SLOT - 8
    assert ring.records() == kept or not in_body


def test_a_mark_of_a_record_that_is_overwritten_changes_nothing():
    buffer, ring = filled(2, 3)
    before = bytes(buffer)
    assert not ring.mark(0, 0, 7)
    assert bytes(buffer) == before
    assert ring.mark(1, 0, -7) and ring.entries()[0] == RingRecord(1, body(1), (-7, 1001))
    with pytest.raises(IndexError, match="2 marks"):
        ring.mark(1, 2, 0)


def test_a_ring_says_what_it_cannot_take():
    buffer, ring = filled(2, 1)
    with pytest.raises(ValueError, match="at most 13 bytes, got 14"):
        ring.append(b"x" * 14)
    assert ring.records() == [(0, body(0))]
    with pytest.raises(ValueError, match=f"takes {SLOT} bytes, and the buffer has {SLOT - 1}"):
        Ring(bytearray(SLOT - 1), RECORD_BYTES, MARKS)
    with pytest.raises(ValueError, match="at least 1 byte"):
        Ring(bytearray(100), 0)
    with pytest.raises(TypeError):
        Ring(bytes(buffer), RECORD_BYTES, MARKS).append(b"x")
    with mmap.mmap(-1, 4096) as memory:
        mapped = Ring(memory, 8)
        mapped.append(b"x")
        mapped.close()


def test_a_ring_of_a_process_that_is_killed_or_runs_on_is_read_without_its_help(tmp_path):
    """20 writers, each read while it writes and after SIGKILL: every record that is found is as it was written."""
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(bytes(64 * slot_bytes(40, 2)))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, env=dict(os.environ))
        assert writer.stdout.readline() == b"ready\n"
        with path.open("r+b") as file:
            ring = Ring(mmap.mmap(file.fileno(), 0), 40, marks=2)
        newest = -1
        while newest < 64 + number:
            live = ring.entries()
            check_written(live, late=len(live))
            newest = live[-1].sequence if live else newest
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        entries = ring.entries()
        check_written(entries, late=1)
        assert len(entries) == 64 - ring.torn and ring.torn <= 1
        assert [record.sequence for record in entries] == list(range(entries[0].sequence, entries[-1].sequence + 1))
        assert ring.lost == entries[0].sequence


def check_written(entries: list[RingRecord], late: int) -> None:
    """All is as it was written; the last `late` records may have been read before they were marked."""
    for position, record in enumerate(entries):
        assert record.body == b"%d " % record.sequence * 3
        pattern = record.sequence * 0x0101010101
        unmarked = [(0, 0), (pattern, 0)] if position >= len(entries) - late else []
        assert record.marks in [(pattern, ~pattern), *unmarked]
