"""What a recorder of collectives leaves behind, as data: calls, groups, and the state of its process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATES = ("scheduled", "started", "completed", "failed", "refused")


@dataclass(frozen=True)
class RecordedGroup:
    """A group of ranks, whose collectives are numbered from 0.

    Args:
        name: such as "dp"; several groups may have one name, with other ranks each.
        ranks: of the job, in the order of the group.
        generation: how many groups of this name and these ranks a rank had recorded before, as after a failure.
    """

    name: str
    ranks: tuple[int, ...]
    generation: int = 0

    def __str__(self) -> str:
        again = f", made again ({self.generation})" if self.generation else ""
        return f"{self.name} of ranks {', '.join(map(str, self.ranks))}{again}"


@dataclass(frozen=True)
class RecordedCall:
    """A collective as one rank has called it.

    Args:
        group: the ranks that make the call.
        sequence: its number among the group's collectives; -1 for a message between two ranks.
        op: "all_reduce" and so on.
        reduce_op: "sum" and so on, empty where nothing is reduced.
        root: rank of the group that sends or receives alone, or None.
        dtype: of its tensor, such as "float32".
        shape: of its tensor; of all_to_all, the numbers of values received and sent.
        site: file, line and function of the caller.
        state: one of STATES; a call that is refused for its arguments is none of the group.
        asynchronous: whether the caller goes on meanwhile.
        enqueued_ns, started_ns, ended_ns: by the monotonic clock of the host, 0 for what has not happened.
        wait_ns: how long the caller has waited for it in all; until now, if the caller waits.
        waiting: whether the caller waits for it.
    """

    group: RecordedGroup
    sequence: int
    op: str
    reduce_op: str
    root: int | None
    dtype: str
    shape: tuple[int, ...]
    site: str
    state: str
    asynchronous: bool
    enqueued_ns: int
    started_ns: int
    ended_ns: int
    wait_ns: int
    waiting: bool

    @property
    def open(self) -> bool:
        """Whether it has not been completed, also because it failed."""
        return self.state in ("scheduled", "started", "failed")

    @property
    def signature(self) -> tuple:
        """What all ranks of the group have to agree on; parts of all_to_all may differ in size."""
        shape = () if self.op in ("all_to_all", "barrier") else self.shape
        return self.op, self.reduce_op, self.root, self.dtype, shape

    def __str__(self) -> str:
        root = f" root {self.root}" if self.root is not None else ""
        reduce_op = f" {self.reduce_op}" if self.reduce_op else ""
        return f"{self.op}{reduce_op}{root} {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Dump:
    """All that one rank has recorded.

    Args:
        rank: of the job.
        calls: oldest first.
        entered: calls of each group so far, also those that were overwritten.
        lost: calls that were overwritten.
        read_ns: when this was read, by the monotonic clock of the host.
        closed: whether the recorder was closed, as a rank does that ends well.
        process: state of the process, as the kernel has it: "R", "S", "D" … for one that lives, "T" for one that is
            stopped, empty for one that is gone, "?" if this host cannot tell.
    """

    rank: int
    calls: tuple[RecordedCall, ...]
    entered: dict[RecordedGroup, int]
    lost: int = 0
    read_ns: int = 0
    closed: bool = False
    process: str = "?"

    def last(self, group: RecordedGroup) -> int:
        """Sequence of the group's last call, -1 if there was none."""
        return self.entered.get(group, 0) - 1


def process_state(pid: int, started: int) -> str:
    """State of a process (see `Dump`), which is another one if it has started at another time.

    Args:
        pid: of the process.
        started: what `start_ticks` said of it.
    """
    if not Path("/proc/self/stat").exists():
        return "?"
    state, begun = _stat(pid)
    return "" if state in "ZX" or begun != started else state


def start_ticks(pid: int) -> int:
    """When a process started, in ticks since the host did; 0 if this host cannot tell."""
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])
