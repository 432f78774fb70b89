"""Windows and epochs: what steps train on, and who has which part."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.training.batches import EpochWindows, RandomWindows, Share, batches_of
from minilib.training.config import TrainConfig


def config(batch_size=3, context=4, seed=0, sampling="epoch") -> TrainConfig:
    return TrainConfig(steps=1, batch_size=batch_size, context=context, seed=seed, sampling=sampling)


def ranks_of(num_tokens, of, world_size):
    return [batches_of(num_tokens, of, rank, world_size) for rank in range(world_size)]


@given(st.integers(0, 12), st.integers(1, 15))
def test_parts_are_the_share_in_order_and_even(size, count):
    parts = Share(list(range(size)), size).parts(count)
    assert len(parts) == count and list(chain(*parts)) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(5, 90), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_every_window_once_for_any_number_of_ranks(num_tokens, batch_size, world_size, seed):
    of = config(batch_size, seed=seed)
    windows = (num_tokens - 1) // 4
    steps = -(-windows // batch_size)
    one, several = EpochWindows(num_tokens, of, 0, 1), ranks_of(num_tokens, of, world_size)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert one.num_sequences(step) == epoch * windows + len(seen)
            shares = [each.draw(step) for each in several]
            together = list(chain(*(share.starts for share in shares)))
            assert {share.total for share in shares} == {len(together)}
            assert max(len(share.starts) for share in shares) - min(len(share.starts) for share in shares) <= 1
            assert together == one.draw(step).starts
            seen += together
        assert sorted(seen) == [4 * window for window in range(windows)]
        assert max(seen) + 5 <= num_tokens, "a window's last target is in the row"
        orders.append(seen)
    assert windows < 6 or orders[0] != orders[1]


@given(st.lists(st.integers(0, 40), max_size=12), st.sampled_from(["windows", "epoch"]))
def test_a_step_is_decided_by_its_number_alone(steps, sampling):
    """In whatever order steps are drawn: resumed, interrupted and repeated, on another number of ranks."""
    of = config(sampling=sampling)
    wandering = batches_of(30, of, 0, 1)
    for step in steps:
        several = [each.draw(step) for each in ranks_of(30, of, 2)]
        found = sorted(wandering.draw(step).starts)
        assert found == sorted(batches_of(30, of, 0, 1).draw(step).starts)
        assert found == sorted(chain(*(share.starts for share in several)))


def test_windows_stay_as_saved_runs_have_them():
    """A saved run goes on with the sequences that it would have had."""
    assert RandomWindows(200, config(6, 8), 0, 1).draw(3).starts == WINDOWS
    assert RandomWindows(200, config(6, 8), 1, 4).draw(3) == Share(WINDOWS[1::4], 6)
    assert RandomWindows(200, config(6, 8), 0, 1).num_sequences(7) == 42


WINDOWS = [106, 152, 121, 3, 184, 72]


def test_the_smallest_row():
    assert EpochWindows(5, config(), 0, 1).draw(9) == Share([0], 1)
    assert [each.draw(0) for each in ranks_of(5, config(), 2)] == [Share([0], 1), Share([], 1)]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="sampling is one of windows, epoch; got 'random'"):
        config(sampling="random")
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        TrainConfig(steps=1, accumulate=0)
    with pytest.raises(ValueError, match="got 5 backwards for 4 sequences"):
        TrainConfig(steps=1, batch_size=4, accumulate=5)
