"""Matrix product: every version at odd sizes, any strides, more tiles than programs, gradients, nothing at all."""

from functools import partial

import torch

from minilib.kernels.matmul import dense as op
from tests.kernels.place import DTYPES, Place, assert_close

SIZES = ((1, 1, 1), (5, 3, 17), (16, 16, 16), (19, 65, 33), (1, 35, 40), (35, 1, 33))


def layouts(place: Place, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values: rows with gaps, columns one after the other, every other one of both, and one row for all."""
    grid = place.strided(x.new_zeros(2 * x.shape[0], 2 * x.shape[1]))[::2, ::2]
    grid.copy_(x)
    columns = x.T.contiguous().T
    return {"gaps": place.strided(x), "columns": columns, "both strides": grid, "repeated": x[:1].expand(x.shape)}


def agrees(place: Place, a: torch.Tensor, b: torch.Tensor, version: str = "persistent", dtype: str = "fp32") -> None:
    a, b = a.requires_grad_(), b.requires_grad_()
    wide_a, wide_b = (x.detach().double().requires_grad_() for x in (a, b))
    oracle = wide_a @ wide_b
    grad = place.random(*oracle.shape, dtype=dtype, seed=2, scale=0.3)
    expected = torch.autograd.grad(oracle, (wide_a, wide_b), grad.double())
    ours = op.matmul(a, b, version, interpret=place.interpret)
    found = torch.autograd.grad(ours, (a, b), grad)
    assert ours.dtype == a.dtype and ours.is_contiguous()
    for x, wide in zip((ours, *found), (oracle, *expected), strict=True):
        assert_close(x, wide, dtype)


def sizes(place: Place, version: str, dtype: str) -> None:
    for m, n, k in SIZES:
        a, b = place.random(m, k, dtype=dtype, scale=0.3), place.random(k, n, dtype=dtype, seed=1)
        agrees(place, a, b, version, dtype)


def strides(place: Place, version: str) -> None:
    a, b = place.random(18, 35, scale=0.3), place.random(35, 20, seed=1)
    for name, left in layouts(place, a).items():
        agrees(place, left.detach(), layouts(place, b)[name].detach(), version)
    agrees(place, layouts(place, a)["columns"].detach(), b, version)


def more_tiles_than_programs(place: Place, dtype: str) -> None:
    """Groups of two rows of tiles and a last one of one, then a group that the product does not fill."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    a, b = place.random(35, 40, dtype=dtype, scale=0.3), place.random(40, 50, dtype=dtype, seed=1)
    oracle = a.double() @ b.double()
    for version, group in (("tiled", 4), ("grouped", 2), ("persistent", 2), ("persistent", 8)):
        ours = op.matmul(a, b, version, interpret=place.interpret, tile=tile | {"GROUP_M": group})
        assert_close(ours, oracle, dtype)


def default_tiles(place: Place) -> None:
    """The tile of a large product, on one that it does not divide."""
    a, b = place.random(130, 70, dtype="bf16", scale=0.1), place.random(70, 260, dtype="bf16", seed=1)
    tile = op.choose_tile(8192, 8192, torch.bfloat16, target="gfx942" if torch.version.hip else "sm_80")
    assert_close(op.matmul(a, b, interpret=place.interpret, tile=tile), a.double() @ b.double(), "bf16")


def one_gradient(place: Place) -> None:
    a, b = place.random(5, 6).requires_grad_(), place.random(6, 7, seed=1)
    op.matmul(a, b, interpret=place.interpret).sum().backward()  # a gradient of strides 0
    assert_close(a.grad, b.double().sum(1).expand(5, 6), "fp32")
    assert b.grad is None


def not_finite(place: Place) -> None:
    """A NaN stays in its row, and what lies behind an edge never gets in."""
    a, b = place.random(20, 18), place.random(18, 20, seed=1)
    a[3, 4] = torch.nan
    a[5, 6] = torch.inf
    for version in op.VERSIONS:
        ours = op.matmul(place.strided(a), place.strided(b), version, interpret=place.interpret)
        assert ours[3].isnan().all() and torch.equal(ours[5], torch.inf * b[6].sign())
        rows = [i for i in range(20) if i not in (3, 5)]
        assert_close(ours[rows], a[rows].double() @ b.double(), "fp32")


def nothing_to_do(place: Place) -> None:
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        for version in op.VERSIONS:
            a, b = place.random(m, k).requires_grad_(), place.random(k, n).requires_grad_()
            ours = op.matmul(a, b, version, interpret=place.interpret)
            ours.sum().backward()
            assert ours.shape == (m, n) and not ours.any()
            assert a.grad.shape == a.shape and b.grad.shape == b.shape and not a.grad.any() and not b.grad.any()


CASES = (
    {
        f"{version}, {dtype}": partial(sizes, version=version, dtype=dtype)
        for version, dtypes in (("naive", ("bf16",)), ("tiled", ("fp32",)), ("persistent", DTYPES))
        for dtype in dtypes
    }
    | {f"{version}, strides": partial(strides, version=version) for version in op.VERSIONS}
    | {f"more tiles than programs, {dtype}": partial(more_tiles_than_programs, dtype=dtype) for dtype in DTYPES}
    | {
        "default tiles": default_tiles,
        "one gradient": one_gradient,
        "not finite": not_finite,
        "nothing to do": nothing_to_do,
    }
)
