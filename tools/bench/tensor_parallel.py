"""Measure tensor parallelism on two ranks beside torch.distributed.tensor.parallel, on the same decoder.

Called by `python -m tools.bench --only tensor-parallel`. Ratios come from calls in turns in one process, a rank's
slowest counting for all. torch's cuts a matrix into contiguous rows, so its model has each rank's heads, and gates with
their ups, side by side; its collectives are gloo's, as for all CPU tensors of torch, and so are those of this library's
first group. The second has this library's own, over shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F
from tqdm import tqdm

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.tensor_parallel.layout import cuts
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.turns import seconds_in_turns
from tools.bench.training import summary

MODEL = ModelConfig(
    4096, 384, 1024, num_layers=6, num_heads=6, num_kv_heads=6, head_dim=64, max_position=128, tie_embeddings=False
)  # that of chapters 05 and 06
SEQUENCES, CONTEXT, TURNS, RATE = 2, 128, 20, 1e-4
COMMUNICATORS: dict[str, Callable[[], Communicator | TorchCommunicator]] = {
    "gloo": TorchCommunicator,
    "shared memory": lambda: Communicator(SharedMemoryTransport()),
}
OURS = {
    "ours": {},
    "ours, 2 chunks": {"chunks": 2},
    "ours, sequence parallel": {"sequence_parallel": True},
}
PEER = "torch.distributed.tensor.parallel"


def tensor_parallel(turns: int = TURNS, config: ModelConfig = MODEL) -> dict:
    """The figures of chapter 07, JSON values in SI units."""
    groups = []
    for name in tqdm(COMMUNICATORS, desc="tensor parallelism on ranks", leave=False):
        times = launch.run(_in_turns, 2, config, name, turns, timeout=600)[0]
        groups.append({"transport": name} | {part: summary(found, PEER) for part, found in times.items()})
    return {
        "parameters": config.num_parameters,
        "tokens": SEQUENCES * CONTEXT,
        "world_size": 2,
        "peer": PEER,
        "over_peer": groups,
    }


def _in_turns(config: ModelConfig, transport: str, turns: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every forward and of every step by each method, on the slower rank."""
    comm = COMMUNICATORS[transport]()
    losses = {name: _ours(config, comm, options) for name, options in OURS.items()} | {PEER: _torch(config)}
    forwards = {name: partial(_forward, loss) for name, (loss, _) in losses.items()}
    steps = {name: partial(_step, *pair) for name, pair in losses.items()}
    expected = forwards[PEER]()
    for name, forward in forwards.items():
        assert abs(forward() - expected) < 1e-4, f"{name} computes another loss than torch"
    return {
        "forward": seconds_in_turns(forwards, turns=turns, warm_up=2),
        "step": seconds_in_turns(steps, turns=turns, warm_up=2),
    }


Loss = Callable[[], Tensor]


def _ours(config: ModelConfig, comm: Communicator, options: dict) -> tuple[Loss, Callable[[], None]]:
    model = Decoder(config)
    tp = TensorParallel(model, comm, **options)
    optimizer = _adamw(model)

    def update() -> None:
        tp.finish()
        optimizer.step()
        optimizer.zero_grad()

    return partial(model.loss, *_batch(config)), update


def _torch(config: ModelConfig) -> tuple[Loss, Callable[[], None]]:
    model = Decoder(config)
    cut_by_torch(model)
    optimizer = _adamw(model)
    token_ids, positions, targets = _batch(config)

    def loss() -> Tensor:
        logits = model(token_ids, positions, model.ops.causal_attention)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return loss, update


def cut_by_torch(model: Decoder) -> None:
    """As torch's own library cuts a decoder among the ranks of the default group, from rank 0's weights; untied ones.

    Its logits are a part on each rank, of which `loss_parallel` computes a loss.
    """
    world_size = dist.get_world_size()
    parts = cuts(model.config, {name: x.shape for name, x in model.state_dict().items()}, world_size)
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("qkv", "gate_up"):  # so that contiguous rows are a rank's
            whole = parameter.detach().clone()
            parameter.data = torch.cat([parts[name].take(whole, rank) for rank in range(world_size)])
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "unembed": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for number, layer in enumerate(model.layers):
        layer.heads = tuple(heads // world_size for heads in layer.heads)
        plan |= {f"layers.{number}.{name}": ColwiseParallel() for name in ("qkv", "gate_up")}
        plan |= {f"layers.{number}.{name}": RowwiseParallel() for name in ("project", "down")}
    parallelize_module(model, init_device_mesh("cpu", (world_size,)), plan)


@torch.no_grad()
def _forward(loss: Loss) -> float:
    with loss_parallel():  # without it torch would gather its logits; nothing to the others
        return loss().item()


def _step(loss: Loss, update: Callable[[], None]) -> None:
    with loss_parallel():
        loss().backward()
    update()


def _batch(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The same on all ranks: token ids, positions and targets."""
    tokens = torch.randint(config.vocab_size, (SEQUENCES, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], torch.arange(CONTEXT).expand(SEQUENCES, CONTEXT), tokens[:, 1:]


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE)
