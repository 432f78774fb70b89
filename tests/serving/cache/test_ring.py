"""The ring: a fixed number of slots, and the result of full attention under the mask of window and sinks."""

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cache.ring import RingCache
from minilib.serving.generation import generate
from tests.model import oracle
from tests.serving.cache.steps import step, steps, text
from tests.serving.served import POSITIONS, greedy, models, prompt

SHAPES = [(1, 0), (1, 1), (4, 0), (4, 2), (8, 3), (7, 40), (64, 0)]  # window, sinks


def ring(window, num_sinks=0, batch_size=1):
    return RingCache(models()[1].config, window, num_sinks, batch_size, torch.float64)


def masked_logits(ids, window, num_sinks):
    """What the model says where plain attention over the whole text is masked token by token."""
    seen = [[s <= t and (s > t - window or s < num_sinks) for s in range(len(ids))] for t in range(len(ids))]

    def attention(layer, q, k, v):
        heads = [x.transpose(-2, -3) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, torch.tensor(seen), enable_gqa=True).transpose(-2, -3)

    with torch.inference_mode():
        row = torch.tensor([ids])
        return models()[1](row, oracle.places(row), attention)[0]


@pytest.mark.parametrize(("window", "num_sinks"), SHAPES)
@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (3, 1, 1, 20, 1, 14), (1, 2, 3, 34)], ids=str)
def test_the_result_is_that_of_masked_attention_over_the_whole_text(window, num_sinks, pieces):
    ids, cache = text(40), ring(window, num_sinks)
    kv, nbytes = cache.kv, (window + num_sinks) * models()[1].config.kv_values_per_token * 8
    (found,) = steps(cache, [ids], [(count,) for count in pieces])
    torch.testing.assert_close(found, masked_logits(ids, window, num_sinks), rtol=0, atol=1e-10)
    assert cache.kv is kv and cache.nbytes == nbytes, "memory does not grow with the text"


def test_window_and_sinks_matter():
    """Else the comparison above would say nothing of them."""
    ids = text(40)
    full, windowed, with_sinks = (masked_logits(ids, *shape) for shape in ((40, 0), (4, 0), (4, 2)))
    torch.testing.assert_close(full[:4], windowed[:4], rtol=0, atol=1e-10)
    assert (full[4:] - windowed[4:]).abs().amax(-1).min() > 0.01
    assert (with_sinks[6:] - windowed[6:]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_window_means_what_transformers_means_by_it(window):
    """Mistral with a sliding window is Llama with one: the same weights, and `window` tokens seen, itself included."""
    theirs = models()[0]
    fields = theirs.config.to_dict() | {"sliding_window": window, "attn_implementation": "eager"}
    mistral = MistralForCausalLM(MistralConfig(**fields)).double().eval()
    mistral.load_state_dict(theirs.state_dict())
    ids = text(30)
    expected = oracle.expected(mistral, torch.tensor([ids]))[0]
    for pieces in ((30,), (10, *(1,) * 20)):
        (found,) = steps(ring(window), [ids], [(count,) for count in pieces])
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)  # transformers rounds norms to float32


def test_each_key_stays_turned_by_its_own_position():
    ids, cache = text(30), ring(window=6, num_sinks=2)
    whole = ContiguousCache(models()[1].config, 1, None, torch.float64)
    step(whole, [ids])
    steps(cache, [ids], [(1,)] * 30)
    kept = cache.kept(30)
    assert kept.tolist() == [0, 1, 24, 25, 26, 27, 28, 29]
    assert sorted(cache.slots(kept).tolist()) == list(range(8)), "each in a slot of its own"
    held, expected = cache.kv[:, 0, 0][:, :, cache.slots(kept)], whole.kv[:, 0, 0][:, :, kept]
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-12)


def test_rows_go_round_independently():
    texts, cache = [text(25, 1), text(40, 2)], ring(5, 2, batch_size=2)
    schedule = [(3, 20), (1, 1), (0, 9), (12, 1), (1, 1), (8, 8)]
    for ids, found in zip(texts, steps(cache, texts, schedule), strict=True):
        torch.testing.assert_close(found, masked_logits(ids, 5, 2), rtol=0, atol=1e-10)


def test_generation_through_a_ring():
    """Each token is the masked model's likeliest; through a window that holds all, transformers' own."""
    ids, window, num_sinks = list(prompt(20)), 6, 2
    found = generate(models()[1], [ids], 15, ring(window, num_sinks)).token_ids[0]
    for token in found:
        assert masked_logits(ids, window, num_sinks)[-1].argmax() == token
        ids.append(token)
    assert found != list(greedy(prompt(20), 15))
    assert generate(models()[1], [prompt(20)], 15, ring(34)).token_ids == [list(greedy(prompt(20), 15))]


@pytest.mark.parametrize(("window", "num_sinks", "batch_size"), [(0, 1, 1), (-3, 0, 1), (4, -1, 1), (4, 0, 0)])
def test_impossible_sizes_are_refused_by_name(window, num_sinks, batch_size):
    with pytest.raises(ValueError, match="is a whole number ≥ [01], got"):
        ring(window, num_sinks, batch_size)


def test_a_text_ends_with_the_models_positions_though_the_ring_goes_on():
    assert ring(4).max_length == models()[1].config.max_position == POSITIONS
