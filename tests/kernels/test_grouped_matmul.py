"""Grouped product without a GPU: what it costs, what it refuses, its tiles, and plain torch in the kernel's place."""

import pytest
import torch

from minilib.kernels.matmul import dense
from minilib.kernels.matmul import grouped as op
from minilib.kernels.matmul.grouped import choose_tile, cost, grouped_matmul, lanes, reference, tile_traffic
from tests.kernels.parity.grouped_matmul import loop
from tests.kernels.poison import poisoned_outputs

ROWS = (0, 3, 0, 4, 1, 0)
OFFSETS = torch.tensor((0, 3, 3, 7, 8, 8), dtype=torch.int32)


def leaves(tail: int = 2, k: int = 5, n: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(ROWS) + tail, k), (len(ROWS), k, n))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def test_on_a_cpu_it_is_the_reference_and_differentiable():
    x, weight = leaves(dtype=torch.float32)
    out, grad = grouped_matmul(x, weight, OFFSETS), torch.randn(10, 4)
    assert torch.equal(out, reference(x, weight, OFFSETS))
    expected = torch.autograd.grad(loop(x, weight, ROWS), (x, weight), grad)
    for ours, oracle in zip(torch.autograd.grad(out, (x, weight), grad), expected, strict=True):
        assert torch.allclose(ours, oracle, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic")
def test_what_nobody_owns_is_zero_even_where_memory_was_not():
    x, weight = leaves()
    with poisoned_outputs():
        out = reference(x, weight, OFFSETS)
        dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert not out[8:].any() and not dx[8:].any() and out.isfinite().all()
    assert not dweight[[0, 2, 5]].any() and dweight[[1, 3, 4]].isfinite().all()


def test_the_reference_passes_gradcheck_twice():
    x, weight = leaves()
    assert torch.autograd.gradcheck(lambda x, weight: reference(x, weight, OFFSETS), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, weight: reference(x, weight, OFFSETS), (x, weight))


def test_one_weight_used_twice_gets_the_sum_of_both_gradients():
    x, weight = leaves(n=5)
    ours = torch.autograd.grad(reference(reference(x, weight, OFFSETS), weight, OFFSETS).sum(), (x, weight))
    oracle = torch.autograd.grad(loop(loop(x, weight, ROWS), weight, ROWS).sum(), (x, weight))
    for a, b in zip(ours, oracle, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize(("wanted", "passes"), [(0, ["multiply", "multiply"]), (1, ["multiply", "reduce"])])
def test_only_gradients_that_are_wanted_are_computed(monkeypatch, wanted, passes):
    inputs, calls = [tensor.detach() for tensor in leaves()], []
    inputs[wanted].requires_grad_()
    for name in ("multiply", "reduce"):
        whole = getattr(op.in_torch, name)
        monkeypatch.setattr(op.in_torch, name, lambda *a, n=name, f=whole: calls.append(n) or f(*a))
    reference(*inputs, OFFSETS).sum().backward()
    assert calls == passes


def test_the_gradient_of_a_transposed_weight_is_laid_out_as_it_is_stored():
    x, stored = leaves()[0], torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(reference(x, stored.mT, OFFSETS).sum(), stored)
    assert found.is_contiguous()
    assert torch.allclose(found, torch.autograd.grad(loop(x, stored.mT, ROWS).sum(), stored)[0])


def test_half_precision_accumulates_in_fp32():
    ones = torch.ones(1, 5000, dtype=torch.bfloat16)  # a bf16 sum of ones ends at 256
    offsets = torch.tensor([1], dtype=torch.int32)
    assert grouped_matmul(ones, ones.T[None], offsets).item() == 4992  # 5000, rounded once


def test_autocast_does_not_reach_inside():
    x, weight = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grouped_matmul(x, weight, OFFSETS), reference(x, weight, OFFSETS))
    assert grouped_matmul(x, weight, OFFSETS).dtype == torch.float32


def test_its_cost_is_every_product_and_what_has_rows_moved_once():
    assert cost((3, 0, 4), 5, 6).flops == 2 * 7 * 5 * 6
    assert cost((3, 0, 4), 5, 6).bytes == 2 * (7 * (6 + 5) + 2 * 5 * 6)
    assert cost((3, 0, 4), 5, 6, "fp32").bytes == 2 * cost((3, 0, 4), 5, 6).bytes
    back = cost((3, 0, 4), 5, 6, backward=True)
    assert back.flops == 2 * cost((3, 0, 4), 5, 6).flops
    assert back.bytes == 2 * ((7 * (5 + 6) + 2 * 5 * 6) + (7 * (5 + 6) + 3 * 5 * 6))
    assert cost((7,), 5, 6).flops == dense.cost(7, 5, 6).flops and cost((7,), 5, 6).bytes == dense.cost(7, 5, 6).bytes


def test_tiles_load_for_each_group_what_its_product_would():
    assert tile_traffic((64, 0, 65), 64, 100, 64, 64) == 2 * (64 * 100 + 64 * 100) + 2 * (65 * 100 + 2 * 64 * 100)


def test_tiles_fit_a_group_and_its_share_of_the_gpu():
    bf16 = torch.bfloat16
    assert choose_tile(2048, 4096, 8, bf16)["BLOCK_N"] == 256  # 16 × 16 tiles each are enough
    assert choose_tile(512, 512, 64, bf16)["BLOCK_N"] == 256  # 8 tiles each would starve a GPU, 512 do not
    assert dense.choose_tile(512, 512, bf16)["BLOCK_N"] == 64
    assert choose_tile(4, 4096, 64, bf16)["BLOCK_M"] == 16
    assert choose_tile(2048, 4096, 8, bf16)["maxnreg"] == 255


def test_lanes_have_room_for_one_group_more():
    assert [lanes(groups) for groups in (1, 31, 32, 255, 256)] == [32, 32, 64, 256, 512]


X, W = torch.zeros(10, 4), torch.zeros(3, 4, 5)


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "weight", "offsets", "error", "message"),
    [
        (X, torch.zeros(4, 5), ends(1, 2, 3), ValueError, r"got \(10, 4\) and \(4, 5\): flatten or transpose"),
        (X[None], W, ends(1, 2, 3), ValueError, r"wants x \(tokens, K\) and weight \(groups, K, N\)"),
        (X, W.mT, ends(1, 2, 3), ValueError, r"got \(10, 4\) and \(3, 5, 4\)"),
        (X.double(), W.double(), ends(1, 2, 3), TypeError, "x is torch.float64"),
        (X, W.half(), ends(1, 2, 3), TypeError, "wants one dtype"),
        ([[1.0]], W, ends(1, 2, 3), TypeError, "x is list"),
        (X, W.to("meta"), ends(1, 2, 3), ValueError, "one device"),
        (X, W, ends(1, 2, 3).long(), TypeError, r"got torch.int64: convert it with .int\(\)"),
        (X, W, [1, 2, 3], TypeError, "got list"),
        (X, W, ends(0, 1, 2, 3), ValueError, r"shape \(3,\) on cpu, got shape \(4,\) on cpu: .* without a leading 0"),
        (X, W, ends(1, 2, 3)[None], ValueError, r"got shape \(1, 3\)"),
        (X, W, ends(1, 2, 3).to("meta"), ValueError, "on cpu, got shape .* on meta"),
        (X, W, ends(1, 5, 3), ValueError, r"at most 10, the rows of x; offsets\[2\] is 3, after 5: take .cumsum"),
        (X, W, ends(1, 5, 11), ValueError, r"at most 10, the rows of x; offsets\[2\] is 11, after 5"),
        (X, W, ends(-1, 5, 6), ValueError, r"offsets\[0\] is -1, after 0"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, offsets, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(x, weight, offsets)


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        grouped_matmul(X, W, ends(1, 2, 3), interpret=True)
