"""Attention through page tables is torch's attention over the same keys and values in one piece, in every way to it."""

import pytest
import torch

from minilib.serving.cache import paged_attention
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import InPlace, PagedAttention, Work
from tests.serving.texts import LAYERS, PAGE_SIZES, Texts, config, contiguous, scatter


@pytest.fixture(params=["as it comes", "gathered", "in place"])
def way(request, monkeypatch):
    """Choose how decoding reads its pages, where there is a choice."""
    if request.param != "as it comes":
        monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", 10**9 if request.param == "gathered" else 1)
    return request.param


def lengths_around(page_size):
    return sorted({max(1, k * page_size + more) for k in (1, 2, 3) for more in (-1, 0, 1)})


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_and_decode_of_many_lengths(page_size):
    texts = Texts(page_size)
    scatter(texts)
    tables = {length: texts.begin() for length in lengths_around(page_size)}
    texts.step([(table, length) for length, table in tables.items()])
    assert any(table.frames != sorted(table.frames) for table in tables.values()) or page_size == 1
    for _ in range(3):
        texts.step([(table, 1) for table in tables.values()])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("chunk", [2, 15, 16, 17])
def test_prefill_behind_a_cached_prefix(page_size, chunk):
    texts = Texts(page_size)
    scatter(texts)
    tables = [texts.begin() for _ in range(3)]
    for _ in range(4):
        texts.step([(table, chunk + number) for number, table in enumerate(tables)])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_and_decode_mixed_in_any_order(page_size):
    texts = Texts(page_size)
    scatter(texts)
    tables = [texts.begin() for _ in range(6)]
    texts.step([(table, 1 + 7 * number) for number, table in enumerate(tables)])
    for counts in ([1, 5, 1, 1, 33, 1], [2, 1, 1, 17, 1, 16], [1, 1, 1, 1, 1, 9], [3, 1, 1, 1, 1, 1]):
        work = list(zip(tables, counts, strict=True))
        texts.step(work)
        texts.step(work[::-1])
        texts.step(work[2:4])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (4, 2)])
def test_groups_of_queries_share_their_keys(num_heads, num_kv_heads):
    texts = Texts(2, shape=config(num_heads, num_kv_heads, head_dim=10))
    tables = [texts.begin() for _ in range(3)]
    texts.step([(tables[0], 5), (tables[1], 1), (tables[2], 8)])
    texts.step([(tables[2], 1), (tables[0], 1), (tables[1], 4)])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("gather_bytes", [0, 1, 5_000, 40_000])
def test_more_sequences_than_are_gathered_at_once(monkeypatch, page_size, gather_bytes):
    monkeypatch.setattr(paged_attention, "GATHER_BYTES", gather_bytes)
    monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", 10**9)
    texts = Texts(page_size, num_pages=500)
    tables = [texts.begin() for _ in range(9)]
    texts.step([(table, 1 + 13 * (number * 5 % 9)) for number, table in enumerate(tables)])
    texts.step([(table, 1) for table in tables])
    page_bytes = texts.cache.page_bytes // LAYERS
    sizes = [attend.rows.shape for _, attend in texts.parts]
    assert sum(batch for batch, _, _ in sizes) == 9
    assert all(batch == 1 or batch * pages * page_bytes <= gather_bytes for batch, _, pages in sizes)
    assert len(sizes) == 9 if gather_bytes < 2 else len(sizes) > 1


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_pages_that_are_mostly_used_are_read_in_place(page_size, way):
    many = paged_attention.IN_PLACE_PAGES // 4 if way == "as it comes" else 16
    texts = Texts(page_size, num_pages=6 * many)
    tables = [texts.begin() for _ in range(6)]
    texts.step([(table, (many + number) * page_size - number % 2) for number, table in enumerate(tables)][:5])
    tables[1].release()  # holes, full of what nobody may see
    del texts.k[tables.pop(1)]
    texts.step([(table, 1) for table in tables[:4]][::-1])
    assert isinstance(texts.parts[0][1], InPlace) == (way != "gathered")
    texts.step([(tables[0], 1), (tables[4], 2), (tables[2], 1), (tables[3], 1), (tables[1], 1)])
    assert isinstance(texts.parts[0][1], InPlace) == (way != "gathered")


def test_shared_pages_and_a_mostly_empty_pool_are_gathered(monkeypatch):
    monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", 1)
    texts = Texts(2)
    parent = texts.begin()
    texts.step([(parent, 9)])
    texts.step([(parent, 1)])
    assert isinstance(texts.parts[0][1], InPlace)
    child = parent.fork()
    texts.k[child], texts.v[child] = texts.k[parent], texts.v[parent]
    texts.step([(parent, 1), (child, 1)])
    assert not isinstance(texts.parts[0][1], InPlace)
    far = texts.begin()
    for table in (parent, child):
        table.release()
        del texts.k[table]
    taken = [texts.cache.pool.allocate() for _ in range(20)]
    texts.step([(far, 3)])
    texts.step([(far, 1)])
    assert not isinstance(texts.parts[0][1], InPlace) and len(taken) == 20


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


def test_a_long_text_in_bf16_is_as_exact_in_place_as_gathered(monkeypatch):
    """Weights that are all alike; the mean of the values is known."""
    length, shape = 9600, config(1, 1)
    for least in (10**9, 1):
        monkeypatch.setattr(paged_attention, "IN_PLACE_PAGES", least)
        cache = PagedCache(shape, 600, 16, dtype=torch.bfloat16)
        table = cache.new_table()
        table.append(length)
        cache.k.zero_(), cache.v.zero_()
        cache.v[0, :, 0, :, 0] = 1
        cache.v[0, 300:, 0, :, 1] = 1
        q, k, v = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
        out = PagedAttention(cache, [Work(table, 1)])(0, *(x.bfloat16() for x in (q, k, v)))
        assert out[0, 0, :2].tolist() == pytest.approx([1, 0.5], abs=0.02), least
