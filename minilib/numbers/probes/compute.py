"""Arithmetic: how fast a large matrix product runs in each dtype, and what the smallest call costs."""

from __future__ import annotations

from minilib.numbers.measure import measure

CPU_SIZES = (256, 1024, 2048)
CUDA_SIZES = (2048, 8192)
TOO_SLOW = 0.25  # seconds; a product expected to take longer is not tried


def matmul_rates(device: str = "cpu", budget: float = 0.5) -> dict[str, float]:
    """FLOP/s (int8: OP/s) of a square matrix product by dtype, the quickest sample of the best size.

    A dtype that this build of torch cannot multiply on this device is left out.
    """
    rates = {}
    for dtype in ("fp32", "tf32", "bf16", "fp16", "int8"):
        if dtype == "tf32" and device == "cpu":
            continue
        rate = _best_rate(dtype, device, budget)
        if rate is not None:
            rates[dtype] = rate
    return rates


def quick_rate(device: str = "cpu", budget: float = 0.1) -> float:
    """FLOP/s of one fp32 product of moderate size, in a fraction of a second: enough to doubt an older figure."""
    n = (CUDA_SIZES if device != "cpu" else CPU_SIZES)[-2]
    return 2 * n**3 / min(measure(_product("fp32", device, n), budget=budget, min_samples=3).samples)


def call_overhead(device: str = "cpu", budget: float = 0.3) -> float:
    """Seconds from one small torch call to the next: an addition of one number to one number.

    On CUDA this is the rate at which launches can be issued, with the GPU running behind.
    """
    import torch

    x, y = torch.zeros(1, device=device), torch.ones(1, device=device)
    return measure(lambda: x.add_(y), budget=budget).seconds


def _best_rate(dtype: str, device: str, budget: float) -> float | None:
    best = None
    for n in CUDA_SIZES if device != "cpu" else CPU_SIZES:
        if best is not None and 2 * n**3 / best > TOO_SLOW:
            break
        try:
            measured = measure(_product(dtype, device, n), budget=budget, min_samples=3)
        except (RuntimeError, NotImplementedError):
            break
        # The quickest sample: a product whose threads lost a core halfway says nothing about the arithmetic.
        best = max(best or 0.0, 2 * n**3 / min(measured.samples))
    return best


def _product(dtype: str, device: str, n: int):
    """A function that multiplies two n × n matrices of random values: zeros run faster than real data."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    if dtype == "int8":
        a, b = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device, generator=generator) for _ in "ab")
        return lambda: torch._int_mm(a, b)
    types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = (torch.randn(n, n, device=device, generator=generator).to(types[dtype]) for _ in "ab")
    out = torch.empty_like(a)
    if device == "cpu" or dtype not in ("fp32", "tf32"):
        return lambda: torch.mm(a, b, out=out)
    return lambda: _mm_fp32(a, b, out, tf32=dtype == "tf32")


def _mm_fp32(a, b, out, *, tf32: bool) -> None:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        torch.mm(a, b, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
