"""The phases of a training step, told to whoever measures them.

data        draw the sequences of this rank's share
forward     once for each backward
backward    once for each backward; gradients of the last one leave for other ranks meanwhile
gradients   wait for averaged gradients, and clip their norm
optimizer   update parameters; with ZeRO gather them again
loss        average the loss over ranks
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

PHASES = ("data", "forward", "backward", "gradients", "optimizer", "loss")


class StepPhases(Protocol):
    """Called at the beginning of a phase with its name; the phase lasts as long as what it returns is entered."""

    def __call__(self, name: str) -> AbstractContextManager[None]: ...


def no_phases(name: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()
