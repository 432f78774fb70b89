"""Bytes that the grouped product's tiles load, counted in the interpreter, and that wrong offsets lead nowhere."""

from itertools import accumulate

import pytest
import torch

from minilib.kernels.matmul import dense
from minilib.kernels.matmul import grouped as op
from minilib.kernels.matmul.tiles import INTERPRETED_PROGRAMS
from minilib.kernels.workbench.dispatch import interpreted
from minilib.kernels.workbench.traffic import count_traffic

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it")
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
ROWS, TAIL, K, N = (17, 0, 33, 5), 20, 40, 35


def offsets_of(rows) -> torch.Tensor:
    return torch.tensor(list(accumulate(rows)), dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_load_what_was_said_and_write_each_value_once(dtype):
    x, weight, offsets = torch.randn(sum(ROWS) + TAIL, K).to(dtype), torch.randn(4, K, N).to(dtype), offsets_of(ROWS)
    with count_traffic(x=x, weight=weight, offsets=offsets) as traffic:
        op.grouped_matmul(x, weight, offsets, interpret=True, tile=TILE)
    blocks, tiles = (TILE["BLOCK_M"], TILE["BLOCK_N"]), 2 * (2 + 3 + 1 + 2)  # those of the tail load no value
    # Every program reads where each group ends, and where each but the first begins; for each tile these two, but for
    # the first group's tiles no beginning, and for the tail's no end.
    looked_up = 4 * (INTERPRETED_PROGRAMS * (4 + 4) + 2 * tiles - 2 * 2 - 2 * 2)
    assert traffic.loaded == op.tile_traffic(ROWS, N, K, *blocks, op.DTYPES[dtype]) + looked_up
    assert traffic.outside == len(x) * N  # the result, which is not watched: each value once
    assert traffic.programs == INTERPRETED_PROGRAMS
    itemsize = x.element_size()  # nobody's rows and an empty group's weight are not touched
    assert traffic.touched == {"x": sum(ROWS) * K * itemsize, "weight": 3 * K * N * itemsize, "offsets": 4 * 4}


def test_the_weight_gradient_loads_each_group_for_every_tile_across():
    x, grad, offsets = torch.randn(sum(ROWS) + TAIL, K), torch.randn(sum(ROWS) + TAIL, N), offsets_of(ROWS)
    with count_traffic(x=x, grad=grad, offsets=offsets) as traffic:
        op._reduce(x, grad, offsets, TILE)
    blocks, tiles = (TILE["BLOCK_M"], TILE["BLOCK_N"]), 3 * 2  # of a group
    looked_up = 4 * (2 * 4 * tiles - tiles)  # for each tile where its group ends and, but for the first, begins
    assert traffic.loaded == sum(dense.tile_traffic(K, N, rows, *blocks, "fp32") for rows in ROWS) + looked_up
    assert traffic.outside == 4 * K * N
    assert traffic.touched == {"x": 4 * sum(ROWS) * K, "grad": 4 * sum(ROWS) * N, "offsets": 4 * 4}


@pytest.mark.parametrize("wrong", [(30, 10, 60), (-5, 20, 99), (70, 80, 90), (40, -(2**31), 2**31 - 1), (0, 0, -1)])
def test_wrong_offsets_touch_nothing_outside_and_leave_no_row_unwritten(wrong):
    """What a GPU cannot be asked to check without waiting for it."""
    tensors = {"x": torch.randn(41, 18), "weight": torch.randn(3, 18, 20), "grad": torch.randn(41, 20)}
    tensors["offsets"] = torch.tensor(wrong, dtype=torch.int32)
    x, weight, grad, offsets = tensors.values()
    out, dweight = op._multiply(x, weight, offsets, TILE), op._reduce(x, grad, offsets, TILE)
    assert out.isfinite().all() and dweight.isfinite().all()
    with count_traffic(**tensors) as traffic:
        op._multiply(x, weight, offsets, TILE)
        op._reduce(x, grad, offsets, TILE)
    ends = [0, *offsets.clamp(0, 41).tolist(), 41]
    written = sum(max(0, end - begin) for begin, end in zip(ends, ends[1:], strict=False)) * 20 + dweight.numel()
    assert traffic.outside == written and written >= out.numel() + dweight.numel()  # both results, not watched


def test_programs_share_the_result_without_a_race():
    x, weight, offsets = torch.randn(70, 20), torch.randn(4, 20, 40), offsets_of(ROWS)
    out = torch.empty(70, 40)
    tensors = {"x": x, "weight": weight, "offsets": offsets, "out": out}
    with count_traffic(("out",), **tensors) as traffic:
        op.launch(
            op.product, 5, x, weight, offsets, out, 4, 70, 40, 20, *x.stride(), *weight.stride(),
            GROUPS=op.lanes(4), UPCAST=False, **TILE,
        )  # fmt: skip
    assert traffic.races == traffic.outside == traffic.unwritten == 0 and traffic.stored == traffic.touched["out"]
    assert torch.allclose(out, op.reference(x, weight, offsets), atol=1e-4)
