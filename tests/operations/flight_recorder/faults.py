"""Real faults in small jobs, whose recordings are then analysed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from minilib.operations.flight_recorder import Dump, RecordedCommunicator, Recorder, read_dumps
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.shared import SharedMemoryTransport

TIMEOUT = 1.0  # seconds that a rank waits for others in a collective


def two_groups(recorder: Recorder) -> dict[str, RecordedCommunicator]:
    """Two groups of all ranks, such as an expert's and a data group have them."""
    return {
        name: RecordedCommunicator(Communicator(SharedMemoryTransport(timeout=TIMEOUT)), recorder, name)
        for name in ("dp", "ep")
    }


def step(groups: dict[str, RecordedCommunicator], before: Callable[[], None], **odd) -> None:
    """A few collectives of two groups, the last but one of which may differ."""
    dp, ep = groups["dp"], groups["ep"]
    x = torch.ones(8)
    ep.all_gather(x)
    pending = dp.all_reduce(x, async_op=True)
    ep.reduce_scatter(x)
    pending.wait()
    before()
    tensor = torch.ones(odd.get("shape", (8,)), dtype=odd.get("dtype", torch.float32))
    if odd.get("op") == "reduce":
        dp.reduce(tensor)
    elif odd.get("op") == "broadcast":
        dp.broadcast(tensor, src=odd["src"])
    else:
        dp.all_reduce(tensor, odd.get("reduce_op", "sum"))
    dp.barrier()


def job(folder: Path, fault: str, culprit: int, steps: int, seed: int) -> None:
    """Steps of a rank, of which the middle one has the fault."""
    rank = dist.get_rank()
    groups = two_groups(recorder := Recorder(folder / f"rank{rank}", rank, capacity=64))
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    for number in range(steps):
        here = number == steps // 2

        def before(here: bool = here) -> None:
            time.sleep(float(torch.rand(1, generator=generator)) / 500)
            if here and rank == culprit:
                misbehave(fault, folder)

        if here and fault == "order":
            for name in ("ep", "dp") if rank == culprit else ("dp", "ep"):
                groups[name].all_reduce(torch.ones(8))
        elif here and fault == "root":
            step(groups, before, op="broadcast", src=int(rank == culprit))
        else:
            step(groups, before, **(ODD.get(fault, {}) if here and rank == culprit else {}))
    recorder.close()


ODD = {
    "shape": {"shape": (2, 4)},
    "dtype": {"dtype": torch.int32},
    "op": {"op": "reduce"},
    "reduce_op": {"reduce_op": "max"},
}


def misbehave(fault: str, folder: Path) -> None:
    """What the culprit does instead of calling the next collective."""
    if fault == "not_entered":
        while not (folder / "go").exists():
            time.sleep(0.01)
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "slow":
        time.sleep(TIMEOUT * 0.75)


def recorded(
    folder: Path, fault: str = "", culprit: int = -1, world_size: int = 3, steps: int = 4, seed: int = 0
) -> tuple[list[Dump], tuple[int, ...]]:
    """Dumps of a job that is over, and the rank that was killed, if one was."""
    dead: tuple[int, ...] = ()
    folder.mkdir()
    try:
        run(job, world_size, folder, fault, culprit, steps, seed, timeout=60)
    except RankFailed as error:
        dead = (error.rank,) if "was killed by" in str(error) else ()
    return read_dumps(folder, "rank*"), dead
