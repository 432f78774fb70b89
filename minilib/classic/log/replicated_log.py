"""A log that several processes hold: what the leader appends goes to the followers by a broadcast plan.

    star   0 → 1, 0 → 2, 0 → 3        chain   0 → 1 → 2 → 3        tree   0 → 1 → 3, 0 → 2

Each replica is a process with a file of its own (file.py). A plan of minilib/mechanisms/replication/plans.py says who
passes a record on to whom, over TCP connections on this machine; acknowledgements go back the same way, and an append
returns when a quorum has the record. When a follower dies, its connection to the leader ends; the leader then brings
all that live to the same length and installs the plan anew over them (group.py).

The leader is replica 0, in the process that made the log. It looks after the others only while it is called. If it
dies, they end, and it starts again from its file. That another replica takes over is the other half of Raft, the
election, and is not done here; so whatever the leader's disk loses, the followers' files still have and nobody uses:
LogsDiverged.

Sources: van Renesse and Schneider, "Chain Replication for Supporting High Throughput and Availability", OSDI 2004;
Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm", USENIX ATC 2014 (quorums, catching up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from minilib.classic.log.file import LogFile
from minilib.classic.log.follower import COUNT, Sent
from minilib.classic.log.group import LogGroup, Route, children_of, file_of, straight
from minilib.classic.log.member import LogMember
from minilib.mechanisms.basics import interrupts
from minilib.mechanisms.replication import Plan
from minilib.mechanisms.replication.plans import chain


class QuorumLost(RuntimeError):
    """Too few replicas live.

    Args:
        message: how many, and what became of the record.
        index: the record, if it was written: it stays in the leader's file without being acknowledged, and reaches the
            others when they are back. None if nothing was written.
    """

    def __init__(self, message: str, index: int | None) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Recovery:
    """How a replica came back.

    Args:
        records: whole records that it found in its file.
        torn_bytes: bytes of a record written in part, which it cut off.
        missed: records that the leader then sent it.
    """

    records: int
    torn_bytes: int
    missed: int


class ReplicatedLog:
    """Replica 0 and its followers. One thread at a time may use it.

    Args:
        folder: made if it does not exist; replica-<rank>.log is a LogFile. What is in there already is taken up.
        world_size: replicas, the leader included.
        plan: makes the broadcast plan for a number of replicas; a function of minilib/mechanisms/replication/plans.py.
        quorum: replicas, the leader included, that must have a record before it counts; by default more than half.
        fsync: have every replica's disk confirm what it writes before the replica acknowledges it.
        timeout: seconds without an answer after which a follower is taken for dead, and killed.
        route: called with a parent, its child in the plan and the child's port, tells to which port the parent
            connects, for instance to that of a link between two racks.

    Raises:
        ValueError: if an argument is out of range.
        PlanError: if the plan is none that broadcasts from replica 0.
        ReplicaFailed: if a follower does not start.
        LogsDiverged: if a follower has what the leader has not.
        LogInUse, LogCorrupt: from the leader's file.
    """

    def __init__(
        self,
        folder: Path | str,
        world_size: int,
        plan: Callable[[str, int], Plan] = chain,
        *,
        quorum: int | None = None,
        fsync: bool = False,
        timeout: float = 5.0,
        route: Route = straight,
    ) -> None:
        self.world_size, self.quorum = world_size, world_size // 2 + 1 if quorum is None else quorum
        if not 1 <= self.quorum <= world_size or timeout <= 0:
            raise ValueError(f"needs 1 ≤ quorum ≤ world_size and timeout > 0, got {quorum=}, {world_size=}, {timeout=}")
        for size in range(1, world_size + 1):
            children_of(plan("broadcast", size))
        self.folder, self._closed = Path(folder).resolve(), False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(self.path(0), fsync)
        self._group = LogGroup(self._file, plan, timeout, route)
        try:
            with self._at_work():
                self._group.start(range(1, world_size))
        except BaseException:
            self._end()
            raise

    def __len__(self) -> int:
        return len(self._file)

    @property
    def epoch(self) -> int:
        """Plans installed so far."""
        return self._group.epoch

    def path(self, rank: int) -> Path:
        """The file of a replica."""
        return file_of(self.folder, rank)

    def append(self, record: bytes) -> int:
        """Append a record and wait until a quorum has it.

        Returns:
            Its index.

        Raises:
            QuorumLost: if too few replicas live.
            TypeError, ValueError: if it is not bytes, or longer than MAX_RECORD.
            OSError: if the leader's disk refuses; nothing was written.
            KeyboardInterrupt: if it is interrupted; a record that was written by then is as after QuorumLost.

        Cost: the plan's messages for one chunk of len(record) + 8 bytes; from each follower one acknowledgement for
        itself and for each one behind it. A follower that dies costs one more plan, one that hangs up to two timeouts.
        """
        with self._at_work():
            batch, index = self._file.pack(record), len(self._file)
            self._group.exchange(0)  # who has died since the last call?
            if not self._group.linked:
                self._group.install()
            self._need_quorum(None)
            self._file.write(batch)  # before anybody else has it: no log is ever longer than the leader's
            self._group.send(batch)
            self._group.reach(lambda: self._acknowledged(index))
            return index

    def read(self, index: int) -> bytes:
        """A record, from the leader's file.

        Raises:
            IndexError: if there is no such record.
        """
        return self._file.read(index)

    def settle(self) -> None:
        """Wait until all that live have everything, not just a quorum."""
        with self._at_work():
            self._settle()

    def living(self) -> list[int]:
        """Replicas that live, the leader first."""
        with self._at_work():
            self._group.exchange(0)
            return self._group.ranks()

    def sent(self) -> dict[int, Sent]:
        """What each replica that lives has sent along plans since its process started, once all have everything."""
        with self._at_work():
            self._settle()
            self._group.ask(COUNT, {rank: {} for rank in self._group.members})
            followers = sorted(self._group.members.items())
            return {0: replace(self._group.sent)} | {rank: Sent(**member.answer["sent"]) for rank, member in followers}

    def pid(self, rank: int) -> int:
        """Number of a follower's process.

        Raises:
            ValueError: if it is the leader, or does not live.
        """
        return self._follower(rank).pid

    def kill(self, rank: int) -> None:
        """Kill a follower's process with SIGKILL. The leader finds out by itself.

        Raises:
            ValueError: if it is the leader, or does not live.
        """
        with self._at_work():
            self._follower(rank).kill()

    def restart(self, rank: int) -> Recovery:
        """Start a dead follower again, bring its log to the length of the leader's, and take it into the plan.

        Raises:
            ValueError: if it is not dead.
            ReplicaFailed: if it does not start.
            LogsDiverged: if it has what the leader has not.

        Cost: one more plan, and the bytes that it lacks, straight from the leader, while nothing is appended.
        """
        with self._at_work():
            self._group.exchange(0)
            if rank not in self._group.dead:
                raise ValueError(f"only the dead can be restarted, {sorted(self._group.dead)}; got {rank!r}")
            self._group.start([rank])
            found = self._group.members[rank].first
            return Recovery(found["records"], found["torn"], len(self._file) - found["records"])

    def close(self) -> None:
        """Wait until all that live have everything, then end their processes and close the files."""
        if not self._closed:
            try:
                self.settle()
            finally:
                self._end()

    def __enter__(self) -> ReplicatedLog:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end()  # whoever interrupts will not wait for stragglers

    def check_invariants(self) -> None:
        """The leader's file and the group are in order."""
        self._file.check_invariants()
        self._group.check_invariants()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Nothing is done after closing, and nothing is interrupted but where it waits."""
        if self._closed:
            raise ValueError("the log is closed; make a new one on the same folder")
        with interrupts.held() as self._group.interrupts:
            yield

    def _follower(self, rank: int) -> LogMember:
        if rank not in self._group.members:
            living = sorted(self._group.members)
            raise ValueError(f"the followers that live are {living}, got {rank!r}; the leader, 0, is this process")
        return self._group.members[rank]

    def _acknowledged(self, index: int) -> bool:
        if sorted(self._group.on_disk.values())[-self.quorum] > index and self._group.all_sent:
            return True
        self._need_quorum(index)
        return False

    def _need_quorum(self, index: int | None) -> None:
        """Raise QuorumLost if too few live."""
        living = len(self._group.ranks())
        if living < self.quorum:
            fate = "nothing was written" if index is None else f"record {index} is written and not acknowledged"
            dead = "; ".join(f"replica {rank} {how}" for rank, how in sorted(self._group.dead.items()))
            count = f"{living} of {self.world_size} replicas live, it takes {self.quorum}"
            raise QuorumLost(f"{count}; {fate}; {dead}", index)

    def _settle(self) -> None:
        self._group.reach(lambda: all(self._group.on_disk[rank] == len(self._file) for rank in self._group.ranks()))

    def _end(self) -> None:
        self._closed = True
        with interrupts.held():
            self._group.end()
            self._file.close()
