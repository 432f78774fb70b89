"""What ZeRO's ranks do together in a forward and a backward, as data, and the walk through it.

    stage 3, units 0 (outer), 1, 2, 3          G gather parameters      R reduce gradients to their owners

    forward    G0 G1 │unit 1 and G2│unit 2 and G3│unit 3                          unit 1 is let go of when it is done
    backward   │unit 3 and G2│unit 2 and G1, R3│unit 1 and R2│ R1 R0              0 and 3 were kept

All ranks walk through the same list, so their collectives match even where one rank skips a unit or a parameter that
another rank uses: whoever comes to an operation does those before it as well.
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
        gathered: parameters must come from their owners first; those that are still there need not.
        reduced: units whose gradients go to their owners.

    Returns:
        A unit's reduction comes after the gather for the unit before it, so that the latter is there in time.
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
        """What comes next; None at the end."""
        return self.plan[self._position] if self._position < len(self.plan) else None

    def step(self) -> None:
        """Do what comes next."""
        self._position += 1  # first, for what it does may walk on
        self._do(self.plan[self._position - 1])

    def through(self, op: Op) -> None:
        """Do everything up to an operation, and it; nothing if it is done, or not in the plan."""
        if op in self.plan[self._position :]:
            while self.next != op:
                self.step()
            self.step()

    def finish(self) -> None:
        """Do everything that is left."""
        while self.next is not None:
            self.step()
