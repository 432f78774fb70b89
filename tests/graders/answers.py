"""How an exercise lists the answers that its graders are tested with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answers:
    """Answers to one task.

    Args:
        correct: code for the solution cell, right but different from the official solution; at least one.
        wrong: plausible mistake → code for the solution cell; at least three.
    """

    correct: tuple[str, ...]
    wrong: dict[str, str]
