"""Measure checkpoints beside torch's and safetensors' on one disk: save, load, stall, and what steps take meanwhile.

The state is that of a Llama-shaped decoder in float32 with AdamW's moments. A save counts as done when its bytes and
the names of its files are durable: who does not sync them by himself is synced here. Ways take turns, each in a fresh
folder. Each state is loaded twice: when its files are in the page cache, and when they are on the disk alone.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from tqdm import tqdm

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint import Checkpointer
from minilib.ranks.launch import run

LLAMA = ModelConfig(32_000, 768, 2048, num_layers=15, num_heads=12, num_kv_heads=4, head_dim=64, max_position=2048,
                    tie_embeddings=False)  # fmt: skip
NOISE = 2**20  # random numbers of which tensors are made
PIECE = 2**24  # bytes that are read at a time
WAYS = ("this", "dcp", "torch", "safetensors")
STALLS = ("copy", "this", "dcp.async_save", "dcp.async_save, buffers kept")
STEP_SIZE = 512  # of the matrices that a step multiplies


def checkpointing(config: ModelConfig = LLAMA, turns: int = 4, steps: int = 40) -> dict:
    """Everything, on one process.

    Args:
        config: of the model; the default's state has 1.72 GB.
        turns: of each way; with 4 of them each way is once the first, which meets memory that others have given back.
        steps: of a run beside which a save is written, at least.

    Returns:
        "bytes": of the state; "durable": seconds of save and loads by each way; "memory": bytes that each way's save
        takes; "stall": seconds that a step waits; "beside": seconds of a step alone and while a save is written.
    """
    return {
        "bytes": sum(x.nbytes for x in state_of(config).values()),
        "durable": durable(config, turns),
        "memory": {way: run(memory_of_save, 1, way, config, timeout=1800)[0] for way in WAYS},
        "stall": run(stalls, 1, config, turns, timeout=1800)[0],
        "beside": run(steps_beside, 1, config, steps, timeout=1800)[0],
    }


def durable(config: ModelConfig, turns: int) -> list[dict]:
    """Seconds of save and loads of the same state by each way, in turns; medians."""
    tensors = state_of(config)
    others = {name: torch.zeros_like(x) for name, x in tensors.items()}
    seconds = {way: {"save": [], "load": [], "load_from_disk": []} for way in WAYS}
    for turn in tqdm(range(turns), desc="save and load", leave=False):
        first = turn % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            with tempfile.TemporaryDirectory(dir=_scratch()) as name:
                folder, found = Path(name), seconds[way]
                found["save"].append(_timed(partial(save, way, tensors, folder)))
                for what, prepare in (("load", _read_all), ("load_from_disk", _evict_all)):
                    for other in others.values():
                        other.zero_()
                    prepare(folder)
                    found[what].append(_timed(partial(load, way, others, folder)))
                    assert all(torch.equal(x, others[name]) for name, x in tensors.items()), f"{way} lost something"
    return [{"way": way, **{what: statistics.median(found) for what, found in seconds[way].items()}} for way in WAYS]


def save(way: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a state, until it is durable."""
    if way == "this":
        with Checkpointer(folder / "this") as checkpointer:
            checkpointer.save({"model": module_of(tensors)}, 1, wait=True)
    elif way == "dcp":
        dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)  # syncs its files, and not their names
        _sync(folder / "dcp")
    elif way == "torch":
        torch.save(tensors, folder / "torch.pt")
        _sync(folder / "torch.pt")
    else:
        save_file(tensors, folder / "model.safetensors")
        _sync(folder / "model.safetensors")
    _sync(folder)


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


def stalls(config: ModelConfig, turns: int) -> dict[str, float]:
    """Seconds until an asynchronous save returns, median; the first of each, which makes its buffers, is left out."""
    tensors = state_of(config)
    room = {name: torch.empty_like(x).fill_(0) for name, x in tensors.items()}
    found: dict[str, list[float]] = {way: [] for way in STALLS}
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder, Checkpointer(Path(folder) / "this") as checkpointer:
        stager = DefaultStager(StagingOptions(False, True, False, False))  # of the GPU's options none
        for turn in range(turns + 1):
            found["copy"].append(_timed(lambda: [room[name].copy_(x) for name, x in tensors.items()]))
            model = module_of(tensors)
            found["this"].append(_timed(lambda turn=turn, model=model: checkpointer.save({"model": model}, turn)))
            checkpointer.wait()
            for way, kept in (("dcp.async_save", None), ("dcp.async_save, buffers kept", stager)):
                begun = time.perf_counter()
                future = dcp.async_save(tensors, checkpoint_id=Path(folder) / "dcp", async_stager=kept)
                found[way].append(time.perf_counter() - begun)
                future.result()
                shutil.rmtree(Path(folder) / "dcp")
        assert dist.get_world_size() == 1
    return {way: statistics.median(samples[1:]) for way, samples in found.items()}


def steps_beside(config: ModelConfig, steps: int) -> dict[str, float]:
    """Seconds of a step, median: alone, and while a save is written; and how many of the latter there were."""
    tensors, matrix = state_of(config), torch.randn(STEP_SIZE, STEP_SIZE)
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


def state_of(config: ModelConfig) -> dict[str, Tensor]:
    """Parameters of a model, and AdamW's state of each; numbers by chance, other ones in each tensor."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Decoder(config).named_parameters()}
    noise, tensors = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)), {}
    for name, shape in shapes.items():
        for full in (f"model.{name}", *(f"optimizer.state.{name}.{key}" for key in ("exp_avg", "exp_avg_sq"))):
            tensors[full] = torch.empty(shape)
            for piece in tensors[full].view(-1).split(NOISE):  # nothing larger is made: see `memory_of_save`
                torch.add(noise[: len(piece)], len(tensors), out=piece)
        tensors[f"optimizer.state.{name}.step"] = torch.tensor(float(len(tensors)))
    return tensors


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """The same memory as a module's buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name.replace(".", " "), tensor)
    return module


def lines(found: dict) -> list[str]:
    """What was found, to be read."""
    rows = []
    for row in found["durable"]:
        saved = f"save {row['save']:.2f} s with {found['memory'][row['way']] / 1e6:,.0f} MB more"
        loaded = f"load {row['load']:.2f} s from the page cache, {row['load_from_disk']:.2f} s from the disk"
        rows.append(f"{row['way']}: {saved}, {loaded}")
    stall, beside = found["stall"], found["beside"]
    rows.append("a step waits " + ", ".join(f"{way} {seconds:.3f} s" for way, seconds in stall.items()))
    rows.append(f"a step beside a save over one alone: {beside['beside'] / beside['alone']:.2f}")
    return rows


def memory_of_save(way: str, config: ModelConfig) -> int:
    """Bytes by which a save raises the most that this process has held."""
    tensors = state_of(config)
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save(way, tensors, Path(folder))
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _read_all(folder: Path) -> None:
    """Bring all files into the page cache."""
    room = bytearray(PIECE)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def _evict_all(folder: Path) -> None:
    """Leave no page of any file in memory."""
    for path in _files(folder):
        _sync(path)  # a page that is not on the disk cannot go
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _scratch() -> str:
    """A folder on a disk; the temporary one is often in memory."""
    return os.environ.get("BENCH_FOLDER", tempfile.gettempdir())
