"""Fsyncs, bytes and what recovery reads are counted, and follow the closed forms."""

import math

import pytest

from minilib.classic.write_ahead_log.costs import PAGE, bytes_per_record, recovery_costs, write_costs


@pytest.mark.parametrize("group", [1, 2, 7, 64, 100])
def test_a_group_shares_one_fsync(group):
    costs = write_costs(100, group)
    assert costs.records == 100 and costs.payload == 100 * 108
    assert costs.syncs == math.ceil(100 / group) and costs.syncs_per_record == costs.syncs / 100
    assert costs.bytes_written == 100 * bytes_per_record(8, 100) == 100 * (32 + 5 + 108)


@pytest.mark.parametrize("group", [1, 4, 32])
def test_pages_are_written_whole(group):
    """Groups of g records of r bytes behind a header of 28: each touches the pages from its first byte to its last."""
    record, costs = bytes_per_record(8, 100), write_costs(64, group)
    pages = 0
    for start in range(0, 64, group):
        first, last = 28 + start * record, 28 + (start + group) * record - 1
        pages += last // PAGE - first // PAGE + 1
    assert costs.bytes_flushed == pages * PAGE


def test_larger_groups_write_less():
    amplifications = [write_costs(64, group).amplification for group in (1, 2, 4, 8, 16, 32, 64)]
    assert amplifications == sorted(amplifications, reverse=True)
    assert amplifications[0] > 10 * amplifications[-1] and amplifications[-1] > 1


def test_snapshots_cost_more_bytes_and_fsyncs():
    plain, with_snapshots = write_costs(64, 8), write_costs(64, 8, snapshot_every=32)
    assert with_snapshots.syncs == plain.syncs + 6 + 7, "the second one removes the first one"
    assert with_snapshots.bytes_written > plain.bytes_written + 96 * 108


def test_recovery_reads_the_snapshot_and_what_is_behind_it():
    lengths = [0, 1, 10, 100, 1000]
    costs = recovery_costs(20, lengths)
    assert [cost.replayed for cost in costs] == lengths
    base = costs[0].bytes_read
    assert [cost.bytes_read - base for cost in costs] == [length * bytes_per_record(8, 100) for length in lengths]
    assert base > 20 * 108 and all(cost.seconds > 0 for cost in costs)


def test_no_records_and_no_group_are_refused():
    for arguments in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="1 or more, got"):
            write_costs(*arguments)
