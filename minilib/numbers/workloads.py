"""The operations that language models are made of, each with its price: chapter 01 predicts and measures them all.

A `Workload` knows its `Cost` from its shapes alone and can make itself runnable on any device. Outputs are allocated
before the clock starts, except in `add_fresh`, which exists to show what allocating them costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Check, measure
from minilib.numbers.price import BYTES, Cost, price

BLOCK = 2**20  # values that are drawn; larger inputs repeat them


@dataclass(frozen=True)
class Workload:
    """One operation: what it costs and how to run it.

    Args:
        name: as a reader would call it.
        formula: how its FLOPs are counted, and the values that it moves.
        cost: counted from the shapes.
        make: device name → function that runs the operation once on inputs already there.
    """

    name: str
    formula: str
    cost: Cost
    make: Callable[[str], Callable[[], object]]

    def check(self, machine: Machine, device: str = "cpu", budget: float = 0.3) -> Check:
        """Price it on `machine`, then run it on `device`, and return both."""
        prediction = price(self.cost, machine)
        return Check(self.name, prediction, measure(self.make(device), budget=budget))


def scalar_add() -> Workload:
    """Add one number to one number: all overhead."""

    def make(device: str):
        x, y = _random(device, 1), _random(device, 1)
        return lambda: x.add_(y)

    return Workload("add two numbers", "1; 2 read, 1 written", Cost(flops=1, bytes=12, calls=1), make)


def copy(n: int) -> Workload:
    """Copy `n` fp32 values."""

    def make(device: str):
        a, out = _random(device, n), _random(device, n)
        return lambda: out.copy_(a)

    return Workload(f"copy {_mb(4 * n)}", "none; n read, n written", Cost(bytes=8 * n, calls=1), make)


def reduction(n: int) -> Workload:
    """Sum `n` fp32 values into one."""

    def make(device: str):
        a = _random(device, n)
        return lambda: a.sum()

    return Workload(f"sum {_mb(4 * n)}", "n; n read", Cost(flops=n, bytes=4 * n, calls=1), make)


def add(n: int) -> Workload:
    """Add two vectors of `n` fp32 values into a third that is there already."""

    def make(device: str):
        a, b, out = (_random(device, n) for _ in "abc")
        return lambda: _torch().add(a, b, out=out)

    return Workload(f"add, {_mb(4 * n)} each", "n; 2n read, n written", Cost(flops=n, bytes=12 * n, calls=1), make)


def scale(n: int) -> Workload:
    """Multiply `n` fp32 values by one in place: each is read and written, at the same address."""

    def make(device: str):
        a = _random(device, n)
        return lambda: a.mul_(1.0)

    return Workload(f"scale {_mb(4 * n)} in place", "n; n read, n written", Cost(flops=n, bytes=8 * n, calls=1), make)


def add_fresh(n: int) -> Workload:
    """The same addition into an output allocated by the call, as ``a + b`` does it. The price is that of `add`."""

    def make(device: str):
        a, b = _random(device, n), _random(device, n)
        return lambda: a + b

    return Workload(f"add, fresh {_mb(4 * n)} output", "n; 2n read, n written", add(n).cost, make)


def matvec(n: int, dtype: str = "fp32") -> Workload:
    """An n × n matrix times a vector: one linear layer while decoding one token."""

    def make(device: str):
        weight, x = _random(device, n, n, dtype=dtype), _random(device, n, dtype=dtype)
        return lambda: weight @ x

    cost = Cost(flops=2 * n * n, bytes=BYTES[dtype] * (n * n + 2 * n), calls=1, dtype=dtype)
    return Workload(f"matrix × vector {n}, {dtype}", "2n²; n² + 2n", cost, make)


def matmul(n: int, dtype: str = "fp32") -> Workload:
    """An n × n matrix times an n × n matrix: one linear layer while training or prefilling."""

    def make(device: str):
        a, b, out = (_random(device, n, n, dtype=dtype) for _ in "abc")
        return lambda: _torch().mm(a, b, out=out)

    cost = Cost(flops=2 * n**3, bytes=3 * BYTES[dtype] * n * n, calls=1, dtype=dtype)
    return Workload(f"matmul {n}³, {dtype}", "2n³; 3n²", cost, make)


def softmax(rows: int, columns: int) -> Workload:
    """Softmax over each row; five operations a value (max, subtract, exponential, sum, divide), one pass of memory."""

    def make(device: str):
        x, out = _random(device, rows, columns), _random(device, rows, columns)
        return lambda: _torch().softmax(x, -1, out=out)

    n = rows * columns
    return Workload(
        f"softmax {rows} × {columns}",
        "5n (max, −, exp, sum, ÷); n read, n written",
        Cost(flops=5 * n, bytes=8 * n, calls=1),
        make,
    )


def attention_prefill(heads: int, tokens: int, head_dim: int, dtype: str = "fp32") -> Workload:
    """Causal self-attention over a whole prompt: two matrix products a head, half of each masked away."""

    def make(device: str):
        q, k, v = (_random(device, 1, heads, tokens, head_dim, dtype=dtype) for _ in "qkv")
        return lambda: _torch().nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    flops = 4 * heads * tokens * tokens * head_dim / 2
    cost = Cost(flops=flops, bytes=4 * BYTES[dtype] * heads * tokens * head_dim, calls=1, dtype=dtype)
    return Workload(f"attention prefill {tokens}, {dtype}", f"4ht²d / 2 with h={heads}, d={head_dim}; 4htd", cost, make)


def attention_decode(batch: int, heads: int, context: int, head_dim: int, dtype: str = "fp32") -> Workload:
    """One new token per sequence attends to its whole KV cache: every cached value is read for two FLOPs.

    Written as its two batched products, which torch's CPU backend streams faster than its tiled attention kernel.
    """

    def make(device: str):
        q = _random(device, batch, heads, 1, head_dim, dtype=dtype)
        k, v = (_random(device, batch, heads, context, head_dim, dtype=dtype) for _ in "kv")
        scale = head_dim**-0.5
        return lambda: _torch().softmax((q * scale) @ k.transpose(-1, -2), -1) @ v

    values = 2 * batch * heads * context * head_dim
    cost = Cost(flops=2 * values, bytes=BYTES[dtype] * values, calls=4, dtype=dtype)
    return Workload(
        f"attention decode {batch} × {context}, {dtype}", f"4bhtd with h={heads}, d={head_dim}; 2bhtd", cost, make
    )


def gather(vocabulary: int, width: int, tokens: int) -> Workload:
    """Look up `tokens` random rows of an embedding table of `vocabulary` × `width` fp32 values."""

    def make(device: str):
        table, out = _random(device, vocabulary, width), _random(device, tokens, width)
        generator = _torch().Generator(device).manual_seed(1)
        rows = _torch().randint(vocabulary, (tokens,), device=device, generator=generator)
        return lambda: _torch().index_select(table, 0, rows, out=out)

    cost = Cost(bytes=8 * tokens * width + 8 * tokens, calls=1)
    return Workload(
        f"gather {tokens} rows of {4 * width} B", "none; each row read and written, and its number", cost, make
    )


def suite(kind: str) -> list[Workload]:
    """The operations of chapter 01, sized so that each fills the machine: "cpu" or "gpu"."""
    if kind == "cpu":
        n, dtype, big, square, heads, prompt, batch = 2**26, "fp32", 8192, 2048, 4, 4096, 32
    elif kind == "gpu":
        n, dtype, big, square, heads, prompt, batch = 2**29, "bf16", 16384, 8192, 32, 8192, 128
    else:
        raise ValueError(f"kind is 'cpu' or 'gpu', got {kind!r}")
    return [
        scalar_add(),
        matmul(16),
        copy(n),
        reduction(n),
        scale(n),
        add(n),
        add_fresh(n),
        softmax(n // 4096, 4096),
        gather(n // 4096, 4096, n // 16384),
        matvec(big),
        matvec(big, "bf16"),
        attention_decode(batch, heads, 4096, 64, dtype),
        attention_prefill(heads, prompt, 128, dtype),
        matmul(square),
        matmul(square, "bf16"),
    ]


def _torch():
    import torch

    return torch


def _random(device: str, *shape: int, dtype: str = "fp32"):
    """Random values: zeros are faster than real data on hardware that saves power on idle bits.

    A block of them is repeated, as drawing 2²⁶ would take longer than measuring what is done with them.
    """
    torch = _torch()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    generator, n = torch.Generator(device).manual_seed(sum(shape)), math.prod(shape)
    block = torch.rand(min(n, BLOCK), device=device, generator=generator).to(types[dtype])
    return block.repeat(ceil_div(n, BLOCK))[:n].view(shape)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"
