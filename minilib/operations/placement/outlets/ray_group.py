"""A placement as a placement group of Ray: a bundle for each worker, reserved all or none.

Ray chooses the nodes. A bundle can ask for one node by the resource "node:<address>" that each node has, so pinned
bundles tell it the hosts of the placement; else a strategy says how bundles lie:

    STRICT_PACK     on one node           PACK     on few nodes, if they fit so
    STRICT_SPREAD   each on its own node  SPREAD   on many nodes, if they fit so

Ray does not see racks or NVLink domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
SHARE = 0.001  # of the one unit of "node:<address>" that a node has, for a bundle that must lie there


@dataclass(frozen=True)
class RayBundles:
    """What `ray.util.placement_group` is called with.

    Args:
        name: of the group.
        bundles: resources of each worker, in rank order.
        strategy: one of STRATEGIES.
    """

    name: str
    bundles: tuple[Mapping[str, float], ...]
    strategy: str

    @classmethod
    def of(cls, job: HostedJob, strategy: str = "PACK", addresses: Mapping[str, str] | None = None) -> RayBundles:
        """A bundle for each worker.

        Args:
            job: its workers.
            strategy: one of STRATEGIES.
            addresses: of the Ray node of each host; with them, worker w lies on its host.

        Raises:
            InvalidOutlet: for another strategy, a host without an address, or a strategy that the hosts contradict.
        """
        if strategy not in STRATEGIES:
            raise InvalidOutlet(f"a strategy is one of {', '.join(STRATEGIES)}, got {strategy!r}")
        bundles = [{"GPU": float(job.gpus_per_worker)} for _ in job.hosts]
        if addresses is not None:
            if missing := [host for host in job.hosts if host not in addresses]:
                raise InvalidOutlet(f"host {missing[0]!r} has no address of a Ray node; there are {len(addresses)}")
            if strategy.startswith("STRICT"):
                raise InvalidOutlet(f"hosts are named, and {strategy} chooses them: use PACK or SPREAD")
            for bundle, host in zip(bundles, job.hosts, strict=True):
                bundle[f"node:{addresses[host]}"] = SHARE
        return cls(job.name, tuple(bundles), strategy)

    def create(self) -> PlacementGroup:
        """Ask the Ray cluster that this process has joined; its `ready()` says when all bundles are reserved."""
        from ray.util import placement_group

        return placement_group([dict(bundle) for bundle in self.bundles], self.strategy, name=self.name)
