"""Verdicts on recordings that are made by hand: each trap of a real analysis is one of them."""

from dataclasses import replace

import pytest

from minilib.operations.flight_recorder import RecordedGroup, analyse
from tests.operations.flight_recorder.made import DP, EVEN, LEFT, ODD, RIGHT, Job


def verdict(job, **options):
    found = analyse(job.dumps(**{k: options.pop(k) for k in ("without", "keep") if k in options}), **options)
    return found.kind, found.ranks, found.group, found.sequence


def test_all_that_ended_is_healthy_and_so_is_what_began_just_now():
    job = Job().call(range(4), DP).call((0, 1), LEFT).call(range(4), DP)
    assert verdict(job) == ("healthy", (), None, -1)
    job.call((0, 1, 3), DP, "started", at=0.4)
    assert verdict(job) == ("healthy", (), None, -1)
    assert verdict(job, patience=0.3) == ("not_entered", (2,), DP, 2)
    assert verdict(Job()) == ("healthy", (), None, -1)


@pytest.mark.parametrize("state", ["started", "failed"])
@pytest.mark.parametrize("hung", range(4))
def test_the_rank_that_has_not_entered_is_named_and_not_those_that_report(state, hung):
    others = set(range(4)) - {hung}
    job = Job().call(range(4), DP).call(others, DP, state, at=30, took=20)
    assert verdict(job) == ("not_entered", (hung,), DP, 1)
    said = analyse(job.dumps()).evidence
    assert f"rank {hung} has not called" in said and f"(train.py:{min(others)} f)" in said
    assert f"ranks {', '.join(map(str, sorted(others)))} waited" in said
    assert f"last call of rank {hung} is all_reduce sum float32 (4,), call 0" in said


def test_two_may_be_missing():
    job = Job().call((0, 3), DP, "started", at=9)
    assert verdict(job) == ("not_entered", (1, 2), DP, 0)
    assert "called nothing" in analyse(job.dumps()).evidence


def test_who_fails_at_last_because_it_came_too_late_is_at_fault():
    job = Job().call((0, 1, 3), DP, "failed", at=30, took=20).call((2,), DP, "failed", at=5, took=0.1)
    assert verdict(job) == ("not_entered", (2,), DP, 0)


@pytest.mark.parametrize(
    "other",
    [{"op": "all_gather"}, {"shape": (4, 1)}, {"dtype": "float16"}, {"reduce_op": "max"}, {"root": 1}],
)
@pytest.mark.parametrize("odd", range(4))
def test_a_call_unlike_the_others_is_found_with_both_lines_of_code(other, odd):
    job = Job().call(range(4), DP).call(set(range(4)) - {odd}, DP, "failed").call((odd,), DP, "failed", **other)
    assert verdict(job) == ("mismatch", (odd,), DP, 1)
    said = analyse(job.dumps()).evidence
    assert f"train.py:{odd} f" in said and f"train.py:{(odd + 1) % 4} f" in said


def test_of_two_ranks_nobody_can_tell_which_is_wrong():
    job = Job().call((0,), LEFT, "failed").call((1,), LEFT, "failed", shape=(5,))
    assert verdict(job) == ("mismatch", (0, 1), LEFT, 0)
    assert "as many" in analyse(job.dumps()).evidence


def test_parts_of_all_to_all_differ_and_that_is_no_mismatch():
    job = Job()
    for rank in range(4):
        job.call((rank,), DP, op="all_to_all", shape=(rank, 9 - rank))
    assert verdict(job)[0] == "healthy"


def test_a_mismatch_that_ended_well_counts_and_the_first_one_is_told():
    job = Job().call((0, 1, 2), DP).call((3,), DP, root=1).call(range(4), DP).call((0, 1, 2), DP).call((3,), DP, root=2)
    assert verdict(job) == ("mismatch", (3,), DP, 0)


def test_numbers_are_those_of_a_group_and_two_groups_have_one_name():
    job = Job().call((0, 1), LEFT).call((0, 1), LEFT).call((2, 3), RIGHT, shape=(9,))
    assert verdict(job)[0] == "healthy"
    job.call((2,), RIGHT, "started", at=50)
    assert verdict(job) == ("not_entered", (3,), RIGHT, 1)


def test_who_waits_in_another_group_is_not_the_one_to_blame():
    """Rank 0 waits for rank 1, which waits for rank 3 in another group, which is nowhere."""
    job = Job().call((0,), LEFT, "started", at=50).call((1,), ODD, "started", at=40)
    assert verdict(job) == ("not_entered", (3,), ODD, 0)


def test_a_rank_whose_background_waits_can_be_elsewhere_itself():
    """Rank 1 has a call in the background that waits for rank 3; but rank 1 itself does not wait, and rank 0 does."""
    job = Job().call((0,), LEFT, "started", at=50)
    job.call((1,), ODD, "started", at=60, asynchronous=True, waiting=False).call((3,), ODD, "started", at=60)
    assert verdict(job) == ("not_entered", (1,), LEFT, 0)


def test_two_groups_entered_in_different_orders_are_a_circle():
    job = Job().call((0,), LEFT, "started", at=50).call((1,), ODD, "started", at=50)
    job.call((3,), RIGHT, "started", at=50).call((2,), EVEN, "started", at=50)
    found = analyse(job.dumps())
    assert (found.kind, found.ranks) == ("deadlock", (0, 1, 2, 3))
    assert "rank 0 waits in" in found.evidence and "for rank 1, rank 1 waits in" in found.evidence
    other = RecordedGroup("ep", (0, 1))
    job = Job().call((0, 1), LEFT).call((0,), LEFT, "failed", at=9, took=3).call((1,), other, "failed", at=9, took=3)
    assert verdict(job) == ("deadlock", (0, 1), LEFT, 1)


def test_rings_of_different_length_and_overwritten_calls():
    job = Job()
    for _ in range(20):
        job.call(range(4), DP).call((0, 1), LEFT)
    assert verdict(job, keep=(40, 3, 1, 1))[0] == "healthy"
    job.call((0, 1, 3), DP, "started", at=9)
    for _ in range(9):
        job.call((2, 3), RIGHT)
    assert verdict(job, keep=(40, 1, 2, 2)) == ("not_entered", (2,), DP, 20)
    assert verdict(job, keep=(1, 1, 1, 1)) == ("not_entered", (2,), DP, 20)


def test_a_rank_without_a_dump():
    job = Job().call(range(4), DP).call((0, 1, 3), DP, "started", at=9)
    assert verdict(job, without=(2,)) == ("not_entered", (2,), DP, 1)
    assert "left no dump" in analyse(job.dumps(without=(2,))).evidence
    assert verdict(job, without=(1,)) == ("not_entered", (2,), DP, 1)  # what is known goes first
    assert verdict(Job().call(range(4), DP), without=(1,))[0] == "healthy"


def test_a_collective_that_failed_and_was_retried():
    again = replace(DP, generation=1)
    job = Job().call(range(4), DP).call(range(4), DP, "failed", at=400, took=30).call(range(4), again)
    assert verdict(job)[0] == "healthy"
    job.call((0, 1, 2), again, "started", at=9)
    assert verdict(job) == ("not_entered", (3,), again, 1)
    in_the_same_group = Job().call(range(4), DP, "failed", at=400, took=30).call(range(4), DP)
    assert verdict(in_the_same_group)[0] == "healthy"
    refused = Job().call((2,), DP, "refused", shape=(99,)).call(range(4), DP)
    assert verdict(refused)[0] == "healthy"


def test_a_group_of_one_waits_for_nobody():
    alone = RecordedGroup("ep", (2,))
    assert verdict(Job().call((2,), alone, "started", at=99))[0] == "healthy"


def test_a_process_that_is_gone_while_others_live_is_dead():
    job = Job().call(range(4), DP).call((0, 1, 3), DP, "started", at=9)
    job.changes = {2: {"process": ""}}
    assert verdict(job) == ("dead", (2,), DP, 1)
    job.changes = {2: {"process": "", "closed": True}}
    assert verdict(job) == ("not_entered", (2,), DP, 1)
    assert "ended well" in analyse(job.dumps()).evidence
    job.changes = {rank: {"process": ""} for rank in range(4)}
    assert verdict(job) == ("not_entered", (2,), DP, 1)  # all are gone by now, so that says nothing
    assert verdict(job, dead=(2,)) == ("dead", (2,), DP, 1)
    assert verdict(job, dead=(2,), without=(2,)) == ("dead", (2,), DP, 1)
    assert verdict(Job().call(range(4), DP), dead=(1,)) == ("dead", (1,), None, -1)


def test_who_died_after_its_call_had_failed_is_a_victim():
    job = Job().call((0, 1), DP, "failed", at=9, took=3).call((3,), DP, "started", at=9)
    job.changes = {0: {"process": ""}, 1: {"process": ""}}
    assert verdict(job) == ("not_entered", (2,), DP, 0)


def test_who_died_within_a_collective_is_dead_and_who_is_stopped_there_is_stuck():
    job = Job().call(range(4), DP, "started", at=9)
    job.changes = {2: {"process": ""}}
    assert verdict(job) == ("dead", (2,), DP, 0)
    job.changes = {2: {"process": "T"}}
    assert verdict(job) == ("stuck", (2,), DP, 0)
    job.changes = {}
    assert verdict(job) == ("stuck", (0, 1, 2, 3), DP, 0)


def test_who_came_long_after_the_others_is_slow():
    job = Job().call(range(4), DP)
    job.call((0, 1, 3), DP, took=3.0).call((2,), DP, took=0.1).call(range(4), DP)
    assert verdict(job) == ("slow", (2,), DP, 1)
    assert verdict(job, patience=5)[0] == "healthy"
    job.call((0, 2, 3), DP, took=2.0).call((1,), DP, took=0.1)
    assert verdict(job) == ("slow", (2,), DP, 1), "the worst of several, not the last"
    job.call((0, 1, 2), DP, "started", at=9)
    assert verdict(job) == ("not_entered", (3,), DP, 4)  # what hangs goes first
    broadcast = (
        Job().call((0, 1), DP, took=0.0, op="broadcast", root=0).call((2, 3), DP, took=4.0, op="broadcast", root=0)
    )
    assert verdict(broadcast)[0] == "healthy"  # whether the root or rank 1 was late is not recorded


def test_dumps_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        analyse([])
    with pytest.raises(ValueError, match=r"ranks \[0, 0\]"):
        analyse([Job().dumps()[0]] * 2)
    with pytest.raises(ValueError, match="patience"):
        analyse(Job().dumps(), patience=0)
