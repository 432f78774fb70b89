"""Arrivals have the rate and the burstiness that they are asked for; a trace is replayed as it was written."""

import json
import math

import numpy as np
import pytest

from minilib.numbers.load_metrics import coefficient_of_variation
from minilib.serving.load.arrivals import (
    TRACE_BLOCK,
    Arrival,
    InvalidTrace,
    gamma_times,
    poisson_times,
    random_arrivals,
    read_trace,
)
from minilib.serving.request import InvalidRequest, SamplingParams

COUNT = 20_000


@pytest.mark.parametrize("cv", [0, 0.5, 1, 2, 4])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv):
    """Within four standard errors; that of the CV from the fourth moment of the gamma distribution."""
    gaps = np.diff([0, *gamma_times(COUNT, rate=5.0, cv=cv, seed=1)])
    assert (gaps >= 0).all() and gaps.mean() == pytest.approx(0.2, abs=4 * 0.2 * cv / math.sqrt(COUNT) + 1e-12)
    error = cv * math.sqrt((0.5 + cv**2) / COUNT)  # delta method: (1 + 2cv²)/2 to first order
    assert coefficient_of_variation(gaps) == pytest.approx(cv, abs=6 * error + 1e-9)


def test_poisson_counts_are_as_spread_as_their_mean():
    times = poisson_times(COUNT, rate=10.0, seed=2)
    counts = np.bincount(np.array(times, dtype=int))[:-1]
    assert counts.mean() == pytest.approx(10, rel=0.03) and counts.var() / counts.mean() == pytest.approx(1, abs=0.15)
    bursty = np.bincount(np.array(gamma_times(COUNT, 10.0, 3.0, seed=2), dtype=int))
    assert bursty.var() / bursty.mean() > 3


def test_a_seed_decides():
    assert poisson_times(5, 1.0, seed=3) == poisson_times(5, 1.0, seed=3) != poisson_times(5, 1.0, seed=4)
    assert poisson_times(0, 1.0) == [] and gamma_times(3, 2.0, 0) == [0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    "wrong", [(-1, 1.0, 1), (1, 0, 1), (1, math.inf, 1), (1, math.nan, 1), (1, 1.0, -1), (1, 1.0, math.nan)]
)
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(ValueError, match="count ≥ 0, rate > 0 and cv ≥ 0"):
        gamma_times(*wrong)


def test_random_arrivals_have_the_lengths_asked_for():
    load = random_arrivals([0.5, 1.0], [3, 7], [2, 9], vocab_size=11, seed=5)
    assert [(a.due, len(a.prompt_token_ids), a.params.max_tokens) for a in load] == [(0.5, 3, 2), (1.0, 7, 9)]
    assert all(0 <= token < 11 for a in load for token in a.prompt_token_ids)
    assert all(a.params.greedy and a.params.ignore_eos for a in load)
    with pytest.raises(ValueError, match="shorter|longer"):
        random_arrivals([0.5, 1.0], [3], [2, 9], vocab_size=11)


def test_what_cannot_arrive_is_refused():
    for due in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="time ≥ 0"):
            Arrival(due, [1], SamplingParams())
    with pytest.raises(InvalidRequest, match="one sample, got n=2"):
        Arrival(0, [1], SamplingParams(n=2))


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_a_trace_is_replayed_with_its_shared_prefixes(tmp_path):
    path = write(
        tmp_path / "trace.jsonl",
        {"timestamp": 0, "input_length": TRACE_BLOCK + 5, "output_length": 3, "hash_ids": [7, 8]},
        {"timestamp": 1500, "input_length": TRACE_BLOCK + 9, "output_length": 1, "hash_ids": [7, 9]},
        {"timestamp": 3000, "input_length": 4, "output_length": 2},
    )
    first, second, third = read_trace(path, vocab_size=50, speed=2.0)
    assert [one.due for one in (first, second, third)] == [0, 0.75, 1.5]
    assert [len(one.prompt_token_ids) for one in (first, second, third)] == [TRACE_BLOCK + 5, TRACE_BLOCK + 9, 4]
    assert [one.params.max_tokens for one in (first, second, third)] == [3, 1, 2]
    assert first.prompt_token_ids[:TRACE_BLOCK] == second.prompt_token_ids[:TRACE_BLOCK]
    assert first.prompt_token_ids[TRACE_BLOCK:] != second.prompt_token_ids[TRACE_BLOCK : TRACE_BLOCK + 5]
    assert all(0 <= token < 50 for token in first.prompt_token_ids)
    assert read_trace(path, 50, 2.0) == [first, second, third]


GOOD = {"timestamp": 0, "input_length": 4, "output_length": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {**GOOD, "timestamp": -1},
        {**GOOD, "timestamp": "soon"},
        {**GOOD, "timestamp": math.nan},
        {**GOOD, "input_length": 0},
        {**GOOD, "input_length": TRACE_BLOCK + 1, "hash_ids": [1]},
        {**GOOD, "output_length": 0},
        {"timestamp": 0, "input_length": 4},
        [1, 2],
        None,
    ],
)
def test_a_line_that_cannot_be_replayed_is_named(tmp_path, wrong):
    path = write(tmp_path / "trace.jsonl", GOOD, wrong)
    with pytest.raises(InvalidTrace, match=r"trace.jsonl, line 2: \w+Error|trace.jsonl, line 2: InvalidRequest"):
        read_trace(path, 50)


def test_half_a_line_and_no_speed(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"timestamp"')
    with pytest.raises(InvalidTrace, match="line 2: JSONDecodeError"):
        read_trace(path, 50)
    for speed in (0, -1, math.nan):
        with pytest.raises(ValueError, match="speed must be > 0"):
            read_trace(path, 50, speed)
    path.write_text("")
    assert read_trace(path, 50) == []
