"""Sizes and files: the odd cases of division, and writes that are interrupted."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilib.mechanisms.basics.arithmetic import ceil_div, next_power_of_two, round_up
from minilib.mechanisms.basics.checks import check_quantity, check_whole, is_whole
from minilib.mechanisms.basics.files import extend_with_zeros, mapped_anew, written_whole


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


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), 10**30])
def test_whole_numbers(value):
    check_whole("a size", value, 2)
    assert is_whole(value) and is_whole(-value) and not is_whole(-value, 0)


@pytest.mark.parametrize("value", [1, -2, True, 2.0, math.nan, math.inf, None, "2", [2], torch.tensor([2, 2])])
def test_no_whole_numbers(value):
    with pytest.raises(LookupError, match=r"a size is a whole number ≥ 2, got "):
        check_whole("a size", value, 2, LookupError)


@pytest.mark.parametrize("value", [1, 0.5, np.float64(2), 10**30])
def test_quantities(value):
    check_quantity("a time", value, above_zero=True)
    check_quantity("a rate", math.inf, finite=False)
    check_quantity("a time", 0)


@pytest.mark.parametrize("value", [-1, math.nan, -math.inf, math.inf, True, None, "2", [2], 1j])
def test_no_quantities(value):
    with pytest.raises(ValueError, match=r"a time is a finite number ≥ 0, got "):
        check_quantity("a time", value)
    with pytest.raises(ValueError, match=r"a time is a number > 0, got 0"):
        check_quantity("a time", 0, above_zero=True, finite=False)


def test_a_mapped_file_has_its_room_and_leaves_the_old_one_to_those_who_map_it(tmp_path):
    path = tmp_path / "ring"
    old = mapped_anew(path, 8192)
    old[:3] = b"old"
    new = mapped_anew(path, 70_000)
    assert bytes(new) == bytes(70_000) and bytes(old[:3]) == b"old"
    old[8191] = 1  # still there
    held = path.stat()
    assert held.st_size == 70_000 <= 512 * held.st_blocks  # no hole, for which there may be no room later


def test_a_file_without_room_is_told_by_name_and_not_left_behind(tmp_path):
    script = """
import errno, pathlib, resource, sys
from minilib.mechanisms.basics.files import extend_with_zeros, mapped_anew
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
path = pathlib.Path(sys.argv[1])
try:
    mapped_anew(path, 70_000)
except OSError as error:
    assert error.errno == errno.EFBIG and "70000 bytes more are needed" in str(error) and str(path) in str(error), error
    assert not path.exists()
    print("named")
"""
    told = subprocess.run([sys.executable, "-c", script, tmp_path / "ring"], capture_output=True, text=True, timeout=60)
    assert told.stdout == "named\n", told.stderr


def test_a_file_is_extended_and_its_content_stays(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"abc")
    with path.open("a+b") as file:
        extend_with_zeros(file, 2)
        extend_with_zeros(file, 5)
    assert path.read_bytes() == b"abc\0\0"
