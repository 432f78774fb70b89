"""How broken up the free GPUs are: the largest gang that would fit now.

Free GPUs alone say little: 64 of them are room for a gang of 64, or for none of 8, as they lie. What counts here is a
gang whose workers take whole hosts, as large gangs do; it is as large as the free whole hosts of

    anywhere      the cluster: ranks talk across the spine
    unit          one unit: no message crosses the spine
    rack          one rack
    domain        one NVLink domain: no message leaves NVLink

The figure of a comparison is that of a unit where an NVLink domain is one host, and that of a domain where it is more:
the largest group that gangs ask for there. Each of them is also told as the largest power of two, which is how
gangs come.
"""

from __future__ import annotations

from typing import NamedTuple

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import LEVELS


class LargestGangs(NamedTuple):
    """GPUs of the largest gang of whole hosts that fits now, by what it lies in.

    Args:
        anywhere: on the cluster.
        unit: in one unit.
        rack: in one rack.
        domain: in one NVLink domain.
    """

    anywhere: int
    unit: int
    rack: int
    domain: int

    @property
    def powers(self) -> LargestGangs:
        """The same for gangs of 1, 2, 4, 8 … GPUs; 0 stays 0."""
        return LargestGangs(*(1 << gpus.bit_length() - 1 if gpus else 0 for gpus in self))


def largest_gangs(free: FreeGpus) -> LargestGangs:
    """The largest gangs that fit now, whose workers have as many GPUs as the largest host.

    Args:
        free: who has which GPU.
    """
    cluster = free.cluster
    hosts = free.index(Fit(cluster.largest_host)).capacity["host"]
    largest = {}
    for level in LEVELS[1:]:
        gpus = [0] * len(cluster.groups(level))
        for host, count in enumerate(hosts):
            if count:
                gpus[cluster.group_number(level, host)] += count
        largest[level] = max(gpus)
    return LargestGangs(sum(hosts), largest["unit"], largest["rack"], largest["domain"])
