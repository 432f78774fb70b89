"""Pages keep their content when they are copied, swapped and shared."""

import logging

import psutil
import pytest
import torch

from minilib.mechanisms.paging import Copy, OutOfFrames
from minilib.serving.cache import paged as paged_cache
from minilib.serving.cache.paged import CacheTooLarge, PagedCache, default_num_pages
from minilib.serving.engine import Engine
from minilib.serving.llm import LLM
from tests.serving.served import models
from tests.serving.texts import LAYERS, PAGE_SIZES, Texts, config


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_copies_keep_what_both_sides_wrote(page_size):
    """A fork shares pages until somebody writes; then each has its own."""
    texts = Texts(page_size)
    parent = texts.begin()
    texts.step([(parent, 2 * page_size + page_size // 2)])
    child = parent.fork()
    texts.k[child], texts.v[child] = texts.k[parent], texts.v[parent]
    texts.step([(parent, 1), (child, 1)])
    texts.step([(child, page_size + 1), (parent, 2)])
    assert parent.frames[:2] == child.frames[:2]
    texts.cache.pool.check_invariants([parent, child])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_swapping_out_and_in_keeps_the_content(page_size):
    texts = Texts(page_size, swap_pages=200)
    tables = [texts.begin() for _ in range(3)]
    texts.step([(table, 2 * page_size - 1 + number) for number, table in enumerate(tables)])
    pages = [len(table.frames) for table in tables]
    assert [texts.cache.swap_out(table) for table in tables[:2]] == pages[:2]
    assert all(table.pool is texts.cache.swap_pool for table in tables[:2])
    texts.check()
    for tensor in (texts.cache.k, texts.cache.v):  # what is left behind is nobody's
        free = [page for page, count in enumerate(texts.cache.pool.ref_counts) if not count]
        tensor[:, free] = 1e3
    texts.step([(tables[2], page_size)])
    assert [texts.cache.swap_in(table) for table in tables[1::-1]] == pages[1::-1]
    assert texts.cache.swap_pool.num_free == 200
    texts.step([(table, 1) for table in tables])
    texts.cache.pool.check_invariants(tables)


def test_a_fork_that_is_swapped_leaves_shared_pages_to_the_others():
    texts = Texts(4, num_pages=8, swap_pages=8)
    parent = texts.begin()
    texts.step([(parent, 10)])
    child = parent.fork()
    texts.k[child], texts.v[child] = texts.k[parent], texts.v[parent]
    assert texts.cache.swap_out(child) == 3
    assert texts.cache.pool.num_free == 5
    texts.step([(parent, 3)])
    assert texts.cache.swap_in(child) == 3
    texts.step([(child, 3), (parent, 1)])


def test_without_room_nothing_is_swapped():
    texts = Texts(4, num_pages=3, swap_pages=2)
    table = texts.begin()
    texts.step([(table, 9)])
    with pytest.raises(OutOfFrames, match="3 frames, and the other pool has 2 free"):
        texts.cache.swap_out(table)
    texts.check()
    table.release()
    small, large = texts.begin(), texts.begin()
    texts.step([(small, 8)])
    assert texts.cache.swap_out(small) == 2
    texts.step([(large, 5)])
    with pytest.raises(OutOfFrames, match="2 frames, and the other pool has 1 free"):
        texts.cache.swap_in(small)
    assert texts.cache.swap_pool.num_free == 0
    del texts.k[table]
    texts.check()


def test_copies_are_of_all_layers_and_leave_other_pages_alone():
    cache = PagedCache(config(), 5, 2)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy([])
    cache.copy([Copy(3, 0), Copy(1, 4)])
    assert torch.equal(cache.k, k[:, [3, 1, 2, 3, 1]]) and torch.equal(cache.v, v[:, [3, 1, 2, 3, 1]])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bytes_are_those_of_the_tensors(page_size):
    cache = PagedCache(config(), 7, page_size, 3, torch.bfloat16)
    assert cache.num_slots == 7 * page_size
    assert 7 * cache.page_bytes == cache.k.nbytes + cache.v.nbytes
    assert 3 * cache.page_bytes == cache.swap_k.nbytes + cache.swap_v.nbytes
    assert cache.page_bytes == 2 * LAYERS * 2 * 8 * page_size * 2


@pytest.mark.parametrize(
    "sizes, message",
    [((4, 0), "page_size"), ((0, 4), "num_pages"), ((-1, 4), "num_pages"), ((4, 4, -1), "num_swap_pages")],
)
def test_sizes_that_make_no_sense_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(config(), *sizes)


CPU = torch.device("cpu")


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("max_sequences, share", [(3, 10), (3, 0.4), (256, 0.01)])
def test_the_default_pool_is_what_may_run_at_once_or_a_share_of_memory(
    monkeypatch, caplog, page_size, max_sequences, share
):
    """Counted in sequences of full length, of which memory has room for `share` times as many as may run."""
    per_sequence, page_bytes = -(-512 // page_size), config().kv_values_per_token * page_size * 4
    free = int(max_sequences * per_sequence * page_bytes * share / paged_cache.HOST_SHARE)
    monkeypatch.setattr(paged_cache, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO):
        found = default_num_pages(config(), page_size, max_sequences, torch.float32, CPU)
    assert found == max_sequences * per_sequence if share > 1 else 0 < found * page_bytes <= free * 0.5
    assert share > 1 or (found + 1) * page_bytes > free * paged_cache.HOST_SHARE
    assert f"num_pages={found}" in caplog.text and f"{found * page_bytes} bytes" in caplog.text
    assert Engine(models()[1], page_size=page_size, max_sequences=2).cache.num_slots >= 1


def test_memory_that_is_too_small_is_said_with_its_numbers(monkeypatch):
    monkeypatch.setattr(paged_cache, "free_bytes", lambda device: 100_000)
    page_bytes = 16 * 4 * config().kv_values_per_token
    with pytest.raises(CacheTooLarge, match=f"num_pages=1000 takes {1000 * page_bytes:,} bytes .* 100,000 are free"):
        PagedCache(config(), 1000)
    with pytest.raises(CacheTooLarge, match="num_swap_pages=1000"):
        PagedCache(config(), 1, num_swap_pages=1000)
    with pytest.raises(CacheTooLarge, match="smaller page_size"):
        LLM(models()[1], page_size=10_000)
    assert default_num_pages(config(), 16, 256, torch.float32, CPU) == 50_000 // page_bytes


def test_what_torch_cannot_allocate_is_said_with_its_numbers(monkeypatch):
    monkeypatch.setattr(paged_cache, "free_bytes", lambda device: 10**18)
    with pytest.raises(CacheTooLarge, match="num_pages=1000000000000"):
        paged_cache._pages("num_pages", 2, 10**12, (2, 16, 8), torch.float32, CPU)


def test_pages_are_not_touched_before_they_are_used():
    """Half a GiB of pages, and no memory taken."""
    shape = config(num_kv_heads=2, head_dim=64)
    free = psutil.virtual_memory().available
    if free < 2**30:
        pytest.skip(f"only {free:,} bytes are free")
    before = psutil.Process().memory_info().rss
    cache = PagedCache(shape, 2**29 // (shape.kv_values_per_token * 16 * 4), 16)
    assert cache.k.nbytes + cache.v.nbytes == 2**29
    assert psutil.Process().memory_info().rss - before < 2**25
