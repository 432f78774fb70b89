"""Matrix product without a GPU: what it costs, what it refuses, its tiles, and plain torch where there is no kernel."""

import pytest
import torch

from minilib.kernels.matmul import choose_tile, cost, matmul, reference, tile_traffic
from minilib.kernels.matmul import dense as op
from minilib.kernels.matmul.tiles import vectorises


@pytest.mark.parametrize("version", op.VERSIONS)
def test_on_a_cpu_it_is_the_reference_and_differentiable(version):
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    grad = torch.randn(3, 2)
    out = matmul(a, b, version)
    assert torch.equal(out, reference(a, b))
    out.backward(grad)
    assert torch.allclose(a.grad, grad @ b.T) and torch.allclose(b.grad, a.T @ grad)


def test_the_reference_is_torchs_and_passes_gradcheck():
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5, 2)))
    assert torch.equal(reference(a, b), a @ b)
    assert torch.autograd.gradcheck(reference, (a, b))


def test_half_precision_accumulates_in_fp32():
    ones = torch.ones(1, 5000, dtype=torch.bfloat16)  # a bf16 sum of ones ends at 256
    assert reference(ones, ones.T).item() == 4992  # 5000, rounded once


def test_its_cost_is_every_product_and_each_matrix_moved_once():
    assert cost(2, 3, 5, "bf16").flops == 2 * 2 * 3 * 5 and cost(2, 3, 5).dtype == "bf16"
    assert cost(2, 3, 5, "bf16").bytes == 2 * (10 + 15 + 6) and cost(2, 3, 5, "fp32").bytes == 4 * (10 + 15 + 6)


def test_tiles_load_each_matrix_once_for_every_tile_across():
    one_tile = tile_traffic(64, 64, 100, 64, 64)
    assert one_tile == 2 * 2 * 64 * 100
    assert tile_traffic(65, 64, 100, 64, 64) == 2 * (65 * 100 + 2 * 64 * 100)  # one row more: B is loaded again
    assert tile_traffic(8192, 8192, 8192, 128, 256) == 2 * 8192**3 // 256 + 2 * 8192**3 // 128
    assert tile_traffic(64, 64, 100, 64, 64, "fp32") == 2 * one_tile


def test_tiles_fit_the_product_and_the_gpu():
    bf16 = torch.bfloat16
    large, small = choose_tile(8192, 8192, bf16), choose_tile(512, 512, bf16)
    assert (large["BLOCK_M"], large["BLOCK_N"]) == (128, 256)
    assert (small["BLOCK_M"], small["BLOCK_N"]) == (64, 64)  # 8 large tiles would leave 124 multiprocessors idle
    assert choose_tile(1, 8192, bf16)["BLOCK_M"] == 16
    assert choose_tile(8192, 8192, bf16, aligned=False)["BLOCK_N"] == 64
    assert choose_tile(8192, 8192, torch.float32)["BLOCK_N"] == 64
    depth = {target: choose_tile(8192, 8192, bf16, target=target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")}
    assert [tile["BLOCK_K"] for tile in depth.values()] == [32, 64, 64, 64]  # wgmma reads shared memory
    assert [tile["num_stages"] for tile in depth.values()] == [4, 3, 3, 2]


def test_what_can_be_read_16_bytes_at_a_time_is_told_from_what_cannot():
    x = torch.zeros(64, 48, dtype=torch.bfloat16)
    assert vectorises(x) and vectorises(x.T) and vectorises(x[5:, :32])
    assert not vectorises(x[:, :40]) and not vectorises(x[:, ::2]) and not vectorises(x[:, 1:17])
    assert not vectorises(torch.zeros(64, 50))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), ValueError, r"got \(3, 4\) @ \(3, 4\): flatten or transpose"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 5), ValueError, r"wants \(M, K\) @ \(K, N\)"),
        (torch.zeros(4), torch.zeros(4, 5), ValueError, r"got \(4,\)"),
        (torch.zeros(3, 4), torch.zeros(4, 5).double(), TypeError, "b is torch.float64"),
        (torch.zeros(3, 4), torch.zeros(4, 5).half(), TypeError, "wants one dtype"),
        ([[1.0]], torch.zeros(1, 1), TypeError, "a is list"),
        (torch.zeros(3, 4), torch.zeros(4, 5, device="meta"), ValueError, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, error, message):
    with pytest.raises(error, match=message):
        matmul(a, b)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="naive, tiled, grouped, persistent, got 'fast'"):
        matmul(torch.zeros(1, 1), torch.zeros(1, 1), "fast")


def test_the_interpreter_must_have_been_switched_on():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        matmul(torch.zeros(1, 1), torch.zeros(1, 1), interpret=True)
