"""The contiguous cache: what it takes, how it grows, and that no row sees what is not its own."""

import pytest
import torch

from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cache.sequences import SequenceTooLong
from tests.model import oracle
from tests.serving.cache.steps import step, steps, text
from tests.serving.served import models


def new_cache(batch_size=1, max_length=None):
    return ContiguousCache(models()[1].config, batch_size, max_length, torch.float64)


def expected(ids):
    """What the model says of the whole text at once; it is transformers', which rounds norms to float32."""
    row = torch.tensor([ids])
    torch.testing.assert_close(oracle.logits(models()[1], row), oracle.expected(models()[0], row), rtol=0, atol=5e-6)
    return oracle.logits(models()[1], row)[0]


@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (7, 1, 12), (1, 18, 1)], ids=str)
def test_a_text_in_pieces_has_the_logits_of_the_whole(pieces):
    ids, cache = text(20), new_cache()
    (found,) = steps(cache, [ids], [(count,) for count in pieces])
    torch.testing.assert_close(found, expected(ids), rtol=0, atol=1e-10)
    cache.check_invariants()


def test_rows_of_any_lengths_share_steps_and_nothing_else():
    """Rows start, pause and decode beside each other."""
    texts = [text(12, 1), text(30, 2), text(9, 3)]
    schedule = [(5, 0, 1), (1, 20, 0), (1, 1, 1), (1, 1, 1), (4, 8, 3), (0, 0, 3)]
    for ids, found in zip(texts, steps(new_cache(3), texts, schedule), strict=True):
        torch.testing.assert_close(found, expected(ids), rtol=0, atol=1e-10)


def test_what_lies_behind_the_end_of_a_row_does_not_matter():
    texts, cache = [text(12, 1), text(30, 2)], new_cache(2)
    found = []
    for counts in ((5, 20), (1, 1), (1, 1), (5, 8)):
        cache._grow(30)
        for row, length in enumerate(cache.lengths):
            cache.kv[:, :, row, :, length:] = 1e6
        new = [ids[length : length + count] for ids, length, count in zip(texts, cache.lengths, counts, strict=True)]
        found.append(step(cache, new).split(list(counts)))
    for row, ids in enumerate(texts):
        logits = torch.cat([parts[row] for parts in found])
        torch.testing.assert_close(logits, expected(ids), rtol=0, atol=1e-10)


def test_capacity_doubles_and_copies_stay_few():
    cache, config = new_cache(2, max_length=50), models()[1].config
    seen = [cache.capacity]
    for token in text(50):
        step(cache, [[token], [token]])
        cache.check_invariants()
        seen.append(cache.capacity)
        assert cache.nbytes == 2 * cache.capacity * config.kv_values_per_token * 8
        assert cache.used_bytes == sum(cache.lengths) * config.kv_values_per_token * 8
    assert sorted(set(seen)) == [0, 1, 2, 4, 8, 16, 32, 50]
    assert cache.slots_copied == 2 * (1 + 2 + 4 + 8 + 16 + 32) < 2 * 2 * cache.capacity
    with pytest.raises(SequenceTooLong, match="row 0 holds 50 tokens and would get 1 more, and max_length is 50"):
        cache.attention([1, 0])
    assert cache.lengths == [50, 50] and cache.capacity == 50


def test_a_long_prompt_takes_its_slots_at_once():
    cache = new_cache()
    step(cache, [text(40)])
    assert (cache.capacity, cache.slots_copied) == (40, 0)


@pytest.mark.parametrize(
    ("batch_size", "max_length", "message"),
    [
        (0, 4, "batch_size is a whole number ≥ 1, got 0"),
        (-1, 4, "batch_size is a whole number ≥ 1, got -1"),
        (1, 0, "max_length from 1 to the model's 256 positions is needed, got 0"),
        (1, 257, "max_length from 1 to the model's 256 positions is needed, got 257"),
    ],
)
def test_impossible_sizes_are_refused_by_name(batch_size, max_length, message):
    with pytest.raises(ValueError, match=message):
        new_cache(batch_size, max_length)
