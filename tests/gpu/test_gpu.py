"""What only a GPU can show. Without one these tests are SKIPPED, and say so."""

import pytest
import torch

from minilib.numbers import workloads
from minilib.numbers.machine import Machine
from minilib.numbers.measure import measure, median_ratio
from minilib.numbers.probes import compute, cuda
from minilib.numbers.probes.chase_kernel import walk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture(scope="module")
def machine():
    return Machine.measure("cuda", refresh=True, progress=False)


def test_a_gpu_is_measured_within_its_data_sheet(machine):
    sheets = {"h100": "h100-sxm", "h200": "h200", "a100": "a100-80g-sxm", "b200": "b200", "4090": "rtx-4090"}
    known = [sheet for word, sheet in sheets.items() if word in machine.name]
    if not known:
        pytest.skip(f"no data sheet for {machine.title}")
    sheet = Machine.datasheet(known[0])
    assert 0.5 < machine.memory_bandwidth / sheet.memory_bandwidth <= 1.05
    assert 0.4 < machine.peak("bf16") / sheet.peak("bf16") <= 1.05
    assert 0.3 < machine.link("pcie").bandwidth / sheet.link("pcie").bandwidth <= 1.05


def test_every_question_is_answered(machine):
    assert machine.kind == "gpu" and machine.asynchronous
    assert {"fp32", "tf32", "bf16", "fp16", "int8"} <= set(machine.flops)
    assert {"launch_enqueue", "launch_in_graph", "launch_and_wait"} <= set(machine.seconds)
    assert {"memory_read", "pcie_to_gpu", "pcie_from_gpu"} <= set(machine.bandwidths)
    assert machine.random_access and machine.caches["L2"] > 0


def test_launching_is_cheaper_than_waiting(machine):
    assert machine.seconds["launch_enqueue"] < machine.seconds["launch_and_wait"]
    assert machine.seconds["launch_in_graph"] < machine.seconds["launch_and_wait"]


def test_hbm_is_slower_than_l2(machine):
    assert machine.load_latency(2**30) > 1.2 * machine.load_latency(2**18)


@pytest.mark.parametrize(("lines", "steps"), [(2, 1), (3, 4), (100, 100), (1000, 12345)])
def test_the_chain_is_followed_as_python_follows_it(lines, steps):
    order = torch.randperm(lines)
    ring = torch.zeros(lines * 16, dtype=torch.int64)
    ring[order * 16] = torch.roll(order, -1) * 16
    at = 0
    for _ in range(steps):
        at = int(ring[at])
    last = torch.full((1,), -1, dtype=torch.int64, device="cuda")
    walk[(1,)](ring.cuda(), last, steps, num_warps=1)
    assert int(last) == at


def test_a_measurement_waits_for_the_gpu():
    """Enqueueing a second's worth of work takes no time; measuring it must."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3
    seconds = measure(lambda: a @ a, budget=0.2).seconds
    assert flops / seconds < 5e15  # faster than any GPU there is: the clock was stopped too early


def test_tf32_is_not_passed_off_as_fp32():
    rates = compute.matmul_rates("cuda", budget=0.1)
    assert rates["tf32"] > 1.5 * rates["fp32"]


def test_pcie_is_slower_than_hbm():
    assert max(cuda.pcie_bandwidths(2**28).values()) < cuda.hbm_copy_bandwidth(2**30, budget=0.1)


def test_prices_of_the_workloads_hold(machine):
    checks = [workload.check(machine, "cuda", budget=0.1) for workload in workloads.suite("gpu")]
    assert 0.5 < median_ratio(checks) < 2
