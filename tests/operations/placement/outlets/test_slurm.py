"""Batch scripts: what they ask for, what the shell makes of them, and what a Slurm that is installed does with them."""

import subprocess

import pytest

from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet, ScatteredRanks
from minilib.operations.placement.outlets.slurm import SlurmOptions, batch_script

JOB = HostedJob("gpt", ("python", "train.py", "a b", "$HOME"), ("h3", "h1", "h2"), 2)
# Instead of srun: run what it would run, once for each line of the host file, as srun --distribution=arbitrary does.
SRUN = """
srun() {
    while [[ $1 == --* ]]; do shift; done
    mapfile -t hosts < "$SLURM_HOSTFILE"
    for rank in "${!hosts[@]}"; do
        SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_NTASKS=${#hosts[@]} SLURMD_NODENAME=${hosts[$rank]} "$@"
    done
}
"""


def directives(text):
    """{name: value} of the lines that sbatch reads: those before the first command."""
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch would not read it"
    found = [line.removeprefix("#SBATCH --").partition("=") for line in lines[1:first]]
    assert len({name for name, _, _ in found}) == len(found)
    return {name: value for name, _, value in found}


def run_with(srun, text, **variables):
    script = text.replace("set -euo pipefail\n", "set -euo pipefail\n" + srun, 1)
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "123", **variables}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=60
    )


def test_what_is_asked_for():
    text = batch_script(JOB, SlurmOptions(3601, checkpoint_seconds=300, partition="gpu_long"))
    assert directives(text) == {
        "job-name": "gpt", "nodes": "3", "ntasks-per-node": "2", "gpus-per-node": "2", "time": "61", "requeue": "",
        "open-mode": "append", "output": "gpt-%j.log", "nodelist": "h3,h1,h2", "signal": "USR1@300",
        "partition": "gpu_long",
    }  # fmt: skip
    assert "no-requeue" in directives(batch_script(JOB, SlurmOptions(60, requeue=False)))


def test_ranks_follow_the_placement_and_not_the_alphabet():
    show = (
        'echo "$RANK $LOCAL_RANK $GROUP_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $SLURMD_NODENAME $MASTER_ADDR $MASTER_PORT"'
    )
    job = HostedJob("gpt", ("bash", "-c", show), ("h3", "h1", "h2"), 2)
    said = run_with(SRUN, batch_script(job, SlurmOptions(60))).stdout.splitlines()
    hosts = ["h3", "h3", "h1", "h1", "h2", "h2"]
    assert said == [f"{r} {r % 2} {r // 2} 6 2 {host} h3 20123" for r, host in enumerate(hosts)]


def test_words_of_the_command_arrive_as_they_are():
    words = ("a b", "$HOME", "it's", 'say "x"', "*", "\\n")
    job = HostedJob("gpt", ("printf", "%s|", *words), ("h1",), 1)
    assert run_with(SRUN, batch_script(job, SlurmOptions(60))).stdout == "|".join(words) + "|"


def test_the_host_file_is_removed(tmp_path):
    run_with(SRUN, batch_script(HostedJob("gpt", ("true",), ("h1",), 1), SlurmOptions(60)), TMPDIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_free_job_names_no_host():
    text = batch_script(JOB, SlurmOptions(60, pinned=False, switches=1))
    assert directives(text)["switches"] == "1" and "nodelist" not in directives(text)
    assert "HOSTFILE" not in text and not any(host in text.split() for host in JOB.hosts)
    assert "--distribution=block" in text and "scontrol show hostnames" in text
    assert directives(batch_script(JOB, SlurmOptions(60, pinned=False, segment=3)))["segment"] == "3"


def test_workers_that_share_a_host_are_one_node():
    asked = directives(batch_script(HostedJob("a", ("x",), ("h1", "h1", "h2", "h2"), 2), SlurmOptions(60)))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["nodelist"]) == ("2", "4", "h1,h2")


@pytest.mark.parametrize("hosts", [("h1", "h1", "h2"), ("h1", "h2", "h1", "h2")], ids=["uneven", "not in a row"])
def test_what_slurm_cannot_say(hosts):
    with pytest.raises(ScatteredRanks, match="in a row"):
        batch_script(HostedJob("a", ("x",), hosts, 2), SlurmOptions(60))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seconds": 0}, "seconds is a finite number > 0"),
        ({"seconds": float("inf")}, "finite"),
        ({"seconds": float("nan")}, "finite"),
        ({"seconds": 60, "checkpoint_seconds": 60}, "less than the job's 60 s"),
        ({"seconds": 1e6, "checkpoint_seconds": 65536}, "65,536"),
        ({"seconds": 60, "checkpoint_seconds": 1.5}, "whole"),
        ({"seconds": 60, "switches": 1}, "pinned=False"),
        ({"seconds": 60, "segment": 0, "pinned": False}, "segment is a whole number"),
        ({"seconds": 60, "partition": "a b"}, "partition"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidOutlet, match=message):
        SlurmOptions(**options)


def test_segments_divide_the_hosts():
    with pytest.raises(InvalidOutlet, match="segments of 2 do not divide 3 hosts"):
        batch_script(JOB, SlurmOptions(60, pinned=False, segment=2))
