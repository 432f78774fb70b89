#!/usr/bin/env bash
# get_optimizer_state_dict looks like a question. Asked of an optimizer that has not stepped yet, it runs a step
# with zero gradients to make the state. The weights stay, but AdamW's step count is then 1 instead of 0, so its
# first real update is corrected for bias as if it were the second, and is 0.744 of what it would be. Ask after the
# first step, not before.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6

observe <<'EOF'
from importlib.metadata import version

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(ask_before):
    """Step counts before the first real step, whether the weights are the first ones, and how far that step goes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    first = model.weight.detach().clone()
    if ask_before:
        get_optimizer_state_dict(model, optimizer)
    counts = [int(state["step"]) for state in optimizer.state.values()]
    kept = torch.equal(first, model.weight)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return counts, kept, (model.weight - first).abs().max().item()


print("torch", version("torch").partition("+")[0])
counts, kept, plain = first_update(ask_before=False)
print(f"not asked: step counts {counts}, weights kept: {kept}")
counts, kept, asked = first_update(ask_before=True)
print(f"asked: step counts {counts}, weights kept: {kept}, first update {asked / plain:.3f} of the usual one")
EOF
expect <<'EOF'
torch 2.13.0
not asked: step counts [], weights kept: True
asked: step counts [1], weights kept: True, first update 0.744 of the usual one
EOF
