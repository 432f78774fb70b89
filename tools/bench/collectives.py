"""Measure collectives: α and β of both transports, all-reduce by every plan beside gloo's own, and what was predicted.

Called by `make bench`. Ratios come from calls taken in turns on the same ranks; the slowest rank's time counts.
Open MPI's all-reduce stands beside them where the extra "mpi" of pyproject.toml is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from minilib.mechanisms.replication import Plan, plans, seconds
from minilib.numbers.machine import Link
from minilib.numbers.measure import quartiles
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import Message
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.turns import seconds_in_turns

WORLD_SIZES = (2, 4)
SIZES = tuple(2**k for k in (12, 16, 20, 22, 24, 26))  # bytes of the tensor
MESSAGES = tuple(2**k for k in (2, 12, 16, 20, 24, 26))  # bytes of a message by which a link is measured
TURNS = 5
KINDS = {  # which transport, and whether the tensor lies in memory that all ranks map
    "group": (GroupTransport, False),
    "shared": (SharedMemoryTransport, False),
    "shared, mapped": (SharedMemoryTransport, True),
}


def collectives(sizes: Sequence[int] = SIZES, messages: Sequence[int] = MESSAGES, budget: float = 4.0) -> dict:
    """The figures of chapter 04, JSON values in SI units.

    Args:
        sizes: bytes of the tensors that are reduced.
        messages: bytes of the messages by which α and β are measured.
        budget: seconds for all plans at one size and number of ranks, which get TURNS turns at least.
    """
    links, rows, gloo = [], [], []
    with tqdm(total=len(WORLD_SIZES) * (len(KINDS) + len(sizes)), desc="collectives", leave=False) as bar:
        for world_size in WORLD_SIZES:
            for kind in KINDS:
                found = launch.run(_messages, world_size, kind, messages, timeout=300)[0]
                links.append({"kind": kind, "world_size": world_size, **_link(world_size, messages, found)})
                bar.update()
            for nbytes in sizes:
                turns = launch.run(_all_reduces, world_size, nbytes, budget, timeout=600)[0]
                peer = turns.pop("gloo")
                gloo.append(_row(world_size, nbytes, peer))
                rows += [{"kind": kind, "plan": plan, **_row(world_size, nbytes, own), **_beside(peer, own)}
                         for (kind, plan), own in turns.items()]  # fmt: skip
                bar.update()
    known = {(link["kind"], link["world_size"]): link for link in links}
    for row in rows:
        row["predicted"] = _predicted(row, known[row["kind"], row["world_size"]])
    return {"links": links, "gloo": gloo, "all_reduce": rows, "open_mpi": open_mpi(sizes)}


def all_reduce_plans(world_size: int) -> dict[str, Plan]:
    """The plans that are compared, by name; the chain in 8 chunks, two levels of two ranks a host."""
    what = "all_reduce"
    return {
        "star": plans.star(what, world_size),
        "chain": plans.chain(what, world_size, num_chunks=8),
        "tree": plans.tree(what, world_size),
        "ring": plans.ring(what, world_size),
        "halving-doubling": plans.halving_doubling(world_size),
        "two-level": plans.two_level([rank // 2 for rank in range(world_size)]),
    }


def open_mpi(sizes: Sequence[int]) -> list[dict]:
    """Open MPI's all-reduce of the same tensors, between processes of its own; nothing where it is not installed."""
    mpirun = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpirun is None:
        return []
    rows = []
    for world_size in WORLD_SIZES:
        script = [sys.executable, str(Path(__file__).with_name("mpi_all_reduce.py"))]
        script += [f"{nbytes}:{_calls(nbytes)}" for nbytes in sizes]
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # both, or it refuses
        command = [mpirun, "-n", str(world_size), "--oversubscribe", *script]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **allowed})
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
        found = json.loads(ended.stdout)
        rows += [{"version": found["version"], **_row(world_size, int(nbytes), times)}
                 for nbytes, times in found["seconds"].items()]  # fmt: skip
    return rows


# On ranks


def _messages(kind: str, messages: Sequence[int]) -> list[list[float]]:
    """For each size, seconds of a message between two ranks, taken over or added, and of a round of all at once."""
    make, mapped = KINDS[kind]
    transport = make()
    me, n = transport.rank, transport.world_size
    source = transport.empty(max(messages) // 4).zero_() if mapped else torch.zeros(max(messages) // 4)
    target = torch.zeros_like(source)

    def there_and_back(numel: int, combine: Callable | None) -> None:
        for sender in (0, 1) if me < 2 else ():
            send = Message(1 - me, source[:numel], None) if me == sender else None
            receive = Message(1 - me, target[:numel], None) if me != sender else None
            transport.exchange(send, receive, combine)

    def everybody(numel: int) -> None:
        send, receive = Message((me + 1) % n, source[:numel], None), Message((me - 1) % n, target[:numel], None)
        transport.exchange(send, receive, None)

    found = []
    for nbytes in messages:
        numel, times = nbytes // 4, max(1, min(20, 2**20 // nbytes))
        calls = {
            "taken over": partial(there_and_back, numel, None),
            "added": partial(there_and_back, numel, Tensor.add_),
            "together": partial(everybody, numel),
        }
        samples = seconds_in_turns(calls, turns=9, repeats=times).values()
        taken, added, together = map(statistics.median, samples)
        found.append([taken / 2, added / 2, together])
    dist.barrier()
    transport.close()
    return found


def _all_reduces(nbytes: int, budget: float) -> dict[str | tuple[str, str], list[float]]:
    """Seconds of gloo's all-reduce ("gloo") and of ours by (kind, plan), in each turn on the slowest rank."""
    plain = torch.zeros(nbytes // 4)
    calls: dict[str | tuple[str, str], Callable[[], object]] = {"gloo": partial(dist.all_reduce, plain)}
    for kind, (make, mapped) in KINDS.items():
        comm = Communicator(make())
        x = comm.transport.empty(nbytes // 4).zero_() if mapped else plain
        for name, plan in all_reduce_plans(dist.get_world_size()).items():
            calls[kind, name] = partial(comm.all_reduce, x, plan=plan)
    return seconds_in_turns(calls, turns=TURNS, repeats=_calls(nbytes), budget=budget)


def _calls(nbytes: int) -> int:
    """How many all-reduces follow one another in a turn: as many as nccl-tests has, fewer of large tensors.

    A single one would also wait for ranks that the barrier before it lets go later.
    """
    return max(1, min(20, 2**26 // nbytes))


# What was measured


def _link(world_size: int, messages: Sequence[int], found: list[list[float]]) -> dict:
    """α and bandwidth of one pair and of all ranks together, and the rate of adding."""
    taken, added, together = (np.array(times) for times in zip(*found, strict=True))
    sizes = np.array(messages)
    (latency, inverse), (_, inverse_added) = _fit(sizes, taken), _fit(sizes, added)
    bus_latency, inverse_bus = _fit(world_size * sizes, together)
    return {
        "latency": latency,
        "bandwidth": 1 / inverse,
        "reduce_rate": 1 / max(inverse_added - inverse, 1e-12),
        "bus_latency": bus_latency / world_size,
        "bus_bandwidth": 1 / inverse_bus,
        "messages": [dict(zip(("bytes", "seconds", "seconds_if_added", "seconds_of_a_round"), (n, *times), strict=True))
                     for n, times in zip(messages, found, strict=True)],
    }  # fmt: skip


def _fit(sizes: np.ndarray, taken: np.ndarray) -> tuple[float, float]:
    """α and β, neither negative, of the line through (bytes, seconds), by least squares of the relative error."""
    columns = np.stack([1 / taken, sizes / taken], axis=1)
    (latency, inverse), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return float(max(latency, 1e-9)), float(max(inverse, 1e-13))


def _row(world_size: int, nbytes: int, taken: list[float]) -> dict:
    """Seconds, and the bus bandwidth as nccl-tests defines it: what each rank of a ring would send per second."""
    middle = statistics.median(taken)
    return {
        "world_size": world_size,
        "bytes": nbytes,
        "seconds": middle,
        "quartiles": quartiles(tuple(taken)),
        "bus_bandwidth": 2 * (world_size - 1) / world_size * nbytes / middle,
    }


def _beside(gloo: list[float], own: list[float]) -> dict:
    ratios = tuple(theirs / ours for theirs, ours in zip(gloo, own, strict=True))
    return {"gloo_over_this": statistics.median(ratios), "ratio_quartiles": quartiles(ratios)}


def _predicted(row: dict, link: dict) -> float:
    plan = all_reduce_plans(row["world_size"])[row["plan"]]
    chunks = [4 * len(part) for part in torch.empty(row["bytes"] // 4, device="meta").tensor_split(plan.num_chunks)]
    way, bus = Link(link["bandwidth"], link["latency"]), Link(link["bus_bandwidth"], link["bus_latency"])
    return seconds(plan, chunks, way, link["reduce_rate"], bus)
