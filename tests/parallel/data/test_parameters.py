"""Parameters of all kinds, used or not, and the buckets that they go into."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minilib.parallel.data.data_parallel import METHODS, DataParallel
from minilib.ranks.agreement import OutOfSync, same_values
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport


class Odd(nn.Module):
    """Parameters of several dtypes, layouts and sizes; each step uses those that it is told to."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
        torch.manual_seed(100 * seed + rank)
        for number in range(1 + draw(8)):
            dtype = (torch.float32, torch.float64, torch.bfloat16)[draw(3)]
            shape = [(), (1,), (3, 5), (2, 3, 4, 5), (0, 3), (17,)][draw(6)]
            values = torch.randn(shape).to(dtype)
            if len(shape) == 4 and draw(2):
                values = values.to(memory_format=torch.channels_last)
            elif len(shape) == 2 and draw(2):
                values = values.T
            self.register_parameter(f"p{number}", nn.Parameter(values, requires_grad=number == 0 or draw(4) > 0))

    def loss(self, used: list[bool], inputs: torch.Generator) -> torch.Tensor:
        total = torch.zeros((), requires_grad=True)
        for p, use in zip(self.parameters(), used, strict=True):
            if use:
                x = torch.randn(p.shape, generator=inputs)
                total = total + (p.float() * x).sum() + (p.float() * x).square().sum()
        return total


def takes_all_kinds() -> list[int]:
    comm = Communicator(SharedMemoryTransport())
    return [takes_all_kinds_by(method, comm) for method in METHODS]


def takes_all_kinds_by(method: str, comm: Communicator) -> int:
    """Gradients against the mean of what autograd alone gives each rank; some are used nowhere, some on some ranks."""
    rank, checked = comm.rank, 0
    for seed in range(12):
        model = Odd(rank, seed)
        dp = DataParallel(model, comm, method, bucket_bytes=[1, 60, 1000][seed % 3])
        inputs = torch.Generator().manual_seed(rank)
        for _ in range(3):
            alone = copy.deepcopy(model)
            used = (torch.rand(len(list(model.parameters())), generator=inputs) < 0.6).tolist()
            alone.loss(used, inputs.clone_state()).backward()
            model.zero_grad()
            model.loss(used, inputs).backward()
            dp.weight(0, 1)  # perhaps no parameter is used here
            dp.finish()
            everybody = [None] * comm.world_size
            dist.all_gather_object(everybody, [(p.grad, q.grad) for p, q in zip(*both(alone, model), strict=True)])
            for column in zip(*everybody, strict=True):
                checked += check_average(column)
        dp.check_invariants()
        dp.close()
    return checked


def both(alone: Odd, model: Odd):
    return alone.parameters(), model.parameters()


def check_average(column) -> int:
    averaged = [theirs for _, theirs in column]
    if averaged[0] is None:  # frozen
        return 0
    local = [torch.zeros_like(averaged[0]) if own is None else own for own, _ in column]
    assert all(torch.equal(averaged[0], other) for other in averaged)
    tolerance = {"rtol": 0.02, "atol": 0.02} if averaged[0].dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(averaged[0], torch.stack(local).mean(0), **tolerance)
    return 1


def test_parameters_of_all_kinds_used_or_not():
    checked = run(takes_all_kinds, 3)
    assert checked == [[checked[0][0]] * 3] * 3 and checked[0][0] > 90


def layouts() -> list:
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    dp = DataParallel(model, Communicator(SharedMemoryTransport()))
    model(torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)).square().sum().backward()
    dp.finish()
    [bucket] = dp.buckets
    place = [
        p.grad.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr() for p in model.parameters()
    ]
    return [model.weight.grad.stride() == model.weight.stride(), *place]


def test_gradients_are_views_of_buckets_in_the_layout_of_their_parameters():
    assert run(layouts, 2) == [[True, True, True]] * 2


def test_gradients_of_a_bucket_are_neighbours_of_one_dtype():
    """Buckets by dtype, in the order in which backward, which goes from the last layer to the first, fills them."""
    single = run(cuts, 1)[0]
    assert single == [["e"], ["f", "d"], ["c"], ["b", "a"]]


def cuts() -> list[list[str]]:
    model = nn.Module()
    for name in "abcdef":
        dtype = torch.float64 if name in "ce" else torch.float32
        model.register_parameter(name, nn.Parameter(torch.zeros(10, dtype=dtype)))
    dp = DataParallel(model, Communicator(GroupTransport()), bucket_bytes=80)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in bucket.parameters] for bucket in dp.buckets]


def keeps_its_own() -> list[tuple]:
    """A parameter of the rank's own: its value, its gradient, those of another, and what comparing says."""
    comm, found = Communicator(SharedMemoryTransport()), []
    for method in METHODS:
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        mine, before = model[1].weight, model[1].weight.detach().clone()
        dp = DataParallel(model, comm, method, bucket_bytes=20, check_every=1, skip=[mine])
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(5, 3) * (comm.rank + 1)).sum().backward()
            own = mine.grad.clone()
            dp.finish()
            dp.check_invariants()
        assert all(mine is not parameter for bucket in dp.buckets for parameter in bucket.parameters)
        same_values(model, comm, [mine])
        with pytest.raises(OutOfSync, match="rank 1 differs in 1.weight from"):
            same_values(model, comm)
        found.append((torch.equal(mine, before) and torch.equal(mine.grad, own), own, model[0].weight.grad))
        dp.close()
    return found


def test_parameters_to_skip_are_left_alone():
    for (kept, own, shared), (kept_there, own_there, shared_there) in zip(*run(keeps_its_own, 2), strict=True):
        assert kept and kept_there and not torch.equal(own, own_there)
        assert torch.equal(shared, shared_there)
