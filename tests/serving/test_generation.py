"""One loop with a cache and without: the tokens of the engine and of transformers, and as many computed as counted."""

import copy

import pytest
import torch

from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cache.sequences import NotAnExtension, SequenceTooLong
from minilib.serving.generation import generate, tokens_with_cache, tokens_without_cache
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest
from tests.model import oracle
from tests.serving.served import POSITIONS, greedy, likeliest, models, prompt

LENGTHS = (3, 17, 1, 30)


def new_cache(batch_size=1, max_length=None):
    return ContiguousCache(models()[1].config, batch_size, max_length, torch.float64)


@pytest.fixture
def embedded():
    """How many tokens have gone into the model, step by step, counted by the model itself."""
    counts = []
    handle = models()[1].embed.register_forward_hook(lambda module, inputs, out: counts.append(inputs[0].numel()))
    yield counts
    handle.remove()


@pytest.mark.parametrize("lengths", [(1,), (9,), LENGTHS], ids=str)
@pytest.mark.parametrize("new", [1, 2, 12])
def test_tokens_are_those_of_the_engine_and_of_transformers(lengths, new, embedded):
    model, prompts = models()[1], [prompt(length) for length in lengths]
    expected = [list(greedy(tokens, new)) for tokens in prompts]
    naive = generate(model, prompts, new)
    assert naive.token_ids == expected
    assert naive.tokens_computed == sum(embedded) == sum(tokens_without_cache(length, new) for length in lengths)
    assert naive.computed == embedded == [sum(lengths) + step * len(lengths) for step in range(new)]
    embedded.clear()
    cache = new_cache(len(lengths))
    cached = generate(model, prompts, new, cache)
    assert cached.token_ids == expected
    assert cached.tokens_computed == sum(embedded) == sum(tokens_with_cache(length, new) for length in lengths)
    assert cached.computed == embedded == [sum(lengths)] + [len(lengths)] * (new - 1)
    cache.check_invariants()
    served = LLM(model, num_pages=64).generate([list(tokens) for tokens in prompts], likeliest(new))
    assert [samples[0].token_ids for samples in served] == expected


def test_the_closed_forms_are_the_sums_they_stand_for():
    for length in (1, 2, 7, 100):
        for new in (1, 2, 9):
            assert tokens_without_cache(length, new) == sum(range(length, length + new))
            assert tokens_with_cache(length, new) == length + sum(1 for _ in range(new - 1))


def test_a_second_turn_computes_what_is_new_alone(embedded):
    model, cache = models()[1], new_cache(2)
    history = [list(prompt(length)) for length in (5, 11)]
    cached = [0, 0]
    for turn, said in enumerate((0, 4, 1)):
        history = [ids + oracle.tokens(said, 1, seed=turn)[0].tolist() for ids in history]
        embedded.clear()
        answer = generate(model, history, 6, cache)
        assert answer.tokens_computed == sum(embedded)
        assert answer.tokens_computed == sum(map(tokens_with_cache, map(len, history), (6, 6), cached))
        assert answer.token_ids == [list(greedy(tuple(ids), 6)) for ids in history]
        history = [ids + more for ids, more in zip(history, answer.token_ids, strict=True)]
        cached = [len(ids) - 1 for ids in history]  # the last token was chosen and never computed
        assert cache.lengths == cached
        cache.check_invariants()


def test_a_sequence_may_reach_the_last_position_and_slot(embedded):
    model, tokens = models()[1], prompt(POSITIONS - 4)
    answer = generate(model, [tokens], 4, new_cache(max_length=POSITIONS - 1))
    assert answer.token_ids == [list(greedy(tokens, 4))]
    embedded.clear()
    with pytest.raises(SequenceTooLong, match=r"252 tokens and 5 new ones make 257, and the model takes at most 256"):
        generate(model, [tokens], 5)
    with pytest.raises(SequenceTooLong, match=r"row 1 holds 0 tokens and would get 13 more, and max_length is 12"):
        generate(model, [prompt(3), prompt(10)], 4, new_cache(2, max_length=12))
    assert not embedded, "nothing is computed of what cannot be finished"


def test_state_is_good_for_one_exact_prefix(embedded):
    model, cache = models()[1], new_cache()
    tokens = list(prompt(8))
    answer = generate(model, [tokens], 3, cache).token_ids[0]
    held = tokens + answer[:2]
    embedded.clear()
    for other in ([*held[:5], (held[5] + 1) % 97, *held[6:], 1], held, held[:4], [(held[0] + 1) % 97, *held[1:], 1]):
        same = next((i for i, (a, b) in enumerate(zip(held, other, strict=False)) if a != b), min(len(other), 10))
        with pytest.raises(NotAnExtension, match=f"row 0 of the cache holds 10 tokens, of which {same} begin"):
            generate(model, [other], 2, cache)
    with pytest.raises(NotAnExtension, match="1 rows, and 2 prompts"):
        generate(model, [held + [1]] * 2, 2, cache)
    assert not embedded and cache.token_ids == [held], "a refusal changes nothing"
    assert generate(model, [[*tokens, *answer]], 2, cache).token_ids == [list(greedy((*tokens, *answer), 2))]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1, 97]], [[-1]], [[0.5]], [3]], ids=str)
def test_bad_prompts_are_refused_by_name(prompts):
    with pytest.raises(InvalidRequest):
        generate(models()[1], prompts, 2)


@pytest.mark.parametrize("count", [0, -1, 1.5, None])
def test_bad_counts_are_refused_by_name(count):
    with pytest.raises(InvalidRequest, match="max_tokens"):
        generate(models()[1], [[1]], count)


def test_logits_without_a_highest_number_are_an_error():
    model = copy.deepcopy(models()[1])
    model.embed.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1 hold NaN"):
        generate(model, [[1, 2], [3, 5]], 2)
