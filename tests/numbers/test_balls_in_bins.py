"""Theory of balls in bins against every outcome of small games, and against seeded simulations of larger ones."""

import itertools
import math

import numpy as np
import pytest

from minilib.mechanisms.balancing import Random, TwoChoices, assign
from minilib.numbers.balls_in_bins import expected_max_load, expected_max_over_mean, fluid_limit


@pytest.mark.parametrize("num_balls, num_bins", [(0, 3), (1, 1), (5, 1), (1, 4), (3, 2), (4, 3), (5, 4), (7, 3)])
def test_one_choice_is_exact(num_balls, num_bins):
    games = itertools.product(range(num_bins), repeat=num_balls)
    fullest = [max(game.count(b) for b in range(num_bins)) for game in games]
    assert expected_max_load(num_balls, num_bins) == pytest.approx(np.mean(fullest), rel=1e-9)


@pytest.mark.parametrize("num_balls, num_bins", [(16, 16), (64, 64), (128, 32), (32, 8)])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_choices_against_simulation(num_balls, num_bins, d):
    policies = [Random(seed) if d == 1 else TwoChoices(seed, d) for seed in range(150)]
    fullest = [max(assign(policy, range(num_balls), num_bins)) for policy in policies]
    error = 3 * np.std(fullest) / len(fullest) ** 0.5  # of the simulation itself
    assert abs(np.mean(fullest) - expected_max_load(num_balls, num_bins, d)) < error + (0.04 * np.mean(fullest))


def test_one_choice_of_many_balls():
    rng = np.random.default_rng(0)
    fullest = rng.multinomial(4_000, [1 / 16] * 16, size=4000).max(axis=1)
    assert expected_max_load(4_000, 16) == pytest.approx(fullest.mean(), rel=1e-3)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_fluid_limit_keeps_all_balls(d):
    shares = fluid_limit(3.0, d)
    assert shares[0] == 1 and (np.diff(shares) <= 0).all()
    assert shares[1:].sum() == pytest.approx(3.0, rel=1e-6)
    if d == 1:  # Poisson
        tail = 1 - np.cumsum([math.exp(-3) * 3**k / math.factorial(k) for k in range(12)])
        assert shares[1:13] == pytest.approx(tail, abs=1e-6)


def test_the_laws_for_large_n_show():
    one, two = ([expected_max_load(n, n, d) for n in (2**6, 2**12)] for d in (1, 2))
    assert two[1] - two[0] < 1 < 2 < one[1] - one[0], "ln ln n hardly grows"
    assert expected_max_over_mean(256, 64, 2) == expected_max_load(256, 64, 2) / 4


def test_games_that_make_no_sense_are_refused():
    for arguments in ((-1, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ValueError, match="needs num_balls"):
            expected_max_load(*arguments)
    for arguments in ((-1.0, 2), (1.0, 0)):
        with pytest.raises(ValueError, match="needs mean_load"):
            fluid_limit(*arguments)
    with pytest.raises(ValueError, match="a ball or more, got 0"):
        expected_max_over_mean(0, 4)
