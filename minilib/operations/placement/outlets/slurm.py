"""A placement as a batch script for Slurm.

Two scripts say two different things. Pinned, it names the hosts, and Slurm starts the job as soon as these are free;
rank r runs on the host that the placement says. Free, Slurm chooses hosts: `switches` (topology/tree) or `segment`
(topology/block) says how close they must be, and Slurm orders the ranks.

What Slurm does that is easily overlooked:
* a node list is a set: sbatch sorts --nodelist, and SLURM_JOB_NODELIST does not tell the order that was asked for.
  srun alone keeps an order, with --distribution=arbitrary and a file that names a host for each rank;
* SLURM_NODEID counts hosts in Slurm's order, so the number of a rank's host is worked out here;
* --requeue starts the job again after a lost node or a preemption, not after its time is over; a pinned job then waits
  until the lost host is back, so a replacement needs a new script;
* --signal without "B:" reaches the ranks and not the script.

Source: sbatch(1), srun(1), topology.conf(5) of Slurm 22.05 to 26.05; topology/block is there from 23.11 on, --segment
from 24.05 on.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet, ScatteredRanks

# What torchrun would tell each rank.
RANK = ('export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={size} '
        'GROUP_RANK=$((SLURM_PROCID / {size})); exec "$@"')  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What a script asks for beside hosts.

    Args:
        seconds: after which Slurm ends the job.
        checkpoint_seconds: how long before that the ranks get SIGUSR1, to write a last checkpoint; 0 for no signal.
        requeue: start again after a lost node or a preemption.
        pinned: run on the hosts of the placement, in its order; else Slurm chooses.
        switches: most leaf switches that hosts chosen by Slurm may lie below.
        segment: hosts that Slurm must choose within one block; divides the number of hosts.
        partition: of the cluster; the default one if empty.

    Raises:
        InvalidOutlet: if a number is out of range, or hosts are named and chosen at once.
    """

    seconds: float
    checkpoint_seconds: int = 0
    requeue: bool = True
    pinned: bool = True
    switches: int | None = None
    segment: int | None = None
    partition: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise InvalidOutlet(f"seconds is a finite number > 0, got {self.seconds!r}")
        if not is_whole(self.checkpoint_seconds, 0) or self.checkpoint_seconds >= min(self.seconds, 65536):
            raise InvalidOutlet(f"checkpoint_seconds is whole and less than the job's {self.seconds:g} s and than "
                                f"65,536, got {self.checkpoint_seconds!r}")  # fmt: skip
        for name in ("switches", "segment"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise InvalidOutlet(f"{name} is a whole number ≥ 1 or None, got {value!r}")
            if value is not None and self.pinned:
                raise InvalidOutlet(f"{name} asks Slurm to choose hosts, and a pinned job names them: pinned=False")
        if self.partition and not self.partition.replace("_", "").replace("-", "").isalnum():
            raise InvalidOutlet(f"a partition's name has letters, digits, - and _, got {self.partition!r}")


def batch_script(job: HostedJob, options: SlurmOptions) -> str:
    """The text for sbatch.

    Args:
        job: workers on hosts; each host's workers stand in a row, and each host has as many.
        options: what else to ask for.

    Raises:
        ScatteredRanks: if a host's workers do not stand in a row, or hosts have different numbers of ranks.
        InvalidOutlet: if segments do not divide the hosts.
    """
    hosts, size = _hosts(job)
    lines = ["#!/bin/bash"] + [f"#SBATCH --{line}" for line in _directives(job.name, hosts, size, options)]
    lines += ["set -euo pipefail", ""]
    if options.pinned:
        ranks = "\n".join(host for host in hosts for _ in range(size))
        lines += ["# one line for each rank: srun's node lists are sets, this file is an order",
                  "SLURM_HOSTFILE=$(mktemp)",
                  "trap 'rm -f \"$SLURM_HOSTFILE\"' EXIT", f"cat > \"$SLURM_HOSTFILE\" <<'END'\n{ranks}\nEND",
                  "export SLURM_HOSTFILE", f"export MASTER_ADDR={hosts[0]}"]  # fmt: skip
    else:
        lines.append('export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
    order = "arbitrary" if options.pinned else "block"
    rank = shlex.quote(RANK.format(size=size))
    lines += ["export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))", "",
              f"srun --ntasks={job.ranks} --distribution={order} --kill-on-bad-exit=1 \\",
              f"    bash -c {rank} rank \\", f"    {shlex.join(job.command)}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _hosts(job: HostedJob) -> tuple[list[str], int]:
    """Different hosts in rank order, and the ranks of each."""
    hosts = list(dict.fromkeys(job.hosts))
    each = len(job.hosts) // len(hosts)
    if list(job.hosts) != [host for host in hosts for _ in range(each)]:
        raise ScatteredRanks(f"Slurm gives a job as many GPUs on each of its nodes, and counts LOCAL_RANK along a "
                             f"node's ranks: {job.name} has workers on {', '.join(job.hosts)}; place as many on each "
                             "host, in a row")  # fmt: skip
    return hosts, each * job.gpus_per_worker


def _directives(name: str, hosts: list[str], size: int, options: SlurmOptions) -> list[str]:
    if options.segment and len(hosts) % options.segment:
        raise InvalidOutlet(f"segments of {options.segment} do not divide {len(hosts)} hosts")
    asked = [f"job-name={name}", f"nodes={len(hosts)}", f"ntasks-per-node={size}", f"gpus-per-node={size}",
             f"time={math.ceil(options.seconds / 60)}", "requeue" if options.requeue else "no-requeue",
             "open-mode=append", f"output={name}-%j.log"]  # fmt: skip
    if options.pinned:
        asked.append(f"nodelist={','.join(hosts)}")
    if options.switches:
        asked.append(f"switches={options.switches}")
    if options.segment:
        asked.append(f"segment={options.segment}")
    if options.checkpoint_seconds:
        asked.append(f"signal=USR1@{options.checkpoint_seconds}")
    if options.partition:
        asked.append(f"partition={options.partition}")
    return asked
