"""A gang as a Job or a JobSet.

    indexed_job   one Job, completionMode Indexed, with a Service for its pods' names; Kubernetes chooses hosts
    job_set       the same as a JobSet (jobset.x-k8s.io): one fails, all start again; Kubernetes chooses hosts
    pinned_set    a JobSet with a Job for each worker, each on the host of the placement; rank order is theirs

None of them is a gang for the scheduler: pods are bound one by one, and two Jobs may hold half of what each needs.
`gangs.py` and `queues.py` add what makes them all or nothing.

Source: JobSet 0.12 (api/jobset/v1alpha2), Kubernetes batch/v1.
"""

from __future__ import annotations

from dataclasses import replace

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet
from minilib.operations.placement.outlets.kubernetes.pods import PodOptions, gang_member

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
WORKERS = "workers"  # the one replicated job of a set whose hosts Kubernetes chooses


def indexed_job(job: HostedJob, options: PodOptions) -> list[dict]:
    """A Job whose pod w is worker w, and the Service by which pods find each other.

    A worker that fails ends the Job: a new pod would be one rank among others that are gone.
    """
    fields = {**options.fields, "subdomain": job.name}
    template = gang_member(job, replace(options, fields=fields), f"{job.name}-0.{job.name}", INDEX)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True,
                 "selector": {"batch.kubernetes.io/job-name": job.name}},
    }  # fmt: skip
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job.name},
                      "spec": _indexed(len(job.hosts), template)}]  # fmt: skip


def job_set(job: HostedJob, options: PodOptions, max_restarts: int = 3, queue: str = "") -> dict:
    """A JobSet whose hosts Kubernetes chooses.

    Args:
        job: its workers; their hosts are not told.
        options: what pods have.
        max_restarts: how often the whole set starts again after a failure.
        queue: a LocalQueue of Kueue that the set waits in; none if empty.
    """
    template = gang_member(job, options, f"{job.name}-{WORKERS}-0-0.{job.name}", INDEX)
    replicated = {"name": WORKERS, "replicas": 1, "template": {"spec": _indexed(len(job.hosts), template)}}
    return _set(job, [replicated], max_restarts, {"kueue.x-k8s.io/queue-name": queue} if queue else {})


def pinned_set(job: HostedJob, options: PodOptions, max_restarts: int = 3) -> dict:
    """A JobSet whose worker w runs on the host of the placement.

    A lost host needs another set: the replicated jobs of a set do not change.
    """
    replicated = []
    for number, host in enumerate(job.hosts):
        template = gang_member(job, options, f"{job.name}-w0-0-0.{job.name}", str(number), host)
        replicated.append({"name": f"w{number}", "replicas": 1, "template": {"spec": _indexed(1, template)}})
    return _set(job, replicated, max_restarts, {})


def _set(job: HostedJob, replicated: list[dict], max_restarts: int, labels: dict[str, str]) -> dict:
    if not is_whole(max_restarts, 0):
        raise InvalidOutlet(f"max_restarts is a whole number ≥ 0, got {max_restarts!r}")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name} | ({"labels": labels} if labels else {}),
        "spec": {
            "replicatedJobs": replicated,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": max_restarts},
            "successPolicy": {"operator": "All"},
        },
    }


def _indexed(pods: int, template: dict) -> dict:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimit": 0,
            "template": template}  # fmt: skip
