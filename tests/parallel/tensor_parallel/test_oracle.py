"""Against torch.distributed.tensor.parallel over gloo: the same loss and gradients, rank by rank."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from minilib.parallel.tensor_parallel import TensorParallel
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from tests.parallel.tensor_parallel.models import decoder, tokens_of
from tools.bench.tensor_parallel import cut_by_torch

# torch's neither pads a vocabulary nor copies heads, and unties tied tables.
OF_TORCH = {"tie_embeddings": False, "vocab_size": 40, "qkv_bias": True}


def both() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    theirs, ours = decoder(0, **OF_TORCH), decoder(0, **OF_TORCH)
    cut_by_torch(theirs)
    tokens, positions, targets = tokens_of(0)
    with loss_parallel():
        logits = theirs(tokens, positions, theirs.ops.causal_attention)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
    tp = TensorParallel(ours, Communicator(GroupTransport()))
    own = ours.loss(tokens, positions, targets)
    own.backward()
    tp.finish()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    return [_local(loss.detach()), own.detach()], [dict(map(_own_gradient, theirs.named_parameters())), gradients]


def _own_gradient(named: tuple[str, nn.Parameter]) -> tuple[str, Tensor]:
    """Laid out as its parameter is: torch leaves that of the embedding in other placements."""
    name, parameter = named
    if isinstance(parameter, DTensor):
        return name, parameter.grad.redistribute(parameter.device_mesh, parameter.placements).to_local()
    return name, parameter.grad


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def test_losses_and_every_rank_s_gradients_are_those_of_torch():
    for losses, (theirs, ours) in run(both, 2):
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
