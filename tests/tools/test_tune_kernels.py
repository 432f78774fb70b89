"""The tuning loop without a GPU: the order of what it prints, what fails, and that every op has something to try."""

import time

import pytest

from tools import tune_kernels
from tools.kernel_jobs import Sizes

TINY = Sizes(device="cpu", attention=((1, 16),), heads=((2, 2),), head_dim=16, product=16, rows=8, hidden=16)


def test_the_quickest_comes_first_and_what_fails_is_left_out():
    def call(tile: dict) -> None:
        if tile["milliseconds"] < 0:
            raise RuntimeError("out of shared memory")
        time.sleep(tile["milliseconds"] / 1e3)

    tiles = [{"milliseconds": n} for n in (20, -1, 2)]
    found = tune_kernels.tune(call, tiles, flops=100, budget=0.01)
    assert [tile["milliseconds"] for _, _, tile in found] == [2, 20]
    assert all(rate == pytest.approx(100 / seconds) for seconds, rate, _ in found)


@pytest.mark.parametrize("name", tune_kernels.OPS)
def test_every_op_has_candidates_and_a_price(name):
    call, candidates, flops = tune_kernels.OPS[name](TINY)
    assert callable(call) and len(candidates) > 1 and flops > 0
    assert all({"num_warps", "num_stages"} <= set(tile) for tile in candidates)
    assert len({str(tile) for tile in candidates}) == len(candidates)
