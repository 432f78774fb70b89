"""The bytes that the tiles of a product load, counted in the interpreter, are those that `tile_traffic` says."""

import pytest
import torch

from minilib.kernels.matmul import dense as op
from minilib.kernels.matmul.tiles import INTERPRETED_PROGRAMS
from minilib.kernels.workbench.dispatch import interpreted
from minilib.kernels.workbench.traffic import count_traffic

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it")
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("version", op.VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_load_what_was_said_and_write_each_value_once(version, dtype):
    m, n, k = 35, 70, 40
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    with count_traffic(a=a, b=b) as traffic:
        op.matmul(a, b, version, interpret=True, tile=None if version == "naive" else TILE)
    blocks = (1, op.NAIVE_N) if version == "naive" else (TILE["BLOCK_M"], TILE["BLOCK_N"])
    assert traffic.loaded == op.tile_traffic(m, n, k, *blocks, op.DTYPES[dtype])
    assert traffic.outside == m * n  # the result, which is not watched: each value once
    programs = {"naive": m * 2, "persistent": INTERPRETED_PROGRAMS}.get(version, 3 * 3)
    assert traffic.programs == programs
