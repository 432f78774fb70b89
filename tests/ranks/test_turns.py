import time
from functools import partial

import pytest
import torch.distributed as dist

from minilib.ranks.launch import run
from minilib.ranks.turns import seconds_in_turns


def test_calls_take_turns_backwards_and_forwards_on_every_rank():
    def on_rank():
        made = []
        found = seconds_in_turns({name: partial(made.append, name) for name in "abc"}, turns=2, repeats=2, warm_up=1)
        return "".join(made), {name: len(times) for name, times in found.items()}

    assert run(on_rank, 2) == [("aabbcc" + "ccbbaa" + "aabbcc", {"a": 2, "b": 2, "c": 2})] * 2


def test_the_slowest_rank_counts_and_all_ranks_hear_of_it():
    def on_rank():
        return seconds_in_turns(
            {turn: lambda turn=turn: time.sleep(0.05 * (dist.get_rank() == turn)) for turn in (0, 1)}
        )

    first, second = run(on_rank, 2)
    assert first == second
    assert [len(times) for times in first.values()] == [5, 5]
    assert all(seconds >= 0.05 for times in first.values() for seconds in times)


def test_a_budget_adds_turns_as_many_on_every_rank():
    def on_rank():
        calls = []
        found = seconds_in_turns({"sleep": lambda: calls.append(time.sleep(0.02))}, turns=1, warm_up=0, budget=0.2)
        return len(calls), len(found["sleep"])

    first, second = run(on_rank, 2)
    assert first == second
    assert first[0] == first[1] and 2 <= first[0] <= 10


@pytest.mark.parametrize(
    ("calls", "options", "said"),
    [
        ({}, {}, "calls is empty"),
        ({"a": int}, {"turns": 0}, "turns ≥ 1.*turns=0"),
        ({"a": int}, {"repeats": 0}, "repeats ≥ 1.*repeats=0"),
        ({"a": int}, {"warm_up": -1}, "warm_up ≥ 0.*warm_up=-1"),
    ],
)
def test_what_cannot_be_timed_is_refused(calls, options, said):
    with pytest.raises(ValueError, match=said):
        seconds_in_turns(calls, **options)
