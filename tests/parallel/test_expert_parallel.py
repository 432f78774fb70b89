"""Expert parallelism against one process that has all tokens and all experts.

Ranks start with other weights, and have other tokens and other numbers of them, always.
"""

import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe import MoE
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from minilib.numbers.machine import Link
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.expert_parallel import ExpertParallel, ExpertsDoNotDivide, step_seconds
from minilib.ranks import collectives
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.expert_balance import METHODS, BalanceConfig
from minilib.training.trainer import TrainConfig, Trainer
from tests.training.test_trainer_ranks import HELD_OUT, ROW, check_same, outcome

HIDDEN, EXPERTS = 6, 8


class Net(nn.Module):
    """Mixtures, one after the other."""

    def __init__(self, seed: int, layers: int = 2, favourite: int | None = None, **config) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = MoEConfig(**{"num_experts": EXPERTS, "top_k": 2, "intermediate_size": 5, **config})
        self.layers = nn.ModuleList(MoE(config, HIDDEN, Ops()) for _ in range(layers))
        if favourite is not None:
            for layer in self.layers:
                layer.router.bias[favourite] = 10.0

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Case(SimpleNamespace):
    """A model, and how many tokens each of 1, 2 or 4 ranks has."""

    def __init__(self, *sizes: list[int], **config) -> None:
        super().__init__(sizes={len(each): each for each in sizes}, config=config)

    def inputs(self, world_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens of each rank, and what its outputs are multiplied by in the loss."""
        sizes = self.sizes[world_size]
        both = torch.randn(2, sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return both[0].split(sizes), both[1].split(sizes)


UNEVEN = ([5], [7, 2], [3, 1, 6, 2])
EMPTY = ([0], [0, 5], [0, 4, 0, 2])
CASES = {
    "one choice": Case(*UNEVEN, top_k=1),
    "two choices, shared experts": Case(*UNEVEN, gate="sigmoid", num_shared_experts=1),
    "all experts": Case(*UNEVEN, top_k=EXPERTS, layers=1),
    "ranks without tokens": Case(*EMPTY),
    "nobody has a token": Case([0], [0, 0], [0, 0, 0, 0]),
    "a hot expert gets every row": Case(*UNEVEN, top_k=1, favourite=5),
    "a hot expert, ranks without tokens": Case(*EMPTY, top_k=1, favourite=0, num_shared_experts=2),
}


def goes(case: Case, comm: Communicator) -> dict:
    """One forward and backward of this rank's tokens."""
    n, rank = comm.world_size, comm.rank
    model = Net(rank, **case.config).double()
    experts = ExpertParallel(model, comm)
    dp = DataParallel(model, comm, "flat", skip=experts.parameters)
    tokens, ways = case.inputs(n)
    x, seen = tokens[rank].clone().requires_grad_(), []
    for layer in model.layers:
        layer.router.register_forward_hook(lambda router, given, routing: seen.append(routing))
    messages, nbytes = comm.traffic.messages, comm.traffic.bytes
    out = model(x)
    (n * (out * ways[rank]).sum()).backward()
    sent = comm.traffic.messages - messages, comm.traffic.bytes - nbytes
    dp.finish()
    experts.finish()
    dp.check_invariants()
    for routing in seen:
        routing.check_invariants()
    names = {name for name, _ in experts.named_parameters(model)}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(len(parameter) == EXPERTS // n for parameter in experts.parameters)
    return {
        "out": out.detach(),
        "x": x.grad,
        "dense": {name: grad for name, grad in grads.items() if name not in names},
        "experts": {name: grads[name] for name in names},
        "weights": {name: experts.whole(p.detach()) for name, p in experts.named_parameters(model)},
        "sent": sent,
        "to": [routing.counts.view(n, -1).sum(1).tolist() for routing in seen],
        "from": [layer.exchange.received for layer in model.layers],
    }


def agrees(kind: type) -> list[dict]:
    comm = Communicator(kind())
    return [goes(case, comm) for case in CASES.values()]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_outputs_gradients_and_traffic_are_those_of_one_process(n):
    ranks = run(agrees, n, GroupTransport if n == 2 else SharedMemoryTransport)
    for number, (name, case) in enumerate(CASES.items()):
        found, model = [results[number] for results in ranks], Net(0, **case.config).double()
        tokens, ways = case.inputs(n)
        x = torch.cat(tokens).requires_grad_()
        out = model(x)
        (out * torch.cat(ways)).sum().backward()
        close = {"rtol": 1e-10, "atol": 1e-12, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(torch.cat([each["out"] for each in found]), out.detach(), **close)
        # The loss of a rank is n times its part, so that the mean over ranks is the whole.
        torch.testing.assert_close(torch.cat([each["x"] for each in found]) / n, x.grad, **close)
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        for rank, each in enumerate(found):
            own = {name: grads[name].tensor_split(n)[rank] for name in each["experts"]}
            torch.testing.assert_close(each["dense"] | each["experts"], grads | own, **close)
            assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in each["weights"].items())
            assert each["sent"] == traffic(each, rank, n), (name, rank)
        sent = [[row[each] for row in found[rank]["to"]] for rank in range(n) for each in range(n)]
        assert sent == [[row[rank] for row in found[each]["from"]] for rank in range(n) for each in range(n)]
        if "favourite" in case.config:
            home = case.config["favourite"] // (EXPERTS // n)
            for rank, each in enumerate(found):
                assert each["from"] == [case.sizes[n] if rank == home else [0] * n] * len(model.layers)


def traffic(found: dict, rank: int, n: int) -> tuple[int, int]:
    """Messages and bytes: counts ahead; rows there and answers back, and the same for their gradients."""
    messages = nbytes = 0
    for to, come in zip(found["to"], found["from"], strict=True):
        elsewhere = [rows for way in (to, come) for peer, rows in enumerate(way) if peer != rank and rows]
        messages += n - 1 + 2 * len(elsewhere)
        nbytes += (n - 1) * EXPERTS // n * 8 + 2 * sum(elsewhere) * HIDDEN * 8
    return messages, nbytes


# Refused, lost, or out of step


def test_experts_that_do_not_divide_are_refused_before_anything_is_sent():
    model = Net(0, num_experts=6, top_k=1)
    message = "6 experts cannot be dealt evenly to 4 ranks; make num_experts a multiple of world_size"
    with pytest.raises(ExpertsDoNotDivide, match=message):
        ExpertParallel(model, SimpleNamespace(world_size=4, rank=0))
    assert all(len(layer.down.weight) == 6 for layer in model.layers)
    assert not ExpertParallel(nn.Linear(2, 2), SimpleNamespace(world_size=4, rank=0)).parameters


def said(call) -> tuple[str, str, float]:
    """What it raises, and after how many seconds."""
    started = time.monotonic()
    try:
        call()
    except (CollectiveFailed, ArithmeticError) as error:
        return type(error).__name__, str(error), time.monotonic() - started
    raise AssertionError("no failure")


def breaks(rows, offsets):
    raise ArithmeticError("in an expert")


def is_out_of_step(timeout: float) -> list[tuple[str, str, float]]:
    collectives.GRACE = 0.0
    odd, found = dist.get_rank() == 1, []
    x = torch.ones(3, HIDDEN)

    def other_number_of_layers(comm):
        model = Net(0, layers=3 if odd else 2)
        ExpertParallel(model, comm)
        model(x)

    def skips_a_layer(comm):
        model = Net(0)
        ExpertParallel(model, comm)
        (model.layers[0] if odd else model)(x).sum().backward()

    def raises_in_an_expert(comm):
        model = Net(0)
        ExpertParallel(model, comm)
        model.layers[1].experts = breaks if odd else model.layers[1].experts
        model(x)

    def does_not_come(comm):
        model = Net(0)
        ExpertParallel(model, comm)
        if odd:
            raise CollectiveFailed("stays away")
        model(x)

    for wrong in (other_number_of_layers, skips_a_layer, raises_in_an_expert, does_not_come):
        comm = Communicator(SharedMemoryTransport(timeout=timeout))
        found.append(said(lambda wrong=wrong, comm=comm: wrong(comm)))
    dist.barrier()
    return found


def test_a_rank_that_is_out_of_step_leaves_nobody_waiting():
    timeout = 1.0
    ranks = run(is_out_of_step, 2, timeout)
    layers, skipped, raised, away = zip(*ranks, strict=True)
    for found in (layers, skipped):
        assert "CollectiveMismatch" in {kind for kind, _, _ in found}, found
        assert all("in call" in message for _, message, _ in found), found
    for found, own in ((raised, "in an expert"), (away, "stays away")):
        assert found[0][0] == "CollectiveFailed" and "rank 1" in found[0][1] and found[1][1] == own, found
    assert all(seconds < 2 * timeout + 5 for found in ranks for _, _, seconds in found)


def dies() -> None:
    model = Net(0)
    ExpertParallel(model, Communicator(GroupTransport(timeout=30.0)))
    if dist.get_rank() == 1:
        model.layers[1].experts = lambda rows, offsets: os.kill(os.getpid(), signal.SIGKILL)
    model(torch.ones(3, HIDDEN))


def test_a_rank_that_dies_among_its_experts_is_the_one_that_launch_names():
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        run(dies, 2)
    assert time.monotonic() - started < 20


# Training


MIXTURE = MoEConfig(4, 2, 12, num_shared_experts=1, gate="sigmoid")
SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=16, moe=MIXTURE)
SHORT = {"steps": 4, "context": 8, "warmup": 1, "evaluate_every": 2, "validation_batches": 1, "weight_decay": 0.3}


def config_of(method: str, **changes) -> TrainConfig:
    balance = BalanceConfig(method, coefficient=0.1, rate=0.05, z_loss=0.01)
    return TrainConfig(**{**SHORT, "batch_size": 3, "balance": balance, **changes})


def trainer(config, comm=None, parallel="data", seed=0, frozen=False) -> Trainer:
    model = Decoder(SHAPE)
    model.initialize(seed)
    for layer in model.layers:
        layer.moe.router.bias.fill_(seed / 10)  # rank 0's is zero
        for parameter in layer.moe.parameters():
            parameter.detach().mul_(20)  # so that experts have their part in the norm of all gradients
        for linear in (layer.moe.gate_up, layer.moe.down):
            linear.requires_grad_(not frozen)
    made, norms = Trainer(model, ROW, HELD_OUT, config, comm, parallel), []
    clip = made.strategy.clip_grad_norm
    made.strategy.clip_grad_norm = lambda max_norm: norms.append(clip(max_norm))
    made.norms = norms
    return made


def result_of(each: Trainer, path: Path | None = None) -> dict:
    """Train it, from a file if there is one, to the end."""
    if path is not None:
        each.resume(path)
        assert each.step == 2
    each.run()
    return outcome(each) | {"norms": each.norms, "loads": each.balancer.history}


def check_trained(found: dict, expected: dict) -> None:
    check_same(found, expected)
    first = len(expected["norms"]) - len(found["norms"])  # what was before resuming is not written down
    assert found["norms"] == pytest.approx(expected["norms"][first:], rel=1e-4)
    assert found["loads"] == expected["loads"][first:]


def alone(*args, **options) -> dict:
    return result_of(trainer(*args, **options))


def trains(runs: dict[str, tuple]) -> dict[str, dict]:
    comm = Communicator(SharedMemoryTransport())
    return {
        name: result_of(trainer(config, comm, parallel, dist.get_rank(), frozen))
        for name, (config, parallel, frozen) in runs.items()
    }


RUNS = {method: (config_of(method), "expert", False) for method in METHODS}
OTHERS = {
    "clipped": (config_of("loss", clip=0.01), "expert", False),
    "frozen experts": (config_of("bias"), "expert", True),
    **{parallel: (config_of("bias"), parallel, False) for parallel in ("data", "zero0", "zero1", "zero2", "zero3")},
    "loss in data": (config_of("loss"), "data", False),
}


@pytest.mark.parametrize(
    ("n", "runs"),
    [(1, {"bias": RUNS["bias"]}), (2, RUNS | OTHERS), (4, RUNS)],
    ids=["one rank", "two ranks", "a rank with an empty share"],
)
def test_ranks_take_the_steps_of_one_process(n, runs):
    expected = {}
    for rank, results in enumerate(run(trains, n, runs)):
        for name, found in results.items():
            config, _, frozen = runs[name]
            key = (config, frozen)
            if key not in expected:
                expected[key] = alone(config, frozen=frozen)
            check_trained(found, expected[key])
            assert "model" in found or rank
    loads = expected[config_of("bias"), False]["loads"]
    assert [sum(map(sum, step)) for step in loads] == [2 * 3 * 8 * 2] * 4  # of the whole batch, whatever a rank has


def saves(parallel: str, path: Path, comm: Communicator) -> None:
    each = trainer(config_of("bias"), comm, parallel, seed=dist.get_rank())
    each.run(until=2)
    each.save(path)


def goes_on(parallel: str, path: Path, comm: Communicator) -> dict:
    return result_of(trainer(config_of("bias"), comm, parallel, seed=7), path)


def two_ranks(folder: Path) -> dict[str, dict]:
    comm, found = Communicator(SharedMemoryTransport()), {}
    for first, seconds in {"expert": ("expert", "data", "zero3"), "zero3": ("expert",), "data": ("expert",)}.items():
        saves(first, folder / f"{first}.pt", comm)
        found |= {f"{first}, then {parallel}": goes_on(parallel, folder / f"{first}.pt", comm) for parallel in seconds}
    return found


def four_ranks(folder: Path) -> list[dict]:
    comm = Communicator(GroupTransport())
    return [goes_on("expert", folder / name, comm) for name in ("expert.pt", "alone.pt")]


def test_a_run_goes_on_in_another_engine_on_another_number_of_ranks(tmp_path):
    expected = alone(config_of("bias"))
    single = trainer(config_of("bias"))
    single.run(until=2)
    single.save(tmp_path / "alone.pt")
    for results in run(two_ranks, 2, tmp_path):
        for found in results.values():
            check_trained(found, expected)
    for results in run(four_ranks, 4, tmp_path):
        for found in results:
            check_trained(found, expected)
    for first in ("expert", "zero3"):
        check_trained(result_of(trainer(config_of("bias"), seed=7), tmp_path / f"{first}.pt"), expected)


def test_the_price_of_a_step_is_the_busiest_rank_and_four_all_to_alls():
    free, link = Link(math.inf, latency=0.0), Link(bandwidth=100.0, latency=1.0)
    even, hot = [[2, 2], [2, 2]], [[0, 3], [1, 4]]
    assert step_seconds(even, 8, 0.5, free) == 4 * 0.5
    assert step_seconds(hot, 8, 0.5, free) == 7 * 0.5  # of the mean of 4, max/mean is 7/4
    assert step_seconds(hot, 8, {1: 0.5, 2: 0.7}.__getitem__, free) == pytest.approx(1 * 0.7 + 6 * 0.5)
    # In a round the larger message counts: 3 rows there and 1 back, and the gradients the other way round.
    assert step_seconds(hot, 8, 0.0, link) == pytest.approx(4 * (1.0 + 3 * 8 / 100))
    assert step_seconds(hot, 8, 0.0, link, bus=link) == pytest.approx(4 * (2 * 1.0 + (3 + 1) * 8 / 100))
    assert step_seconds([[5]], 8, 0.5, link) == 2.5
    assert step_seconds([[0, 0], [0, 0]], 8, 0.5, link) == 0
