"""Ring attention and Ulysses on ranks against torch's attention on one process, and what they send against formulas."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from minilib.parallel.context_parallel import METHODS, ContextParallel, HeadsDoNotDivide, LengthDoesNotDivide
from minilib.parallel.context_parallel.traffic import ring_bytes, ulysses_bytes
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.parallel.context_parallel.test_layout import mask

BATCH, TOKENS, HEADS, DIM = 2, 24, 4, 6
PACKED = [[0, 5, 6, 17, 24], [0, 11, 24]]


def whole(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the result's gradient; the same on every rank."""
    torch.manual_seed(kv_heads)
    return [torch.randn(BATCH, TOKENS, heads, DIM, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads, HEADS)]


def on_one_process(q, k, v, grad, documents, causal) -> list[torch.Tensor]:
    """Result and gradients by torch's attention with the mask written out."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    starts = documents or [[0, TOKENS]] * BATCH
    visible = torch.stack([mask(TOKENS, begins, causal) for begins in starts]).bool().unsqueeze(1)
    heads = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(*heads, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def on_ranks(cp: ContextParallel, q, k, v, grad, documents, causal) -> tuple[list[torch.Tensor], list[int]]:
    """Result and gradients of whole rows, and the bytes that this rank has sent forward and backward."""
    inputs = [cp.split(x).requires_grad_() for x in (q, k, v)]
    before = cp.comm.traffic.bytes
    out = cp.attention(TOKENS, documents, causal)(0, *inputs)
    between = cp.comm.traffic.bytes
    gradients = torch.autograd.grad(out, inputs, cp.split(grad))
    sent = [between - before, cp.comm.traffic.bytes - between]
    return [cp.gather(x.detach()) for x in (out, *gradients)], sent


def errors() -> dict:
    """For every way, the largest error of result and gradients, and the bytes sent."""
    comm, found = Communicator(SharedMemoryTransport(timeout=20.0)), {}
    cases = itertools.product(METHODS, (True, False), (None, PACKED), (True, False), (4, 2, 1), (torch.float64,))
    for method, balanced, documents, causal, kv_heads, dtype in (
        *cases,
        *itertools.product(METHODS, (True,), (None, PACKED), (True,), (2,), (torch.float32, torch.bfloat16)),
    ):
        cp, (q, k, v, grad) = ContextParallel(comm, method, balanced), whole(kv_heads, dtype)
        wide = [x.double() for x in (q, k, v, grad)]
        got, sent = on_ranks(cp, q, k, v, grad, documents, causal)
        pairs = zip(got, on_one_process(*wide, documents, causal), strict=True)
        assert [x.dtype for x in got] == [dtype] * 4
        worst = max((x.double() - y).abs().max().item() for x, y in pairs)
        found[method, balanced, documents is not None, causal, kv_heads, dtype] = (worst, sent)
    comm.close()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_as_on_one_process(ranks):
    """Also not causal and balanced, where torch crashed, and with fewer heads of keys than ranks."""
    tokens = BATCH * TOKENS // ranks
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.05}
    for found in run(errors, ranks, timeout=120):
        assert len(found) == 2 * 2 * 2 * 2 * 3 + 2 * 2 * 2
        for (method, *_, kv_heads, dtype), (worst, sent) in found.items():
            assert worst < bound[dtype], (method, kv_heads, dtype, worst)
            q_values, kv_values = tokens * HEADS * DIM, 2 * tokens * kv_heads * DIM
            if method == "ring":
                sums = torch.promote_types(dtype, torch.float32)
                assert sent == list(ring_bytes(kv_values, ranks, dtype.itemsize, sums.itemsize))
            else:
                assert sent == list(ulysses_bytes(q_values, kv_values, kv_heads, ranks, dtype.itemsize))


def alone() -> list:
    comm = Communicator(SharedMemoryTransport(timeout=20.0))
    result = []
    for method in METHODS:
        cp, (q, k, v, grad) = ContextParallel(comm, method), whole(2, torch.float64)
        got, sent = on_ranks(cp, q, k, v, grad, PACKED, True)
        expected = on_one_process(q, k, v, grad, PACKED, True)
        result.append((all(torch.allclose(x, y, atol=1e-12) for x, y in zip(got, expected, strict=True)), sent))
    return result


def test_one_rank_sends_nothing():
    assert run(alone, 1, timeout=60) == [[(True, [0, 0])] * 2]
    assert ring_bytes(100, 1) == ulysses_bytes(100, 50, 1, 1) == (0, 0)


def refusals() -> list[str]:
    """What each rank says; no rank waits for another."""
    comm, said = Communicator(SharedMemoryTransport(timeout=20.0)), []
    x = torch.randn(1, 4, 6, DIM)
    calls = (
        lambda: ContextParallel(comm).split(torch.zeros(1, 12)),
        lambda: ContextParallel(comm).loss(None, torch.zeros(1, 12), torch.zeros(1, 12)),
        lambda: ContextParallel(comm, "ulysses").attention(16)(0, x, x, x),
        lambda: ContextParallel(comm, "ulysses").attention(16)(0, x[:, :, :4], x[:, :, :3], x[:, :, :3]),
        lambda: ContextParallel(comm, "star"),
        lambda: ContextParallel(comm).attention(16, [[0, 15]])(0, x, x, x),
    )
    for call in calls:
        try:
            call()
        except (ValueError, LengthDoesNotDivide, HeadsDoNotDivide) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_cannot_be_dealt_is_refused_on_every_rank():
    expected = [
        "LengthDoesNotDivide: 12 tokens",
        "LengthDoesNotDivide: 12 tokens",
        "HeadsDoNotDivide: 6 query heads and 6 heads of keys",
        "HeadsDoNotDivide: 4 query heads and 3 heads of keys",
        "ValueError: method is one of ring, ulysses; got 'star'",
        "ValueError: documents[0] must climb",
    ]
    for said in run(refusals, 4, timeout=60):
        assert [line.startswith(wanted) for line, wanted in zip(said, expected, strict=True)] == [True] * 6, said


def lost(method: str) -> str:
    comm = Communicator(SharedMemoryTransport(timeout=20.0))
    cp, (q, k, v, _) = ContextParallel(comm, method), whole(2, torch.float32)
    q, k, v = (cp.split(x).requires_grad_() for x in (q, k, v))
    out = cp.attention(TOKENS)(0, q, k, v)
    if dist.get_rank() == 1:
        comm.close()  # gone between forward and backward
        return "gone"
    try:
        out.sum().backward()
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_is_gone_in_backward(method):
    assert run(lost, 2, method, timeout=60) == ["CollectiveFailed", "gone"]
