"""One trace for two worlds: what processes do with bytes is what sequences do with tokens, if both are paged alike.

A trace appends, overwrites, forks and exits. `replay` runs it through any `World`: through
`PhysicalMemory`, where a slot is a byte of a process, or a paged KV cache, where a slot is a token of a sequence.
After every step it records which frame holds which page, how many frames were copied, and what every process reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from minilib.mechanisms.paging import FramePool, OutOfFrames, PageTable

ACTIONS = ("append", "write", "fork", "exit")


@dataclass(frozen=True)
class Step:
    """One step of a trace.

    Args:
        action: "append", "write", "fork" or "exit".
        process: number of the process that takes it, in the order of their start; process 0 runs from the outset.
        values: one value, 0 to 255, for each slot that is appended or written.
        slot: the first slot that "write" overwrites.

    Raises:
        ValueError: if the action is none of the four.
    """

    action: str
    process: int
    values: bytes = b""
    slot: int = 0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"an action is one of {', '.join(ACTIONS)}; got {self.action!r}")


@dataclass(frozen=True)
class Snapshot:
    """What a world looks like after a step.

    Args:
        frames: of each process that runs, the frame of every page.
        values: of each process that runs, what it reads from slot 0 to its end.
        num_copies: frames copied so far.
        num_used: frames in use.
        refused: whether the step was refused because there are too few frames.
    """

    frames: dict[int, tuple[int | None, ...]]
    values: dict[int, bytes]
    num_copies: int
    num_used: int
    refused: bool


class Process(Protocol):
    """A process, or a sequence of tokens."""

    table: PageTable

    def append(self, values: bytes) -> object: ...
    def write(self, slot: int, values: bytes) -> None: ...
    def read(self, slot: int, count: int) -> bytes: ...
    def fork(self) -> Process: ...
    def exit(self) -> None: ...


class World(Protocol):
    """Frames, and processes that share them."""

    pool: FramePool
    num_copies: int

    def new_process(self) -> Process: ...


def replay(trace: Iterable[Step], world: World) -> list[Snapshot]:
    """Run a trace through a world. A step that lacks frames is refused, changes nothing, and the trace goes on.

    Returns:
        A snapshot after each step.

    Raises:
        ValueError: if a step names a process that does not run.
    """
    processes, started, snapshots = {0: world.new_process()}, 1, []
    for step in trace:
        if step.process not in processes:
            raise ValueError(f"{step} is of a process that does not run; running: {sorted(processes)}")
        process, refused = processes[step.process], False
        try:
            child = _take(step, process)
        except OutOfFrames:
            child, refused = None, True
        if child is not None:
            processes[started] = child
            started += 1
        if step.action == "exit":
            del processes[step.process]
        snapshots.append(_snapshot(world, processes, refused))
    return snapshots


def _take(step: Step, process: Process) -> Process | None:
    """Take a step; returns the child of a fork."""
    if step.action == "fork":
        return process.fork()
    if step.action == "exit":
        process.exit()
    elif step.action == "append":
        process.append(step.values)
    else:
        process.write(step.slot, step.values)
    return None


def _snapshot(world: World, processes: dict[int, Process], refused: bool) -> Snapshot:
    frames = {number: tuple(process.table.frames) for number, process in processes.items()}
    values = {number: process.read(0, process.table.length) for number, process in processes.items()}
    return Snapshot(frames, values, world.num_copies, world.pool.num_used, refused)
