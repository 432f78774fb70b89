"""The grouped product on a real GPU, at the size of a mixture of experts. Without one these tests are SKIPPED."""

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.matmul import grouped as op
from minilib.kernels.matmul.grouped import cost, grouped_matmul
from minilib.numbers.measure import compare
from tests.kernels.parity.grouped_matmul import ends_of, inputs, loop
from tests.kernels.place import Place, assert_close
from tools.kernel_jobs import shares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
HERE = Place("cuda", interpret=False)


def needs(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def step(op, leaves, grad, *others):
    out = op(*leaves, *others)
    return out, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("experts", (8, 64, 256))
def test_it_agrees_with_the_oracle(experts):
    rows, grad = shares(4000, experts, even=False), HERE.random(4096, 768, dtype="bf16", seed=2, scale=0.1)
    x, weight = inputs(HERE, rows, 512, 768, 96, "bf16")
    found = step(grouped_matmul, leaves_of(x, weight), grad, ends_of(HERE, rows))
    wide = leaves_of(x.double(), weight.double())
    for ours, expected in zip(found, step(lambda x, weight: loop(x, weight, rows), wide, grad.double()), strict=True):
        assert_close(ours, expected, "bf16")


def test_every_candidate_that_fits_computes_the_same():
    rows = (700, 0, 129, 1)
    x, weight = inputs(HERE, rows, 256, 512, 30, "bf16")
    expected = loop(x.double(), weight.double(), rows)
    tried = 0
    for tile in op.CANDIDATES:
        try:
            ours = grouped_matmul(x, weight, ends_of(HERE, rows), tile=tile)
        except Exception as error:  # Triton's OutOfResources, on a GPU with less shared memory
            assert "out of resource" in str(error)
            continue
        tried += 1
        assert_close(ours, expected, "bf16")
    assert tried


def test_it_never_waits_for_the_gpu_and_a_graph_of_it_serves_other_groups():
    """What a router decides is in device memory: the same launches serve whatever it says."""
    x, weight = inputs(HERE, (50, 0, 250), 128, 256, 20, "bf16")
    leaves, grad = leaves_of(x, weight), HERE.random(320, 256, dtype="bf16", seed=2)
    offsets = ends_of(HERE, (50, 0, 250))
    step(grouped_matmul, leaves, grad, offsets)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(grouped_matmul, leaves, grad, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(grouped_matmul, leaves, grad, offsets)
    for rows in ((50, 0, 250), (0, 320, 0), (0, 0, 0), (1, 2, 3)):
        offsets.copy_(ends_of(HERE, rows))
        graph.replay()
        expected = step(grouped_matmul, leaves, grad, offsets)
        assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))


def test_weights_of_more_than_two_to_the_31_values():
    needs(16)
    rows, side = [0] * 33 + [40], 8192
    weight = torch.zeros(34, side, side, dtype=torch.bfloat16, device="cuda")
    weight[-1] = HERE.random(side, side, dtype="bf16", seed=1, scale=0.02)
    x, grad = (HERE.random(50, side, dtype="bf16", seed=seed) for seed in (0, 2))
    out, dx, dweight = step(grouped_matmul, leaves_of(x, weight), grad, ends_of(HERE, rows))
    few = leaves_of(x.double(), weight[-1:].double())
    expected = step(lambda x, last: loop(x, last, (40,)), few, grad.double())
    for ours, other in zip((out, dx, dweight[-1:]), expected, strict=True):
        assert_close(ours, other, "bf16")
    assert not dweight[:-1].any()


def test_rows_of_more_than_two_to_the_31_values():
    needs(24)
    rows, k, n = (2**25, 64), 64, 16
    x = torch.randn(sum(rows), k, dtype=torch.bfloat16, device="cuda")
    weight, grad = HERE.random(2, k, n, dtype="bf16", scale=0.1), torch.randn_like(x[:, :n])
    out, dx, dweight = step(grouped_matmul, leaves_of(x, weight), grad, ends_of(HERE, rows))
    few = leaves_of(x[-64:].double(), weight[1:].double())
    expected = step(lambda x, last: loop(x, last, (64,)), few, grad[-64:].double())
    for ours, other in zip((out[-64:], dx[-64:], dweight[1:]), expected, strict=True):
        assert_close(ours, other, "bf16")


@pytest.mark.parametrize("even", (True, False))
def test_it_is_nearly_as_fast_as_one_product_of_as_many_flops(even, record_property):
    rows, hidden = shares(16384, 8, even), 4096
    x, weight = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((16384, hidden), (8, hidden, hidden))
    )
    offsets, flops = ends_of(HERE, rows), cost(rows, hidden, hidden).flops
    peers = {"dense": lambda: x @ weight[0], "torch": lambda: F.grouped_mm(x, weight, offs=offsets)}
    ratios = {}
    for name, peer in peers.items():
        found = compare(peer, lambda: grouped_matmul(x, weight, offsets))
        ratios[name] = found.ratio
        record_property(f"{name}_tflops", flops / found.a.seconds / 1e12)
        record_property("ours_tflops", flops / found.b.seconds / 1e12)
    # The aims are 0.75 of a dense product and 1 of torch's own; a bound for any GPU is generous.
    assert ratios["dense"] > 0.5 and ratios["torch"] > 0.6, ratios
