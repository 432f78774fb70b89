"""Costs against what torch itself counts, and every operation against its plain meaning."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minilib.numbers import workloads
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Check

SMALL = {
    "scalar_add": workloads.scalar_add(),
    "copy": workloads.copy(1000),
    "reduction": workloads.reduction(1000),
    "add": workloads.add(1000),
    "add_fresh": workloads.add_fresh(1000),
    "scale": workloads.scale(1000),
    "softmax": workloads.softmax(7, 33),
    "gather": workloads.gather(50, 8, 20),
    "matvec": workloads.matvec(65),
    "matvec bf16": workloads.matvec(65, "bf16"),
    "matmul": workloads.matmul(65),
    "prefill": workloads.attention_prefill(2, 64, 16),
    "decode": workloads.attention_decode(3, 2, 64, 16),
}


def torch_flops(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_matmul_flops_are_those_that_torch_counts():
    a, b, x = torch.rand(65, 65), torch.rand(65, 65), torch.rand(65, 1)
    assert SMALL["matmul"].cost.flops == torch_flops(lambda: a @ b)
    assert SMALL["matvec"].cost.flops == torch_flops(lambda: a @ x)


def test_attention_flops_are_those_that_torch_counts():
    p = torch.rand(1, 2, 64, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert SMALL["decode"].cost.flops == torch_flops(SMALL["decode"].make("cpu"))
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows the two products, not its fused CPU kernel
        # it counts the whole square, of which a causal mask leaves half
        assert SMALL["prefill"].cost.flops == torch_flops(lambda: sdpa(p, p, p, is_causal=True)) / 2


def test_bytes_are_those_of_the_tensors_read_and_written():
    f = 4
    assert SMALL["copy"].cost.bytes == 2 * 1000 * f
    assert SMALL["reduction"].cost.bytes == 1000 * f
    assert SMALL["add"].cost.bytes == SMALL["add_fresh"].cost.bytes == 3 * 1000 * f
    assert SMALL["scale"].cost.bytes == 2 * 1000 * f
    assert SMALL["softmax"].cost.bytes == 2 * 7 * 33 * f
    assert SMALL["gather"].cost.bytes == 2 * 20 * 8 * f + 20 * 8  # rows out of the table, rows into the result, indices
    assert SMALL["matvec"].cost.bytes == (65 * 65 + 65 + 65) * f
    assert SMALL["matvec bf16"].cost.bytes == SMALL["matvec"].cost.bytes / 2
    assert SMALL["matmul"].cost.bytes == 3 * 65 * 65 * f
    assert SMALL["decode"].cost.bytes == 2 * 3 * 2 * 64 * 16 * f
    assert SMALL["prefill"].cost.bytes == 4 * 2 * 64 * 16 * f


@pytest.mark.parametrize("name", SMALL)
def test_every_workload_runs_on_cpu(name):
    result = SMALL[name].make("cpu")()
    assert torch.isfinite(torch.as_tensor(result)).all()


def test_softmax_writes_probabilities_and_gather_copies_rows():
    assert torch.allclose(SMALL["softmax"].make("cpu")().sum(-1), torch.ones(7))
    assert SMALL["gather"].make("cpu")().shape == (20, 8)


def test_decoding_is_attention(monkeypatch):
    make, inputs = workloads._random, []

    def remember(*args, **options):
        inputs.append(make(*args, **options))
        return inputs[-1]

    monkeypatch.setattr(workloads, "_random", remember)
    ours = SMALL["decode"].make("cpu")()
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(*inputs))


def test_a_check_holds_the_price_beside_the_measurement():
    machine = Machine(
        name="toy",
        title="Toy",
        kind="cpu",
        origin="measured",
        flops={"fp32": 1e11},
        memory_bandwidth=1e10,
        memory_bytes=1,
    )
    check = SMALL["matmul"].check(machine, budget=0.01)
    assert isinstance(check, Check)
    assert check.prediction.seconds == max(2 * 65**3 / 1e11, 3 * 65 * 65 * 4 / 1e10)
    assert check.measurement.seconds > 0


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_suite_covers_every_bound(kind):
    suite = workloads.suite(kind)
    assert len({workload.name for workload in suite}) == len(suite) >= 8
    machine = Machine(
        name="toy",
        title="Toy",
        kind=kind,
        origin="measured",
        flops={"fp32": 2e11, "bf16": 8e11},
        memory_bandwidth=4e10,
        memory_bytes=1,
        call_overhead=1e-6,
    )
    bounds = {workloads.price(workload.cost, machine).bound for workload in suite}
    assert bounds == {"compute", "memory", "overhead"}
    with pytest.raises(ValueError, match="'cpu' or 'gpu'"):
        workloads.suite("tpu")
