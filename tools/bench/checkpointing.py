"""Measure checkpoints beside torch's and safetensors' on one disk: save, load, stall, and what steps take meanwhile.

All saves are durable when they count as done: who does not sync by itself is synced here. Ways take turns, each in a
fresh folder, and loads follow a read of all files, so that all find them in the page cache.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from minilib.operations.checkpoint import Checkpointer
from minilib.ranks.launch import run

NBYTES = 1_720_000_000  # of a state: 143 M parameters with AdamW's moments, in float32
TENSOR = 2**22  # elements of a tensor
WAYS = ("this", "dcp", "torch", "safetensors")
STEP_SIZE = 512  # of the matrices that a step multiplies


def checkpointing(nbytes: int = NBYTES, turns: int = 3, steps: int = 40) -> dict:
    """Everything, on one process.

    Args:
        nbytes: of the state.
        turns: of each way.
        steps: of a run beside which a save is written, at least.

    Returns:
        "durable": seconds of save and load and bytes of memory for each way; "stall": seconds that a step waits;
        "beside": seconds of a step alone and while a save is written.
    """
    return {
        "bytes": nbytes,
        "durable": durable(nbytes, turns),
        "stall": run(stalls, 1, nbytes, turns, timeout=1800)[0],
        "beside": run(steps_beside, 1, nbytes, steps, timeout=1800)[0],
    }


def durable(nbytes: int, turns: int) -> list[dict]:
    """Save and load of the same state by each way, in turns; memory in a process of its own."""
    tensors, seconds = tensors_of(nbytes), {way: {"save": [], "load": []} for way in WAYS}
    for _ in tqdm(range(turns), desc="save and load", leave=False):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
                seconds[way]["save"].append(_timed(lambda way=way, folder=folder: save(way, tensors, Path(folder))))
                _read_all(Path(folder))
                others = {name: torch.zeros_like(x) for name, x in tensors.items()}
                seconds[way]["load"].append(
                    _timed(lambda way=way, folder=folder, others=others: load(way, others, Path(folder)))
                )
                assert all(torch.equal(x, others[name]) for name, x in tensors.items()), f"{way} lost something"
    rows = [{"way": way, **{what: statistics.median(found) for what, found in seconds[way].items()}} for way in WAYS]
    for row in rows:
        row["memory"] = run(_memory, 1, row["way"], nbytes, timeout=1800)[0]
    return rows


def save(way: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a state, until it is durable."""
    if way == "this":
        with Checkpointer(folder / "this") as checkpointer:
            checkpointer.save({"model": module_of(tensors)}, 1, wait=True)
    elif way == "dcp":
        dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)  # syncs its files
    elif way == "torch":
        torch.save(tensors, folder / "torch.pt")
        _sync(folder / "torch.pt")
    else:
        save_file(tensors, folder / "model.safetensors")
        _sync(folder / "model.safetensors")


def load(way: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Read it back into a state that is there."""
    if way == "this":
        with Checkpointer(folder / "this") as checkpointer:
            checkpointer.load({"model": module_of(tensors)})
    elif way == "dcp":
        dcp.load(tensors, checkpoint_id=folder / "dcp", no_dist=True)
    else:
        found = torch.load(folder / "torch.pt") if way == "torch" else load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def stalls(nbytes: int, turns: int) -> dict[str, float]:
    """Seconds until an asynchronous save returns, median; the first of each, which makes its buffers, is left out."""
    tensors = tensors_of(nbytes)
    room = {name: torch.empty_like(x).fill_(0) for name, x in tensors.items()}
    found: dict[str, list[float]] = {"copy": [], "this": [], "dcp.async_save": []}
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder, Checkpointer(Path(folder) / "this") as checkpointer:
        for turn in range(turns + 1):
            found["copy"].append(_timed(lambda: [room[name].copy_(x) for name, x in tensors.items()]))
            model = module_of(tensors)
            found["this"].append(_timed(lambda turn=turn, model=model: checkpointer.save({"model": model}, turn)))
            checkpointer.wait()
            begun = time.perf_counter()
            future = dcp.async_save(tensors, checkpoint_id=Path(folder) / "dcp")
            found["dcp.async_save"].append(time.perf_counter() - begun)
            future.result()
            shutil.rmtree(Path(folder) / "dcp")
        assert dist.get_world_size() == 1
    return {way: statistics.median(samples[1:]) for way, samples in found.items()}


def steps_beside(nbytes: int, steps: int) -> dict[str, float]:
    """Seconds of a step, median: alone, and while a save is written; and how many of the latter there were."""
    tensors, matrix = tensors_of(nbytes), torch.randn(STEP_SIZE, STEP_SIZE)
    model = module_of(tensors)

    def step() -> None:
        torch.mm(matrix, matrix)

    with tempfile.TemporaryDirectory(dir=_scratch()) as folder, Checkpointer(folder) as checkpointer:
        checkpointer.save({"model": model}, 0)
        checkpointer.wait()
        alone, beside, number = [], [], 0
        while len(beside) < steps:
            alone += [_timed(step) for _ in range(steps)]
            number += 1
            checkpointer.save({"model": model}, number)
            while checkpointer.latest() != number:
                beside.append(_timed(step))
            checkpointer.wait()
    return {"alone": statistics.median(alone), "beside": statistics.median(beside), "steps": len(beside)}


def tensors_of(nbytes: int) -> dict[str, Tensor]:
    """A state of so many bytes of float32, in tensors of one size; the last one is smaller."""
    generator, left, tensors = torch.Generator().manual_seed(0), nbytes // 4, {}
    while left:
        size = min(TENSOR, left)
        tensors[f"tensor{len(tensors)}"] = torch.randn(size, generator=generator)
        left -= size
    return tensors


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """The same memory as a module's buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def lines(found: dict) -> list[str]:
    """What was found, to be read."""
    rows = [f"{row['way']}: save {row['save']:.2f} s, load {row['load']:.2f} s, {row['memory'] / 1e6:,.0f} MB more"
            for row in found["durable"]]  # fmt: skip
    stall, beside = found["stall"], found["beside"]
    rows.append("a step waits " + ", ".join(f"{way} {seconds:.3f} s" for way, seconds in stall.items()))
    rows.append(f"a step beside a save over one alone: {beside['beside'] / beside['alone']:.2f}")
    return rows


def _memory(way: str, nbytes: int) -> int:
    """Bytes by which a save raises the most that this process has held."""
    tensors = tensors_of(nbytes)
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save(way, tensors, Path(folder))
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _read_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def _scratch() -> str:
    """A folder on a disk; the temporary one is often in memory."""
    return os.environ.get("BENCH_FOLDER", tempfile.gettempdir())
