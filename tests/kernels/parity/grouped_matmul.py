"""Grouped product: groups of any size, none included, rows that belong to nobody, any strides, both gradients."""

from functools import partial
from itertools import accumulate, pairwise

import torch

from minilib.kernels.matmul import grouped as op
from tests.kernels.parity.matmul import layouts
from tests.kernels.place import DTYPES, Place, assert_close

TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
ROWS = (0, 15, 17, 0, 1)  # of each group, around one tile
SPLITS = {
    "empty first": ((0, 5, 17), 0),
    "empty in the middle": ((16, 0, 0, 3), 0),
    "empty last": ((7, 1, 0), 0),
    "all empty": ((0, 0, 0), 18),
    "one has everything": ((0, 35, 0), 0),
    "one group": ((19,), 0),
    "a group a row": ((1, 1, 1), 0),
    "a tail": ((3, 18), 17),
    "zero tokens": ((0, 0), 0),
}


def ends_of(place: Place, rows) -> torch.Tensor:
    return torch.tensor(list(accumulate(rows)), dtype=torch.int32, device=place.device)


def loop(x: torch.Tensor, weight: torch.Tensor, rows) -> torch.Tensor:
    """The oracle: a product a group, then zeros."""
    parts = [x[begin:end] @ weight[g] for g, (begin, end) in enumerate(pairwise(accumulate((0, *rows))))]
    return torch.cat((*parts, x.new_zeros(len(x) - sum(rows), weight.shape[2])))


def agrees(place: Place, x, weight, rows, dtype: str = "fp32", tile: dict | None = TILE) -> None:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    oracle = loop(*wide, rows)
    grad = place.random(*oracle.shape, dtype=dtype, seed=2, scale=0.3)
    expected = torch.autograd.grad(oracle, wide, grad.double())
    ours = op.grouped_matmul(x, weight, ends_of(place, rows), interpret=place.interpret, tile=tile)
    found = torch.autograd.grad(ours, (x, weight), grad)
    assert ours.dtype == x.dtype and ours.is_contiguous()
    for found_one, expected_one in zip((ours, *found), (oracle, *expected), strict=True):
        assert_close(found_one, expected_one, dtype)
    for always_zero in (ours[sum(rows) :], found[0][sum(rows) :], *found[1][torch.tensor(rows) == 0]):
        assert not always_zero.any()


def inputs(place: Place, rows, k: int, n: int, tail: int = 0, dtype: str = "fp32"):
    weight = place.random(len(rows), k, n, dtype=dtype, seed=1, scale=0.5)
    return place.random(sum(rows) + tail, k, dtype=dtype, scale=0.5), weight


def split(place: Place, rows, tail: int) -> None:
    agrees(place, *inputs(place, rows, 17, 15, tail), rows)


def sizes(place: Place, dtype: str) -> None:
    agrees(place, *inputs(place, ROWS, 17, 33, 5, dtype), ROWS, dtype)
    agrees(place, *inputs(place, (2, 1), 1, 1, 1, dtype), (2, 1), dtype)


def transposed_weight(place: Place, dtype: str) -> None:
    """As a layer stores it, (groups, N, K); its gradient is laid out as it is."""
    rows = (0, 15, 1)
    x, stored = inputs(place, rows, 21, 18, 2, dtype)[0], place.random(3, 18, 21, dtype=dtype, seed=1)
    agrees(place, x, stored.mT, rows, dtype)
    ours = op.grouped_matmul(x, stored.requires_grad_().mT, ends_of(place, rows), interpret=place.interpret, tile=TILE)
    assert torch.autograd.grad(ours.sum(), stored)[0].is_contiguous()


def strides(place: Place) -> None:
    rows = (5, 0, 9)
    x, weight = inputs(place, rows, 15, 14, 2)
    views = layouts(place, x)
    agrees(place, views["gaps"], place.strided(weight), rows)
    agrees(place, views["both strides"], weight.permute(2, 0, 1).contiguous().permute(1, 2, 0), rows)
    agrees(place, views["repeated"], weight[:1].expand(3, 15, 14), rows)


def own_tiles(place: Place, dtype: str) -> None:
    rows = (3, 0, 70)
    agrees(place, *inputs(place, rows, 18, 34, 1, dtype), rows, dtype, None)


def largest_tile(place: Place) -> None:
    """That of many rows, on groups that do not fill it."""
    tile = op.choose_tile(8192, 8192, 8, torch.bfloat16, target="gfx942" if torch.version.hip else "sm_80")
    agrees(place, *inputs(place, (0, 130), 36, 70, 3, "bf16"), (0, 130), "bf16", tile)


def many_groups(place: Place) -> None:
    """More than the search has lanes at least, with rows in the first, the middle and the last; no other has one."""
    for groups in (32,) if place.interpret else (31, 32, 300, 511):
        rows = [2, *[0] * (groups // 2), 1, *[0] * ((groups + 1) // 2 - 3), 3]
        agrees(place, *inputs(place, rows, 3, 5, 2), rows)


def not_finite(place: Place) -> None:
    """A NaN stays in its group, infinities in their rows; in the rows of nobody they do not get in."""
    rows, poisoned = (4, 17, 3), slice(4, 21)
    x, weight = inputs(place, rows, 18, 20, 5)
    x[5, 6], x[22, 3], x[24:], weight[1, 2, 3] = torch.nan, torch.inf, torch.nan, torch.nan
    leaves = place.strided(x).requires_grad_(), place.strided(weight).requires_grad_()
    ours = op.grouped_matmul(*leaves, ends_of(place, rows), interpret=place.interpret, tile=TILE)
    assert ours[5].isnan().all() and ours[poisoned, 3].isnan().all() and not ours[24:].any()
    assert torch.equal(ours[22], torch.inf * weight[2, 3].sign())
    assert_close(ours[:4], x[:4].double() @ weight[0].double(), "fp32")
    dx, dweight = torch.autograd.grad(ours, leaves, torch.ones_like(ours))
    assert dx[:4].isfinite().all() and dx[21:24].isfinite().all() and not dx[24:].any()
    assert dweight[0].isfinite().all() and dweight[1, 6].isnan().all() and dweight[2, 3].isinf().all()


def one_gradient(place: Place) -> None:
    x, weight = inputs(place, (2, 3), 6, 7)
    ends = ends_of(place, (2, 3))
    op.grouped_matmul(x.requires_grad_(), weight, ends, interpret=place.interpret).sum().backward()  # one of strides 0
    assert_close(x.grad, weight.double().sum(2)[[0, 0, 1, 1, 1]], "fp32")
    assert weight.grad is None


def second_derivative(place: Place) -> None:
    x, weight = inputs(place, (3, 0, 4), 5, 6, 2)
    ends, found = ends_of(place, (3, 0, 4)), []
    for wide in (False, True):
        leaves = [(tensor.double() if wide else tensor).detach().requires_grad_() for tensor in (x, weight)]
        ours = op.reference(*leaves, ends) if wide else op.grouped_matmul(*leaves, ends, interpret=place.interpret)
        first = torch.autograd.grad((ours**2).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    for ours, oracle in zip(*found, strict=True):
        assert_close(ours, oracle, "fp32")


def again_the_same(place: Place) -> None:
    """Bit by bit: nothing depends on which program comes first."""
    rows = (3, 0, 9) if place.interpret else (300, 0, 9000)
    leaves = [tensor.requires_grad_() for tensor in inputs(place, rows, 33, 34, 3, "fp16")]
    first, again = (
        torch.autograd.grad(op.grouped_matmul(*leaves, ends_of(place, rows), place.interpret).sum(), leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def nothing_to_do(place: Place) -> None:
    for tokens, groups, k, n in ((0, 2, 3, 4), (3, 2, 0, 4), (3, 2, 4, 0), (3, 0, 4, 5), (0, 0, 0, 0)):
        x, weight = place.random(tokens, k).requires_grad_(), place.random(groups, k, n).requires_grad_()
        ends = torch.full((groups,), tokens, dtype=torch.int32, device=place.device)
        ours = op.grouped_matmul(x, weight, ends, interpret=place.interpret)
        ours.sum().backward()
        assert ours.shape == (tokens, n) and not ours.any()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
        assert not x.grad.any() and not weight.grad.any()


CASES = (
    {name: partial(split, rows=rows, tail=tail) for name, (rows, tail) in SPLITS.items()}
    | {
        f"{name}, {dtype}": partial(case, dtype=dtype)
        for name, case, dtypes in (
            ("sizes", sizes, DTYPES),
            ("transposed weight", transposed_weight, DTYPES),
            ("own tiles", own_tiles, ("fp32", "bf16")),
        )  # fmt: skip
        for dtype in dtypes
    }
    | {
        "strides": strides,
        "largest tile": largest_tile,
        "many groups": many_groups,
        "not finite": not_finite,
        "one gradient": one_gradient,
        "second derivative": second_derivative,
        "again the same": again_the_same,
        "nothing to do": nothing_to_do,
    }
)
