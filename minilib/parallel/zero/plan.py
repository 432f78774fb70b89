"""The collectives of a forward and a backward with ZeRO, as data, and the walk through them.

    stage 3, units 0 (outer), 1, 2, 3          G gather parameters      R reduce gradients to their owners

    forward    G0 G1 │unit 1 and G2│unit 2 and G3│unit 3                  a block is released after its forward
    backward   │unit 3 and G2│unit 2 and G1, R3│unit 1 and R2│ R1 R0      but 0 and the last one are kept for this

All ranks walk through the same list, so their collectives match even where one rank skips a unit or a parameter that
another rank uses: a rank that reaches an operation does all operations before it first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple


class Op(NamedTuple):
    """One operation of all ranks.

    Args:
        what: "gather" or "reduce".
        unit: its number.
    """

    what: str
    unit: int

    def __str__(self) -> str:
        return f"{self.what[0].upper()}{self.unit}"


def forward_plan(num_units: int) -> list[Op]:
    """Gathers for a forward that uses units in order."""
    return [Op("gather", unit) for unit in range(num_units)]


def backward_plan(num_units: int, gathered: bool, reduced: Collection[int]) -> list[Op]:
    """Operations of a backward that uses units in the opposite order, and the outer one throughout.

    Args:
        num_units: the outer one included.
        gathered: whether parameters have to be gathered; units that are still whole are passed over.
        reduced: units whose gradients are reduced to their owners.

    Returns:
        A unit's reduction stands after the gather of the unit before it, whose backward needs the parameters first.
    """
    plan = [Op("gather", 0)]
    for unit in range(num_units - 1, 0, -1):
        plan += [Op("gather", unit), Op("reduce", unit + 1)]
    plan += [Op("reduce", 1), Op("reduce", 0)]
    return [op for op in plan if (gathered if op.what == "gather" else op.unit in reduced)]


class Walk:
    """A place in a plan.

    Args:
        plan: each operation once.
        do: called with each, in order.
    """

    def __init__(self, plan: Sequence[Op], do: Callable[[Op], None]) -> None:
        self.plan, self._do, self._position = plan, do, 0

    @property
    def next(self) -> Op | None:
        """The next operation; None at the end."""
        return self.plan[self._position] if self._position < len(self.plan) else None

    def step(self) -> None:
        """Do the next operation."""
        self._position += 1  # first, since the operation may walk on
        self._do(self.plan[self._position - 1])

    def through(self, op: Op) -> None:
        """Do all operations up to this one, and this one; none if it is done already, or not in the plan."""
        if op in self.plan[self._position :]:
            while self.next != op:
                self.step()
            self.step()

    def finish(self) -> None:
        """Do all operations that are left."""
        while self.next is not None:
            self.step()
