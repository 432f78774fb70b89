"""Which parts of a container this kernel lets us have: found by trying each."""

from __future__ import annotations

import tempfile
from pathlib import Path

from minilib.classic.container.container import run_in_container
from minilib.classic.container.errors import CannotContain
from minilib.classic.container.limits import Cgroup, ContainerLimits
from minilib.classic.container.root import OverlayRoot, lay_out

PARTS = ("namespaces", "overlay", "memory", "pids", "cpu")
_LIMITS = {"memory": ContainerLimits(memory=1 << 26), "pids": ContainerLimits(pids=16), "cpu": ContainerLimits(cpus=1)}


def survey_kernel() -> dict[str, str | None]:
    """Try each part once, and leave nothing behind.

    Returns:
        For each of `PARTS` None where it works, and the reason why not where it does not.
    """
    return {part: _reason(part) for part in PARTS}


def _reason(part: str) -> str | None:
    try:
        if part == "namespaces":
            run_in_container(int)
        elif part == "overlay":
            _try_overlay()
        else:
            Cgroup(_LIMITS[part]).remove()
    except CannotContain as error:
        return str(error)
    return None


def _try_overlay() -> None:
    with tempfile.TemporaryDirectory() as folder, OverlayRoot(lay_out(Path(folder, "layer"), {"file": b""})) as root:
        run_in_container(int, root=root)
