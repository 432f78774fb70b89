"""A placed gang as other schedulers see it: hosts in rank order, and how many ranks each worker has.

Slurm, Kubernetes and Ray count GPUs of a host, and choose which of its GPUs a worker gets. So a placement is told to
them by hosts; the order of the hosts is the order of the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangPlacement

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
HOST = re.compile(r"[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?")
LONGEST_NAME = 40  # a pod's name adds the names and numbers of its job to it, and may have 63 characters


class InvalidOutlet(ValueError):
    """A job that a scheduler would not take; the message says what came and how to mend it."""


class ScatteredRanks(InvalidOutlet):
    """Ranks of a host that are no whole row of workers, so that their order cannot be told to a scheduler."""


@dataclass(frozen=True)
class HostedJob:
    """Workers of equal size, each on a host.

    Args:
        name: of the job, as DNS takes it: lower case, digits and "-", at most 40 characters.
        command: words of what each rank runs.
        hosts: of each worker, in rank order; worker w runs ranks w · gpus_per_worker …; two workers may share a host.
        gpus_per_worker: ranks of a worker, one on each GPU.

    Raises:
        InvalidOutlet: if a name is none, a number is no whole one ≥ 1, or there is nothing to run.
    """

    name: str
    command: tuple[str, ...]
    hosts: tuple[str, ...]
    gpus_per_worker: int

    def __post_init__(self) -> None:
        for name in ("command", "hosts"):
            words = getattr(self, name)
            if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
                raise InvalidOutlet(f"{name} is a list of words, at least one, none empty; got {words!r}")
            object.__setattr__(self, name, tuple(words))
        if not isinstance(self.name, str) or len(self.name) > LONGEST_NAME or not LABEL.fullmatch(self.name):
            raise InvalidOutlet(f"a job's name has lower-case letters, digits and inner -, at most {LONGEST_NAME}; "
                                f"got {self.name!r}")  # fmt: skip
        if wrong := [host for host in self.hosts if not HOST.fullmatch(host)]:
            raise InvalidOutlet(f"a host's name has letters, digits and inner - and ., got {wrong[0]!r}")
        if not is_whole(self.gpus_per_worker, 1):
            raise InvalidOutlet(f"gpus_per_worker is a whole number ≥ 1, got {self.gpus_per_worker!r}")

    @classmethod
    def of(cls, placement: GangPlacement, cluster: GpuCluster, command: Sequence[str]) -> HostedJob:
        """The hosts of a placement, in workers as large as the job asks for, else as large as all can be.

        Args:
            placement: rank r runs on its GPU r.
            cluster: whose GPUs these are.
            command: words of what each rank runs.

        Raises:
            ScatteredRanks: if a worker of the asked size would lie on two hosts.
            InvalidOutlet: as the constructor.
        """
        hosts = [cluster.hosts[cluster.host_of(gpu)].name for gpu in placement.gpus]
        size = placement.job.gpus_per_host or math.gcd(*(len(list(run)) for _, run in groupby(hosts)))
        workers = [hosts[first : first + size] for first in range(0, len(hosts), size)]
        for number, worker in enumerate(workers):
            if len(set(worker)) > 1:
                raise ScatteredRanks(f"worker {number} of {placement.job.name} has {size} ranks on {set(worker)}: "
                                     "place the ranks of a worker on one host")  # fmt: skip
        return cls(placement.job.name, tuple(command), tuple(worker[0] for worker in workers), size)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.hosts) * self.gpus_per_worker
