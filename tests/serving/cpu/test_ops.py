"""Each compiled operation is the plain one, row by row, for any number of rows and any numbers in them."""

import numpy as np
import pytest
import torch
from numba import njit

from minilib.model.ops import Ops
from minilib.model.rope import inverse_frequencies, rotation
from minilib.serving.cpu.machine_code import FAST
from minilib.serving.cpu.ops import CompiledOps
from minilib.serving.cpu.row_kernels import exp

plain, compiled = Ops(), CompiledOps()
ROWS = [0, 1, 2, 13, 33]
HARD = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e-30, 1e30])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 15, 64, 130])
def test_norm_alone_and_with_a_residual(rows, width):
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    close(compiled.rms_norm(x, weight, None, 1e-5), plain.rms_norm(x, weight, None, 1e-5))
    (y, h), (expected, total) = (ops.rms_norm(x, weight, residual, 1e-5) for ops in (compiled, plain))
    close(y, expected)
    assert torch.equal(h, total)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_norm_of_small_and_large_rows(scale):
    x, weight = scale * torch.randn(5, 48), torch.randn(48)
    close(compiled.rms_norm(x, weight, None, 1e-5), plain.rms_norm(x, weight, None, 1e-5))


@pytest.mark.parametrize("rows", ROWS)
def test_norm_of_heads_that_lie_apart(rows):
    heads, weight = torch.randn(rows, 7, 16)[:, 2:5], torch.randn(16)
    close(compiled.rms_norm(heads, weight, None, 1e-5), plain.rms_norm(heads, weight, None, 1e-5))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rotation(rows, head_dim):
    rope = rotation(torch.randint(5000, (rows,)), inverse_frequencies(head_dim, 1e4, None), torch.float32)
    heads = torch.randn(rows, 6, head_dim)[:, :5]
    close(compiled.rotary(heads, rope), plain.rotary(heads, rope))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 17, 64])
def test_swiglu_and_sum(rows, width):
    gate_up = 20 * torch.randn(rows, 2 * width)
    torch.testing.assert_close(compiled.swiglu(gate_up), plain.swiglu(gate_up), rtol=2e-6, atol=2e-5)
    x, y = gate_up[:, :width], torch.randn(rows, width)
    assert torch.equal(compiled.add(x, y), x + y)


@pytest.mark.parametrize("hard", HARD.tolist())
def test_a_row_of_hard_numbers_is_that_of_plain_torch_and_leaves_the_others_alone(hard):
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    before = [compiled.rms_norm(x, weight, residual, 1e-5)[0], compiled.swiglu(x)]
    x[2, 3] = hard
    after = [compiled.rms_norm(x, weight, residual, 1e-5)[0], compiled.swiglu(x)]
    both = [plain.rms_norm(x, weight, residual, 1e-5)[0], plain.swiglu(x)]
    for old, new, expected in zip(before, after, both, strict=True):
        assert torch.equal(old[[0, 1, 3, 4]], new[[0, 1, 3, 4]])
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@njit(fastmath=FAST, error_model="numpy")
def each(x, y):
    for i in range(len(x)):
        y[i] = exp(x[i])


def test_exp_to_four_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1, 1, 50_001)]).astype(np.float32)
    y = np.empty_like(x)
    each(x, y)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(y / expected - 1).max() < 4 * 2.0**-23
    hard = np.array([np.nan, -np.inf, np.inf, 0, -100, 200], np.float32)
    each(hard, y)
    np.testing.assert_array_equal(y[: len(hard)], np.array([np.nan, 0, np.inf, 1, 0, np.inf], np.float32))
