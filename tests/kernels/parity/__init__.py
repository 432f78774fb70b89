"""Parity cases, one module an op: CASES maps a name to a function of a Place that asserts.

tests/interpreter runs them in Triton's interpreter, tests/gpu on a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable


def every_case() -> dict[str, Callable]:
    """All cases of all ops, by "op: case"."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found |= {f"{info.name}: {name}": case for name, case in module.CASES.items()}
    return found
