"""A trainer whose step has two halves: a result that other replicas add to, and its application, once all agree."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from minilib.model.decoder import Decoder
from minilib.training.batches import EpochWindows, RandomWindows, batches_of
from minilib.training.config import TrainConfig
from minilib.training.trainer import Trainer


class ReplicaTrainer(Trainer):
    """A replica of a dense model with its optimizer. It communicates with nobody: see `ElasticReplica.train`.

    Args:
        model, train, validation, config: see `Trainer`; the same on all replicas.

    Attributes:
        starts: where in the row of tokens the windows of the latest `compute` begin.

    Raises:
        ValueError: for a mixture of experts, whose loads would have to be summed, too; or as `Trainer`.
    """

    def __init__(self, model: Decoder, train: Tensor, validation: Tensor, config: TrainConfig) -> None:
        if model.config.moe is not None:
            raise ValueError("replicas share gradients and the loss, not the load of experts: pass a dense model")
        super().__init__(model, train, validation, config)
        self.starts: list[int] = []
        self._dealt: tuple[tuple[int, int], RandomWindows | EpochWindows] = ((0, 1), self._batches)

    def compute(self, rank: int, world_size: int) -> Tensor:
        """Gradients and loss of this replica's share of the next step's batch, as parts of the batch's mean.

        Nothing is changed that counts: the sum over ranks goes to `apply`, or another `compute` takes its place.

        Args:
            rank, world_size: which share.

        Returns:
            (parameters + 1,) float32; the last value is the loss.
        """
        if self._dealt[0] != (rank, world_size):
            self._dealt = (rank, world_size), batches_of(len(self.train_tokens), self.config, rank, world_size)
        share = self._dealt[1].draw(self.step)
        self.starts = share.starts
        self.strategy.zero_grad()
        loss = sum(self._backward(tokens, weight, True) for tokens, weight in self._parts(share, self.train_tokens))
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters()]
        return torch.cat([*gradients, torch.tensor([loss], device=gradients[0].device)])

    def apply(self, total: Tensor) -> None:
        """Take the step, with the sum of what all members computed."""
        parameters = list(self.model.parameters())
        *gradients, loss = total.split([*(parameter.numel() for parameter in parameters), 1])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.grad_norms.append(self.strategy.clip_grad_norm(self.config.clip))
        self.strategy.step()
        self.losses.append(loss.item())
        self.step += 1

    def packed(self) -> Tensor:
        """Weights, optimizer and progress, (bytes,) uint8."""
        buffer = io.BytesIO()
        torch.save(self.strategy.full_state_dict() | self.progress(), buffer)
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def unpack(self, data: Tensor) -> None:
        """Stand where another replica stood that has packed its state.

        Raises:
            CannotResume: if that belongs to another run.
        """
        state = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True, map_location="cpu")
        self.check_same_run(state, "the state of a peer")
        self.strategy.load_full_state_dict(state)
        self.go_on_from(state)
