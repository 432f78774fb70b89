"""A small model with its optimizer, and a folder that fails, for tests of checkpoints."""

import errno

import torch

from minilib.operations.checkpoint.format.folder import CheckpointFolder


def model_and_optimizer(seed=0, width=7, steps=1, lr=0.1):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()


class FailingFolder(CheckpointFolder):
    """The step of this number fails, counted over all saves."""

    fails_at, taken, error = -1, 0, OSError(errno.ENOSPC, "no space left")

    def run(self, steps):
        for step in steps:
            FailingFolder.taken += 1
            if self.taken == self.fails_at:
                raise self.error
            super().run([step])
