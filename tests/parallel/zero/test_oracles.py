"""ZeRO against what torch has for it: DDP, ZeroRedundancyOptimizer, FSDP2.

In a file of its own, since loading FSDP costs every rank a second.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from minilib.parallel.zero import Zero
from minilib.parallel.zero.ledger import STAGES
from minilib.ranks import launch
from tests.parallel.zero.models import ADAMW, communicator, decoder, largest_difference, values


def decoder_batch(step, rank):
    tokens = torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return tokens[:, :-1], torch.arange(8).expand(3, 8), tokens[:, 1:]


def train_decoder(loss, step, after=lambda: None):
    seen = []
    for number in range(12):
        value = loss(*decoder_batch(number, dist.get_rank()))
        value.backward()
        step()
        after()
        seen.append(value.item())
    return seen


def with_ddp(make):
    wrapped = DistributedDataParallel(_LossIsForward(decoder(0).double()))
    optimizer = make(wrapped.parameters())
    seen = train_decoder(wrapped, optimizer.step, optimizer.zero_grad)
    return seen, values(wrapped.module.model)


class _LossIsForward(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model.loss(*args)


def with_fsdp():
    model = decoder(0).double()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    optimizer = ADAMW(model.parameters())
    seen = train_decoder(model.loss, optimizer.step, optimizer.zero_grad)
    return seen, {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def with_zero(comm, stage):
    zero = Zero(decoder(comm.rank).double(), comm, stage, ADAMW, precision="fp64")
    seen = train_decoder(zero.model.loss, zero.step, zero.zero_grad)
    zero.check_invariants()
    whole = zero.full_state_dict()
    return seen, {name: whole[name] for name, _ in zero.model.named_parameters()}


def test_ddp_and_zero_redundancy_optimizer_and_fsdp2_agree():
    def on_rank():
        comm = communicator("shared")
        sliced = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, **ADAMW.keywords)
        theirs = {"DDP": with_ddp(ADAMW), "ZeroRedundancyOptimizer": with_ddp(sliced), "FSDP2": with_fsdp()}
        return theirs, [with_zero(comm, stage) for stage in STAGES]

    for theirs, ours in launch.run(on_rank, 3):
        for losses, weights in ours:
            for other_losses, other_weights in theirs.values():
                assert losses == pytest.approx(other_losses, abs=1e-6)  # the decoder's loss is float32 throughout
                assert largest_difference(weights, other_weights) < 1e-6
