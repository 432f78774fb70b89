"""The plan of a save: what each rank's part holds; it is worked out once, and again when a rank holds other boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minilib.operations.checkpoint.format.folder import part_name
from minilib.operations.checkpoint.format.table import HeldBox, StoredBox, StoredTensor, dtype_of
from minilib.operations.checkpoint.format.writing import PartContents
from minilib.operations.checkpoint.states.shares import packed_holdings, shares_of, unpacked_holdings
from minilib.operations.checkpoint.together import told_by_all
from minilib.ranks.agreement import gather_numbers
from minilib.ranks.collectives import Communicator


@dataclass(frozen=True)
class SavePlan:
    """Who writes what.

    Args:
        holdings: what each rank holds.
        parts: what each rank writes.
    """

    holdings: Sequence[Sequence[HeldBox]]
    parts: Sequence[PartContents]

    def table(self, step: int) -> dict[str, StoredTensor]:
        """Where each tensor will lie once all parts of a step are written."""
        boxes: dict[str, list[StoredBox]] = {}
        for rank, part in enumerate(self.parts):
            name = part_name(step, rank)
            for held, offset in zip(part.boxes, part.offsets, strict=True):
                boxes.setdefault(held.name, []).append(StoredBox(held.box, name, offset))
        tensors = {held.name: held for holding in self.holdings for held in holding}
        return {
            name: StoredTensor(dtype_of(held.dtype), held.shape, tuple(boxes.get(name, ())))
            for name, held in tensors.items()
        }


class Planner:
    """Makes plans, and keeps the latest.

    Args:
        comm: between all ranks; None on one process.
    """

    def __init__(self, comm: Communicator | None) -> None:
        self._comm = comm
        self._text, self._plan = "", SavePlan((), ())

    def plan(self, held: Sequence[HeldBox]) -> SavePlan:
        """The plan for what ranks hold now, this one what `held_by` says. A collective.

        Raises:
            StateMismatch: on all ranks, if they do not hold one whole state.

        Cost: 8 bytes from each rank to each; the first time, or after a change, about 100 bytes a box.
        """
        text = packed_holdings(held)
        changed = text != self._text
        if self._comm is not None:
            changed = any(gather_numbers(int(changed), self._comm))
        if changed:
            holdings = [unpacked_holdings(said) for said in told_by_all(text, self._comm)]
            self._text = ""
            self._plan = SavePlan(holdings, [PartContents.of(share) for share in shares_of(holdings)])
            self._text = text
        return self._plan
