"""The same list of jobs for our schedulers and for those that people run: which jobs run at each event.

Called by `make bench ARGS="--only placement-peers"`. Ray's placement groups run on nodes that Ray simulates, in an
environment of its own; Slurm, where it is installed, on several slurmd of this machine. Nothing is measured with a
clock: a list's time stands still while a scheduler decides, and what is compared are sets of jobs.

Ray knows no durations, so ours has none either there; the rules by which it differs are put into ours one by one, until
the sets are the same: a later group overtakes a waiting one, a bundle takes the emptiest node, and of equally empty
nodes another one than ours would take. What no rule of ours tells is which of two groups that wait, and both fit now,
starts first: Ray tries each again after a pause that grows with its tries, so it is the one whose next try comes first,
and not the older one. Slurm's backfill keeps room for every job in line, ours for the first alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import psutil

from minilib.mechanisms.scheduling.placing import (
    FILTERS,
    BinPacking,
    Claim,
    Ledger,
    Node,
    Refusal,
    Spreading,
    place_all,
)
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from tools.bench.peers.environments import HERE, Unavailable, python_of
from tools.bench.peers.event_trace import ListedJob, Moment, Scheduler, trace
from tools.bench.peers.slurm_cluster import SlurmCluster
from tools.bench.still_process import last_line

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
SECONDS = 1200  # for all lists of Ray
QUIET = 5.0  # seconds without a change after which Slurm is taken to have decided; it looks for backfill each second

RAY_NODES = (8, 8, 4)  # GPUs
RAY_LISTS = {
    "one large waits": (
        ListedJob("eight-1", 0, 1, 8, 50), ListedJob("six", 1, 1, 6, 30), ListedJob("eight-2", 2, 1, 8, 40),
        ListedJob("two-1", 3, 1, 2, 60), ListedJob("two-2", 4, 1, 2, 45), ListedJob("four", 5, 1, 4, 20),
    ),
    "small ones first": (
        ListedJob("one", 0, 1, 1, 90), ListedJob("two", 1, 1, 2, 80), ListedJob("eight", 2, 1, 8, 30),
        ListedJob("three", 3, 1, 3, 60),
    ),
    "two alike wait": (
        ListedJob("full-1", 0, 1, 8, 50), ListedJob("full-2", 1, 1, 8, 70), ListedJob("first", 2, 1, 8, 30),
        ListedJob("second", 3, 1, 8, 30),
    ),
    "several workers": (
        ListedJob("pair-1", 0, 2, 4, 30), ListedJob("pair-2", 1, 2, 4, 50), ListedJob("three", 2, 3, 2, 25),
        ListedJob("four", 3, 4, 1, 30), ListedJob("pair-3", 4, 2, 8, 20),
    ),
}  # fmt: skip
HOSTS, WHOLE = 8, 8  # of Slurm, and GPUs of each
SLURM_LISTS = {
    "backfill": (
        ListedJob("A", 0, 6, WHOLE, 120), ListedJob("B", 5, 4, WHOLE, 60), ListedJob("C", 10, 2, WHOLE, 60),
        ListedJob("D", 15, 2, WHOLE, 300), ListedJob("E", 20, 1, WHOLE, 30),
    ),
    "second in line": (
        ListedJob("A", 0, 6, WHOLE, 120), ListedJob("B", 5, 4, WHOLE, 60), ListedJob("C", 10, 2, WHOLE, 60),
        ListedJob("all", 15, 8, WHOLE, 60), ListedJob("long", 20, 2, WHOLE, 300),
    ),
}  # fmt: skip


@dataclass
class PlacedClaims:
    """Ours without durations: workers are claims, all of a job's or none.

    Args:
        nodes: GPUs of each.
        score: which node is best.
        overtaking: a job may start while an earlier one waits.
        together: all workers on one node, or "apart", each on another; None for neither.
    """

    nodes: Sequence[int]
    score: BinPacking | Spreading
    overtaking: bool = False
    together: str | None = None
    line: list[ListedJob] = field(default_factory=list)
    held: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(Node(f"host{number}", {"gpu": gpus}) for number, gpus in enumerate(self.nodes))
        self.running: dict[str, list[str]] = {}

    def submit(self, job: ListedJob, now: float) -> None:
        """A job arrives."""
        self.line.append(job)

    def finish(self, name: str, now: float) -> None:
        """A job that ran has ended."""
        for claim in self.held.pop(name):
            self.ledger.release(claim)
        del self.running[name]

    def decide(self, now: float) -> dict[str, list[str]]:
        """Start what fits, in the order of the line."""
        for job in list(self.line):
            found = place_all(self._claims(job), self.ledger, [*FILTERS, *self._apart(job)], self.score)
            if not isinstance(found, Refusal):
                self.line.remove(job)
                self.held[job.name] = list(found)
                self.running[job.name] = list(found.values()) * (job.workers // len(found))
            elif not self.overtaking:
                break
        return dict(self.running)

    def _claims(self, job: ListedJob) -> list[Claim]:
        if self.together == "one node":
            return [Claim(job.name, {"gpu": job.workers * job.gpus})]
        return [Claim(f"{job.name}/{worker}", {"gpu": job.gpus}) for worker in range(job.workers)]

    def _apart(self, job: ListedJob) -> list[Callable]:
        def sibling(claim: Claim, node: Node, ledger: Ledger) -> list[str]:
            shares = any(other.name.startswith(f"{job.name}/") for other in ledger.claims_on(node.name))
            return ["another worker is there"] if shares else []

        return [sibling] if self.together == "apart" else []


class Gangs:
    """Ours with durations: the scheduler of gangs, first come, first served, with backfill."""

    def __init__(self, hosts: int = HOSTS, gpus: int = WHOLE) -> None:
        self.scheduler = GangScheduler(GpuCluster.regular(1, hosts, gpus))

    def submit(self, job: ListedJob, now: float) -> None:
        """A job arrives."""
        self.scheduler.submit(GangJob(job.name, job.workers * job.gpus, job.gpus, seconds=60 * job.minutes), 60 * now)

    def finish(self, name: str, now: float) -> None:
        """A job that ran has ended."""
        self.scheduler.finish(name, 60 * now)

    def decide(self, now: float) -> dict[str, list[str]]:
        """Start what can start."""
        self.scheduler.start(60 * now)
        cluster, running = self.scheduler.cluster, self.scheduler.running
        hosts = {
            name: [cluster.hosts[cluster.host_of(gpu)].name for gpu in placed.gpus] for name, placed in running.items()
        }
        return {name: list(dict.fromkeys(found)) for name, found in hosts.items()}


class SlurmJobs:
    """Slurm: a job sleeps until it is cancelled; before a decision, limits are set to the minutes that are left."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.numbers: dict[str, str] = {}
        self.minutes: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    def submit(self, job: ListedJob, now: float) -> None:
        """A job arrives."""
        found = self.cluster.run("sbatch", "--parsable", f"--job-name={job.name}", f"--nodes={job.workers}",
                                 "--exclusive", f"--ntasks-per-node={job.gpus}", f"--gpus-per-node={job.gpus}",
                                 "--output=/dev/null",
                                 f"--time={math.ceil(job.minutes)}", "--wrap=exec sleep 86400")  # fmt: skip
        self.numbers[job.name], self.minutes[job.name] = found.strip(), job.minutes

    def finish(self, name: str, now: float) -> None:
        """Cancel a job, and wait until its hosts are free."""
        self._limits(now)
        number = self.numbers.pop(name)
        del self.ends[name]
        self.cluster.run("scancel", "--full", number)

    def decide(self, now: float) -> dict[str, list[str]]:
        """Wait until nothing more starts."""
        self._limits(now)
        before, since = None, time.monotonic()
        while before is None or time.monotonic() - since < QUIET:
            running = self._running()
            if running != before:
                before, since = running, time.monotonic()
            time.sleep(0.2)
        self.ends |= {name: now + self.minutes[name] for name in before if name not in self.ends}
        return before

    def _running(self) -> dict[str, list[str]]:
        rows = self.cluster.run("squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%j %N").splitlines()
        named = dict(row.split() for row in rows if len(row.split()) == 2)
        return {name: self.cluster.run("scontrol", "show", "hostnames", hosts).split()
                for name, hosts in named.items() if name in self.numbers}  # fmt: skip

    def _limits(self, now: float) -> None:
        for name, end in self.ends.items():
            left = max(1, math.ceil(end - now))
            self.cluster.run("scontrol", "update", f"jobid={self.numbers[name]}", f"TimeLimit={left}")


def differences(ours: Sequence[Moment], theirs: Sequence[Moment]) -> list[dict]:
    """Instants at which not the same jobs run, and those of each side that the other has not."""
    found = []
    for now in sorted({moment.now for moment in (*ours, *theirs)}):
        one, other = (
            max((m for m in side if m.now <= now), key=lambda m: m.now, default=None) for side in (ours, theirs)
        )
        a, b = (set(moment.running) if moment else set() for moment in (one, other))
        if a != b:
            found.append({"now": now, "ours_alone": sorted(a - b), "theirs_alone": sorted(b - a)})
    return found


def ours_for(strategy: str, nodes: Sequence[int] = RAY_NODES) -> dict[str, Scheduler]:
    """Our schedulers beside a strategy of Ray: first as we would, then with Ray's rules, one more each time."""
    together = {"STRICT_PACK": "one node", "STRICT_SPREAD": "apart"}.get(strategy)
    usual = Spreading("gpu") if "SPREAD" in strategy else BinPacking("gpu")
    return {
        "in order": PlacedClaims(nodes, usual, together=together),
        "overtaking": PlacedClaims(nodes, usual, True, together),
        "overtaking, emptiest node": PlacedClaims(nodes, Spreading("gpu"), True, together),
        "overtaking, emptiest node, other ties": PlacedClaims(nodes[::-1], Spreading("gpu"), True, together),
    }


def ray_traces(python: str, lists: dict[str, Sequence[ListedJob]], strategies: Sequence[str], said: bool) -> dict:
    """What Ray does; see ray_groups.py.

    Raises:
        Unavailable: if Ray does not start or ends with an error.
    """
    asked = {"nodes": RAY_NODES, "strategies": strategies, "said": said,
             "jobs": {name: list(map(asdict, jobs)) for name, jobs in lists.items()}}  # fmt: skip
    process = psutil.Popen([python, str(HERE / "ray_groups.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    try:
        out, noise = process.communicate(json.dumps(asked), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for child in (*process.children(recursive=True), process):
            child.kill()
        process.communicate()
        raise Unavailable(f"no answer within {SECONDS} s") from None
    if process.returncode:
        raise Unavailable(last_line(noise))
    found = json.loads(out.splitlines()[-1])
    for traces in found["traces"].values():
        traces |= {strategy: [Moment(**moment) for moment in moments] for strategy, moments in traces.items()}
    return found


def placement_peers() -> dict:
    """The figures of chapter 20 about other schedulers, JSON values.

    Returns:
        "ray" and "slurm": version, what was seen, and "rows": for each list and scheduler of ours how many instants
        there are, and where not the same jobs run; "failed": reasons by name.
    """
    found: dict = {"failed": {}}
    for name, compared in (("ray", _beside_ray), ("slurm", _beside_slurm)):
        try:
            found[name] = compared()
        except Unavailable as reason:
            found["failed"][name] = str(reason)
    return found


def lines(found: dict) -> Iterator[str]:
    """What was found, for people."""
    for peer in ("ray", "slurm"):
        for row in found.get(peer, {}).get("rows", []):
            first = f", first {row['differences'][0]}" if row["differences"] else ""
            yield (f"{peer} {row['theirs']}, {row['list']}, ours {row['ours']}: {len(row['differences'])} of "
                   f"{row['instants']} instants differ{first}")  # fmt: skip
    for what, happened in found.get("ray", {}).get("said", {}).items():
        yield f"ray, {what}: {happened}"
    for name, reason in found["failed"].items():
        yield f"{name}: {reason}"


def _beside_ray() -> dict:
    theirs = ray_traces(str(python_of("ray")), RAY_LISTS, STRATEGIES, said=True)
    rows = [
        _row(name, strategy, rule, trace(ours, RAY_LISTS[name]), theirs["traces"][name][strategy])
        for name in RAY_LISTS for strategy in STRATEGIES for rule, ours in ours_for(strategy).items()
    ]  # fmt: skip
    return {"version": theirs["version"], "nodes": RAY_NODES, "said": theirs["said"], "rows": rows}


def _beside_slurm() -> dict:
    rows = []
    for name, jobs in SLURM_LISTS.items():
        with SlurmCluster(HOSTS, WHOLE) as cluster:
            version = cluster.run("sbatch", "--version").strip()
            theirs = trace(SlurmJobs(cluster), jobs)
        rows.append(_row(name, "backfill", "gangs", trace(Gangs(), jobs), theirs))
    return {"version": version, "hosts": HOSTS, "rows": rows}


def _row(name: str, theirs_name: str, ours_name: str, ours: list[Moment], theirs: list[Moment]) -> dict:
    instants = len({moment.now for moment in (*ours, *theirs)})
    return {"list": name, "theirs": theirs_name, "ours": ours_name, "instants": instants,
            "differences": differences(ours, theirs), "trace": [asdict(moment) for moment in theirs]}  # fmt: skip
