"""Conversations whose state stays: the tokens of transformers always, and as many computed as are not held."""

import copy

import pytest
import torch

from minilib.mechanisms.caching import Fifo, Lru
from minilib.serving.cache.sequences import SequenceTooLong
from minilib.serving.generation import tokens_with_cache
from minilib.serving.request import InvalidRequest
from minilib.serving.sessions import ModelSessions
from tests.serving.served import POSITIONS, greedy, models, prompt

PLENTY = 10**9


def served(memory=PLENTY, eviction=Lru):
    return ModelSessions(models()[1], memory, eviction())


def slots(count):
    """Bytes of so many slots; a cache has as many as its first step needs, and twice as many when it has to grow."""
    return count * models()[1].config.kv_values_per_token * 8


def test_each_turn_computes_what_is_not_held_and_replies_are_those_of_transformers():
    sessions, held, history = served(), {}, {name: list(prompt(length)) for name, length in (("a", 5), ("b", 12))}
    for turn in range(4):
        for name in history:
            reply = sessions.reply(name, history[name], 3)
            assert reply.token_ids == [list(greedy(tuple(history[name]), 3))]
            assert reply.tokens_computed == tokens_with_cache(len(history[name]), 3, held.get(name, 0))
            held[name] = len(history[name]) + 2
            history[name] += [*reply.token_ids[0], *prompt(turn + 1, seed=turn)]
        sessions.sessions.check_invariants()
    assert (sessions.sessions.hits, sessions.sessions.misses, sessions.num_lost) == (6, 2, 0)


@pytest.mark.parametrize("lose", ["restart", "evict", "no memory", "another's", "edited"])
def test_losing_state_costs_time_and_never_truth(lose):
    memory = {"evict": slots(14), "no memory": 0}.get(lose, PLENTY)
    sessions, first = served(memory), list(prompt(6))
    first += sessions.reply("a", first, 3).token_ids[0]
    if lose == "restart":
        sessions.restart()
        assert sessions.sessions.used == len(sessions.sessions) == 0
    elif lose == "evict":
        sessions.reply("b", prompt(7), 2)
        assert list(sessions.sessions) == ["b"]
    elif lose == "another's":
        sessions.reply("a", prompt(30), 2)
    elif lose == "edited":
        first[1] = (first[1] + 1) % 97
    reply = sessions.reply("a", first, 4)
    assert reply.token_ids == [list(greedy(tuple(first), 4))]
    assert reply.tokens_computed == tokens_with_cache(len(first), 4)
    assert sessions.num_lost == {"another's": 2, "edited": 1}.get(lose, 0)
    sessions.sessions.check_invariants()


def test_the_policy_chooses_who_is_forgotten():
    for eviction, kept in ((Lru, ["a", "c"]), (Fifo, ["b", "c"])):
        sessions, history = served(slots(10 + 8), eviction), {}
        for name, length in (("a", 5), ("b", 6)):
            history[name] = [*prompt(length), *sessions.reply(name, prompt(length), 1).token_ids[0]]
        sessions.reply("a", history["a"], 1)
        sessions.reply("c", prompt(8), 1)
        assert sorted(sessions.sessions) == kept


def test_what_cannot_be_served_leaves_state_as_it_was():
    sessions, history = served(), list(prompt(8))
    history += sessions.reply("a", history, 2).token_ids[0]
    for bad, error in (([], InvalidRequest), ([*history, 97], InvalidRequest)):
        with pytest.raises(error):
            sessions.reply("a", bad, 2)
    with pytest.raises(SequenceTooLong):
        sessions.reply("a", history, POSITIONS)
    assert sessions.reply("a", history, 2).tokens_computed == tokens_with_cache(10, 2, 9)


def test_a_step_that_fails_leaves_state_that_is_good():
    model = copy.deepcopy(models()[1])
    sessions, history = ModelSessions(model, PLENTY, Lru()), list(prompt(8))
    history += sessions.reply("a", history, 2).token_ids[0]
    weight = model.embed.weight.data
    sound = weight.clone()
    weight[history[-1]] = torch.nan
    with pytest.raises(FloatingPointError):
        sessions.reply("a", history, 2)
    weight.copy_(sound)
    reply = sessions.reply("a", history, 2)
    assert reply.token_ids == [list(greedy(tuple(history), 2))] and reply.tokens_computed == 2
