"""What a caller gives, looked at before it does harm: whole numbers and quantities."""

from __future__ import annotations

import math
import operator
from numbers import Real


def whole(value: object) -> int | None:
    """A whole number of Python, numpy or torch as Python's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether a value is a whole number, of Python, numpy or torch, and not below `least`; True and False are none."""
    found = whole(value)
    return found is not None and (least is None or found >= least)


def check_whole(what: str, value: object, least: int = 0, error: type[Exception] = ValueError) -> None:
    """Refuse what is no whole number of at least so many.

    Raises:
        error: which says what came.
    """
    if not is_whole(value, least):
        raise error(f"{what} is a whole number ≥ {least}, got {value!r}")


def check_quantity(
    what: str, value: object, above_zero: bool = False, finite: bool = True, error: type[Exception] = ValueError
) -> None:
    """Refuse what is no number, negative, or 0 if it has to be more; infinity unless it makes sense, too.

    Raises:
        error: which says what came.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (value > 0 if above_zero else value >= 0) or (finite and value == math.inf):
        kind = "a finite number" if finite else "a number"
        raise error(f"{what} is {kind} {'> 0' if above_zero else '≥ 0'}, got {value!r}")
