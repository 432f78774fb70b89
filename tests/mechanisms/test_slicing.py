"""Slices and pieces, against a row whose elements are moved one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.classic.resharding import expected_moved
from minilib.mechanisms.sharding.slicing import IncompleteSlices, Piece, reslice, slices


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 8))
def test_slices_are_equal_contiguous_and_as_short_as_can_be(num_elements, num_shards, multiple):
    cut = slices(num_elements, num_shards, multiple)
    assert len(cut) == num_shards and cut[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in zip(cut, cut[1:], strict=False))
    (length,) = {stop - start for start, stop in cut}
    assert length % multiple == 0
    assert (length - multiple) * num_shards < num_elements <= length * num_shards or num_elements == length == 0


def test_slices_at_their_corners():
    assert slices(0, 3) == [(0, 0)] * 3
    assert slices(7, 1) == [(0, 7)]
    assert slices(2, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]  # the last two are padding
    assert slices(7, 3) == [(0, 3), (3, 6), (6, 9)]
    assert slices(7, 3, multiple=4) == [(0, 4), (4, 8), (8, 12)]
    for wrong in ((-1, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="got {}, {} and {}".format(*wrong)):
            slices(*wrong)


CUTS = st.tuples(st.integers(1, 9), st.integers(1, 8))


@given(st.integers(0, 100), CUTS, CUTS)
def test_pieces_carry_every_element_once_and_padding_never(num_elements, old, new):
    old_cut, new_cut = slices(num_elements, *old), slices(num_elements, *new)
    row = [*range(num_elements), *["padding"] * (old_cut[-1][1] - num_elements)]
    held = [row[start:stop] for start, stop in old_cut]
    got = [["padding"] * (stop - start) for start, stop in new_cut]
    pieces = reslice(num_elements, old_cut, new_cut)
    for piece in pieces:
        assert piece.length > 0
        source = held[piece.old_shard][piece.old_start : piece.old_start + piece.length]
        assert got[piece.new_shard][piece.new_start : piece.new_start + piece.length] == ["padding"] * piece.length
        got[piece.new_shard][piece.new_start : piece.new_start + piece.length] = source
    assert sum(got, []) == [*range(num_elements), *["padding"] * (new_cut[-1][1] - num_elements)]
    pairs = [(piece.old_shard, piece.new_shard) for piece in pieces]
    assert len(set(pairs)) == len(pairs), "what goes from one shard to another goes in one piece"
    assert len(pieces) <= max(0, len(old_cut) + len(new_cut) - 1)
    assert sum(piece.length for piece in pieces) == num_elements


@given(st.integers(0, 60), st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_slices_need_not_be_of_one_length(num_elements, old, new):
    def cut(inner):
        ends = sorted([0, *(end for end in inner if end < num_elements), num_elements])
        return list(zip(ends, ends[1:], strict=False))

    old_cut, new_cut = cut(old), cut(new)
    moved = []
    for piece in reslice(num_elements, old_cut, new_cut):
        start = old_cut[piece.old_shard][0] + piece.old_start
        assert start == new_cut[piece.new_shard][0] + piece.new_start
        assert start + piece.length <= min(old_cut[piece.old_shard][1], new_cut[piece.new_shard][1])
        moved += range(start, start + piece.length)
    assert moved == list(range(num_elements))


def test_four_ranks_to_three():
    assert reslice(7, slices(7, 4), slices(7, 3)) == [
        Piece(0, 0, 0, 0, 2),
        Piece(1, 0, 0, 2, 1),
        Piece(1, 1, 1, 0, 1),
        Piece(2, 1, 0, 1, 2),
        Piece(3, 2, 0, 0, 1),
    ]
    assert reslice(0, slices(0, 4), slices(0, 3)) == []
    assert reslice(1, slices(1, 4), slices(1, 1)) == [Piece(0, 0, 0, 0, 1)]


@pytest.mark.parametrize("old, new", [(4, 3), (4, 5), (2, 4), (1, 6), (3, 3)])
def test_what_travels_is_what_even_ranges_move(old, new):
    num_elements = 60
    pieces = reslice(num_elements, slices(num_elements, old), slices(num_elements, new))
    travels = sum(piece.length for piece in pieces if piece.old_shard != piece.new_shard)
    assert travels == expected_moved("range", old, new) * num_elements


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([(0, 4)], "slices end at 4 and there are 6 elements"),
        ([], "slices end at 0"),
        ([(0, 4), (5, 6)], "slice 1 is 5 to 6; it must begin at 4"),
        ([(0, 4), (3, 6)], "slice 1 is 3 to 6; it must begin at 4"),
        ([(1, 6)], "slice 0 is 1 to 6; it must begin at 0"),
        ([(0, 6), (6, 4)], "slice 1 is 6 to 4"),
    ],
)
def test_slices_that_do_not_cover_the_row_are_refused(wrong, said):
    with pytest.raises(IncompleteSlices, match=f"old {said}"):
        reslice(6, wrong, slices(6, 2))
    with pytest.raises(IncompleteSlices, match=f"new {said}"):
        reslice(6, slices(6, 2), wrong)
