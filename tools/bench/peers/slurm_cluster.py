"""A Slurm of several hosts on this machine: one slurmctld and a slurmd for each host, in a folder that goes with them.

Hosts have as many CPUs and GPUs as they are told to have; nothing is measured on them. It needs slurmctld, slurmd and
munged (Debian: slurm-wlm and munge), built for several slurmd on one machine, as Debian's is, and root, which starts
jobs as others; nothing is installed, and no service of the system is used.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from tools.bench.peers.environments import Unavailable

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
STARTING = 60.0  # seconds
FIXED = """ClusterName=peers
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_window=10080,bf_resolution=60,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no such cluster here; empty if there can."""
    absent = [program for program in PROGRAMS if _program(program) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root, and this user is another"


class SlurmCluster:
    """A context manager that leaves no process behind.

    Args:
        hosts: host0, host1, …
        gpus: of each, and as many CPUs.

    Raises:
        Unavailable: if Slurm is not here, or does not start.
    """

    def __init__(self, hosts: int, gpus: int) -> None:
        if reason := missing():
            raise Unavailable(reason)
        self.names = [f"host{number}" for number in range(hosts)]
        self._daemons: list[subprocess.Popen] = []
        self._place = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        self.folder = Path(self._place.name)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure(gpus)
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints.

        Raises:
            Unavailable: if it fails; the message is Slurm's.
        """
        ended = subprocess.run(
            [_program(command[0]) or command[0], *command[1:]],
            capture_output=True, text=True, env=self.environment, cwd=self.folder, timeout=STARTING,
        )  # fmt: skip
        if ended.returncode:
            raise Unavailable(ended.stderr.strip() or f"{command[0]} ended with {ended.returncode}")
        return ended.stdout

    def close(self) -> None:
        """End all jobs and daemons."""
        if len(self._daemons) > 1:
            with suppress(Unavailable, subprocess.TimeoutExpired):
                self.run("scancel", "--signal=KILL", "--full", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._place.cleanup()

    def _configure(self, gpus: int) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        for name in ("state", *(f"spool/{name}" for name in self.names)):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        controller, *ports = _free_ports(1 + len(self.names))
        lines = [FIXED, f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={controller}",
                 f"AuthInfo=socket={folder}/munge.sock", f"StateSaveLocation={folder}/state",
                 f"SlurmdSpoolDir={folder}/spool/%n", f"SlurmctldPidFile={folder}/slurmctld.pid",
                 f"SlurmdPidFile={folder}/%n.pid"]  # fmt: skip
        lines += [f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={gpus} RealMemory=1000 "
                  f"Gres=gpu:{gpus} State=UNKNOWN" for name, port in zip(self.names, ports, strict=True)]  # fmt: skip
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        files = [folder / f"gpu{number}" for number in range(gpus)]
        for file in files:
            file.touch()  # Slurm complains that it is no device, and counts it
        gres = [f"NodeName={name} Name=gpu File={file}" for name in self.names for file in files]
        (folder / "gres.conf").write_text("\n".join(gres) + "\n")

    def _start(self) -> None:
        at = self.folder
        self._daemon("munged", "--foreground", "--force", f"--key-file={at}/munge.key", f"--socket={at}/munge.sock",
                     f"--pid-file={at}/munge.pid", f"--log-file={at}/munge.log",
                     f"--seed-file={at}/munge.seed")  # fmt: skip
        self._until(lambda: (at / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", str(at / "slurm.conf"))
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name, "-f", str(at / "slurm.conf"))
        self._until(self._idle, "Slurm")

    def _daemon(self, program: str, *options: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{program}.log").open("w") as log:
            self._daemons.append(subprocess.Popen(
                [_program(program), *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ))  # fmt: skip

    def _idle(self) -> bool:
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * len(self.names)
        except Unavailable:
            return False

    def _until(self, condition: object, what: str) -> None:
        deadline = time.monotonic() + STARTING
        while not condition():
            if ended := [daemon for daemon in self._daemons if daemon.poll() is not None]:
                raise Unavailable(f"{Path(ended[0].args[0]).name} ended with {ended[0].returncode}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{what} was not ready within {STARTING:g} s")
            time.sleep(0.2)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
