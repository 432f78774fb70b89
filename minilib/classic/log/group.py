"""The followers of a replicated log as their leader keeps them: who lives, the plan over them, and catching up.

Whenever a follower joins or dies, `install` repeats three steps: every follower closes the connections of the old plan
and reports the length of its log; the leader sends each follower the records that it lacks; and each follower receives
its children in the new plan. A connection carries the epoch, the number of its plan, so that a connection of an older
plan is never taken for one of the current plan.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from minilib.classic.log.channel import Channel, exchange
from minilib.classic.log.file import Batch, LogFile
from minilib.classic.log.follower import ACK, FILL, GREETING, HALT, LINK, Sent, connect
from minilib.classic.log.member import LogMember
from minilib.mechanisms.replication import Plan, PlanError, simulate

START_TIMEOUT = 60.0  # seconds for a process to start, on a machine that is busy with other things
LOOK_UP = 0.1  # seconds between two looks for an interrupt

Route = Callable[[int, int, int], int]  # (parent, child, port of the child) → port that the parent connects to


def straight(parent: int, child: int, port: int) -> int:
    """The route without detours: the child's own port."""
    return port


class ReplicaFailed(RuntimeError):
    """A follower did not start; the message says how it ended."""


class LogsDiverged(RuntimeError):
    """A follower's log is not the beginning of the leader's."""


class LogGroup:
    """The followers of one leader, and the plan by which records travel.

    Args:
        file: the leader's log.
        plan: makes the broadcast plan for a number of replicas.
        timeout: seconds without an answer after which the leader takes a follower for dead, and kills it.
        route: see ReplicatedLog.

    Attributes:
        epoch: plans installed so far.
        linked: whether the current plan connects all living followers, each with every record that the leader had when
            the plan was installed.
        dead: follower → how it ended.
        on_disk: replica → records that the replica is known to have on its disk, dead replicas included.
        sent: messages and bytes that the leader has sent.
        interrupts: the list of `interrupts.held`; waiting ends with KeyboardInterrupt once the list has an entry.
    """

    def __init__(
        self, file: LogFile, plan: Callable[[str, int], Plan], timeout: float, route: Route = straight
    ) -> None:
        self._file, self._plan, self.timeout, self._route = file, plan, timeout, route
        self.members: dict[int, LogMember] = {}
        self.dead: dict[int, str] = {}
        self.on_disk = {0: len(file)}
        self.sent, self.epoch, self.linked = Sent(), 0, False
        self.interrupts: list[int] = []
        self._children: list[Channel] = []
        self._secret = secrets.token_bytes(GREETING - 8)
        self._numbers = itertools.count(1)

    def ranks(self) -> list[int]:
        """Replicas that live, the leader first."""
        return [0, *sorted(self.members)]

    def start(self, ranks: Iterable[int]) -> None:
        """Start followers' processes and take them in.

        Raises:
            ReplicaFailed: if one does not start.
            LogsDiverged: if one has what the leader has not.
        """
        self.linked = False
        for rank in ranks:
            self.members[rank] = LogMember(rank, file_of(self._file.path.parent, rank), self._file.fsync)
            self.dead.pop(rank, None)
            self.on_disk[rank] = 0
        self.ask(HALT, {rank: {} for rank in ranks}, START_TIMEOUT)
        self.install()
        for rank in ranks:
            if rank in self.dead:
                raise ReplicaFailed(f"replica {rank} {self.dead[rank]}")

    def install(self) -> None:
        """Bring all that answer to the length of the leader's log, and install a plan over them."""
        self.linked = False
        while not self.linked:
            self.epoch += 1
            for child in self._children:
                child.close()
            self._children = []
            self.ask(HALT, {rank: {} for rank in self.members})
            self._note_lengths()
            for member in list(self.members.values()):
                if member.rank in self.members:  # it may have died while another was catching up
                    self._catch_up(member)
            self._link()

    def send(self, batch: Batch) -> None:
        """Send a record, which the leader's file has, along the plan."""
        self.on_disk[0] = len(self._file)
        for child in self._children:
            child.send(batch.stored)
            self.sent.messages += 1
            self.sent.bytes += len(batch.stored)

    @property
    def all_sent(self) -> bool:
        """Whether the kernel has taken all that the leader has sent, so that it will go on its way by itself."""
        return not any(child.unsent for child in self._children)

    def reach(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, under as many plans as it takes: each new one has fewer followers, or all up to date."""
        while not done():
            if not (self.linked and self._until(lambda: done() or not self.linked, self.timeout)):
                self.install()

    def ask(self, kind: bytes, bodies: dict[int, dict], seconds: float | None = None) -> None:
        """Send followers a message each and wait for all answers; drop those that do not answer in time."""
        number, seconds = next(self._numbers), seconds or self.timeout
        for rank, body in bodies.items():
            self.members[rank].control.post(kind, {"number": number, **body})

        def silent() -> list[int]:
            asked = [self.members[rank] for rank in bodies if rank in self.members]
            return [member.rank for member in asked if member.answer.get("number") != number]

        if not self._until(lambda: not silent(), seconds):
            for rank in silent():
                self._drop(rank, f"did not answer for {seconds:g} s and was ")

    def exchange(self, seconds: float) -> None:
        """Send and receive what can be, after waiting for that at most so long; notice who has died."""
        exchange([*self._children, *(member.control for member in self.members.values())], seconds)
        for child in self._children:
            for rank, records in ACK.iter_unpack(child.take_whole(ACK.size)):
                self.on_disk[rank] = max(self.on_disk[rank], records)
        for rank, member in list(self.members.items()):
            member.hear()
            if not member.control.open:
                self._drop(rank)

    def end(self) -> None:
        """End all processes: they have until the timeout to do so by themselves."""
        for channel in (*self._children, *(member.control for member in self.members.values())):
            channel.close()
        deadline = time.monotonic() + self.timeout
        while self.members:
            rank, member = self.members.popitem()
            self.dead[rank] = member.end(deadline)

    def check_invariants(self) -> None:
        """Nobody both lives and is dead, nobody has more than the leader, and every child has its connection."""
        assert not set(self.members) & set(self.dead), "a follower lives and is dead"
        assert set(self.on_disk) == {0, *self.members, *self.dead}, "a follower is lost"
        assert self.on_disk[0] == len(self._file) == max(self.on_disk.values()), "a follower is ahead of the leader"
        assert not self.linked or len(self._children) == len(self._tree()[0]), "a child has no connection"

    def _tree(self) -> list[list[int]]:
        """For each place in the plan over those that live, the places that it passes on to."""
        return children_of(self._plan("broadcast", len(self.ranks())))

    def _until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Send and receive until `done`; False if that takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self.exchange(min(remaining, LOOK_UP))
            if self.interrupts:
                raise KeyboardInterrupt
        return True

    def _drop(self, rank: int, why: str = "") -> None:
        """Take a follower for dead, and make sure that it is: at once if there is a reason why."""
        self.linked = False
        self.dead[rank] = why + self.members.pop(rank).end(time.monotonic() + (0 if why else self.timeout))

    def _note_lengths(self) -> None:
        for rank, member in self.members.items():
            self.on_disk[rank] = member.answer["records"]

    def _catch_up(self, member: LogMember) -> None:
        """Send a follower the bytes that its file lacks.

        Raises:
            LogsDiverged: if it has what the leader has not.
        """
        rank, records = member.rank, member.answer["records"]
        if not self._file.begins_with(records, member.answer["crc"]):
            self.on_disk[rank] = 0  # of the leader's log, as far as it knows
            self._drop(rank, f"has {records} records, which the {len(self._file)} of the leader do not begin with; ")
            raise LogsDiverged(f"replica {rank} {self.dead[rank]}; move away whichever of the two files is wrong")
        for piece in self._file.stored_from(records):
            member.control.post(FILL, piece)
            if not self._until(lambda: rank not in self.members or not member.control.unsent, self.timeout):
                self._drop(rank, f"took nothing for {self.timeout:g} s and was ")
            if rank not in self.members:
                return

    def _link(self) -> None:
        """Tell every follower its children, and connect to the leader's own; nothing is linked if one is lost."""
        ranks, tree = self.ranks(), self._tree()
        greeting = self._secret + self.epoch.to_bytes(8, "big")
        ports = [0] + [self.members[rank].answer["port"] for rank in ranks[1:]]
        for place in tree[0]:
            try:
                self._children.append(connect(self._route(0, ranks[place], ports[place]), greeting))
            except OSError as error:
                self._drop(ranks[place], f"cannot be reached ({error}) and was ")
                return
        orders = {
            rank: {
                "greeting": greeting.hex(),
                "children": [self._route(rank, ranks[place], ports[place]) for place in places],
            }
            for rank, places in zip(ranks[1:], tree[1:], strict=True)
        }
        self.ask(LINK, orders)
        self._note_lengths()
        self.linked = self.ranks() == ranks


def file_of(folder: Path, rank: int) -> Path:
    """The log of a replica."""
    return folder / f"replica-{rank}.log"


def children_of(plan: Plan) -> list[list[int]]:
    """For each place in a broadcast plan, the places that it passes on to, in the plan's order.

    Raises:
        PlanError: if the plan is none that brings one chunk from place 0 to every other, once.
    """
    children: list[list[int]] = [[] for _ in range(plan.world_size)]
    for transfer in itertools.chain(*plan.rounds):
        children[transfer.src].append(transfer.dst)
    once = sorted([0, *itertools.chain(*children)]) == list(range(plan.world_size))
    if plan.collective != "broadcast" or plan.root or plan.num_chunks != 1 or not once:
        raise PlanError(f"a log needs a broadcast of one chunk from place 0 to every other, once; got {plan!r}")
    simulate(plan)
    return children
