"""Sizes and files: the odd cases of division, and writes that are interrupted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two, round_up
from minilib.mechanisms.basics.files import written_whole


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_pieces_hold_the_amount_and_one_fewer_do_not(amount, size):
    pieces = ceil_div(amount, size)
    assert (pieces - 1) * size < amount <= pieces * size or amount == pieces == 0
    assert round_up(amount, size) == pieces * size


def test_dividing_by_nothing_is_an_error():
    with pytest.raises(ZeroDivisionError):
        ceil_div(3, 0)


@given(st.integers(-5, 2**40))
def test_the_next_power_of_two_is_the_smallest_that_is_enough(amount):
    power = next_power_of_two(amount)
    assert math.log2(power).is_integer() and power >= amount
    assert power == 1 or power // 2 < amount


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "figures.json"
    with written_whole(path) as place:
        place.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as place:
        place.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as place:
        place.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
