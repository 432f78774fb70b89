"""A service as a set of replicas, each a small gang; and how many of them may be taken away by choice.

n − 1 of n ranks are nothing, n − 1 of n replicas are nearly all. So gangs stand together and replicas apart, and a
budget says how many replicas have to serve while hosts are drained and others preempt. Failures ask no budget.

Source: kubernetes.io, "Disruptions" and "Specifying a Disruption Budget for your Application" (policy/v1: minAvailable
or maxUnavailable; the disruption controller counts ready pods against those that are wanted).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minilib.mechanisms.basics.checks import check_quantity, check_whole, whole
from minilib.operations.placement.cluster.topology import LEVELS
from minilib.operations.placement.gangs.job import GangJob
from minilib.ranks.mesh_shape import MeshShape

YEARS = 10 * 365 * 86_400.0  # seconds for which a replica serves at most: backfill counts on no end of it


class InvalidReplicaSet(ValueError):
    """A set of replicas that contradicts itself; the message says what came and how to mend it."""


@dataclass(frozen=True)
class DisruptionBudget:
    """How many replicas may be taken away by choice at a time.

    Args:
        min_available: so many have to serve.
        max_unavailable: so many of those that are wanted need not serve.

    Raises:
        InvalidReplicaSet: unless one of the two is given, a whole number ≥ 0.
    """

    min_available: int | None = None
    max_unavailable: int | None = None

    def __post_init__(self) -> None:
        if (self.min_available is None) == (self.max_unavailable is None):
            raise InvalidReplicaSet(f"a budget has min_available or max_unavailable, one of them; got {self}")
        for name in ("min_available", "max_unavailable"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), error=InvalidReplicaSet)
                object.__setattr__(self, name, whole(getattr(self, name)))  # one of numpy may know no number below 0

    def least(self, wanted: int) -> int:
        """How many of the replicas that are wanted have to serve."""
        if self.min_available is not None:
            return self.min_available
        return max(wanted - self.max_unavailable, 0)

    def allowed(self, wanted: int, ready: int) -> int:
        """How many replicas that serve may be taken away now."""
        return max(ready - self.least(wanted), 0)


@dataclass(frozen=True)
class ReplicaJob(GangJob):
    """One replica: a gang that stands apart from those of the same service.

    Args:
        service: whose replica it is.
        spread_over: over the groups of which level replicas are spread.
        most_together: how many replicas of the service stand in one such group at most; any number if left out.
    """

    service: str = ""
    spread_over: str = "rack"
    most_together: int | None = None


@dataclass(frozen=True)
class ReplicaSet:
    """Replicas that are the same to whoever asks them.

    A router of minilib/serving in front of them is no replica here: a gang has a GPU for each rank, and a router has
    none. It goes to hosts' processors, see routers.py.

    Args:
        name: of the service, no other has it.
        replicas: how many are wanted; 0 for a service that sleeps.
        gpus: of one replica, its tensor-parallel ranks: within one NVLink domain.
        budget: one replica at a time may be taken away if left out.
        start_seconds: from the placement to the first answer: weights are loaded.
        spread_over: "host", "domain", "rack" or "unit"; groups that have few replicas get the next.
        most_together: how many stand in one such group at most; if left out, a group that has room takes any number.
        priority: 0 is the most urgent, as of other gangs.
        tenant: whose service it is.
        selector: labels that its hosts have.

    Raises:
        InvalidReplicaSet: for numbers that are none, no name, or a level that there is not.
    """

    name: str
    replicas: int
    gpus: int = 1
    budget: DisruptionBudget = field(default_factory=lambda: DisruptionBudget(max_unavailable=1))
    start_seconds: float = 0.0
    spread_over: str = "rack"
    most_together: int | None = None
    priority: float = 0
    tenant: str = ""
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidReplicaSet(f"a service has a name, a string; got {self.name!r}")
        check_whole(f"replicas of {self.name}", self.replicas, error=InvalidReplicaSet)
        check_whole(f"gpus of a replica of {self.name}", self.gpus, 1, InvalidReplicaSet)
        if self.most_together is not None:
            check_whole(f"most_together of {self.name}", self.most_together, 1, InvalidReplicaSet)
        if self.spread_over not in LEVELS:
            raise InvalidReplicaSet(f"{self.name} is spread over one of {', '.join(LEVELS)}; got {self.spread_over!r}")
        check_quantity(f"start_seconds of {self.name}", self.start_seconds, error=InvalidReplicaSet)

    def job(self, number: int) -> ReplicaJob:
        """One of its replicas.

        Raises:
            InvalidPriority: if the priority is not a finite number ≥ 0.
        """
        mesh = MeshShape.of(tp=self.gpus)
        return ReplicaJob(
            f"{self.name}-{number}", self.gpus, mesh=mesh, tenant=self.tenant, priority=self.priority, seconds=YEARS,
            selector=self.selector, segment=self.gpus, service=self.name, spread_over=self.spread_over,
            most_together=self.most_together,
        )  # fmt: skip
