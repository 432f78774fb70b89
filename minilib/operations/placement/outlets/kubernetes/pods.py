"""The pod of a worker: one container with the worker's GPUs, in which torchrun starts a rank on each.

GPUs are counted (`nvidia.com/gpu`, the extended resource of a device plugin) or claimed (DRA, whose core is stable from
Kubernetes 1.34 on, see `replicas.py`). Which GPU of a host a worker gets is the device plugin's or the driver's choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet

GPU = "nvidia.com/gpu"
HOSTNAME = "kubernetes.io/hostname"
PORT = 29500  # torchrun's own


@dataclass(frozen=True)
class PodOptions:
    """What pods have beside ranks.

    Args:
        image: of the container.
        claim_template: a ResourceClaimTemplate that gives a pod its GPUs; counted GPUs if empty.
        labels, annotations: of the pod.
        fields: of the pod's specification beside those made here, such as schedulerName or schedulingGroup.

    Raises:
        InvalidOutlet: without an image.
    """

    image: str
    claim_template: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.image:
            raise InvalidOutlet("a container has an image, got none")


def gang_member(job: HostedJob, options: PodOptions, master: str, node_rank: str, host: str = "") -> dict:
    """The template of a worker's pod.

    Args:
        job: whose worker.
        options: what else it has.
        master: DNS name of the pod of rank 0.
        node_rank: the worker's number, or the path of the pod's field that holds it, such as
            "metadata.annotations['…']".
        host: the node that it must run on; the scheduler's choice if empty.
    """
    number = {"value": node_rank} if node_rank.isdigit() else {"valueFrom": {"fieldRef": {"fieldPath": node_rank}}}
    launcher = ["torchrun", f"--nnodes={len(job.hosts)}", f"--nproc-per-node={job.gpus_per_worker}",
                "--node-rank=$(NODE_RANK)", f"--master-addr={master}", f"--master-port={PORT}",
                "--no-python"]  # fmt: skip
    environment = [{"name": "NODE_RANK", **number}]
    return pod_template([*launcher, *job.command], job.gpus_per_worker, options, environment, host)


def pod_template(
    command: Iterable[str], gpus: int, options: PodOptions, environment: Iterable[Mapping] = (), host: str = ""
) -> dict:
    """A pod with one container.

    Args:
        command: its words; $(NAME) stands for a variable of the environment.
        gpus: of the container.
        options: what else it has.
        environment: its variables.
        host: the node that it must run on; the scheduler's choice if empty. A selector, and not nodeName, which would
            go round the scheduler: taints and what others have already taken still count.
    """
    resources: dict = {"limits": {GPU: gpus}}
    claims: dict = {}
    if options.claim_template:
        resources = {"claims": [{"name": "gpus"}]}
        claims = {"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": options.claim_template}]}
    container = {"name": "ranks", "image": options.image, "command": list(command), "env": list(environment),
                 "resources": resources}  # fmt: skip
    named = {"nodeSelector": {HOSTNAME: host}} if host else {}
    described = {"labels": dict(options.labels), "annotations": dict(options.annotations)}
    return {
        "metadata": {key: value for key, value in described.items() if value},
        "spec": {"restartPolicy": "Never", "containers": [container], **claims, **named, **options.fields},
    }


def manifest_text(objects: Iterable[Mapping]) -> str:
    """Objects as `kubectl apply -f` reads them: YAML documents in JSON, which is YAML, too."""
    return "".join(f"---\n{json.dumps(each, indent=2)}\n" for each in objects)
