"""What a child process needs in its environment to import minilib, wherever this one was started."""

from __future__ import annotations

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[3]  # where a new process finds minilib


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with these variables set, and this minilib before all others."""
    search = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **variables, "PYTHONPATH": search}
