"""A segment gives back its longest valid beginning; a torn tail is cut, and damage to what was durable is named."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.journaling import (
    FRAME_BYTES,
    SEGMENT_BYTES,
    JournalDamaged,
    RecordDamaged,
    UnknownFormat,
    frame,
    scan,
    segment_header,
)
from minilib.mechanisms.journaling.segment import MAX_BODY

SALT = 0xC0FFEE11
GROUPS = [
    [b"first", b""],
    [b"the third one"],
    [b"x" * 40, b"fifth"],
]  # each was written once the one before was durable


def segment(groups, first=0, salt=SALT):
    """A segment of these groups, and where each record ends."""
    data, ends, sequence = segment_header(first, salt), [], first
    for group in groups:
        durable = sequence
        for body in group:
            data += frame(body, sequence, durable, salt)
            sequence += 1
            ends.append(len(data))
    return data, ends


def bodies(found):
    return [record.body for record in found.records]


ALL = list(itertools.chain(*GROUPS))


def test_what_was_framed_is_found():
    data, ends = segment(GROUPS, first=7)
    found = scan(data)
    assert bodies(found) == ALL and [record.end for record in found.records] == ends
    assert [record.sequence for record in found.records] == [7, 8, 9, 10, 11]
    assert (found.first, found.salt, found.next_sequence, found.end, found.torn_bytes) == (7, SALT, 12, len(data), 0)
    assert found.num_durable == 10 and found.durable_end == ends[2], "the last group has no witness"
    assert len(data) == SEGMENT_BYTES + sum(FRAME_BYTES + len(body) for body in ALL)


@pytest.mark.parametrize("groups", [[], [[b""]]])
def test_a_segment_of_no_record_or_an_empty_one(groups):
    found = scan(segment(groups)[0])
    assert len(found.records) == len(groups) and found.durable_end == SEGMENT_BYTES and found.torn_bytes == 0


def test_a_tail_is_torn_wherever_it_was_cut():
    data, ends = segment(GROUPS)
    for size in range(ends[2], len(data)):
        found = scan(data[:size])
        whole = sum(end <= size for end in ends)
        assert bodies(found) == ALL[:whole] and found.torn_bytes == size - found.end


def test_every_page_of_the_last_group_may_be_lost_alone():
    """Records behind a hole were written together with the lost ones: none was acknowledged, and the tail is cut."""
    data, ends = segment(GROUPS)
    tail = range(ends[2], len(data))
    for start, size in itertools.product(tail, (1, 8, 33)):
        stop = min(start + size, len(data))
        found = scan(data[:start] + bytes(stop - start) + data[stop:])
        hit = next((at for at in range(start, stop) if data[at]), len(data))  # the first byte that is another one now
        assert bodies(found) == ALL[: sum(end <= hit for end in ends)]


def test_damage_in_front_of_a_later_group_is_no_torn_tail():
    """Each bit of what was durable when the last group was written: an error by name, with the record."""
    data, ends = segment(GROUPS)
    for at in range(SEGMENT_BYTES, ends[2]):
        for bit in range(8):
            damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(RecordDamaged, match="was durable once") as raised:
                scan(damaged)
            assert raised.value.sequence == sum(end <= at for end in ends)
            assert raised.value.offset == ([SEGMENT_BYTES, *ends])[raised.value.sequence]


def test_damage_to_the_last_group_is_found_by_who_knows_better():
    data, ends = segment(GROUPS)
    damaged = data[:-1] + b"?"
    assert bodies(scan(damaged)) == ALL[:4]
    with pytest.raises(RecordDamaged, match="as the caller knows"):
        scan(damaged, known_durable=5)
    with pytest.raises(RecordDamaged, match="record 4"):
        scan(data[: ends[3]], known_durable=5)
    assert bodies(scan(data, known_durable=5)) == ALL


def test_a_damaged_header_is_an_error_and_never_an_empty_log():
    data, _ = segment(GROUPS)
    for at in range(SEGMENT_BYTES):
        for bit in range(8):
            with pytest.raises((JournalDamaged, UnknownFormat)):
                scan(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    for size in range(SEGMENT_BYTES):
        with pytest.raises(JournalDamaged, match=f"here are {size} bytes"):
            scan(data[:size])


def test_another_version_and_another_program_are_named(monkeypatch):
    with pytest.raises(UnknownFormat, match="SQLite"):
        scan(b"SQLite format 3\0" + bytes(100))
    monkeypatch.setattr("minilib.mechanisms.journaling.segment.VERSION", 2)
    newer = segment_header(0, SALT)
    monkeypatch.undo()
    with pytest.raises(UnknownFormat, match="version 2"):
        scan(newer)


def test_records_of_an_older_segment_never_pass():
    """A file that is used again has them behind its end; the salt tells them apart."""
    old, ends = segment(GROUPS, salt=1)
    new = segment_header(0, 2) + frame(GROUPS[0][0], 0, 0, 2)
    assert bodies(scan(new + old[len(new) :])) == [b"first"]
    assert len(new) == ends[0], "the next old record begins just where a new one would"


def test_a_record_out_of_turn_is_not_taken():
    data = segment_header(0, SALT) + frame(b"a", 0, 0, SALT) + frame(b"c", 2, 0, SALT)
    assert bodies(scan(data)) == [b"a"]
    with pytest.raises(RecordDamaged, match="record 1"):
        scan(segment_header(0, SALT) + frame(b"a", 0, 0, SALT) + frame(b"c", 2, 2, SALT))


def test_a_value_may_look_like_a_frame():
    """A torn record whose body holds a frame of this very segment is torn, and no witness to damage."""
    witness = frame(b"inner", 9, 9, SALT)
    torn = frame(witness + b"the end", 1, 1, SALT)
    begin = segment_header(0, SALT) + frame(b"a", 0, 0, SALT)
    for size in range(FRAME_BYTES, len(torn)):
        assert bodies(scan(begin + torn[:size])) == [b"a"]


def test_what_is_no_record_is_refused():
    with pytest.raises(ValueError, match="at most 67,108,864 bytes"):
        frame(bytes(MAX_BODY + 1), 0, 0, SALT)
    with pytest.raises(ValueError, match="0 to 3 are durable; got 4"):
        frame(b"", 3, 4, SALT)


@given(
    st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_a_scan_is_a_prefix_or_an_error(groups, salt, data):
    """Any bytes may follow what was durable; and any change of it is either harmless or named."""
    whole, ends = segment(groups, salt=salt)
    everything = list(itertools.chain(*groups))
    durable = len(everything) - len(groups[-1])
    keep = ends[durable - 1] if durable else SEGMENT_BYTES
    garbage = data.draw(st.binary(max_size=60))
    found = bodies(scan(whole[:keep] + garbage))
    assert found == everything[:durable]
    at = data.draw(st.integers(SEGMENT_BYTES, len(whole) - 1))
    changed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    hit = sum(end <= at for end in ends)
    if hit < durable:
        with pytest.raises(RecordDamaged):
            scan(changed)
    else:
        assert bodies(scan(changed)) == everything[:hit]
