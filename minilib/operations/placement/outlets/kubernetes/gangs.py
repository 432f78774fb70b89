"""All or nothing: how a group of pods tells Kubernetes' scheduler, or Volcano's, that it starts together.

The native API changed twice: 1.35 had Workload v1alpha1, named by a pod's `workloadRef`; 1.36 replaced that by PodGroup
v1alpha2, named by `schedulingGroup.podGroupName`; in 1.37 PodGroup is beta. A manifest for one release is refused by
the next, so the release is an argument.

minCount and minMember hold while pods are scheduled, not after: a gang that loses a pod later runs on with n − 1 until
its Job ends it. So the Jobs here end with their first failed pod, and a JobSet starts again as a whole.

Source: KEP-4671 and the schemas of Kubernetes 1.35, 1.36, 1.37; scheduling.volcano.sh/v1beta1.
"""

from __future__ import annotations

from dataclasses import replace

from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet
from minilib.operations.placement.outlets.kubernetes.pods import GPU, PodOptions

VERSIONS = {"1.36": "v1alpha2", "1.37": "v1beta1"}


def native_gang(job: HostedJob, options: PodOptions, release: str, within: str = "") -> tuple[dict, PodOptions]:
    """A PodGroup, and the options that put pods into it.

    Args:
        job: its workers.
        options: of their pods.
        release: of Kubernetes, one of VERSIONS.
        within: a node label whose value all pods must share, such as that of an NVLink domain.

    Raises:
        InvalidOutlet: for a release without this API.
    """
    if release not in VERSIONS:
        raise InvalidOutlet(f"PodGroup is there in Kubernetes {', '.join(VERSIONS)}, got {release!r}: "
                            "use volcano_gang or a queue of Kueue")  # fmt: skip
    spec: dict = {"schedulingPolicy": {"gang": {"minCount": len(job.hosts)}}}
    if within:
        spec["schedulingConstraints"] = {"topology": [{"key": within}]}
    group = {"apiVersion": f"scheduling.k8s.io/{VERSIONS[release]}", "kind": "PodGroup",
             "metadata": {"name": job.name}, "spec": spec}  # fmt: skip
    return group, replace(options, fields={**options.fields, "schedulingGroup": {"podGroupName": job.name}})


def volcano_gang(job: HostedJob, options: PodOptions, queue: str = "default") -> tuple[dict, PodOptions]:
    """A PodGroup of Volcano, and the options that put pods into it.

    Args:
        job: its workers.
        options: of their pods.
        queue: of Volcano.
    """
    group = {
        "apiVersion": "scheduling.volcano.sh/v1beta1",
        "kind": "PodGroup",
        "metadata": {"name": job.name},
        "spec": {"minMember": len(job.hosts), "queue": queue, "minResources": {GPU: job.ranks}},
    }
    annotations = {**options.annotations, "scheduling.k8s.io/group-name": job.name}
    return group, replace(options, annotations=annotations, fields={**options.fields, "schedulerName": "volcano"})
