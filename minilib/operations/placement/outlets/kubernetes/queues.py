"""Kueue: a tenant's queue with a quota of GPUs, and the tree of racks in which it looks for a gang's hosts.

Kueue admits a gang as a whole, by its quota. Without a topology a quota is one number: two nodes with four free GPUs
each admit one pod of eight, which then waits for ever. With a topology Kueue looks for hosts before it admits, and
gives pods their nodes in the order of their index, so that neighbours in rank stand near each other.

Source: Kueue 0.19, kueue.x-k8s.io/v1beta2; topology-aware scheduling is on by default from 0.14 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.outlets.hosted_job import InvalidOutlet
from minilib.operations.placement.outlets.kubernetes.pods import GPU, HOSTNAME, PodOptions

API = "kueue.x-k8s.io/v1beta2"
FLAVOR, TOPOLOGY = "gpus", "racks"


def kueue_queue(
    tenant: str, namespace: str, gpus: int, levels: Sequence[str], cohort: str = "", borrow: int | None = None
) -> list[dict]:
    """Topology, ResourceFlavor, ClusterQueue and LocalQueue of a tenant.

    Args:
        tenant: name of both queues.
        namespace: whose jobs may wait in the LocalQueue.
        gpus: the tenant's own.
        levels: node labels from the widest to the narrowest, such as unit, rack and NVLink domain; the host is added.
        cohort: tenants that lend each other what they do not use; none if empty.
        borrow: GPUs that the tenant may borrow at most; None for no limit.

    Raises:
        InvalidOutlet: if a number is no whole one ≥ 0, or something is borrowed from nobody.
    """
    if not is_whole(gpus, 0) or not (borrow is None or is_whole(borrow, 0)):
        raise InvalidOutlet(f"quotas are whole numbers of GPUs, got {gpus!r} and {borrow!r} borrowed")
    if borrow is not None and not cohort:
        raise InvalidOutlet(f"{tenant} has no cohort to borrow {borrow} GPUs from: name one")
    if len(set(levels)) < len(levels) or HOSTNAME in levels:
        raise InvalidOutlet(f"levels are different node labels above {HOSTNAME}, which is added, got {list(levels)}")
    quota = {"name": GPU, "nominalQuota": gpus} | ({} if borrow is None else {"borrowingLimit": borrow})
    covered = {"coveredResources": [GPU], "flavors": [{"name": FLAVOR, "resources": [quota]}]}
    spec = {"resourceGroups": [covered], "queueingStrategy": "BestEffortFIFO",
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "preemption": {"reclaimWithinCohort": "Any", "withinClusterQueue": "LowerPriority"}}  # fmt: skip
    return [
        _object("Topology", TOPOLOGY, {"levels": [{"nodeLabel": label} for label in (*levels, HOSTNAME)]}),
        _object("ResourceFlavor", FLAVOR, {"topologyName": TOPOLOGY}),
        _object("ClusterQueue", tenant, spec | ({"cohortName": cohort} if cohort else {})),
        _object("LocalQueue", tenant, {"clusterQueue": tenant}, namespace),
    ]


def within(options: PodOptions, level: str, required: bool = True) -> PodOptions:
    """Pods that Kueue places within one group of a level, or tries to.

    Args:
        options: of the pods.
        level: a node label, one of the queue's levels.
        required: rather wait than run elsewhere.
    """
    key = f"kueue.x-k8s.io/podset-{'required' if required else 'preferred'}-topology"
    return replace(options, annotations={**options.annotations, key: level})


def _object(kind: str, name: str, spec: dict, namespace: str = "") -> dict:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}
