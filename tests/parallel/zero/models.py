"""Models with everything that is awkward to cut, data that differs per rank, and what one process would make of it."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.parallel.zero import Zero
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
VOCABULARY, WIDTH, SAMPLES = 11, 5, 12
ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95))


class Block(nn.Module):
    """Odd sizes, and one parameter that is smaller than any world."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH, bias=False)

    def forward(self, x):
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Odd(nn.Module):
    """Tied embeddings, a half frozen block, a wholly frozen one, a parameter that nobody uses, a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unembed.weight = self.embed.weight
        self.blocks[0].spare = nn.Parameter(torch.randn(3))
        self.blocks[1].up.weight.requires_grad_(False)
        self.blocks[2].requires_grad_(False)
        self.register_buffer("seen", torch.tensor(seed))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


def decoder(seed=0, **other) -> Decoder:
    shape = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 4}
    model = Decoder(ModelConfig(**{**shape, "num_kv_heads": 2, "head_dim": 6, "max_position": 16, **other}))
    model.initialize(seed)
    return model


def groups(model):
    """Matrices decay, vectors do not; frozen parameters may come along."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 2e-2}]


def batch(step, rank=0, world_size=1):
    """A rank's share of a step's samples: tokens and targets."""
    samples = torch.randint(VOCABULARY, (SAMPLES, 2), generator=torch.Generator().manual_seed(step))
    return samples[rank::world_size].unbind(1)


def loss_of(model, tokens, targets):
    return F.cross_entropy(model(tokens), targets)


def communicator(transport) -> Communicator:
    return Communicator(TRANSPORTS[transport]())


def values(model) -> dict[str, torch.Tensor]:
    """Copies of a whole model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def train(zero, steps, clip=math.inf, micro=1, of=batch):
    """Steps of `micro` backwards each; `of(step, rank, world_size)` gives a rank's batch. Returns losses and norms."""
    rank, world_size = zero.comm.rank, zero.comm.world_size
    seen = []
    for step in steps:
        for part in range(micro - 1):
            with zero.no_sync():
                (loss_of(zero.model, *of(100 * step + part, rank, world_size)) / micro).backward()
        loss = loss_of(zero.model, *of(100 * step + micro - 1, rank, world_size)) / micro
        loss.backward()
        norm = zero.clip_grad_norm(clip)
        zero.step()
        zero.zero_grad()
        zero.check_invariants()
        seen.append((loss.item(), norm))
    return seen


def train_alone(model, steps, clip=math.inf, micro=1, optimizer=ADAMW, param_groups=groups):
    """The same on one process and whole batches; parameters without a gradient have one of zero, as with Zero."""
    optimizer = optimizer(param_groups(model))
    norms = []
    for step in steps:
        for part in range(micro):
            (loss_of(model, *batch(100 * step + part)) / micro).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(torch.nn.utils.clip_grad_norm_(trained, clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def odd_zero(comm, stage, *, seed=None, precision="fp64", optimizer=ADAMW, **other) -> Zero:
    """Zero over an odd model that begins differently on every rank, unless with a seed."""
    model = Odd(comm.rank if seed is None else seed)
    if precision == "fp64":
        model.double()
    return Zero(model, comm, stage, optimizer, param_groups=groups, precision=precision, **other)
