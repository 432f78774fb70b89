"""Ten steps of a mixture on (data × context × expert) ranks of one mesh against one process."""

import pytest
import torch
from torch import nn

from minilib.parallel.context_parallel import ContextParallel
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.expert_parallel import ExpertParallel
from minilib.parallel.global_norm import clip_global_norm
from minilib.ranks.launch import run
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshShape
from tests.parallel.context_parallel.test_training import EXPERTS, PACKED, adamw, batches, decoder, on_one_process


def on_mesh(sizes: dict, ep: int, method: str) -> tuple[list[float], dict, list[float]]:
    mesh = DeviceMesh(MeshShape.of(**sizes), timeout=20.0)
    regrouped = mesh.shape.regrouped(("dp", "cp"), edp=None, ep=ep)
    model = decoder(EXPERTS, seed=mesh.rank)
    both, same_experts = mesh.comm("dp", "cp"), mesh.comm("edp", of=regrouped)
    for parameter in model.parameters():  # before the cut, which copies within an ep group alone
        both.broadcast(parameter)
    experts = ExpertParallel(model, mesh.comm("ep", of=regrouped))
    data = DataParallel(model, both, skip=experts.parameters)
    cp, dp = ContextParallel(mesh.comm("cp"), method), mesh.coordinates["dp"]
    optimizer, losses, norms = adamw(model.parameters()), [], []
    mine = set(experts.parameters)
    dense = [parameter for parameter in model.parameters() if parameter not in mine]
    rows = slice(dp, None, sizes["dp"])
    for tokens, targets in batches():
        optimizer.zero_grad()
        loss = cp.loss(model, tokens[rows], targets[rows], PACKED[rows])
        loss.backward()
        data.finish()
        experts.finish()
        for parameter in experts.parameters:
            same_experts.all_reduce(parameter.grad, "avg")
        norms.append(clip_global_norm(0.5, [(dense, None), (experts.parameters, experts.comm)]))
        optimizer.step()
        both.all_reduce(mean := loss.detach().clone(), "avg")
        losses.append(mean.item())
    whole = {name: experts.whole(p.detach()) if p in mine else p.detach() for name, p in model.named_parameters()}
    return losses, whole, norms


@pytest.mark.parametrize(
    ("sizes", "ep", "method"),
    [({"dp": 2, "cp": 2}, 2, "ring"), ({"cp": 2, "dp": 2}, 4, "ulysses"), ({"dp": 2, "cp": 1}, 2, "ring")],
)
def test_data_context_and_experts_on_one_mesh(sizes, ep, method):
    losses, parameters = on_one_process(EXPERTS, PACKED)
    for found, theirs, _ in run(on_mesh, sizes["dp"] * sizes["cp"], sizes, ep, method, timeout=120):
        assert found == pytest.approx(losses, abs=1e-10)
        assert max((theirs[name] - x).abs().max().item() for name, x in parameters.items()) < 1e-10


def divided(rank_grads: list[list[float]]) -> float:
    mesh = DeviceMesh(MeshShape.of(tp=2), timeout=20.0)
    parameter, shared, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    parameter.grad, shared.grad = torch.tensor(rank_grads[mesh.rank]), torch.tensor([2.0, 0.0])
    copied = nn.Parameter(torch.zeros(2))
    copied.grad = shared.grad.clone()
    norm = clip_global_norm(1.0, [([parameter, idle], mesh.comm("tp")), ([shared], None)], [copied, idle])
    expected = torch.tensor([*rank_grads[0], *rank_grads[1], 2.0, 0.0])
    whole = nn.Parameter(torch.zeros(6))
    whole.grad = expected.clone()
    torchs = nn.utils.clip_grad_norm_(whole, 1.0)
    assert norm == pytest.approx(torchs.item())
    assert torch.allclose(parameter.grad, whole.grad[2 * mesh.rank : 2 * mesh.rank + 2])
    assert torch.allclose(shared.grad, whole.grad[4:]) and torch.equal(copied.grad, shared.grad) and idle.grad is None
    return norm


def test_the_norm_counts_each_part_once():
    assert run(divided, 2, [[1.0, 2.0], [4.0, 0.0]], timeout=60) == [5.0, 5.0]
    assert run(divided, 2, [[0.1, 0.0], [0.0, 0.0]], timeout=60) == pytest.approx([4.01**0.5] * 2)
