"""A decoder in float64, batches whose sequences differ in length, and what one process makes of them."""

import gc
from functools import partial

import torch
from torch.nn import functional as F

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from minilib.parallel.pipeline import Microbatch, PipelineParallel
from minilib.parallel.pipeline.stage import IGNORED
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
VOCABULARY, LONGEST = 19, 7
ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95))
EXPERTS = MoEConfig(num_experts=4, top_k=2, intermediate_size=6)
CLIP = 0.5  # most gradients here are longer


class DoubleLoss(Ops):
    """The model's own loss is in float32 whatever its weights are, which would hide what is to be compared."""

    def loss(self, features, weight, targets):
        return F.cross_entropy(F.linear(features, weight).flatten(0, -2), targets.flatten())


def decoder(seed=0, **other) -> Decoder:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_layers": 4, "num_heads": 2}
    shape |= {"num_kv_heads": 1, "head_dim": 4, "max_position": LONGEST, "qk_norm": True, "qkv_bias": True}
    model = Decoder(ModelConfig(**{**shape, **other})).double()
    model.initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # far from the point where all logits are 0
    model.ops = DoubleLoss()
    return model


def lengths(step, num_microbatches):
    """Tokens that count in each sequence, one or two sequences a microbatch; one microbatch has none at all."""
    draw = torch.Generator().manual_seed(step)
    rows = [torch.randint(1, LONGEST + 1, (1 + number % 2,), generator=draw) for number in range(num_microbatches)]
    if num_microbatches > 2:
        rows[step % num_microbatches].zero_()
    return rows


def microbatches(step, num_microbatches) -> list[Microbatch]:
    """Microbatches of different shapes, each as long as its longest sequence."""
    found = []
    for number, counts in enumerate(lengths(step, num_microbatches)):
        draw = torch.Generator().manual_seed(1000 * step + number)
        tokens = torch.randint(VOCABULARY, (len(counts), LONGEST + 1), generator=draw)
        targets = tokens[:, 1:].masked_fill(torch.arange(LONGEST) >= counts[:, None], IGNORED)
        length = max(1, int(counts.max()))
        positions = torch.arange(length).expand(len(counts), length)
        found.append(Microbatch(tokens[:, :length].contiguous(), positions, targets[:, :length].contiguous()))
    return found


def whole(parts) -> Microbatch:
    """All of a step's microbatches as one batch, shorter sequences filled up with tokens that do not count."""

    def padded(number, value):
        return torch.cat([F.pad(part[number], (0, LONGEST - part[number].shape[1]), value=value) for part in parts])

    token_ids, targets = padded(0, 0), padded(2, IGNORED)
    return Microbatch(token_ids, torch.arange(LONGEST).expand(token_ids.shape), targets)


def train_alone(model, steps, num_microbatches):
    """One process on whole batches: losses, gradients of the last step, norms."""
    optimizer, losses, norms = ADAMW(model.parameters()), [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(*whole(microbatches(step, num_microbatches)))
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, gradients(model.named_parameters())


def train(pipeline: PipelineParallel, steps):
    """The same on ranks."""
    optimizer, losses, norms = ADAMW(pipeline.parameters()), [], []
    for step in range(steps):
        pipeline.zero_grad()
        losses.append(pipeline.step(microbatches(step, pipeline.schedule.num_microbatches)))
        norms.append(pipeline.clip_grad_norm(CLIP))
        optimizer.step()
        pipeline.check_invariants()
    return losses, norms, gradients(pipeline.named_parameters())


def gradients(named):
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def largest_difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Saved:
    """Bytes that forwards save for backwards, while they are held; by reference counts alone, without collection.

    Attributes:
        now, most: bytes held now, and most at a time.
    """

    class Box:
        def __init__(self, tensor, saved):
            self.tensor, self.saved = tensor.detach(), saved
            saved.now += tensor.nbytes
            saved.most = max(saved.most, saved.now)

        def __del__(self):
            self.saved.now -= self.tensor.nbytes

    def __init__(self, besides=()):
        self.now = self.most = 0
        self._besides = {parameter.data_ptr() for parameter in besides}

    def __enter__(self):
        gc.disable()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: getattr(kept, "tensor", kept))
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        gc.enable()

    def _pack(self, tensor):
        return tensor if tensor.data_ptr() in self._besides else self.Box(tensor, self)


def communicator(transport="shared", **options) -> Communicator:
    return Communicator(TRANSPORTS[transport](**options))
