import sys

import numpy as np
import pytest

from minilib.numbers.probes import peak

linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")


@linux
@pytest.mark.parametrize("megabytes", (64, 256))
def test_what_is_touched_shows_even_if_it_is_freed(megabytes):
    rose = peak.peak_memory(lambda: np.ones(megabytes * 2**20, np.uint8).sum())
    assert 0.9 * megabytes * 2**20 < rose < 1.3 * megabytes * 2**20 + 2**24


@linux
def test_an_earlier_peak_is_forgotten():
    np.ones(2**28, np.uint8).sum()
    assert peak.peak_memory(lambda: None) < 2**24


def test_where_it_cannot_be_reset_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_RESET", tmp_path / "nothing" / "there")
    with pytest.raises(peak.NoHighWaterMark, match="cannot be reset"):
        peak.peak_memory(lambda: None)
