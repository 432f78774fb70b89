"""Measure data parallelism and ZeRO on two ranks and more, beside torch's own: DistributedDataParallel and FSDP2.

Called by `make bench`. Ratios come from steps taken in turns in one process, a rank's slowest counting for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Link
from minilib.numbers.measure import quartiles
from minilib.numbers.probes.peak import peak_memory
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.zero import Zero
from minilib.parallel.zero.ledger import STAGES, expected_bytes
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import Transport
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.turns import seconds_in_turns

MODEL = ModelConfig(4096, 384, 1024, num_layers=6, num_heads=6, num_kv_heads=6, head_dim=64, max_position=128)
CONTEXT, ROUNDS, RATE = 128, 12, 1e-4
OURS = {
    "naive": {"method": "naive"},
    "flat": {"method": "flat"},
    "buckets": {"method": "buckets"},
    "buckets of 16 MiB": {"method": "buckets", "bucket_bytes": 2**24},
}
TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "gloo": GroupTransport,
    "shared memory": SharedMemoryTransport,
    "5 Gb/s": lambda: _wire(0.625e9),
    "2.5 Gb/s": lambda: _wire(0.3125e9),
}


def _wire(bandwidth: float) -> Transport:
    return ShapedTransport(SharedMemoryTransport(), Link(bandwidth, latency=50e-6))


def training() -> dict:
    """The figures of chapters 05 and 06, JSON values in SI units."""
    bar = tqdm(total=len(TRANSPORTS) + 2 + 2 * len(STAGES), desc="training on ranks", leave=False)

    def ranks(world_size: int, fn: Callable, *args) -> list:
        found = launch.run(fn, world_size, *args, timeout=300)
        bar.update()
        return found

    with bar:
        return {
            "parameters": MODEL.num_parameters,
            "tokens_per_rank": CONTEXT,
            "data_parallel": [
                {"transport": name, "methods": summary(ranks(2, _data_parallel, name)[0], "torch DDP")}
                for name in TRANSPORTS
            ],
            "zero_steps": summary(ranks(2, _sharded)[0], "fully_shard"),
            "zero_peak_bytes": {kind: max(ranks(2, _peak, kind)) for kind in KINDS},
            "zero_bytes": [_ledger(n, stage, ranks(n, _held, stage)) for n in (2, 4) for stage in STAGES],
        }


class _Loss(nn.Module):
    """The decoder with its loss as forward, as torch's wrapper wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder(MODEL)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(CONTEXT).expand(len(tokens), CONTEXT)
        return self.model.loss(tokens[:, :-1], positions, tokens[:, 1:])


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(MODEL.vocab_size, (1, CONTEXT + 1), generator=generator)


def _adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=RATE)


def _data_parallel(transport: str) -> dict[str, list[float]]:
    """Seconds of every step by each method, on the slower rank."""
    comm = Communicator(TRANSPORTS[transport]())
    steps: dict[str, Callable[[], None]] = {}
    for method in ("alone", *OURS, "torch DDP"):
        net = _Loss()
        dp = DataParallel(net, comm, **OURS[method]) if method in OURS else None
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if method == "torch DDP" else net
        steps[method] = partial(_step, wrapped, _adamw(net), dp.finish if dp else lambda: None)
    return seconds_in_turns(steps, turns=ROUNDS, warm_up=2)


def _step(net: nn.Module, optimizer, finish: Callable[[], None]) -> None:
    net(_tokens()).backward()
    finish()
    optimizer.step()
    optimizer.zero_grad()


def _zero(stage: int) -> Callable[[], None]:
    net = _Loss()
    zero = Zero(net, Communicator(SharedMemoryTransport()), stage, partial(torch.optim.AdamW, lr=RATE),
                blocks=list(net.model.layers))  # fmt: skip
    return partial(_step, net, zero, lambda: None)


def _fsdp() -> Callable[[], None]:
    net, mesh = _Loss(), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*net.model.layers, net):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(net.model, "loss")
    return partial(_step, net, _adamw(net), lambda: None)


KINDS = {"stage 3": partial(_zero, 3), "fully_shard": _fsdp}


def _sharded() -> dict[str, list[float]]:
    stages = {f"stage {stage}": _zero(stage) for stage in STAGES}
    return seconds_in_turns({**stages, "fully_shard": _fsdp()}, turns=ROUNDS, warm_up=2)


def _peak(kind: str) -> int:
    """Bytes by which building a model and three steps raise this rank's memory, which did nothing else before."""
    return peak_memory(partial(_build_and_step, KINDS[kind]))


def _build_and_step(make: Callable[[], Callable[[], None]]) -> None:
    step = make()
    for _ in range(3):
        step()


def _held(stage: int) -> dict[str, int]:
    step = _zero(stage)
    step()
    return step.args[1].bytes_per_rank()


def summary(turns: dict[str, list[float]], peer: str) -> list[dict]:
    """A row a method: its median, and its ratio to a peer that took the same turns."""
    rows = []
    for name, times in turns.items():
        ratios = tuple(own / other for own, other in zip(times, turns[peer], strict=True))
        median, spread = statistics.median(ratios), quartiles(ratios)
        rows.append({"method": name, "seconds": statistics.median(times), "over_peer": median, "quartiles": spread})
    return rows


def _ledger(world_size: int, stage: int, held: list[dict[str, int]]) -> dict:
    expected = sum(expected_bytes(MODEL.num_parameters, world_size, stage).values())
    found = max(sum(rank[name] for name in ("parameters", "gradients", "optimizer")) for rank in held)
    return {"world_size": world_size, "stage": stage, "bytes": found, "expected": expected}
