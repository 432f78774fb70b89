"""Attempts: changes that are undone in reverse unless they are committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Trial:
    """An attempt that is going on.

    Attributes:
        committed: whether its changes stay.
    """

    committed: bool = False

    def commit(self) -> None:
        """Keep the changes."""
        self.committed = True


class Attempts:
    """How to undo what was changed since an attempt began; an attempt within an attempt is part of it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._depth = 0

    @property
    def going_on(self) -> bool:
        """Whether an attempt is open."""
        return self._depth > 0

    def note(self, undo: Callable[[], None]) -> None:
        """A change was made, and this is how to undo it; outside of attempts nothing is kept."""
        if self._depth:
            self._undo.append(undo)

    @contextmanager
    def attempt(self) -> Iterator[Trial]:
        """Undo, at the end, what was noted in between, unless the trial was committed."""
        trial, mark = Trial(), len(self._undo)
        self._depth += 1
        try:
            yield trial
        finally:
            self._depth -= 1
            while not trial.committed and len(self._undo) > mark:
                self._undo.pop()()
            if not self._depth:
                self._undo.clear()
