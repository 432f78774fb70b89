"""Probabilities are those of transformers' warpers, and draws follow them."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minilib.serving.request import SamplingParams
from minilib.serving.sampling import sample, sorted_probabilities

LAST = 1 - 2**-53  # the largest chance that there is
GREEDY = SamplingParams(temperature=0)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def warped(row, params):
    """transformers' probabilities of one row: temperature, then top-k, then top-p."""
    scores = row[None].clone()
    for warper, wanted in (
        (lambda: TemperatureLogitsWarper(float(params.temperature)), params.temperature != 1),
        (lambda: TopKLogitsWarper(params.top_k), params.top_k > 0),
        (lambda: TopPLogitsWarper(params.top_p), params.top_p < 1),
    ):
        scores = warper()(None, scores) if wanted else scores
    return scores.softmax(-1)[0]


def probabilities(logits, params):
    """Ours, in the order of the vocabulary."""
    ordered, tokens = sorted_probabilities(logits, params)
    assert (ordered.diff(dim=-1) <= 0).all(), "not in descending order"
    return torch.zeros_like(ordered).scatter(-1, tokens, ordered)


@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 2, 7, 100]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.1, 0.7, 1, 1.0, 3.0]),
            st.sampled_from([0, 1, 2, 5, 99, 100, 101, 10**9]),
            st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=200)
def test_every_row_has_the_probabilities_of_transformers(seed, vocab_size, rows):
    logits = 3 * draw(len(rows), vocab_size, seed=seed)
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in rows]
    expected = torch.stack([warped(row, one) for row, one in zip(logits, params, strict=True)])
    got = probabilities(logits, params)
    other = (got > 0) != (expected > 0)
    assert expected[other].sum() + got[other].sum() < 1e-9, "another choice of tokens"
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_order_is_temperature_then_top_k_then_top_p():
    """Values where every other order keeps other tokens."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # probabilities .4 .3 .2 .1
    assert (probabilities(logits, [SamplingParams(top_k=3, top_p=0.75)]) > 0).sum() == 2  # .44 .33 | .22, not .4 .3 .2
    hot = SamplingParams(temperature=100.0, top_p=0.7)
    assert (probabilities(logits, [hot]) > 0).sum() == 3
    cold = SamplingParams(temperature=0.1, top_p=0.7)
    assert (probabilities(logits, [cold]) > 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_probabilities_are_in_single_precision_or_better_and_sum_to_one(dtype):
    logits = draw(5, 1000).to(dtype)
    ordered, tokens = sorted_probabilities(logits, [SamplingParams(top_p=0.9, temperature=0.8)] * 5)
    assert ordered.dtype == torch.promote_types(dtype, torch.float32) and tokens.dtype == torch.int64
    torch.testing.assert_close(ordered.sum(-1), torch.ones(5, dtype=ordered.dtype))
    expected = torch.stack(
        [warped(row.to(ordered.dtype), SamplingParams(top_p=0.9, temperature=0.8)) for row in logits]
    )
    torch.testing.assert_close(ordered.sum(-1), expected.sum(-1))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2, "top_p": 0.5}]
)
def test_draws_follow_the_probabilities(params):
    """A grid of chances instead of luck: every token comes as often as its probability says, to within one draw."""
    count, logits = 20_000, draw(30)
    params = SamplingParams(**params)
    grid = [(i + 0.5) / count for i in range(count)]
    drawn = Counter(sample(logits.expand(count, -1), [params] * count, grid))
    expected = count * warped(logits, params)
    assert all(abs(drawn[token] - expected[token]) <= 1 for token in range(30))
    assert set(drawn) <= set((expected > 0).nonzero()[:, 0].tolist())
    chi_square = sum((drawn[t] - e.item()) ** 2 / e.item() for t, e in enumerate(expected) if e > 0)
    assert chi_square < 1  # 29 degrees of freedom would allow 40 to luck


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_greedy_rows_of_a_mixed_batch_take_the_likeliest(dtype):
    logits = draw(40, 50).to(dtype)
    logits[:, 7] = logits[:, 31] = logits.amax(-1)  # ties
    params = [GREEDY if row % 2 else SamplingParams(temperature=5.0) for row in range(40)]
    mixed = sample(logits, params, [LAST] * 40)
    alone = sample(logits, [GREEDY] * 40, [LAST] * 40)
    assert mixed[1::2] == alone[1::2] == logits.argmax(-1).tolist()[1::2]
    assert mixed[::2] != alone[::2]


def test_a_greedy_row_ignores_its_chance_and_the_other_settings():
    logits = draw(1, 50)
    best = logits.argmax(-1).tolist()
    odd = SamplingParams(temperature=0, top_k=40, top_p=0.1)
    for chance in (0.0, 0.5, LAST):
        assert sample(logits, [odd], [chance]) == best
        assert sample(logits.expand(2, -1), [odd, SamplingParams()], [chance, 0.0])[0] == best[0]


def test_of_equal_tokens_as_many_are_kept_as_top_k_says():
    """The first ones; transformers keeps all that equal the k-th, which is more than was asked for."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    assert probabilities(logits, [SamplingParams(top_k=3)])[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, [SamplingParams(top_k=1)])[0].tolist() == [0, 1, 0, 0, 0, 0]
    assert probabilities(torch.zeros(1, 4), [SamplingParams(top_p=0.5)])[0].tolist() == [0.5, 0.5, 0, 0]


def test_each_token_has_the_chances_from_its_lower_limit_on_without_the_upper_one():
    logits = torch.zeros(8, 4, dtype=torch.float64)
    chances = [0.0, 0.25, 0.5, 0.75, *(x - 2**-53 for x in (0.25, 0.5, 0.75, 1.0))]
    assert sample(logits, [SamplingParams()] * 8, chances) == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [5e-324, 1e-30, 1e-9, 0.2])
def test_a_tiny_top_p_keeps_the_likeliest(top_p, dtype):
    logits = draw(3, 20, dtype=dtype)
    logits[:, 5] = 20.0
    params = [SamplingParams(top_p=top_p, temperature=t) for t in (0.5, 1.0, 2.0)]
    for chance in (0.0, LAST):
        assert sample(logits, params, [chance] * 3) == [5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 2, 97, 5000])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.05}, {"top_k": 7, "top_p": 0.9}]
)
def test_the_smallest_and_the_largest_chance_choose_the_first_and_the_last_token(vocab_size, params, dtype):
    for seed in range(10):
        logits = 2 * draw(1, vocab_size, seed=seed, dtype=dtype)
        params_ = [SamplingParams(**params)]
        ordered, tokens = sorted_probabilities(logits, params_)
        kept = int((ordered > 0).sum())
        assert sample(logits, params_, [0.0]) == [tokens[0, 0]]
        assert sample(logits, params_, [LAST])[0] in tokens[0, :kept]
        if dtype == torch.float64 and ordered[0, kept - 1] > 1e-12:
            assert sample(logits, params_, [LAST]) == [tokens[0, kept - 1]]


def test_forbidden_tokens_are_never_drawn():
    logits = draw(1, 10)
    logits[0, [1, 3, 9]] = -math.inf
    for params in (
        SamplingParams(),
        SamplingParams(top_k=9),
        SamplingParams(top_p=0.9999),
        SamplingParams(temperature=9),
    ):
        got = {sample(logits, [params], [chance])[0] for chance in (0.0, 0.2, 0.5, 0.9, 0.9999, LAST)}
        assert not got & {1, 3, 9} and len(got) > 1
    only = torch.full((1, 10), -math.inf).index_fill_(1, torch.tensor([4]), 0.0)
    assert sample(only, [SamplingParams()], [LAST]) == [4]


def test_a_top_p_of_one_keeps_every_token_of_a_large_vocabulary():
    kept = [
        int((sorted_probabilities(draw(1, 50_000, seed=seed, dtype=torch.float32), [SamplingParams()])[0] > 0).sum())
        for seed in range(20)
    ]
    assert kept == [50_000] * 20


@pytest.mark.parametrize("temperature", [1e-39, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = draw(4, 20, dtype=torch.float32)
    assert sample(logits, [SamplingParams(temperature=temperature)] * 4, [LAST] * 4) == logits.argmax(-1).tolist()


def test_a_temperature_above_all_floats_is_uniform():
    got = probabilities(draw(1, 20, dtype=torch.float32), [SamplingParams(temperature=1e39)])
    torch.testing.assert_close(got, torch.full((1, 20), 0.05))


def test_a_row_s_draw_does_not_depend_on_the_others():
    logits = draw(20, 60)
    params = [SamplingParams(temperature=0.5 + row / 10, top_k=row % 4 * 5, top_p=1 - row / 40) for row in range(20)]
    chances = [(row * 7 % 20 + 0.5) / 20 for row in range(20)]
    alone = [sample(logits[row : row + 1], [params[row]], [chances[row]])[0] for row in range(20)]
    assert sample(logits, params, chances) == alone


KINDS = [{"temperature": 0}, {"temperature": 1e-30}, {"temperature": 5e-324}, {}, {"top_k": 3}, {"top_p": 0.5}]
UNUSABLE = {"NaN": math.nan, "+inf": math.inf, "-inf alone": -math.inf}


@pytest.mark.parametrize("value", UNUSABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_without_a_highest_number_has_no_token_and_changes_no_other(value, kind, dtype):
    logits, params = draw(6, 50).to(dtype), [SamplingParams(**kind), GREEDY, SamplingParams()] * 2
    chances = [0.1, 0.5, LAST, 0.3, 0.9, 0.0]
    alone = [sample(logits[row : row + 1], params[row : row + 1], chances[row : row + 1])[0] for row in range(6)]
    for row in range(6):
        spoilt = logits.clone()
        spoilt[row, slice(None) if value == "-inf alone" else 7] = UNUSABLE[value]
        assert sample(spoilt, params, chances) == [*alone[:row], None, *alone[row + 1 :]]
    assert sample(torch.full((2, 1), UNUSABLE[value]), params[:2], chances[:2]) == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_minus_infinity_is_never_drawn_and_is_no_fault(kind):
    logits = draw(1, 8).repeat(200, 1)
    logits[:, 2:6] = -math.inf
    grid = [(i + 0.5) / 200 for i in range(200)]
    drawn = set(sample(logits, [SamplingParams(**kind)] * 200, grid))
    assert drawn <= {0, 1, 6, 7} and None not in drawn
