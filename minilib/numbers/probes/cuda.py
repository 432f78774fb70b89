"""The same questions for an NVIDIA or AMD GPU under torch.cuda: its memory, its link to the host, its launches."""

from __future__ import annotations

import time

from minilib.numbers.measure import measure


def hbm_copy_bandwidth(nbytes: int = 4 * 2**30, budget: float = 0.5) -> float:
    """Bytes per second of a device-to-device copy, read plus written; buffers far larger than the L2 cache."""
    import torch

    nbytes = min(nbytes, torch.cuda.mem_get_info()[0] // 4)
    a = torch.ones(nbytes // 2 // 4, device="cuda")
    b = torch.zeros_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a), budget=budget).seconds


def hbm_read_bandwidth(nbytes: int = 4 * 2**30, budget: float = 0.5) -> float:
    """Bytes per second of a reduction, which reads everything and writes nothing."""
    import torch

    nbytes = min(nbytes, torch.cuda.mem_get_info()[0] // 4)
    a = torch.ones(nbytes // 4, device="cuda")
    return a.nbytes / measure(lambda: a.sum(), budget=budget).seconds


def pcie_bandwidths(nbytes: int = 2**30) -> dict[str, float]:
    """Bytes per second between pinned host memory and the GPU, each way."""
    import torch

    host = torch.ones(nbytes // 4, pin_memory=True)
    device = torch.empty(nbytes // 4, device="cuda")
    return {
        "pcie_to_gpu": nbytes / measure(lambda: device.copy_(host, non_blocking=True)).seconds,
        "pcie_from_gpu": nbytes / measure(lambda: host.copy_(device, non_blocking=True)).seconds,
    }


def launch_latencies() -> dict[str, float]:
    """Seconds that a small kernel costs: to enqueue, to replay from a CUDA graph, and to launch and wait for."""
    import torch

    x, y = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")

    def launch_and_wait() -> None:
        x.add_(y)
        torch.cuda.synchronize()

    return {
        "launch_enqueue": _enqueue_seconds(lambda: x.add_(y)),
        "launch_in_graph": _seconds_in_graph(lambda: x.add_(y)),
        "launch_and_wait": measure(launch_and_wait).seconds,
    }


def _enqueue_seconds(call, count: int = 200) -> float:
    """Seconds until the call returns, the queue being empty at the start and never full (a full queue blocks)."""
    import torch

    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - started) / count)
    torch.cuda.synchronize()
    return best


def _seconds_in_graph(call, count: int = 100) -> float:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return measure(graph.replay).seconds / count


def random_access(working_set: int, steps: int = 1 << 15) -> float:
    """Seconds per dependent 8-byte load from a random place in `working_set` bytes of GPU memory.

    One thread follows a chain through one word per 128-byte line, as `minilib.numbers.probes.chase` does on the CPU.
    """
    import torch

    from minilib.numbers.probes.chase_kernel import walk

    lines = working_set // 128
    order = torch.randperm(lines, generator=torch.Generator().manual_seed(0))
    ring = torch.zeros(lines * 16, dtype=torch.int64)
    ring[order * 16] = torch.roll(order, -1) * 16
    ring = ring.cuda()
    last = torch.full((1,), -1, dtype=torch.int64, device="cuda")
    return measure(lambda: walk[(1,)](ring, last, steps, num_warps=1)).seconds / steps
