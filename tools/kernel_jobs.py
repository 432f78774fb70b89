"""What tools/bench/kernels.py measures: each op at sizes well over a GPU's cache, with its peers and its price."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minilib.kernels.cross_entropy import linear
from minilib.kernels.cross_entropy import logits as cross_entropy
from minilib.kernels.flash_attention import attention as flash_attention
from minilib.kernels.matmul import dense as matmul
from minilib.kernels.matmul import grouped as grouped_matmul
from minilib.kernels.rowwise import rms_norm, rotary, softmax, swiglu
from minilib.numbers.price import Cost

Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured, in bf16: by default tensors far larger than an H200's 50 MiB of L2.

    Args:
        device: "cuda", or "cpu" to try all of this out in plain torch.
        attention: (batch, tokens) of each causal self-attention.
        heads: (num_heads, num_kv_heads) of each.
        head_dim: of all heads.
        product: m = n = k of the matrix product.
        rows, columns: of what is normalised, gated or turned.
        tokens, vocab: of the logits.
        hidden: width of the hidden states from which linear_cross_entropy makes them.
        experts: of a mixture, each with a weight of hidden × hidden, which share `rows` evenly or not.
        budget: seconds for each comparison.
    """

    device: str = "cuda"
    attention: tuple[tuple[int, int], ...] = ((4, 4096), (2, 8192), (1, 16384))
    heads: tuple[tuple[int, int], ...] = ((32, 32), (32, 8))
    head_dim: int = 128
    product: int = 8192
    rows: int = 16384
    columns: int = 8192
    tokens: int = 8192
    vocab: int = 128256
    hidden: int = 4096
    experts: tuple[int, ...] = (8, 64)
    budget: float = 1.0

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal values: zeros run faster than real data."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).bfloat16()


@dataclass(frozen=True)
class Job:
    """One op at one size.

    Args:
        name: such as "softmax forward 16384 × 8192".
        cost: what the op must do.
        ours: allocates what it needs and returns the call to measure.
        peers: the same for each peer, by name.
        figures: further figures for the row, from the calls (ours, then peers, by name).
    """

    name: str
    cost: Cost
    ours: Callable[[], Call]
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    figures: Callable[[dict[str, Call]], dict] | None = None


def jobs(sizes: Sizes, compiler: Callable = torch.compile) -> list[Job]:
    """Everything that is measured, in order."""
    products = [*_products(sizes), *_grouped_products(sizes)]
    return [*_attention(sizes), *products, *_rowwise(sizes, compiler), _linear_cross_entropy(sizes)]


def _attention(sizes: Sizes) -> Iterator[Job]:
    """Causal attention against torch's FlashAttention and cuDNN's; the backward pass alone, through one graph."""
    backends = {"torch flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for backward in (False, True):
        for heads, kv_heads in sizes.heads:
            for batch, tokens in sizes.attention:
                shape = (batch, tokens, heads, sizes.head_dim)
                shapes = (shape, *[(batch, tokens, kv_heads, sizes.head_dim)] * 2)
                ways = {"ours": flash_attention.flash_attention}
                ways |= {name: _sdpa(backend, heads != kv_heads) for name, backend in backends.items()}
                yield _job(
                    f"attention {_way(backward)} batch {batch}, {tokens} tokens, heads {heads}/{kv_heads}",
                    flash_attention.cost(batch, heads, kv_heads, tokens, tokens, sizes.head_dim, backward=backward),
                    ways,
                    lambda shapes=shapes: [sizes.random(*shape, seed=i) for i, shape in enumerate(shapes)],
                    backward=backward,
                )


def _sdpa(backend: SDPBackend, grouped: bool) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return attend


def _products(sizes: Sizes) -> Iterator[Job]:
    n = sizes.product
    for version in matmul.VERSIONS:
        ways = {"ours": lambda a, b, version=version: matmul.matmul(a, b, version), "torch": torch.mm}
        yield _job(f"matmul {version} {n}³", matmul.cost(n, n, n), ways, lambda: _square(sizes))


def _square(sizes: Sizes) -> list[Tensor]:
    return [sizes.random(sizes.product, sizes.product, seed=seed) for seed in (0, 1)]


def _grouped_products(sizes: Sizes) -> Iterator[Job]:
    """Against torch's own, the loop over experts that one writes first, and one product of as many FLOPs."""
    tokens, hidden = sizes.rows, sizes.hidden
    ways = {"ours": grouped_matmul.grouped_matmul, "torch": _torch_grouped, "loop": _loop_over_groups}
    for backward, experts, even in itertools.product((False, True), sizes.experts, (True, False)):
        rows = shares(tokens, experts, even)

        def inputs(rows=rows, weights: tuple[int, ...] = (experts,)) -> list[Tensor]:
            ends = torch.tensor(rows, device=sizes.device).cumsum(0).int()
            return [sizes.random(tokens, hidden), hidden**-0.5 * sizes.random(*weights, hidden, hidden, seed=1), ends]

        def dense(inputs=inputs, backward=backward) -> Call:
            return _pass(torch.mm, inputs(weights=())[:2], 2, backward)

        size = f"{experts} experts, {'even' if even else 'uneven'}, {tokens} × {hidden} × {hidden}"
        cost = grouped_matmul.cost(rows, hidden, hidden, backward=backward)
        job = _job(f"grouped_matmul {_way(backward)} {size}", cost, ways, inputs, 2, backward)
        yield replace(job, peers=job.peers | {"dense": dense})


def shares(rows: int, experts: int, even: bool) -> list[int]:
    """Rows of each expert: all the same, but for what does not divide, or the nth 1 / n of the first's."""
    parts = [1 if even else 1 / (1 + expert) for expert in range(experts)]
    ends = [round(rows * sum(parts[:expert]) / sum(parts)) for expert in range(experts + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _torch_grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=offsets)


def _loop_over_groups(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
    return loop_over_experts(x, weight, torch.searchsorted(offsets, rows, right=True))


def loop_over_experts(x: Tensor, weight: Tensor, expert_of: Tensor) -> Tensor:
    """Picks out each expert's rows and puts its results back, as one does whose rows are not sorted."""
    out = x.new_zeros(len(x), weight.shape[2])
    for expert in range(len(weight)):
        chosen = (expert_of == expert).nonzero()[:, 0]
        out[chosen] = x[chosen] @ weight[expert]
    return out


def _rowwise(sizes: Sizes, compiler: Callable) -> Iterator[Job]:
    """What moves bytes: against torch's own op where there is one, and what its compiler makes of our reference."""
    rows, columns, head_dim = sizes.rows, sizes.columns, sizes.head_dim
    heads, values = columns // head_dim, 2 * rows * columns  # bytes of a tensor

    def norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h

    def logits() -> list[Tensor]:
        targets = torch.arange(sizes.tokens, device=sizes.device) * 7919 % sizes.vocab
        return [sizes.random(sizes.tokens, sizes.vocab), targets]

    def stream() -> list[Tensor]:
        return [sizes.random(*shape, seed=i) for i, shape in enumerate(((rows, columns), (columns,), (rows, columns)))]

    def angles() -> list[Tensor]:
        return [sizes.random(rows, n, head_dim, seed=seed) for seed, n in enumerate((heads, 1, 1))]

    # name, module, its op, torch's, inputs, how many of them want a gradient, cost forward and backward
    table = [
        (
            f"rms_norm with residual {rows} × {columns}", rms_norm.rms_norm, rms_norm.reference, norm,
            stream, 3, rms_norm.cost(rows, columns, residual=True), _backward(8, values, 4),  # h, dy, dh → dx
        ),
        (
            f"softmax {rows} × {columns}", softmax.softmax, softmax.reference, lambda x: x.softmax(-1),
            lambda: [sizes.random(rows, columns)], 1,
            softmax.cost(rows, columns), _backward(4, values, 3),  # y, dy → dx
        ),
        (
            f"swiglu {rows} × {columns}", swiglu.swiglu, swiglu.reference, None,
            lambda: [sizes.random(rows, 2 * columns)], 1,
            swiglu.cost(rows, columns), _backward(10, values, 5),  # gate, up, dy → dgate, dup
        ),
        (
            f"cross_entropy {sizes.tokens} × {sizes.vocab}", cross_entropy.cross_entropy, cross_entropy.reference,
            F.cross_entropy, logits, 1,
            *(cross_entropy.cost(sizes.tokens, sizes.vocab, backward=backward) for backward in (False, True)),
        ),
        (
            f"rotary {rows} × {heads} heads", rotary.rotary, rotary.reference, None, angles, 1,
            *[rotary.cost(rows, heads, head_dim)] * 2,
        ),
    ]  # fmt: skip
    for name, op, reference, torchs, inputs, wanted, *costs in table:
        for backward, cost in zip((False, True), costs, strict=True):
            ways = {"ours": op, "torch.compile": compiler(reference)} | ({"torch": torchs} if torchs else {})
            op_name, _, size = name.partition(" ")
            yield _job(f"{op_name} {_way(backward)} {size}", cost, ways, inputs, wanted, backward)


def _backward(flops: int, values: int, tensors: int) -> Cost:
    """A backward pass of so many FLOPs a value that reads or writes so many tensors of `values` bytes."""
    return Cost(flops=flops * values / 2, bytes=tensors * values, calls=1)


def _linear_cross_entropy(sizes: Sizes) -> Job:
    """Forward and backward together, as the gradients are computed in the forward pass; with the peak of memory."""
    tokens, hidden, vocab = sizes.tokens, sizes.hidden, sizes.vocab

    def inputs() -> list[Tensor]:
        targets = torch.arange(tokens, device=sizes.device) * 7919 % vocab
        return [sizes.random(tokens, hidden), hidden**-0.5 * sizes.random(vocab, hidden, seed=1), targets]

    def both(op: Callable) -> Callable[[], Call]:
        def make() -> Call:
            h, weight, targets = inputs()
            leaves = [h.requires_grad_(), weight.requires_grad_()]
            return lambda: torch.autograd.grad(op(*leaves, targets), leaves)

        return make

    def unfused(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(h @ weight.T, targets)

    def memory(calls: dict[str, Call]) -> dict:
        chunk = linear.chunk_tokens(tokens, vocab)
        logits = {"ours": 2 * chunk * vocab, "torch": 2 * tokens * vocab}
        return {"logits_bytes": logits, "peak_bytes": {name: _peak(call, sizes.device) for name, call in calls.items()}}

    ours, torchs = both(linear.linear_cross_entropy), both(unfused)
    name = f"linear_cross_entropy forward and backward {tokens} × {hidden} × {vocab}"
    return Job(name, linear.cost(tokens, hidden, vocab), ours, {"torch": torchs}, memory)


def _peak(call: Call, device: str) -> int | None:
    """Bytes that a call allocates at most beyond what is there; None where torch does not count them."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _job(
    name: str, cost: Cost, ways: dict[str, Callable], inputs: Callable[[], list[Tensor]], wanted: int = 3,
    backward: bool = False,
) -> Job:  # fmt: skip
    """One op computed in several ways: the forward pass without a graph, or the backward pass alone."""

    def ready(op: Callable) -> Callable[[], Call]:
        return lambda: _pass(op, inputs(), wanted, backward)

    peers = {peer: ready(op) for peer, op in ways.items() if peer != "ours"}
    return Job(name, cost, ready(ways["ours"]), peers)


def _pass(op: Callable, inputs: list[Tensor], wanted: int, backward: bool) -> Call:
    if not backward:
        return lambda: _without_graph(op, inputs)
    leaves = [x.requires_grad_() for x in inputs[:wanted]]
    out = op(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(x) for x in outs]
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


@torch.no_grad()
def _without_graph(op: Callable, inputs: list[Tensor]) -> object:
    return op(*inputs)


def _way(backward: bool) -> str:
    return "backward" if backward else "forward"
