"""Data parallelism against one process on the whole batch, and against torch's DistributedDataParallel.

Ranks start with other weights and have other data, always.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from minilib.parallel.data.data_parallel import METHODS, DataParallel
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
STEPS, ROWS = 4, 6  # rows a rank
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # fp32: sums in another order, through four steps of AdamW


class Net(nn.Module):
    """Tied weights, odd sizes, a frozen layer, a scalar."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.embed = nn.Embedding(11, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.middle = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.rand(()) + 1)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.out(self.norm(x + self.scale * torch.tanh(self.middle(self.frozen(x)))))


def batch(step: int, rank: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return tuple(torch.randint(11, (rows,), generator=generator) for _ in range(2))


def loss_of(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens), targets)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and gradients."""
    grads = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | grads


def all_same(states: list[dict[str, torch.Tensor]]) -> bool:
    return all(s.keys() == states[0].keys() and all(torch.equal(s[k], states[0][k]) for k in s) for s in states)


def one_process(world_size: int, batch=batch) -> dict[str, torch.Tensor]:
    """The oracle: all ranks' batches one after another, through rank 0's model."""
    model = Net()
    optimizer = adamw(model)
    for step in range(STEPS):
        parts = [batch(step, rank) for rank in range(world_size)]
        optimizer.zero_grad()
        loss_of(model, *(torch.cat(side) for side in zip(*parts, strict=True))).backward()
        optimizer.step()
    return state(model)


# Equal to one process, and to torch


def trains(transport: str) -> tuple[dict[str, dict], dict]:
    rank, comm, results = dist.get_rank(), Communicator(TRANSPORTS[transport]()), {}
    for method in METHODS:
        model = Net(rank)
        dp = DataParallel(model, comm, method, bucket_bytes=120, check_every=1)
        optimizer = adamw(model)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss_of(model, *batch(step, rank)).backward()
            dp.finish()
            dp.check_invariants()
            optimizer.step()
        results[method] = state(model)
        dp.close()
    theirs = DistributedDataParallel(Net(rank))
    optimizer = adamw(theirs.module)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(theirs, *batch(step, rank)).backward()
        optimizer.step()
    return results, state(theirs.module)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_equals_one_process_on_the_whole_batch_and_torchs_ddp(world_size, transport):
    ranks, expected = run(trains, world_size, transport), one_process(world_size)
    for method in METHODS:
        mine = [results[method] for results, _ in ranks]
        assert all_same(mine), f"{method}: ranks have other bits"
        torch.testing.assert_close(mine[0], expected, **CLOSE)
        torch.testing.assert_close(mine[0], ranks[0][1], **CLOSE)
    assert "frozen.weight.grad" not in expected and not torch.equal(expected["out.weight"], Net().out.weight)


# Where it begins


def begins() -> tuple[bool, dict]:
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(rank >= 0)
    torch.manual_seed(rank)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().copy_(torch.rand(tensor.shape) + 7 * rank)
    dp = DataParallel(model, Communicator(GroupTransport()))
    dp.check_in_sync()
    return all(p.grad is None for p in model.parameters()), model.state_dict()


def test_ranks_start_with_the_parameters_and_buffers_of_rank_0():
    ranks = run(begins, 3)
    assert all(no_gradient for no_gradient, _ in ranks)
    assert all_same([weights for _, weights in ranks])
    assert max(float(tensor.max()) for tensor in ranks[2][1].values()) < 7


def buffers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Running means before and after `finish`, with and without their synchronisation."""
    rank, comm, means = dist.get_rank(), Communicator(GroupTransport()), []
    for sync in (True, False):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        dp = DataParallel(model, comm, sync_buffers=sync)
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
        before = model[1].running_mean.clone()
        dp.finish()
        means.append((before, model[1].running_mean))
    return means


def test_buffers_are_those_of_rank_0_after_each_step_if_asked():
    (first, alone_0), (second, alone_1) = run(buffers, 2)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], first[0]) and torch.equal(second[1], first[0])
    assert torch.equal(alone_0[1], alone_0[0]) and torch.equal(alone_1[1], alone_1[0])


# Accumulation


def accumulates(sync_last: bool) -> dict[str, tuple[dict, list[int]]]:
    comm = Communicator(SharedMemoryTransport())
    return {method: accumulates_by(method, comm, sync_last) for method in METHODS}


def accumulates_by(method: str, comm: Communicator, sync_last: bool) -> tuple[dict, list[int]]:
    rank, model = dist.get_rank(), Net(dist.get_rank())
    dp = DataParallel(model, comm, method, bucket_bytes=120)
    optimizer, sent = adamw(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        before = comm.traffic.bytes
        with dp.no_sync():
            for part in (0, 2):
                loss_of(model, *(x[part : part + 2] for x in batch(step, rank))).div(3).backward()
            assert comm.traffic.bytes == before
            if not sync_last:
                loss_of(model, *(x[4:] for x in batch(step, rank))).div(3).backward()
        if sync_last:
            loss_of(model, *(x[4:] for x in batch(step, rank))).div(3).backward()
        dp.finish()
        sent.append(comm.traffic.bytes - before)
        optimizer.step()
    return state(model), sent


@pytest.mark.parametrize("sync_last", [True, False], ids=["the last one synchronises", "finish does"])
def test_gradients_accumulate_without_communication(sync_last):
    ranks, expected = run(accumulates, 2, sync_last), one_process(2)
    for method in METHODS:
        assert all_same([results[method][0] for results in ranks])
        torch.testing.assert_close(ranks[0][method][0], expected, **CLOSE)
        once = sum(p.nbytes for p in trained(Net()))  # an all-reduce of two ranks sends each byte once
        for results in ranks:
            assert results[method][1] == [pytest.approx(once, abs=4 * 9)] * STEPS  # odd sizes do not halve


# Batches of different numbers of tokens


def uneven(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch(step, rank, rows=[3, 0, 7, 1][(rank + step) % 4])


def weighs() -> list[dict]:
    comm = Communicator(GroupTransport())
    return [weighs_by(method, comm, known) for method in METHODS for known in (True, False)]


def weighs_by(method: str, comm: Communicator, known: bool) -> dict:
    rank, model = dist.get_rank(), Net(dist.get_rank())
    dp = DataParallel(model, comm, method, bucket_bytes=120)
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, targets = uneven(step, rank)
        total = sum(len(uneven(step, other)[0]) for other in range(comm.world_size))
        weight = dp.weight(len(tokens), total) if known else dp.weight(len(tokens))
        if len(tokens):
            (weight * loss_of(model, tokens, targets)).backward()
        dp.finish()
        optimizer.step()
    return state(model)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_token_counts_the_same_however_they_are_dealt(world_size):
    expected = one_process(world_size, uneven)
    for column in zip(*run(weighs, world_size), strict=True):
        assert all_same(list(column))
        torch.testing.assert_close(column[0], expected, **CLOSE)
