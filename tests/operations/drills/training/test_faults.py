"""Faults are drawn from seeds: the same again, all kinds as often, healthy ones between."""

import random
from collections import Counter

import pytest

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.drills.score import ELSEWHERE, HEALTHY, score_drills
from minilib.operations.drills.training.fault import KINDS, SIZES, STEPS, InjectedFault, drawn_fault, fault_of_seed
from minilib.operations.drills.training.injector import STRIKES, Injector
from minilib.operations.drills.training.runs import DrillRun


@pytest.mark.parametrize("first", [0, 1000, 1234])
def test_220_seeds_in_a_row_have_10_faults_of_each_kind_and_100_healthy_runs(first):
    faults = [fault_of_seed(seed) for seed in range(first, first + 220)]
    counts = Counter(fault.kind if fault else HEALTHY for fault in faults)
    assert counts == dict.fromkeys(KINDS, 10) | {HEALTHY: 100}
    assert faults == [fault_of_seed(seed) for seed in range(first, first + 220)]
    ranks = Counter(fault.rank for fault in faults if fault)
    assert sorted(ranks) == [0, 1, 2, 3] and min(ranks.values()) > 15
    runs = "".join("h" if fault is None else "f" for fault in faults)
    assert "hhhh" not in runs and "ffff" not in runs  # healthy ones between


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_in_their_range_and_faults_leave_time_before_and_after(kind):
    for seed in range(100):
        fault = drawn_fault(kind, random.Random(seed))
        assert SIZES[kind].least <= fault.size <= SIZES[kind].most and 4 <= fault.step <= STEPS - 7
        assert not SIZES[kind].whole or fault.size == int(fault.size)
    assert kind in STRIKES or kind in ("slow_link", "full_disk")


@pytest.mark.parametrize("kind, rank, step", [("slow", 0, 0), ("slow_rank", 4, 0), ("slow_rank", -1, 0),
                                              ("slow_rank", 0, STEPS)])  # fmt: skip
def test_a_fault_that_is_none_is_refused(kind, rank, step):
    with pytest.raises(ValueError, match="got"):
        InjectedFault(kind, rank, step, 1.0)


def test_only_one_way_is_slow_and_only_from_the_step_on():
    injector = Injector(InjectedFault("slow_link", 3, 5, 4.0), 0)
    assert injector.link(3, 0).latency == 0
    injector._step = 5
    ways = {(src, dst): injector.link(src, dst).latency for src in range(4) for dst in range(4) if src != dst}
    assert [way for way, latency in ways.items() if latency] == [(3, 0)] and ways[3, 0] == 0.004


def made_up(kind=None, rank=1, *findings):
    return DrillRun(0, InjectedFault(kind, rank, 4, 1.0) if kind else None, findings)


def test_a_score_counts_kinds_and_ranks():
    score = score_drills([
        made_up("slow_rank", 1, Finding("slow_rank", 1, "")),
        made_up("slow_rank", 1, Finding("slow_rank", 2, "")),
        made_up("memory_leak", 1, Finding("slow_rank", 1, ""), Finding("memory_leak", 1, "")),
        made_up("hung_rank"),
        made_up("slow_link", 3, Finding("slow_link", 3, "", 0)),
        made_up("slow_link", 3, Finding("slow_link", 3, "", 1)),
        made_up(),
        made_up(None, 1, Finding("hung_rank", 1, "")),
    ])  # fmt: skip
    assert (score.faulty, score.healthy, score.false_alarms) == (6, 2, 1)
    assert (score.recall, score.precision) == (3 / 6, 3 / 7)
    assert score.confusion == {
        ("slow_rank", "slow_rank"): 1, ("slow_rank", ELSEWHERE): 1, ("memory_leak", "memory_leak"): 1,
        ("hung_rank", HEALTHY): 1, ("slow_link", "slow_link"): 1, ("slow_link", ELSEWHERE): 1,
        (HEALTHY, HEALTHY): 1, (HEALTHY, "hung_rank"): 1,
    }  # fmt: skip
    assert score_drills([]).recall == score_drills([]).precision == 1
