"""Attention through page tables is torch's attention over the same keys and values in one piece, in every way to it."""

import pytest
import torch

from minilib.serving.cache import paged_attention
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention, Work
from tests.serving.texts import LAYERS, PAGE_SIZES, Texts, config, contiguous, scatter


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request):
    """Who attends on a CPU."""
    return request.param


def lengths_around(page_size):
    return sorted({max(1, k * page_size + more) for k in (1, 2, 3) for more in (-1, 0, 1)})


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_and_decode_of_many_lengths(page_size, compiled):
    texts = Texts(page_size, compiled=compiled)
    scatter(texts)
    tables = {length: texts.begin() for length in lengths_around(page_size)}
    texts.step([(table, length) for length, table in tables.items()])
    assert any(table.frames != sorted(table.frames) for table in tables.values()) or page_size == 1
    for _ in range(3):
        texts.step([(table, 1) for table in tables.values()])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("chunk", [2, 15, 16, 17])
def test_prefill_behind_a_cached_prefix(page_size, chunk, compiled):
    texts = Texts(page_size, compiled=compiled)
    scatter(texts)
    tables = [texts.begin() for _ in range(3)]
    for _ in range(4):
        texts.step([(table, chunk + number) for number, table in enumerate(tables)])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_and_decode_mixed_in_any_order(page_size, compiled):
    texts = Texts(page_size, compiled=compiled)
    scatter(texts)
    tables = [texts.begin() for _ in range(6)]
    texts.step([(table, 1 + 7 * number) for number, table in enumerate(tables)])
    for counts in ([1, 5, 1, 1, 33, 1], [2, 1, 1, 17, 1, 16], [1, 1, 1, 1, 1, 9], [3, 1, 1, 1, 1, 1]):
        work = list(zip(tables, counts, strict=True))
        texts.step(work)
        texts.step(work[::-1])
        texts.step(work[2:4])


@pytest.mark.parametrize("head_dim", [2, 10, 32, 34])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (4, 2)])
def test_groups_of_queries_share_their_keys(num_heads, num_kv_heads, head_dim, compiled):
    texts = Texts(2, shape=config(num_heads, num_kv_heads, head_dim), compiled=compiled)
    tables = [texts.begin() for _ in range(3)]
    texts.step([(tables[0], 5), (tables[1], 1), (tables[2], 8)])
    texts.step([(tables[2], 1), (tables[0], 1), (tables[1], 4)])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("gather_bytes", [0, 1, 5_000, 40_000])
def test_more_sequences_than_are_gathered_at_once(monkeypatch, page_size, gather_bytes):
    monkeypatch.setattr(paged_attention, "GATHER_BYTES", gather_bytes)
    texts = Texts(page_size, num_pages=500)
    tables = [texts.begin() for _ in range(9)]
    texts.step([(table, 1 + 13 * (number * 5 % 9)) for number, table in enumerate(tables)])
    texts.step([(table, 1) for table in tables])
    page_bytes = texts.cache.page_bytes // LAYERS
    sizes = [part.rows.shape for part in texts.parts]
    assert sum(batch for batch, _, _ in sizes) == 9
    assert all(batch == 1 or batch * pages * page_bytes <= gather_bytes for batch, _, pages in sizes)
    assert len(sizes) == 9 if gather_bytes < 2 else len(sizes) > 1


@pytest.mark.parametrize("num_sequences", [1, 3, 9])
def test_what_a_sequence_gets_depends_on_nobody_beside_it(num_sequences):
    """In compiled code to the last bit, whatever else is decoded and whatever others wrote."""
    texts = Texts(4, compiled=True)
    tables = [texts.begin() for _ in range(num_sequences)]
    texts.step([(table, 1 + 9 * number) for number, table in enumerate(tables)])
    for table in tables:
        table.append(1)
    q, k, v = texts.draw(num_sequences, 6, 8), *texts.draw(2, num_sequences, 2, 8)
    together = PagedAttention(texts.cache, [Work(table, 1) for table in tables], compiled=True)(0, q, k, v)
    for row, table in enumerate(tables):
        one = slice(row, row + 1)
        alone = PagedAttention(texts.cache, [Work(table, 1)], compiled=True)(0, q[one], k[one], v[one])
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_dtypes_come_out_as_they_went_in(dtype, tolerance):
    cache = PagedCache(config(), 20, 16, dtype=dtype)
    cache.k.fill_(7), cache.v.fill_(7)
    tables = [cache.new_table() for _ in range(2)]
    tables[0].append(20)
    tables[1].append(1)
    q, k, v = (torch.randn(21, heads, 8).to(dtype) for heads in (6, 2, 2))
    out = PagedAttention(cache, [Work(tables[0], 20), Work(tables[1], 1)])(1, q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    for part in (slice(20), slice(20, 21)):
        expected = contiguous(*(x[None, part].double() for x in (q, k, v)))[0]
        torch.testing.assert_close(out[part].double(), expected, rtol=tolerance, atol=tolerance)
    full = tables[0].frames[0]
    assert (cache.k[0, full] == 7).all() and (cache.v[0, full] == 7).all(), "another layer's slots"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_text_is_mixed_exactly(dtype):
    """Weights that are all alike; the mean of the values is known."""
    length, shape = 9600, config(1, 1)
    cache = PagedCache(shape, 600, 16, dtype=dtype)
    table = cache.new_table()
    table.append(length)
    cache.k.zero_(), cache.v.zero_()
    cache.v[0, :, 0, :, 0] = 1
    cache.v[0, 300:, 0, :, 1] = 1
    q, k, v = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    for compiled in {False, dtype == torch.float32}:
        out = PagedAttention(cache, [Work(table, 1)], compiled)(0, *(x.to(dtype) for x in (q, k, v)))
        assert out[0, 0, :2].tolist() == pytest.approx([1, 0.5], abs=0.02 if dtype == torch.bfloat16 else 1e-3)
