"""NaN and who brought it, spikes, leaks, odd replicas: the rank is named, and what only follows from it is not."""

import math
import random

import pytest

from minilib.operations.diagnosis.numbers import loss_spikes, memory_leaks, nan_ranks, spikes
from minilib.operations.diagnosis.replicas import odd_replicas
from tests.operations.diagnosis.records import steps_of

NAN, MIB = float("nan"), 2**20


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_the_first_rank_with_a_nan_is_named_though_all_have_one_in_the_end(bad):
    def change(rank, step):
        return {"own_grad_norm": bad if step > 5 or (rank, step) == (2, 5) else 1.0, "loss": bad if step > 5 else 3.0}

    [found] = nan_ranks(steps_of(change=change))
    assert (found.kind, found.rank) == ("nan_from_one_rank", 2) and "step 5" in found.evidence


def test_a_nan_of_all_ranks_at_once_is_nobodys():
    [found] = nan_ranks(steps_of(change=lambda rank, step: {"own_grad_norm": NAN if step > 5 else 1.0}))
    assert (found.kind, found.rank) == ("nan_everywhere", None)


def test_numbers_that_nobody_looked_at_are_no_finding():
    assert nan_ranks(steps_of(change=lambda rank, step: {"own_grad_norm": None})) == nan_ranks(steps_of()) == []


def falling(count=200, seed=0):
    chance = random.Random(seed)
    return [3 + 5 * math.exp(-step / 30) + chance.gauss(0, 0.05) for step in range(count)]


def test_a_spike_is_found_and_a_warm_up_is_none():
    values = falling()
    assert spikes(values) == []
    values[120] = 9.0
    assert spikes(values) == [120]
    rising = [min(1.0, step / 20) + 0.01 * (step % 3) for step in range(60)]  # a norm that grows from 0
    assert spikes(rising[4:]) == []
    assert spikes([NAN, *falling(20)]) == [0] and spikes([]) == spikes([1.0]) == []


def test_several_spikes_do_not_hide_each_other():
    values = falling()
    for position in (100, 101, 102, 150):
        values[position] = 50.0
    assert spikes(values) == [100, 101, 102, 150]


def test_spikes_never_cry_over_a_hundred_healthy_curves():
    assert [seed for seed in range(100) if spikes(falling(seed=seed))] == []


def test_the_kind_of_a_spike_says_of_what():
    found = loss_spikes(steps_of(change=lambda rank, step: {"grad_norm": 40.0 if step == 11 else 1.0}))
    assert [(finding.kind, finding.rank) for finding in found] == [("grad_norm_spike", None)]


def growing(by, start=0, rank=1):
    return lambda at, step: {"rss_bytes": 100 * MIB + (at == rank) * max(0, step - start) * by}


def test_the_leaking_rank_is_named():
    [found] = memory_leaks(steps_of(change=growing(3 * MIB, 6)))
    assert (found.kind, found.rank) == ("memory_leak", 1) and "3.0 MiB" in found.evidence


def test_memory_that_all_take_that_comes_once_or_trickles_is_no_leak():
    assert memory_leaks(steps_of()) == memory_leaks(steps_of(3, change=growing(9 * MIB))) == []
    assert memory_leaks(steps_of(change=lambda rank, step: {"rss_bytes": step * 9 * MIB})) == []
    assert memory_leaks(steps_of(change=lambda rank, step: {"rss_bytes": 99 * MIB * (rank == 1 and step > 9)})) == []
    assert memory_leaks(steps_of(change=growing(MIB // 2))) == []


def sums(rank, step, odd, names, since=5):
    return {"checksums": {name: 7 + (rank == odd and step >= since and name in names) for name in "abc"}}


def test_one_tensor_of_one_rank_is_a_flipped_bit_and_several_are_another_update():
    [found] = odd_replicas(steps_of(change=lambda rank, step: sums(rank, step, 3, "b")))
    assert (found.kind, found.rank) == ("flipped_bit", 3) and "step 5" in found.evidence
    [found] = odd_replicas(steps_of(change=lambda rank, step: sums(rank, step, 0, "abc")))
    assert (found.kind, found.rank) == ("desynchronised_replica", 0)


def test_of_two_replicas_both_are_named_and_of_one_none():
    found = odd_replicas(steps_of(ranks=2, change=lambda rank, step: sums(rank, step, 1, "b")))
    assert [finding.rank for finding in found] == [0, 1]
    assert odd_replicas(steps_of(ranks=1)) == odd_replicas(steps_of()) == []


def test_steps_without_a_check_are_passed_over():
    def change(rank, step):
        return sums(rank, step, 2, "a") if step % 4 == 0 else {"checksums": {}}

    [found] = odd_replicas(steps_of(change=change))
    assert found.rank == 2 and "step 8" in found.evidence
