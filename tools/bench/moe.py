"""Measure chapter 09: balancing of HTTP requests, experts against a loop, expert parallelism, and training.

Called by `make bench`. Ratios come from runs taken in turns in one process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from minilib.classic.http.experiment import exponential_work, run_bursts, run_experiment, zipf_keys
from minilib.mechanisms.balancing import Policy, Random, TwoChoices
from minilib.model import corpus, tokenizer
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe import MoE, Router, Routing, route
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from minilib.numbers.balls_in_bins import expected_max_over_mean
from minilib.numbers.load_metrics import max_over_mean
from minilib.numbers.machine import Link
from minilib.numbers.measure import compare
from minilib.parallel.expert_parallel import ExpertParallel, step_seconds
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.turns import seconds_in_turns
from minilib.training.config import TrainConfig
from minilib.training.expert_balance import BalanceConfig
from minilib.training.trainer import Trainer
from tools.kernel_jobs import loop_over_experts

CORES = os.cpu_count() or 1
POLICIES: dict[str, Callable[[int], Policy]] = {"random": Random, "two choices": TwoChoices}
BACKENDS, BURSTS, RUNS = 32, 20, 10

LAYER = MoEConfig(num_experts=8, top_k=2, intermediate_size=512)
WIDTH, TOKENS = 256, 512  # of the layer that is measured on ranks; tokens a rank
SKEWS = (0.0, 0.5, 1.0, 1.5, 2.5)

SEEDS = range(6)
VOCABULARY = 512
EXPERTS = MoEConfig(num_experts=8, top_k=2, intermediate_size=48, gate="sigmoid")
DENSE = ModelConfig(VOCABULARY, 48, 96, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=16, max_position=128)
TRAIN = TrainConfig(steps=1200, batch_size=16, context=128, warmup=30, evaluate_every=1200, validation_batches=32)
BALANCE = {
    "dense": None,
    "none": BalanceConfig(),
    "loss": BalanceConfig("loss", coefficient=0.01),
    "strong loss": BalanceConfig("loss", coefficient=0.1),
    "bias": BalanceConfig("bias", rate=0.002),
}


def moe() -> dict:
    """The figures of chapter 09, JSON values in SI units."""
    return {
        "http": {name: _http(policy) for name, policy in POLICIES.items()},
        "grouped_matmul": _grouped(),
        "expert_parallel": [row for world_size in (2, 4) for row in _expert_parallel(world_size)],
        "training": list(_training()),
    }


def _http(policy: Callable[[int], Policy]) -> dict:
    """Bursts of a request a backend, whose queues are balls in bins, and p99 under load that arrives as it likes."""
    bursts = run_bursts(policy(0), BACKENDS, BACKENDS, BURSTS)
    delays = []
    for seed in range(RUNS):
        keys, work = zipf_keys(600, 100, seed=seed), exponential_work(600, 0.005, seed)
        report = run_experiment(policy(seed), [1.0] * 4, keys, work=work, utilization=0.8, seed=seed)
        delays.append(report.latency.p99)
    choices = 1 if policy is Random else 2
    return {
        "max_over_mean": statistics.mean(max_over_mean(queues) for queues in bursts),
        "expected_max_over_mean": expected_max_over_mean(BACKENDS, BACKENDS, choices),
        "p99": delays,
    }


def _grouped() -> dict:
    """Forward and backward of eight groups in one product, against the loop over experts that one writes first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 256, generator=generator, requires_grad=True)
    weight = torch.randn(8, 256, 512, generator=generator, requires_grad=True)
    expert = torch.randint(8, (2048,), generator=generator)
    order, ends = expert.sort(stable=True).indices, torch.bincount(expert, minlength=8).cumsum(0).int()

    def loop() -> None:
        loop_over_experts(x, weight, expert).sum().backward()

    def grouped() -> None:
        grouped.grouped_matmul(x[order], weight, ends).sum().backward()

    found = compare(loop, grouped, budget=4.0)
    return {"loop_over_grouped": found.ratio, "tokens": 2048, "experts": 8}


def skewed_logits(num_tokens: int, num_experts: int, skew: float, seed: int) -> Tensor:
    """Logits whose largest are expert i with a probability in proportion to 1 / (i + 1)^skew (Gumbel's trick)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()
    return -skew * torch.arange(1, num_experts + 1).log() - noise


def _expert_parallel(world_size: int, turns: int = 10) -> list[dict]:
    ranks = launch.run(_layer_on_ranks, world_size, turns, timeout=300)
    per_row = [statistics.median(times) for times in ranks[0]["per_row"]]
    link = Link(bandwidth=min(rank["bandwidth"] for rank in ranks), latency=max(rank["latency"] for rank in ranks))
    bus = link if world_size > CORES else None
    rows = []
    for number, skew in enumerate(SKEWS):
        pairs = [rank["runs"][number]["sent"] for rank in ranks]
        loads = [sum(column) for column in zip(*pairs, strict=True)]
        seconds = statistics.median(ranks[0]["runs"][number]["seconds"])
        rows.append({
            "world_size": world_size, "skew": skew, "max_over_mean": max_over_mean(loads), "pairs": pairs,
            "bytes": max(rank["runs"][number]["bytes"] for rank in ranks), "seconds": seconds,
            "predicted": step_seconds(pairs, 4 * WIDTH, lambda busy: per_row[busy - 1], link, bus),
        })  # fmt: skip
    return rows


def _layer_on_ranks(turns: int) -> dict:
    """One layer's experts, forward and backward, for each skew in turns; and what a message costs here, and a row.

    A row's seconds while 1, 2, … ranks are busy, of which the others wait: they share cores, caches and memory.
    """
    comm, rank = Communicator(SharedMemoryTransport()), dist.get_rank()
    torch.manual_seed(rank)
    layer = MoE(LAYER, WIDTH, Ops())
    even = torch.full((LAYER.num_experts,), TOKENS * LAYER.top_k // LAYER.num_experts).cumsum(0).int()
    rows = torch.randn(int(even[-1]), WIDTH, requires_grad=True)
    alone = partial(_experts_alone, layer, rows, even)
    busy = seconds_in_turns({others: alone if rank <= others else int for others in range(comm.world_size)},
                            turns=turns, warm_up=2)  # fmt: skip
    ExpertParallel(layer, comm)
    steps, runs = {}, []
    for skew in SKEWS:
        routing = route(skewed_logits(TOKENS, LAYER.num_experts, skew, rank), torch.zeros(LAYER.num_experts), LAYER)
        mine = torch.randn(len(routing.tokens), WIDTH, requires_grad=True)
        steps[skew] = partial(_there_and_back, layer, mine, routing.offsets)
        before = comm.traffic.bytes
        steps[skew]()
        sent = routing.counts.view(comm.world_size, -1).sum(1).tolist()
        runs.append({"bytes": comm.traffic.bytes - before, "sent": sent})
    seconds = seconds_in_turns(steps, turns=turns, warm_up=1)
    latency, bandwidth = _link(comm)
    return {
        "per_row": [[taken / len(rows) for taken in times] for times in busy.values()],
        "latency": latency, "bandwidth": bandwidth,
        "runs": [{**run, "seconds": seconds[skew]} for skew, run in zip(SKEWS, runs, strict=True)],
    }  # fmt: skip


def _experts_alone(layer: MoE, rows: Tensor, offsets: Tensor) -> None:
    layer.experts(rows, offsets).sum().backward()


def _there_and_back(layer: MoE, rows: Tensor, offsets: Tensor) -> None:
    layer.exchange(rows, offsets, layer.experts).sum().backward()


def _link(comm: Communicator) -> tuple[float, float]:
    """Seconds of an empty message, and bytes/s, as an all-to-all of small and of large parts has them."""
    n, calls = comm.world_size, {}
    for numel in (1, 2**18):
        parts, there = [torch.zeros(numel) for _ in range(n)], [torch.zeros(numel) for _ in range(n)]
        calls[numel] = partial(comm.all_to_all, there, parts)
    times = {numel: statistics.median(taken) for numel, taken in seconds_in_turns(calls, turns=20).items()}
    rounds = n - 1 if n <= CORES else n * (n - 1)  # on shared cores one message after another
    latency = times[1] / rounds
    return latency, 4 * 2**18 / max(1e-9, times[2**18] / rounds - latency)


def _training() -> Iterator[dict]:
    """Every way to balance with every seed, two at a time."""
    jobs = [
        (
            name,
            replace(DENSE, moe=EXPERTS if balance else None),
            replace(TRAIN, seed=seed, balance=balance or TRAIN.balance),
        )
        for name, balance in BALANCE.items()
        for seed in SEEDS
    ]
    data = _data()
    with tqdm(total=len(jobs), desc="training mixtures", leave=False) as bar:
        for first in range(0, len(jobs), 2):
            pair = jobs[first : first + 2]
            yield from launch.run(_train, len(pair), pair, *data, timeout=1800)
            bar.update(len(pair))


def _data() -> list[Tensor]:
    """The corpus to train on and the one held out, as tokens."""
    texts = corpus.standard_library()
    words = tokenizer.train(texts.train, VOCABULARY)
    return [torch.tensor(tokenizer.encode_all(words, part)) for part in (texts.train, texts.validation)]


def _train(pair: list[tuple[str, ModelConfig, TrainConfig]], train: Tensor, validation: Tensor) -> dict:
    name, shape, config = pair[dist.get_rank()]
    model = Decoder(shape)
    model.initialize(config.seed)
    trainer = Trainer(model, train, validation, config)
    trainer.run(bar=False)  # two processes at once
    held_out = _loads(model, trainer.validation_loss)
    late = torch.tensor(trainer.balancer.history[-100:]).sum(0).tolist() if shape.moe else []
    return {
        "method": name, "seed": config.seed, "validation_loss": trainer.validation_losses[-1][1],
        "parameters": shape.num_parameters, "active_parameters": shape.num_active_parameters,
        "max_over_mean": [max_over_mean(loads) for loads in late],
        "held_out_max_over_mean": [max_over_mean(loads) for loads in held_out], "config": asdict(config),
    }  # fmt: skip


def _loads(model: Decoder, look: Callable[[], object]) -> list[list[int]]:
    """Pairs that each expert of each layer is wanted for while somebody looks."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = torch.zeros(len(routers), EXPERTS.num_experts, dtype=torch.int64)

    def count(number: int, router: Router, inputs: tuple, routing: Routing) -> None:
        loads[number] += routing.wanted

    hooks = [router.register_forward_hook(partial(count, number)) for number, router in enumerate(routers)]
    look()
    for hook in hooks:
        hook.remove()
    return loads.tolist()
