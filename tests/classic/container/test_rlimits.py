"""The limits that every process may give itself: a promise refused, where a cgroup kills."""

import errno
import mmap
import os

import numpy as np
import psutil
import pytest

from minilib.classic.container import InvalidLimit, run_with_rlimits
from tests.classic.container import work
from tests.classic.container.work import MIB

INTERPRETER = 400 * MIB  # addresses that it reserves at most, whatever it has imported here


def test_addresses_are_refused_before_they_are_touched():
    result = run_with_rlimits(lambda: bytearray(2 * INTERPRETER), address_space=2 * INTERPRETER)
    assert result.status == 1 and "MemoryError" in result.output
    assert run_with_rlimits(lambda: len(bytearray(MIB)), address_space=2 * INTERPRETER).value == MIB


def test_mmap_says_enomem_and_the_process_goes_on():
    def reserve():
        try:
            mmap.mmap(-1, 2 * INTERPRETER)
        except OSError as error:
            return error.errno
        return 0

    assert run_with_rlimits(reserve, address_space=2 * INTERPRETER).value == errno.ENOMEM
    assert run_with_rlimits(reserve).value == 0


def test_processes_are_counted_for_a_user_and_root_is_not():
    def fork_as_somebody():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return work.fork_until_refused(most=2)

    assert run_with_rlimits(fork_as_somebody, processes=1).value == (0, errno.EAGAIN)
    if os.getuid() == 0:
        assert run_with_rlimits(lambda: work.fork_until_refused(most=2), processes=1).value == (2, None)


def test_what_it_forked_ends_with_it():
    assert run_with_rlimits(lambda: work.fork_until_refused(most=3)).value == (3, None)
    assert not psutil.Process().children(recursive=True)


def test_one_that_hangs_is_killed():
    result = run_with_rlimits(work.hang_with_a_child, timeout=1)
    assert result.timed_out and result.status == -9


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1G", 2**63])
def test_limits_that_are_no_counts_are_named(limit):
    for name in ("address_space", "processes"):
        with pytest.raises(InvalidLimit, match="a whole number"):
            run_with_rlimits(int, **{name: limit})


def test_a_limit_may_be_a_whole_number_of_numpy():
    assert run_with_rlimits(int, address_space=np.int64(1 << 33)).status == 0
