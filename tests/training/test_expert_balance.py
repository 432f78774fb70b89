"""Balancing: penalties against loops over the papers' formulas, scales that depend on nothing, and a controller."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minilib.model.moe import MoE
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.training.expert_balance import METHODS, BalanceConfig, Balancer, load_balancing_loss, router_z_loss

HIDDEN, EXPERTS = 6, 4
LOSS = BalanceConfig("loss", coefficient=0.3, z_loss=0.02)


class Net(nn.Module):
    """Two mixtures, one after the other."""

    def __init__(self, **config) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MoEConfig(**{"num_experts": EXPERTS, "top_k": 2, "intermediate_size": 5, **config})
        self.layers = nn.ModuleList(MoE(config, HIDDEN, Ops()) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def batch(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The formulas


def test_the_load_balancing_loss_is_the_formula_of_switch():
    logits = torch.randn(7, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores, chosen = logits.softmax(-1), logits.argmax(-1).tolist()
    expected = 0.0
    for expert in range(EXPERTS):
        fraction = sum(each == expert for each in chosen) / 7
        mean = sum(row[expert] for row in scores.tolist()) / 7
        expected += EXPERTS * fraction * mean
    shares = torch.tensor([chosen.count(expert) / 7 for expert in range(EXPERTS)], dtype=torch.float64)
    assert load_balancing_loss(scores, shares).item() == pytest.approx(expected, rel=1e-12)
    sigmoids = logits.sigmoid()
    normal = sigmoids / sigmoids.sum(-1, keepdim=True)  # DeepSeek-V3, equation 19
    assert load_balancing_loss(sigmoids, shares).item() == load_balancing_loss(normal, shares).item()


def test_it_is_one_for_even_loads_and_the_number_of_experts_at_collapse():
    even = torch.full((5, EXPERTS), 1 / EXPERTS)
    assert load_balancing_loss(even, torch.full((EXPERTS,), 1 / EXPERTS)).item() == 1
    one = torch.zeros(5, EXPERTS).index_fill(1, torch.tensor([2]), 1.0)
    assert load_balancing_loss(one, one[0]).item() == EXPERTS
    assert load_balancing_loss(even, one[0]).item() == 1  # nobody is sure of it
    assert load_balancing_loss(even[:0], torch.zeros(EXPERTS)).item() == 0


def test_its_gradient_is_that_of_finite_differences_and_takes_from_who_has_much():
    logits = torch.randn(6, EXPERTS, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    for gate in (lambda x: x.softmax(-1), torch.sigmoid):
        assert torch.autograd.gradcheck(lambda x, gate=gate: load_balancing_loss(gate(x), shares), logits)
        (slope,) = torch.autograd.grad(load_balancing_loss(gate(logits), shares), logits)
        assert (slope[:, 0] > 0).all() and (slope[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_square_of_log_sum_exp():
    logits = torch.randn(6, EXPERTS, dtype=torch.float64, requires_grad=True)
    expected = sum(row.exp().sum().log() ** 2 for row in logits) / 6
    assert router_z_loss(logits).item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.autograd.gradcheck(router_z_loss, logits)
    assert router_z_loss(logits[:0]).item() == 0
    assert router_z_loss(torch.full((3, EXPERTS), 1e4)).isfinite()


def test_the_penalty_is_the_mean_over_layers():
    model, x = Net().double(), batch(9)
    balancer, seen = Balancer(model, LOSS), []
    for router in balancer.routers:
        router.register_forward_hook(lambda router, given, routing: seen.append(routing))
    model(x)
    found = balancer.penalty()
    each = [
        0.3 * load_balancing_loss(r.scores, r.wanted.double() / (9 * 2)) + 0.02 * router_z_loss(r.logits) for r in seen
    ]
    assert found.item() == pytest.approx(sum(each).item() / 2, rel=1e-12)
    found.backward()
    assert all(router.weight.grad.any() for router in balancer.routers)


# Scales


def penalised(model, balancer, x, weight=1.0, scale=1.0) -> None:
    """Backward of a loss that is a mean over tokens, as a model's is."""
    loss = model(x).square().sum() / max(1, len(x)) * weight
    ((loss + balancer.penalty(weight)) * scale).backward()


def step_of(method: str, x: torch.Tensor, total: int, comm: Communicator | None) -> tuple[dict, list, list]:
    """A rank's tokens of a batch of so many; gradients, loads, and biases after a step."""
    model = Net(gate="sigmoid").double()
    balancer = Balancer(model, BalanceConfig(method, 0.3, 0.125, 0.02), comm)
    weight = len(x) * (comm.world_size if comm else 1) / total
    penalised(model, balancer, x if len(x) else batch(5, seed=99), weight)  # who has nothing takes something along
    found, loads = gradients(model), balancer.loads.tolist()
    if comm:
        for grad in found.values():
            comm.all_reduce(grad, "avg")
    balancer.step()
    return found, loads, [router.bias.tolist() for router in balancer.routers]


def shares_a_batch(sizes: list[int]) -> list[tuple[dict, list, list]]:
    comm = Communicator(GroupTransport())
    return [step_of(method, batch(14).split(sizes)[dist.get_rank()], 14, comm) for method in METHODS]


@pytest.mark.parametrize("sizes", [[14], [3, 11], [2, 7, 0, 5]], ids=str)
def test_scales_do_not_depend_on_the_number_of_ranks(sizes):
    for ranks in run(shares_a_batch, len(sizes), sizes):
        for method, (grads, loads, biases) in zip(METHODS, ranks, strict=True):
            expected = step_of(method, batch(14), 14, None)
            torch.testing.assert_close(grads, expected[0], rtol=1e-10, atol=1e-13)
            assert loads == expected[1] and sum(loads[0]) == 14 * 2
            assert biases == expected[2] and (method in ("bias", "both")) == any(map(any, biases))


@pytest.mark.parametrize("method", METHODS)
def test_scales_do_not_depend_on_accumulation(method):
    model, results = Net(gate="sigmoid").double(), []
    for parts in (1, 2, 5):
        model.zero_grad()
        balancer = Balancer(model, BalanceConfig(method, 0.3, 0.0, 0.02))
        for _ in range(parts):
            penalised(model, balancer, batch(9), scale=1 / parts)
        results.append(gradients(model))
        assert balancer.loads.sum(1).tolist() == [parts * 9 * 2] * 2
        balancer.close()
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-13)


def test_parts_of_a_batch_are_balanced_by_the_loads_of_all_before_them():
    model, x = Net().double(), batch(9)
    balancer, seen = Balancer(model, BalanceConfig("loss", 1.0)), []
    balancer.routers[0].register_forward_hook(lambda router, given, routing: seen.append(routing))
    for part in x.split(3):
        model(part)
        balancer.penalty()
    assert balancer.loads[0].tolist() == sum(routing.wanted for routing in seen).tolist()


# What is counted


def test_a_penalty_belongs_to_one_forward():
    model = Net().double()
    balancer = Balancer(model, LOSS)
    with pytest.raises(RuntimeError, match="once after each forward with gradients; 2 routers have been seen 0 times"):
        balancer.penalty()
    model(batch(3))
    model(batch(3))
    with pytest.raises(RuntimeError, match="2 routers have been seen 4 times since"):
        balancer.penalty()
    assert not balancer.loads.any()
    model(batch(3))  # a mistake is over when it has been said
    balancer.penalty()
    assert balancer.loads.sum() == 2 * 3 * 2
    with pytest.raises(RuntimeError, match="seen 0 times"):
        balancer.penalty()


def test_a_look_at_the_validation_loss_does_not_count():
    model = Net().double()
    balancer = Balancer(model, LOSS)
    with torch.no_grad():
        model(batch(30))
    with torch.inference_mode():
        model(batch(30))
    model(batch(3))
    with torch.no_grad():
        model(batch(30))
    balancer.penalty()
    assert balancer.loads.sum(1).tolist() == [6, 6]


def test_tokens_that_weigh_nothing_do_not_count():
    model = Net().double()
    balancer = Balancer(model, LOSS)
    model(batch(3))
    assert balancer.penalty(0.0).item() == 0 and not balancer.loads.any()
    model(batch(0))
    assert balancer.penalty().item() == 0 and not balancer.loads.any()


def test_what_finds_no_room_counts_as_load():
    """Otherwise the busiest expert would look no busier than its capacity."""
    model = Net(capacity_factor=0.25).double()
    balancer = Balancer(model, BalanceConfig())
    model(batch(16))
    balancer.penalty()
    assert balancer.loads.sum(1).tolist() == [32, 32]


@pytest.mark.parametrize("method", METHODS)
def test_history_holds_the_loads_of_every_step(method):
    model, seen = Net().double(), []
    balancer = Balancer(model, BalanceConfig(method))
    for router in balancer.routers:
        router.register_forward_hook(lambda router, given, routing: seen.append(routing.wanted.tolist()))
    for step in range(3):
        model(batch(8, step))
        balancer.penalty()
        balancer.step()
        assert not balancer.loads.any()
    balancer.step()  # of nothing
    assert balancer.history == [seen[0:2], seen[2:4], seen[4:6], [[0] * EXPERTS] * 2]


def test_biases_move_towards_balance_by_the_rate():
    model = Net().double()
    balancer = Balancer(model, BalanceConfig("bias", rate=0.25))
    model(batch(8))
    balancer.penalty()
    balancer.step()
    for router, loads in zip(balancer.routers, balancer.history[0], strict=True):
        expected = [0.25 * ((load < 4) - (load > 4)) for load in loads]
        assert len(set(loads)) > 1 and router.bias.tolist() == expected
    before = [router.bias.clone() for router in balancer.routers]
    model(batch(8))
    balancer.penalty()
    balancer.step(scale=0.5)
    moved = torch.stack([router.bias - old for router, old in zip(balancer.routers, before, strict=True)])
    assert set(moved.abs().unique().tolist()) <= {0.0, 0.125} and moved.any()
    for method in ("none", "loss"):
        model = Net().double()
        balancer = Balancer(model, BalanceConfig(method))
        model(batch(8))
        balancer.penalty()
        balancer.step()
        assert not any(router.bias.any() for router in balancer.routers)


# Models of all kinds


def test_without_routers_there_is_nothing_to_do():
    for method in METHODS:
        balancer = Balancer(nn.Linear(2, 2), BalanceConfig(method, z_loss=1.0))
        assert balancer.penalty() == 0.0
        balancer.step()
        balancer.close()
        assert balancer.history == [] and balancer.loads.numel() == 0


def test_a_frozen_router_is_watched_and_gets_no_gradient():
    model, x = Net(gate="sigmoid").double(), batch(9)
    for layer in model.layers:
        layer.router.requires_grad_(False)
    balancer = Balancer(model, BalanceConfig("bias", rate=0.25, z_loss=0.1))
    penalised(model, balancer, x)
    balancer.step()
    assert all(router.weight.grad is None and router.bias.any() for router in balancer.routers)


def test_a_closed_one_lets_go_of_the_model():
    model = Net().double()
    balancer = Balancer(model, LOSS)
    balancer.close()
    model(batch(3))
    assert not any(router._forward_hooks for router in balancer.routers) and not balancer._seen
    other = Balancer(model, LOSS)
    model(batch(3))
    other.penalty()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "luck"}, "method is one of none, loss, bias, both; got 'luck'"),
        ({"coefficient": -1}, "coefficient must not be negative, got -1"),
        ({"rate": -0.5}, "rate must not be negative, got -0.5"),
        ({"z_loss": float("nan")}, "z_loss must not be negative, got nan"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**wrong)


# Does it balance?


def trained(method: str, steps: int = 60) -> tuple[float, list]:
    """On tokens that all point the same way, so that few experts are everybody's best; max/mean load at the end."""
    torch.manual_seed(1)
    model = MoE(MoEConfig(8, 2, 4, gate="sigmoid"), HIDDEN, Ops())
    target = nn.Linear(HIDDEN, HIDDEN)
    balancer = Balancer(model, BalanceConfig(method, coefficient=3.0, rate=0.03))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        x = batch(64, step).float() + 3 * torch.ones(HIDDEN)
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        (loss + balancer.penalty()).backward()
        optimizer.step()
        balancer.step()
    late = torch.tensor(balancer.history[-10:]).sum((0, 1)).double()
    assert late.sum() == 10 * 64 * 2
    return (late.max() / late.mean()).item(), balancer.history


def test_balanced_loads_are_more_even_than_unbalanced_ones():
    ratio = {method: trained(method)[0] for method in METHODS}
    assert ratio["none"] > 3.5 and max(ratio["bias"], ratio["both"]) < 1.3 and ratio["loss"] < 3, ratio
    assert trained("bias", 20)[1] == trained("bias", 20)[1]
