"""Sizes that no cache has: an error by name, before memory or a file is taken."""

import math

import pytest
import torch

from minilib.mechanisms.paging import FramePool, PageTable
from minilib.model.config import ModelConfig
from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cache.keeping_pool import KeepingPool
from minilib.serving.cache.page_file import PageFile
from minilib.serving.cache.paged import PagedCache, default_num_pages
from minilib.serving.cache.prefix import PrefixCache
from minilib.serving.cache.ring import RingCache
from minilib.serving.cache.tiers import SecondTier

CONFIG = ModelConfig(32, 16, 24, 1, 2, 1, 8, max_position=64)
NONE = [-1, 2.5, 2.0, math.nan, math.inf, True, None, "2"]


@pytest.mark.parametrize("value", NONE)
def test_numbers_of_pages_and_slots_that_are_none(value, tmp_path):
    for name, call in {
        "num_pages": lambda: SecondTier(path=tmp_path / "pages", num_pages=value),
        "num_pages ": lambda: PageFile(tmp_path / "pages", value, "model", (2, 1, 1, 4, 8), torch.float32),
        "num_pages  ": lambda: PagedCache(CONFIG, value),
        "page_size": lambda: PagedCache(CONFIG, 4, value),
        "page_size ": lambda: default_num_pages(CONFIG, value, 4, torch.float32, torch.device("cpu")),
        "page_size  ": lambda: PageTable(FramePool(2), value),
        "num_frames": lambda: FramePool(value),
        "num_frames ": lambda: KeepingPool(value),
        "num_swap_pages": lambda: PagedCache(CONFIG, 4, num_swap_pages=value),
        "window": lambda: RingCache(CONFIG, value),
        "num_sinks": lambda: RingCache(CONFIG, 4, value),
        "batch_size": lambda: RingCache(CONFIG, 4, 0, value),
        "batch_size ": lambda: ContiguousCache(CONFIG, value),
        "length": lambda: RingCache(CONFIG, 4).kept(value),
    }.items():
        with pytest.raises(ValueError, match=f"{name.strip()} is a whole number ≥ [01], got"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0, 65, 2.5, math.nan, True, "2"])
def test_lengths_that_are_none(value):
    with pytest.raises(ValueError, match="max_length from 1 to the model's 64 positions"):
        ContiguousCache(CONFIG, 1, value)


def test_pages_for_a_file_that_is_not_named():
    with pytest.raises(ValueError, match="num_pages is for a file, and there is no path"):
        SecondTier(num_pages=4)
    with pytest.raises(ValueError, match="num_pages is a whole number ≥ 1, got 0"):
        SecondTier(path="pages")
    with pytest.raises(TypeError, match="machine is a Machine, got 8"):
        SecondTier(8)
    with pytest.raises(TypeError, match="path is a file's, got 5"):
        SecondTier(path=5, num_pages=4)


@pytest.mark.parametrize("design", ["tree", [], True, None, 3])
def test_designs_that_are_unknown(design):
    with pytest.raises(ValueError, match="prefix_cache is one of hash, radix"):
        PrefixCache(PagedCache(CONFIG, 4, pool_type=KeepingPool), design, None)
