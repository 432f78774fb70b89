"""What one stage does with microbatches: forward, backward whole or in halves; and the activations that it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minilib.parallel.pipeline.split_backward import SplitBackward
from minilib.parallel.pipeline.stage import DecoderStage, Microbatch


@dataclass
class _Held:
    """A microbatch whose forward is done, and whose backward is not.

    Args:
        source: the leaf that the stage's layers read.
        embedded: on the first stage the same values, as the embedding made them.
        output: a loss on the last stage; None after the input half of the backward.
        split: after that half, what the weight half needs.
        gradient: after that half, of the source; of the output where the source needs none.
    """

    source: Tensor
    embedded: Tensor | None
    output: Tensor | None
    split: SplitBackward | None = None
    gradient: Tensor | None = None


class StageWork:
    """Runs one stage's part of any schedule.

    Args:
        stage: its layers and weights.
    """

    def __init__(self, stage: DecoderStage) -> None:
        self.stage = stage
        self._held: dict[int, _Held] = {}

    @property
    def num_held(self) -> int:
        """Microbatches whose activations are held."""
        return len(self._held)

    def forward(self, number: int, x: Tensor | None, microbatch: Microbatch, weight: float) -> Tensor:
        """F.

        Args:
            number: of the microbatch.
            x: (sequences, tokens, hidden_size) from the stage before; None on the first, which embeds.
            microbatch: its tokens, positions and targets.
            weight: what to multiply its mean loss by.

        Returns:
            Without a graph: the output for the next stage, or on the last stage the weighted loss.
        """
        stage, embedded = self.stage, None
        if stage.embed is not None:
            embedded = stage.embed(microbatch.token_ids)
            x = embedded.detach().requires_grad_(embedded.requires_grad)
        else:
            x.requires_grad_()
        output = stage(x, microbatch.positions)
        if stage.last:
            output = stage.loss(output, microbatch.targets) * weight
        self._held[number] = _Held(x, embedded, output)
        return output.detach()

    def backward(self, number: int, gradient: Tensor | None) -> Tensor | None:
        """B: add to the gradients of the weights, and let go of the activations.

        Args:
            number: of the microbatch.
            gradient: of the output; None on the last stage, whose output is a loss.

        Returns:
            The gradient of the input; None on the first stage, and where nothing is trained.
        """
        held = self._held.pop(number)
        if not held.output.requires_grad:
            return None
        torch.autograd.backward(held.output, gradient)
        self._finish(held, held.source.grad)
        return held.source.grad

    def input_gradient(self, number: int, gradient: Tensor | None) -> Tensor | None:
        """I: the gradient of the input alone; activations stay, for `weight_gradients`. See `backward`."""
        held = self._held[number]
        if not held.source.requires_grad:  # nobody asks for it: all of the backward is done with the weights
            held.gradient = gradient
            return None
        held.split = SplitBackward(held.output, held.source)
        held.output = None
        held.gradient = held.split.input_gradient(gradient)
        return held.gradient

    def weight_gradients(self, number: int) -> None:
        """W: add to the gradients of the weights, and let go of the activations."""
        held = self._held.pop(number)
        if held.split is not None:
            held.split.weight_gradients()
            self._finish(held, held.gradient)
        elif held.output.requires_grad:
            torch.autograd.backward(held.output, held.gradient)

    def drop(self) -> None:
        """Let go of everything, after a step that failed."""
        self._held.clear()

    @staticmethod
    def _finish(held: _Held, gradient: Tensor | None) -> None:
        """Take the gradient of the layers' input on to the embedding table."""
        if held.embedded is not None and held.embedded.requires_grad:
            held.embedded.backward(gradient)
