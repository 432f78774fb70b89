"""Replicas of inference that span several hosts: a LeaderWorkerSet, and the DRA template of a pod's GPUs.

Each replica is a gang of its own: a lost pod starts its replica again, not the others.

Source: LeaderWorkerSet 0.10 (leaderworkerset.x-k8s.io/v1); resource.k8s.io/v1, stable from Kubernetes 1.34 on.
"""

from __future__ import annotations

from collections.abc import Sequence

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.outlets.hosted_job import InvalidOutlet
from minilib.operations.placement.outlets.kubernetes.pods import PORT, PodOptions, pod_template


def leader_worker_set(
    name: str,
    command: Sequence[str],
    replicas: int,
    hosts_per_replica: int,
    gpus_per_host: int,
    options: PodOptions,
    domain: str = "",
) -> dict:
    """Replicas of some hosts each.

    Args:
        name: of the set.
        command: words of what each rank runs.
        replicas: how many.
        hosts_per_replica: pods of a replica; the first one leads.
        gpus_per_host: of each pod.
        options: what else pods have.
        domain: a node label whose value a replica's pods share and no other replica has, such as that of an NVLink
            domain; none if empty.

    Raises:
        InvalidOutlet: if a number is no whole one.
    """
    counts = {
        "replicas": (replicas, 0),
        "hosts_per_replica": (hosts_per_replica, 1),
        "gpus_per_host": (gpus_per_host, 1),
    }
    for what, (count, least) in counts.items():
        if not is_whole(count, least):
            raise InvalidOutlet(f"{what} is a whole number ≥ {least}, got {count!r}")
    launcher = ["torchrun", f"--nnodes={hosts_per_replica}", f"--nproc-per-node={gpus_per_host}",
                "--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)", f"--master-port={PORT}",
                "--no-python"]  # fmt: skip
    template = pod_template([*launcher, *command], gpus_per_host, options)
    template["spec"]["restartPolicy"] = "Always"  # what a StatefulSet's pods have
    exclusive = {"annotations": {"leaderworkerset.sigs.k8s.io/exclusive-topology": domain}} if domain else {}
    group = {"size": hosts_per_replica, "restartPolicy": "RecreateGroupOnPodRestart", "workerTemplate": template}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, **exclusive},
        "spec": {"replicas": replicas, "leaderWorkerTemplate": group},
    }


def gpu_claim_template(name: str, gpus: int, device_class: str = "gpu.nvidia.com", same: str = "") -> dict:
    """A ResourceClaimTemplate: each pod that names it gets a claim of its own.

    Args:
        name: of the template.
        gpus: of a pod, all or none.
        device_class: of the driver.
        same: an attribute that the GPUs of a pod share, such as "resource.kubernetes.io/pcieRoot"; none if empty.

    Raises:
        InvalidOutlet: if `gpus` is no whole number ≥ 1.
    """
    if not is_whole(gpus, 1):
        raise InvalidOutlet(f"a claim is for a whole number of devices ≥ 1, got {gpus!r}: a slice of a GPU is a "
                            "device, of another class or chosen by a selector")  # fmt: skip
    exactly = {"deviceClassName": device_class, "allocationMode": "ExactCount", "count": gpus}
    devices: dict = {"requests": [{"name": "gpus", "exactly": exactly}]}
    if same:
        devices["constraints"] = [{"requests": ["gpus"], "matchAttribute": same}]
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaimTemplate", "metadata": {"name": name},
            "spec": {"spec": {"devices": devices}}}  # fmt: skip
