"""Where routers go that stand before replicas: beside them on hosts' processors, since no rank of theirs has a GPU.

A gang takes a GPU for each rank, so a router is no gang: it is a claim on a node as in chapter 13's placing, of which a
host takes one, and racks share them.
"""

from __future__ import annotations

from collections.abc import Iterable

from minilib.mechanisms.scheduling.placing import FILTERS, Claim, Ledger, Node, Refusal, place_all
from minilib.operations.placement.cluster.capacity import FreeGpus

ROUTER = "router"  # a resource of which each host has one


def place_routers(names: Iterable[str], free: FreeGpus) -> dict[str, str] | Refusal:
    """A host for each router, or none of them: in the rack that has fewest, and on no host that fails or is drained.

    Args:
        names: of the routers.
        free: whose cluster; routers take no GPU of it.

    Returns:
        Router → host, by name; or why the first router that gets no host gets none.

    Raises:
        InvalidClaim: if two routers have one name.
    """
    cluster = free.cluster
    ledger = Ledger(Node(host.name, {ROUTER: 1}, {"rack": host.rack}) for host in cluster.hosts)
    for number, host in enumerate(cluster.hosts):
        if any(free.out(gpu) in ("failed", "drained") for gpu in cluster.gpus_of(number)):
            ledger.close(host.name)

    def fewest(claim: Claim, node: Node, ledger: Ledger) -> float:
        beside = (ledger.node(ledger.node_of(other.name)) for other in ledger.claims)
        return -sum(other.labels["rack"] == node.labels["rack"] for other in beside)

    return place_all([Claim(name, {ROUTER: 1}) for name in names], ledger, FILTERS, fewest)
