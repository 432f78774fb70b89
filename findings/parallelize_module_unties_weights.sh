#!/usr/bin/env bash
# parallelize_module, given a plan for an embedding and the head that is tied to it, makes two parameters of the one
# they shared, without a warning. The first output is that of the tied model; after one step of training it no
# longer is. Way round it: tie again afterwards (head.weight = embed.weight), and count parameters.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
import copy
import os
import warnings
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def output(model, steps):
    """What the model says after some steps of gradient descent."""
    tokens, optimizer = torch.arange(8), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(tokens).detach()


torch.manual_seed(0)
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
model = Tied()
tied = copy.deepcopy(model)
print("torch", version("torch").partition("+")[0])
print("before:", len(list(model.parameters())), "parameter, tied:", model.head.weight is model.embed.weight)
plan = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
said = [str(one.message) for one in told if "tie" in str(one.message).lower() or "share" in str(one.message).lower()]
print("after:", len(list(model.parameters())), "parameters, tied:", model.head.weight is model.embed.weight)
print("warnings about it:", len(said))
for steps in (0, 1):
    same = torch.allclose(output(model, steps), output(tied, steps))
    print("the output of the tied model after", steps, "steps:", same)
dist.destroy_process_group()
EOF
expect <<'EOF'
torch 2.13.0
before: 1 parameter, tied: True
after: 2 parameters, tied: False
warnings about it: 0
the output of the tied model after 0 steps: True
the output of the tied model after 1 steps: False
EOF
