"""Boxes, shares and tables: every element once, whoever holds it."""

import math
import random

import numpy as np
import pytest

from minilib.operations.checkpoint.format.boxes import Box, boxes_of_range, overlap
from minilib.operations.checkpoint.format.table import HeldBox, StateMismatch, packed_table, unpacked_table
from minilib.operations.checkpoint.states.shares import packed_holdings, shares_of, unpacked_holdings


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 4, 1, 3), (3, 1), (0,), (2, 0, 3)])
def test_a_range_is_a_few_boxes_in_order(shape):
    whole = np.arange(math.prod(shape)).reshape(shape)
    for start in range(whole.size + 1):
        for stop in range(start, whole.size + 1):
            boxes = boxes_of_range(shape, start, stop)
            found = [whole[box.slices(Box.whole(shape))].reshape(-1) for box in boxes]
            assert np.array_equal(np.concatenate([*found, np.arange(0)]), np.arange(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1) and all(box.fits(shape) for box in boxes)


def test_a_range_beyond_the_tensor_is_refused():
    for start, stop in ((-1, 2), (2, 1), (0, 7)):
        with pytest.raises(ValueError, match=f"elements {start} to {stop} are not a range"):
            boxes_of_range((2, 3), start, stop)


def test_overlaps_are_those_of_sets_of_elements():
    chance = random.Random(3)
    for _ in range(300):
        one, other = (Box(*zip(*((chance.randrange(4), chance.randrange(4)) for _ in range(3)), strict=True))
                      for _ in range(2))  # fmt: skip
        masks = [np.zeros((8, 8, 8), dtype=bool) for _ in range(2)]
        for mask, box in zip(masks, (one, other), strict=True):
            mask[box.slices(Box.whole((8, 8, 8)))] = True
        both, expected = overlap(one, other), masks[0] & masks[1]
        assert (both.numel if both else 0) == expected.sum()
        if both:
            assert expected[both.slices(Box.whole((8, 8, 8)))].all()


def whole(name: str, *shape: int, dtype: str = "float32") -> HeldBox:
    return HeldBox(name, dtype, shape, Box.whole(shape))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_replicas_write_every_byte_once_and_equally_much(ranks):
    row = [whole("a", 5, 7), whole("b", 3), whole("step"), whole("c", 64, 3, dtype="bfloat16"), whole("empty", 0, 4)]
    shares = shares_of([row] * ranks)
    total = sum(held.nbytes for held in row)
    written = [sum(held.nbytes for held in share) for share in shares]
    assert sum(written) == total and max(written) - min(written) <= 8
    for held in row:
        mask = np.zeros(held.shape, dtype=int)
        for share in shares:
            for mine in share:
                if mine.name == held.name:
                    mask[mine.box.slices(held.box)] += 1
        assert (mask == 1).all()


def test_what_one_rank_alone_holds_it_writes():
    halves = [HeldBox("a", "float32", (4, 6), Box((row, 0), (2, 6))) for row in (0, 2)]
    shared = whole("b", 8)
    shares = shares_of([[halves[0], shared], [halves[1], shared], [shared]])
    assert halves[0] in shares[0] and halves[1] in shares[1]
    assert sum(held.nbytes for share in shares for held in share) == 4 * (24 + 8)
    assert unpacked_holdings(packed_holdings(halves)) == halves


@pytest.mark.parametrize(
    "holdings, said",
    [
        ([[whole("a", 3)], [whole("a", 4)]], r"a is float32 \(4,\) on rank 1, and float32 \(3,\) on rank 0"),
        ([[whole("a", 3)], [whole("a", 3, dtype="int32")]], "a is int32"),
        ([[HeldBox("a", "float32", (4,), Box((0,), (3,)))]], "ranks hold 3 of 4 elements"),
        ([[HeldBox("a", "float32", (4,), Box((0,), (3,)))], [HeldBox("a", "float32", (4,), Box((2,), (2,)))]],
         r"Box\(start=\(2,\), shape=\(1,\)\) is held twice"),
        ([[HeldBox("a", "float32", (4,), Box((0,), (2,)))], [HeldBox("a", "float32", (4,), Box((1,), (2,)))]],
         "is held twice"),  # as many elements as there are, and not all of them
        ([[HeldBox("a", "float32", (4,), Box((2,), (4,)))]], "is not within it"),
    ],
)  # fmt: skip
def test_holdings_that_are_no_whole_state_are_refused(holdings, said):
    with pytest.raises(StateMismatch, match=said):
        shares_of(holdings)


def test_a_dtype_that_torch_lacks_is_named():
    table = packed_table({})
    table["tensors"]["a"] = ["float3", [2], []]
    with pytest.raises(StateMismatch, match="float3"):
        unpacked_table(table)
