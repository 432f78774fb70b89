"""A rank that computes slowly, or waits for its data, is named; a rank that waits for others is not."""

import pytest

from minilib.operations.diagnosis.step_record import PhaseTime
from minilib.operations.diagnosis.stragglers import pace_scores, slow_ranks, starved_loaders
from tests.operations.diagnosis.records import MS, record, steps_of


def from_step(step, ranks, own):
    return lambda rank, at: {"own": own} if at >= step and rank in ranks else {}


def test_a_healthy_job_has_no_finding():
    assert slow_ranks(steps_of()) == starved_loaders(steps_of()) == []


@pytest.mark.parametrize("rank", range(4))
def test_the_slow_rank_is_named_and_not_those_that_wait_for_it(rank):
    [found] = slow_ranks(steps_of(change=from_step(6, {rank}, {"forward": 17})))
    assert (found.kind, found.rank) == ("slow_rank", rank)
    assert starved_loaders(steps_of(change=from_step(6, {rank}, {"forward": 17}))) == []


def test_scores_are_those_of_other_ranks_and_of_the_ranks_own_past():
    slow, *others = pace_scores(steps_of(change=from_step(7, {0}, {"forward": 14})))  # 6 ms, then 18 ms
    assert (slow.relative, slow.individual) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert all((score.relative, score.individual) == (1, 1) for score in others)
    always = pace_scores(steps_of(change=from_step(0, {0}, {"forward": 14})))[0]
    assert (always.relative, always.individual) == (pytest.approx(1 / 3), 1)  # the past alone would not tell


def test_a_job_that_slows_down_as_a_whole_has_no_slow_rank():
    steps = steps_of(change=from_step(7, range(4), {"forward": 20}))
    assert slow_ranks(steps) == []
    assert all(score.individual < 0.7 for score in pace_scores(steps))


def test_time_without_a_core_and_in_collectives_is_not_the_ranks_own():
    assert PhaseTime(30, 10, 15, 5).own_ns == 10
    assert PhaseTime(10, 10, 5, 20).own_ns == 0
    assert record(0, 0).compute_ns == 6 * MS and record(0, 0).wait_ns == pytest.approx(13.6 * MS)


def test_a_difference_too_small_to_matter_is_none():
    steps = steps_of(change=lambda rank, step: {"own": {"forward": 4.9} if rank == 1 else {}})
    assert pace_scores(steps)[1].relative < 0.7 and slow_ranks(steps) == []


def test_few_steps_and_single_spikes_name_nobody():
    assert slow_ranks(steps_of(5, change=from_step(0, {1}, {"forward": 50}))) == []
    assert pace_scores([]) == starved_loaders([]) == []
    spike = steps_of(change=lambda rank, step: {"own": {"forward": 90 if (rank, step) == (2, 11) else 2}})
    assert slow_ranks(spike) == []


def test_a_rank_that_computes_in_its_data_phase_does_not_starve():
    steps = steps_of(change=lambda rank, step: {"own": {"data": 15}, "cpu_of_data": 14} if rank == 1 else {})
    assert starved_loaders(steps) == []
    assert PhaseTime(30, 10, 15, 0).asleep_ns == 5 and PhaseTime(10, 10, 5, 0).asleep_ns == 0


def test_the_starved_rank_is_named_or_the_whole_job():
    [found] = starved_loaders(steps_of(change=from_step(6, {3}, {"data": 15})))
    assert (found.kind, found.rank) == ("starved_loader", 3)
    [found] = starved_loaders(steps_of(change=from_step(6, range(4), {"data": 15})))
    assert (found.kind, found.rank) == ("starved_loader", None)
    assert slow_ranks(steps_of(change=from_step(6, {3}, {"data": 15}))) == []


@pytest.mark.parametrize("waits, kinds", [(6, []), (7, ["starved_loader"])])
def test_all_ranks_starve_if_they_wait_for_data_for_a_third_of_their_step(waits, kinds):
    steps = steps_of(change=from_step(0, range(4), {"data": waits}))  # of 20 ms; the processor takes 0.1 ms of it
    assert [found.kind for found in starved_loaders(steps)] == kinds
