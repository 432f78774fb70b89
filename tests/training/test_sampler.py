"""Deals against the order of each epoch, cut by brute force; and torch's DistributedSampler where numbers divide."""

import re
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from minilib.mechanisms.sharding import RangePartitioner
from minilib.training.sampler import NothingToDeal, OtherDeal, ShardedSampler

FIRST_OF_SEED_0 = [32, 29, 13, 49, 14, 18, 30, 27]


def deal(num_samples, world_size, global_batch_size, **options):
    """The samplers of all ranks."""
    return [ShardedSampler(num_samples, world_size, rank, global_batch_size, **options) for rank in range(world_size)]


def order_of(num_samples, epoch, seed=0):
    return np.random.RandomState([seed, epoch]).permutation(num_samples).tolist()


def step(samplers):
    """One step of all ranks, after which they must agree on where they are."""
    batches = [sampler.next_batch() for sampler in samplers]
    for sampler in samplers:
        sampler.check_invariants()
        assert sampler.state_dict() == samplers[0].state_dict()
        assert len(sampler) == len(samplers[0])
    return batches


SIZES = st.integers(1, 30), st.integers(1, 8), st.integers(1, 12)


@given(*SIZES, st.booleans(), st.booleans())
def test_an_epoch_deals_its_order_once(num_samples, world_size, global_batch_size, shuffle, drop_last):
    if drop_last:
        num_samples = max(num_samples, global_batch_size)
    samplers = deal(num_samples, world_size, global_batch_size, seed=5, shuffle=shuffle, drop_last=drop_last)
    for epoch in (0, 1):
        order = order_of(num_samples, epoch, seed=5) if shuffle else list(range(num_samples))
        whole, rest = divmod(num_samples, global_batch_size)
        steps = whole + (rest > 0 and not drop_last)
        assert len(samplers[0]) == steps
        for number in range(steps):
            batches = step(samplers)
            assert sum(batches, []) == order[number * global_batch_size : (number + 1) * global_batch_size]
            sizes = [len(batch) for batch in batches]
            assert max(sizes) - min(sizes) <= 1
            who = RangePartitioner.even(sum(sizes), world_size)
            places = [who.owner(place) for place in range(sum(sizes))]
            assert places == [rank for rank, size in enumerate(sizes) for _ in range(size)]
        assert (samplers[0].epoch, samplers[0].position) == (epoch + 1, 0)


@given(
    st.integers(1, 30),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12), st.integers(0, 9)), max_size=6),
)
def test_changing_the_world_in_mid_epoch_loses_and_doubles_nothing(num_samples, seed, segments):
    dealt, state = [], ShardedSampler(num_samples, 1, 0, 1, seed=seed).state_dict()
    for world_size, global_batch_size, steps in segments:
        samplers = deal(num_samples, world_size, global_batch_size, seed=seed)
        for sampler in samplers:
            sampler.load_state_dict(state)
            assert sampler.state_dict() == state
        for _ in range(steps):
            dealt += chain(*step(samplers))
        state = samplers[0].state_dict()
    assert len(dealt) == state["epoch"] * num_samples + state["position"]
    orders = chain(*(order_of(num_samples, epoch, seed) for epoch in range(state["epoch"] + 1)))
    assert dealt == list(orders)[: len(dealt)]


@given(*SIZES, st.integers(1, 8))
def test_a_step_is_the_same_for_any_number_of_ranks(num_samples, world_size, global_batch_size, other):
    one, two = (deal(num_samples, size, global_batch_size) for size in (world_size, other))
    for _ in range(2 * len(one[0])):
        assert sum(step(one), []) == sum(step(two), [])


def test_small_numbers():
    assert [list(sampler) for sampler in deal(1, 3, 4)] == [[[0]], [[]], [[]]]
    assert [list(sampler) for sampler in deal(10, 3, 4, shuffle=False)] == [
        [[0, 1], [4, 5], [8]],
        [[2], [6], [9]],
        [[3], [7], []],
    ]
    assert [list(sampler) for sampler in deal(10, 3, 4, shuffle=False, drop_last=True)] == [
        [[0, 1], [4, 5]],
        [[2], [6]],
        [[3], [7]],
    ]


def test_seed_and_epoch_decide_the_order():
    def epochs(seed):
        sampler = ShardedSampler(50, 1, 0, 50, seed=seed)
        return [sampler.next_batch() for _ in range(3)]

    assert epochs(1) == epochs(1)
    orders = epochs(0) + epochs(1)
    assert len({tuple(order) for order in orders}) == 6
    assert epochs(0)[0][:8] == FIRST_OF_SEED_0, "a saved run would go on with other samples"


@pytest.mark.parametrize("num_samples, world_size", [(12, 1), (12, 3), (12, 12), (40, 8)])
def test_as_distributed_sampler_deals_where_numbers_divide(num_samples, world_size):
    samplers = deal(num_samples, world_size, 2 * world_size)
    for epoch in range(3):
        ours = [list(chain(*sampler)) for sampler in samplers]
        theirs = []
        for rank in range(world_size):
            sampler = DistributedSampler(range(num_samples), world_size, rank)
            sampler.set_epoch(epoch)
            theirs.append(list(sampler))
        for dealt in (ours, theirs):
            assert sorted(chain(*dealt)) == list(range(num_samples)), "disjoint, and all of them"
            assert {len(share) for share in dealt} == {num_samples // world_size}


def test_distributed_sampler_doubles_samples_where_ours_deals_uneven_shares():
    theirs = sorted(chain(*(DistributedSampler(range(10), 4, rank) for rank in range(4))))
    ours = sorted(chain(*(chain(*sampler) for sampler in deal(10, 4, 4))))
    assert (len(theirs), len(ours)) == (12, 10)
    assert ours == list(range(10))


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_a_summed_loss_over_all_tokens_has_the_gradient_of_one_rank(world_size):
    """What the docstring advises; the mean of means is off as soon as shares are uneven."""
    inputs, targets = torch.arange(1.0, 11).square(), torch.arange(10.0)
    for batches in zip(*deal(10, world_size, 5), strict=True):
        weights = [torch.zeros(1, requires_grad=True) for _ in range(world_size + 1)]
        whole = sum(batches, [])
        ((weights[-1] * inputs[whole] - targets[whole]) ** 2).mean().backward()
        for weight, mine in zip(weights[:-1], batches, strict=True):
            (((weight * inputs[mine] - targets[mine]) ** 2).sum() / len(whole)).backward()
        torch.testing.assert_close(sum(weight.grad for weight in weights[:-1]), weights[-1].grad)


def test_a_loader_takes_it_as_its_batch_sampler():
    data = torch.arange(100, 110)
    sampler, same = (ShardedSampler(10, 2, 1, 4) for _ in "ab")
    loader = DataLoader(data, batch_sampler=sampler)
    for _ in range(2):
        assert len(loader) == 3
        assert [batch.tolist() for batch in loader] == [[100 + number for number in batch] for batch in same]


def test_iteration_can_stop_and_go_on():
    stopped, whole = (ShardedSampler(10, 2, 0, 3) for _ in "ab")
    seen = list(islice(stopped, 2))
    assert (stopped.position, len(stopped)) == (6, 2)
    resumed = ShardedSampler(10, 2, 0, 3)
    resumed.load_state_dict(stopped.state_dict())
    assert [*seen, *resumed] == [*seen, *stopped] == list(whole)


def test_a_larger_batch_that_is_not_full_any_more_is_dropped_on_resuming():
    first = ShardedSampler(10, 1, 0, 3, drop_last=True)
    for _ in range(2):
        first.next_batch()
    larger = ShardedSampler(10, 1, 0, 5, drop_last=True)
    larger.load_state_dict(first.state_dict())
    assert (larger.epoch, larger.position) == (1, 0)
    larger.check_invariants()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_samples": 11}, "num_samples was 10, now 11"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"shuffle": False, "seed": 2}, "seed was 0, now 2; shuffle was True, now False"),
    ],
)
def test_a_position_in_another_deal_is_refused(change, said):
    state = ShardedSampler(10, 2, 0, 4).state_dict()
    other = ShardedSampler(**({"num_samples": 10, "world_size": 2, "rank": 0, "global_batch_size": 4} | change))
    with pytest.raises(OtherDeal, match=re.escape(said)):
        other.load_state_dict(state)


def test_a_state_that_is_none_is_refused():
    sampler = ShardedSampler(10, 2, 0, 4)
    sampler.next_batch()
    before = sampler.state_dict()
    for change in ({"position": 10}, {"position": -1}, {"epoch": -1}):
        with pytest.raises(OtherDeal, match="not in a deal of 10 samples"):
            sampler.load_state_dict(before | change)
    with pytest.raises(OtherDeal, match=r"has \['epoch', .*got \['position'\]"):
        sampler.load_state_dict({"position": 4})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "is the dict that state_dict() gave, got None, a NoneType"),
        ([0, 4], "got [0, 4], a list"),
        ("epoch", "got 'epoch', a str"),
        ({}, "got []"),
        ({None: 1, "epoch": 0}, "got ['None', 'epoch']"),
    ],
)
def test_a_state_of_another_kind_is_refused(state, said):
    with pytest.raises(OtherDeal, match=re.escape(said)):
        ShardedSampler(10, 2, 0, 4).load_state_dict(state)


@pytest.mark.parametrize("name", ["num_samples", "seed", "shuffle", "epoch", "position"])
@pytest.mark.parametrize("value", [None, "1", 1.0, [1], np.arange(2), float("nan"), torch.tensor([1, 2])])
def test_a_value_of_another_kind_is_refused_by_its_name(name, value):
    sampler = ShardedSampler(10, 2, 0, 4)
    before = sampler.state_dict()
    with pytest.raises(OtherDeal, match=f"{name} of a sampler's state is .*, got .*, a {type(value).__name__}"):
        sampler.load_state_dict(before | {name: value})
    with pytest.raises(OtherDeal, match="got (True|0), a (bool|int)"):
        sampler.load_state_dict(before | {name: 0 if name == "shuffle" else True})
    assert sampler.state_dict() == before
    sampler.check_invariants()


def test_numpys_whole_numbers_are_whole_numbers():
    sampler = ShardedSampler(10, 2, 0, 4)
    sampler.load_state_dict(sampler.state_dict() | {"epoch": np.int64(2), "position": np.int32(4)})
    assert sampler.state_dict() | {"epoch": 2, "position": 4} == sampler.state_dict()
    assert {type(sampler.epoch), type(sampler.position)} == {int}
    sampler.check_invariants()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(NothingToDeal, match="at least 1, got 0; is the corpus empty"):
        ShardedSampler(0, 1, 0, 1)
    with pytest.raises(NothingToDeal, match="3 samples do not fill a batch of 4"):
        ShardedSampler(3, 1, 0, 4, drop_last=True)
    with pytest.raises(ValueError, match="global_batch_size must be at least 1, got 0"):
        ShardedSampler(1, 1, 0, 0)
    for world_size, rank in ((2, 2), (2, -1), (0, 0)):
        with pytest.raises(ValueError, match=f"rank {rank} of {world_size}"):
            ShardedSampler(1, world_size, rank, 1)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed must be 0 to .*, got {seed}"):
            ShardedSampler(1, 1, 0, 1, seed=seed)


def test_invariants_see_damage():
    def damaged(name, value):
        sampler = ShardedSampler(4, 1, 0, 2)
        setattr(sampler, name, value)
        with pytest.raises(AssertionError):
            sampler.check_invariants()

    damaged("position", 4)
    damaged("position", -1)
    damaged("_order", np.array([0, 1, 1, 3]))
