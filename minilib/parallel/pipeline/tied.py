"""A tied embedding with two copies on two ranks: the first stage's table and the last stage's unembedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilib.parallel.pipeline.schedule import PipelineSchedule
from minilib.parallel.pipeline.stage import DecoderStage
from minilib.ranks.point_to_point import PointToPoint


class TiedCopy:
    """This rank's copy of the table. After every step both have the same gradient, the sum of both stages', bit by bit.

    Args:
        weight: this rank's.
        peer: the rank that has the other.
        first: whether this is the first stage's.
    """

    def __init__(self, weight: nn.Parameter, peer: int, first: bool) -> None:
        self.weight, self._peer, self.first = weight, peer, first
        self._before: Tensor | None = None

    def begin(self) -> None:
        """Before a step: set aside what earlier steps have added up, which is a sum already."""
        self._before, self.weight.grad = self.weight.grad, None

    def end(self, mail: PointToPoint) -> None:
        """After a step: exchange this step's gradients and add them; of a frozen table there are none.

        Raises:
            CollectiveMismatch: if only one copy is frozen.
        """
        trained = self.weight.requires_grad
        label = f"gradient of a tied embedding that is {'trained' if trained else 'frozen'}"
        own = self.weight.grad
        if own is None:  # no token counts on the last stage, or the table is frozen
            own = torch.zeros_like(self.weight) if trained else self.weight.new_zeros(1)
        mail.send(own, self._peer, label)
        other = mail.receive(torch.empty_like(own), self._peer, label)
        mail.settle()
        if not trained:
            self.undo()
            return
        total = own + other if self.first else other + own
        self.weight.grad = total if self._before is None else self._before.add_(total)
        self._before = None

    def undo(self) -> None:
        """After a step that failed: give back what earlier steps have added up."""
        self.weight.grad, self._before = self._before, None


def tied_copy(stages: dict[int, DecoderStage], schedule: PipelineSchedule, rank: int) -> TiedCopy | None:
    """This rank's copy of a tied table, if its other copy is on another rank.

    Args:
        stages: of this rank, of a model with tied embeddings.
        schedule: which rank has which stage.
        rank: this one.
    """
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    if first == last or rank not in (first, last):
        return None
    weight = stages[0].embed.weight if rank == first else stages[schedule.num_stages - 1].unembed.weight
    return TiedCopy(weight, last if rank == first else first, rank == first)
