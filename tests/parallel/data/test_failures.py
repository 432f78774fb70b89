"""What goes wrong on one rank is said on every rank, within the timeout."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minilib.parallel.data.data_parallel import DataParallel
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
TIMEOUT = 1.0


class Breaks(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in backward")


def linear(*sizes: int) -> nn.Sequential:
    torch.manual_seed(dist.get_rank())
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


def said(fn) -> tuple[str, str, float]:
    """What a call raises on this rank, and after how many seconds."""
    started = time.monotonic()
    try:
        fn()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


def breaks_in_backward(transport: str, method: str) -> tuple[str, str, float]:
    model = linear(64, 64, 64, 64)
    dp = DataParallel(model, Communicator(TRANSPORTS[transport](timeout=TIMEOUT)), method, bucket_bytes=1)

    def step():
        x = model[0](torch.randn(2, 64))
        x = Breaks.apply(x) if dist.get_rank() == 1 else x
        model[1:](x).sum().backward()
        dp.finish()

    return said(step)


@pytest.mark.parametrize(
    ("transport", "method"), [("group", "naive"), ("group", "buckets"), ("shared", "flat"), ("shared", "buckets")]
)
def test_a_rank_that_raises_in_backward_leaves_nobody_waiting(transport, method):
    ranks = run(breaks_in_backward, 3, transport, method)
    assert ranks[1][:2] == ("ArithmeticError", "in backward")
    for rank in (0, 2):
        kind, message, seconds = ranks[rank]
        assert kind == "CollectiveFailed" and "rank" in message
        assert seconds < 2 * TIMEOUT + 5  # the machine is shared


def cuts_other_buckets(transport: str) -> tuple[str, str, float]:
    model = linear(64, 64, 64, 64)
    dp = DataParallel(
        model, Communicator(TRANSPORTS[transport](timeout=TIMEOUT)), bucket_bytes=1 if dist.get_rank() == 1 else 2**14
    )

    def step():
        model(torch.randn(2, 64)).sum().backward()
        dp.finish()

    return said(step)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_pass_other_shapes_are_told(transport):
    ranks = run(cuts_other_buckets, 2, transport)
    assert {kind for kind, _, _ in ranks} <= {"CollectiveMismatch", "CollectiveFailed"}
    assert "CollectiveMismatch" in {kind for kind, _, _ in ranks}
    assert any("same shapes" in message for _, message, _ in ranks)


def builds(variants: list[str]) -> list[tuple[str, str]]:
    comm = Communicator(GroupTransport())
    return [said(lambda name=name: DataParallel(built(name), comm))[:2] for name in variants]


def built(variant: str) -> nn.Sequential:
    """A layer, or on rank 2 something else."""
    model = linear(3, 4)
    if dist.get_rank() == 2:
        if variant == "shape":
            model = linear(3, 5)
        elif variant == "missing":
            model = linear(3, 4, 4)
        elif variant == "dtype":
            model.double()
        elif variant == "frozen":
            model[0].bias.requires_grad_(False)
        elif variant == "order":
            model[0].weight, model[0].bias = swap(model[0])
        elif variant == "buffer":
            model.register_buffer("seen", torch.zeros(2))
        elif variant == "layout":
            model[0].weight = nn.Parameter(torch.zeros(3, 4).T)
    return model


def swap(layer: nn.Linear):
    """Register the bias before the weight."""
    weight, bias = layer.weight, layer.bias
    del layer.weight, layer.bias
    layer.register_parameter("bias", bias)
    layer.register_parameter("weight", weight)
    return weight, bias


DIFFERENT = {
    "shape": "0.weight: rank 0 has (4, 3) float32, rank 2 has (5, 3) float32",
    "missing": "1.weight: rank 0 has nothing of that name, rank 2 has (4, 4) float32",
    "dtype": "0.weight: rank 0 has (4, 3) float32, rank 2 has (4, 3) float64",
    "frozen": "0.bias: rank 0 has (4,) float32, rank 2 has (4,) float32, frozen",
    "order": "rank 2 has the parameters of rank 0, but registers them in another order",
    "buffer": "seen: rank 0 has nothing of that name, rank 2 has (2,) float32, a buffer",
    "layout": "0.weight: rank 0 has (4, 3) float32, rank 2 has (4, 3) float32 with strides (1, 4)",
}


def test_ranks_that_built_different_models_are_told_what_differs():
    for found in run(builds, 3, list(DIFFERENT)):
        for (kind, text), message in zip(found, DIFFERENT.values(), strict=True):
            assert kind == "RanksDiffer"
            assert text.startswith(message)


def drifts(cases: list) -> list[tuple[tuple[str, str], int]]:
    comm = Communicator(SharedMemoryTransport())
    return [drifts_by(changes, check_every, comm) for changes, check_every in cases]


def drifts_by(changes: dict[int, list[str]], check_every: int, comm: Communicator) -> tuple[tuple[str, str], int]:
    """Values change on some ranks; in which step that is noticed."""
    model = linear(3, 4, 5)
    dp = DataParallel(model, comm, check_every=check_every)
    with torch.no_grad():
        for name in changes.get(dist.get_rank(), []):
            weight = model.get_parameter(name)
            weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))  # the smallest change
    for step in range(1, 5):
        model(torch.randn(2, 3)).sum().backward()
        error = said(dp.finish)
        if error[0] != "nothing":
            return error[:2], step
    return said(dp.check_in_sync)[:2], 0


def test_ranks_that_drift_apart_are_named_with_their_parameters():
    cases = [({1: ["1.weight"]}, 3), ({0: ["0.bias", "1.bias"], 2: ["1.weight"]}, 0), ({}, 1)]
    for (one, step), (two, never), fine in run(drifts, 3, cases):
        assert (one[0], step) == ("OutOfSync", 3)
        assert one[1].startswith("rank 1 differs in 1.weight from")
        assert (two[0], never) == ("OutOfSync", 0)
        assert two[1].startswith("rank 0 differs in 0.bias, 1.bias; rank 2 differs in 1.weight from")
        assert fine == (("nothing", ""), 0)
    for [((kind, text), step)] in run(drifts, 2, [({0: ["0.bias"]}, 1)]):
        assert (kind, step) == ("OutOfSync", 1)
        assert text.startswith("rank 1 differs in 0.bias from")  # of two, rank 0 is right


def misuses() -> dict[str, tuple[str, str]]:
    comm, model, x = Communicator(GroupTransport()), linear(3, 4, 5), torch.ones(2, 3)
    found = {"method": said(lambda: DataParallel(model, comm, "ring"))[:2]}
    found["nothing to train"] = said(lambda: DataParallel(linear(3, 4).requires_grad_(False), comm))[:2]
    dp = DataParallel(model, comm)
    found["no backward"] = said(dp.finish)[:2]
    dp.weight(0, 5)
    found["no tokens"] = said(dp.finish)[:2]
    model(x).sum().backward()
    dp.finish()
    found["finished twice"] = said(dp.finish)[:2]
    model(x).sum().backward()
    found["not finished"] = said(model(x).sum().backward)[:2]
    return found


def test_misuse_is_explained():
    [found] = run(misuses, 1)
    assert found["method"] == ("ValueError", "method is one of naive, flat, buckets; got 'ring'")
    assert found["nothing to train"][0] == "ValueError" and "no parameter to train" in found["nothing to train"][1]
    assert found["no backward"][0] == found["finished twice"][0] == "NoBackward"
    assert "call loss.backward() first, or weight(0)" in found["no backward"][1]
    assert found["no tokens"] == ("nothing", "")
    assert found["not finished"][0] == "NotFinished" and "no_sync()" in found["not finished"][1]
