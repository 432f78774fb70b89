"""What every rank does over a TorchCommunicator: the same on gloo and, with other tensors, on NCCL."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from minilib.model.moe import MoE
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from minilib.parallel.data.data_parallel import METHODS, DataParallel
from minilib.parallel.expert_parallel import ExpertParallel
from minilib.parallel.zero import Zero
from minilib.parallel.zero.ledger import STAGES
from minilib.ranks.collectives import Communicator, chunk_of
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.ranks.transport.group import GroupTransport
from tests.ranks.collective_cases import values

HIDDEN, EXPERTS, STEPS = 8, 4, 3


def collectives() -> None:
    """Every collective against sums and copies that this rank makes by itself."""
    comm = TorchCommunicator()
    n, rank = comm.world_size, comm.rank
    on = partial(torch.Tensor.to, device=comm.device)
    for numel in (0, 1, n, n + 1, 12 * n, 101):
        everybody = torch.stack([values(numel, rank=r) for r in range(n)])
        total, mine = on(everybody.sum(0)), on(everybody[rank])
        x = mine.clone()
        assert comm.all_reduce(x) is None and torch.equal(x, total)
        x = mine.clone()
        comm.all_reduce(x, "max")
        assert torch.equal(x, on(everybody.amax(0)))
        x = mine.clone()
        own = comm.reduce_scatter(x)
        assert own.data_ptr() == chunk_of(x, rank, n).data_ptr() and torch.equal(own, total.tensor_split(n)[rank])
        comm.all_gather(x)
        assert torch.equal(x, total)
        for root in range(n):
            x = mine.clone()
            comm.broadcast(x, root)
            assert torch.equal(x, on(everybody[root]))
            x = mine.clone()
            comm.reduce(x, root, async_op=True).wait()
            assert rank != root or torch.equal(x, total)
    sizes = [[(2 * src + dst) % 3 for dst in range(n)] for src in range(n)]
    inputs = [on(torch.full((size,), 10.0 * rank + dst)) for dst, size in enumerate(sizes[rank])]
    outputs = [on(torch.empty(sizes[src][rank])) for src in range(n)]
    comm.all_to_all(outputs, inputs)
    assert [x.tolist() for x in outputs] == [[10.0 * src + rank] * sizes[src][rank] for src in range(n)]
    pending = [comm.all_reduce(on(torch.ones(3)), async_op=True) for _ in range(3)]
    for each in pending:
        each.wait()
        each.wait()
        assert each.done
    comm.barrier()
    comm.close()


class Net(nn.Module):
    """A dense layer, then a mixture of experts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList([MoE(MoEConfig(EXPERTS, 2, 5), HIDDEN, Ops())])

    def forward(self, x):
        x = torch.tanh(self.dense(x))
        for block in self.blocks:
            x = x + block(x)
        return x


def trainings() -> dict[str, dict[str, torch.Tensor]]:
    """Weights, on the CPU, after steps of every engine over both communicators; the first is one process's."""
    ours = {"torch": TorchCommunicator()}
    if ours["torch"].device.type == "cpu":
        ours["plans"] = Communicator(GroupTransport())
    found = {"alone": _alone(ours["torch"])}
    for name, comm in ours.items():
        for method in METHODS:
            found[f"{name}, {method}"] = _data_parallel(comm, method)
        for stage in STAGES:
            found[f"{name}, stage {stage}"] = _zero(comm, stage)
        found[f"{name}, experts"] = _expert_parallel(comm)
    return {name: {key: x.cpu() for key, x in weights.items()} for name, weights in found.items()}


def all_like_the_first(found: dict[str, dict[str, torch.Tensor]]) -> None:
    """Every engine has the weights that one process has."""
    (_, alone), *others = found.items()
    for name, weights in others:
        assert weights.keys() == alone.keys(), name
        for key, expected in alone.items():
            assert torch.allclose(weights[key], expected, rtol=1e-9, atol=1e-9), (name, key)


def _samples(step: int, n: int) -> tuple[torch.Tensor, ...]:
    """The whole batch: 6 rows for each rank."""
    return torch.randn(6 * n, HIDDEN, generator=torch.Generator().manual_seed(step), dtype=torch.float64).split(6)


def _alone(comm: TorchCommunicator) -> dict[str, torch.Tensor]:
    model = Net(0).double().to(comm.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.cat(_samples(step, comm.world_size)).to(comm.device)).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


def _steps(model: nn.Module, comm: Communicator):
    for step in range(STEPS):
        x = _samples(step, comm.world_size)[comm.rank].to(comm.device)
        model(x).square().mean().backward()
        yield step


def _data_parallel(comm: Communicator, method: str) -> dict[str, torch.Tensor]:
    model = Net(comm.rank).double().to(comm.device)
    dp = DataParallel(model, comm, method, bucket_bytes=256, check_every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in _steps(model, comm):
        dp.finish()
        optimizer.step()
        optimizer.zero_grad()
    dp.close()
    return dict(model.state_dict())


def _zero(comm: Communicator, stage: int) -> dict[str, torch.Tensor]:
    model = Net(comm.rank).double().to(comm.device)
    zero = Zero(model, comm, stage, partial(torch.optim.AdamW, lr=1e-2), precision="fp64")
    for _ in _steps(model, comm):
        zero.clip_grad_norm(1e9)
        zero.step()
        zero.zero_grad()
        zero.check_invariants()
    return zero.full_state_dict()


def _expert_parallel(comm: Communicator) -> dict[str, torch.Tensor]:
    model = Net(comm.rank).double().to(comm.device)
    experts = ExpertParallel(model, comm)
    dp = DataParallel(model, comm, skip=experts.parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in _steps(model, comm):
        dp.finish()
        experts.finish()
        optimizer.step()
        optimizer.zero_grad()
    names = {name for name, _ in experts.named_parameters(model)}
    return {name: experts.whole(x) if name in names else x for name, x in model.state_dict().items()}


def refusals() -> list[str]:
    """What a TorchCommunicator says to tensors that it cannot carry."""
    comm, said = TorchCommunicator(), []
    elsewhere = "meta"
    for call in (
        lambda: comm.all_reduce(torch.ones(3, device=elsewhere)),
        lambda: comm.broadcast(torch.ones(4, 6, device=comm.device).t()),
        lambda: DataParallel(nn.Linear(2, 2, device=elsewhere), comm),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        dist.barrier()
    return said
