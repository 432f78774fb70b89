"""What a figure of a cluster shows: one cell for each GPU, who has it, and the boxes of the groups around the cells."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from minilib.operations.placement.cluster.capacity import FreeGpus


class GpuCell(NamedTuple):
    """One GPU in a figure.

    Args:
        gpu: its number.
        column: of its rack.
        row: within the column, hosts below each other.
        place: within its host's row.
        owner: whose it is; None if nobody's.
        out: failed, drained or reserved; None if it is in use.
    """

    gpu: int
    column: int
    row: int
    place: int
    owner: Hashable | None
    out: str | None


def gpu_cells(free: FreeGpus) -> list[GpuCell]:
    """Racks side by side, a row for each host: a cell for each GPU, in topology order."""
    cluster = free.cluster
    cells = []
    for rack in cluster.groups("rack"):
        for row, host in enumerate(rack.hosts):
            for place, gpu in enumerate(cluster.gpus_of(host)):
                cells.append(GpuCell(gpu, rack.number, row, place, free.owner(gpu), free.out(gpu)))
    return cells
