"""Who takes the next step, and whether it was taken: what the lighthouse decides, without sockets or clocks of its own.

    0 1 2 ready ─▶ quorum 1, step 0: 0 1 2 ─▶ all vote yes ─▶ commit step 0
    0 1 2 ready ─▶ quorum 1, step 1: 0 1 2 ─▶ 1 is lost    ─▶ void quorum 1: nobody applies step 1
    0 2   ready ─▶ quorum 2, step 1: 0   2 ─▶ all vote yes ─▶ commit step 1       2 of 3 are more than half
    0 1 2 ready ─▶ quorum 3, step 2: 0 1 2                    the new 1 stands at step 0: a peer sends it the state

A step counts once every member of its quorum has voted for it, and then for all of them. Each quorum has more than half
of the members of the one before, so that two groups cannot both go on. A number is never used again: the vote of a
member that slept belongs to a quorum that is over.

Source: torchft's lighthouse and manager (github.com/meta-pytorch/torchft); the majority is Raft's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class QuorumMember:
    """A process that takes part.

    Args:
        replica: its number.
        address: of this process of the replica, never used again by another.
        step: the step before which it stands.
    """

    replica: int
    address: str
    step: int


@dataclass(frozen=True)
class Quorum:
    """Those who take a step together.

    Args:
        number: grows whenever members change or a step was not taken.
        step: the one to take.
        members: ordered by replica; a member's position is its rank.
    """

    number: int
    step: int
    members: tuple[QuorumMember, ...]

    def message(self) -> dict:
        """As it is sent."""
        return {"kind": "quorum", **asdict(self)}

    @classmethod
    def from_message(cls, message: dict) -> Quorum:
        """As it was sent."""
        members = tuple(QuorumMember(**member) for member in message["members"])
        return cls(message["number"], message["step"], members)


@dataclass(frozen=True)
class CommittedStep:
    """A step that counts.

    Args:
        step, quorum: which step, and the number of the quorum that took it.
        replicas: who took part.
    """

    step: int
    quorum: int
    replicas: tuple[int, ...]


@dataclass(frozen=True)
class VoidedStep:
    """A step that was begun and not taken.

    Args:
        step, quorum: see `CommittedStep`.
        why: what happened.
    """

    step: int
    quorum: int
    why: str


@dataclass
class QuorumDecisions:
    """The state of the lighthouse. Each method returns the messages that go out, as (replica, message).

    Args:
        expected: the replicas of the first quorum; it waits for all of them that do not get lost.
        patience: seconds to wait for a majority, and for a living member that neither gets ready nor votes.

    Attributes:
        step: the next one to take; all before are committed.
        quorum: the latest one; None before the first.
        finished: whether a replica has come to the end of the run.
        formed: the replicas of each quorum, one for each number.
        committed, voided: what became of steps.
        refused: votes for a quorum that was over.
    """

    expected: frozenset[int]
    patience: float
    step: int = 0
    quorum: Quorum | None = None
    finished: bool = False
    formed: list[set[int]] = field(default_factory=list)
    committed: list[CommittedStep] = field(default_factory=list)
    voided: list[VoidedStep] = field(default_factory=list)
    refused: int = 0
    _living: dict[int, str] = field(default_factory=dict)  # address of each
    _ready: dict[int, QuorumMember] = field(default_factory=dict)
    _votes: set[int] = field(default_factory=set)
    _running: bool = False
    _given_up: set[int] = field(default_factory=set)  # of the expected
    _coming: set[int] = field(default_factory=set)  # were started, and are waited for
    _waiting_since: float | None = None

    @property
    def waiting(self) -> set[int]:
        """Replicas that are ready for the next quorum."""
        return set(self._ready)

    def expect(self, replica: int) -> None:
        """The next quorum waits for this replica, too, which has just been started."""
        self._coming.add(replica)

    def alive(self, replica: int, address: str) -> None:
        """A process has told that it lives."""
        self._living[replica] = address

    def ready(self, member: QuorumMember, now: float) -> list[tuple[int, dict]]:
        """A living process is ready to take its next step with whomever there is."""
        if self.finished:
            return [(member.replica, {"kind": "finished"})]
        if self._running and member.address in {each.address for each in self.quorum.members}:
            return []  # said twice
        if self.quorum is not None and member.step > self.step:
            why = f"replica {member.replica} stands before step {member.step}, the run before {self.step}"
            return [(member.replica, {"kind": "no quorum", "why": f"{why}: it belongs to another run"})]
        self._ready[member.replica] = member
        self._coming.discard(member.replica)
        return self._form(now)

    def vote(self, replica: int, number: int, yes: bool, why: str, now: float) -> list[tuple[int, dict]]:
        """A member has its part of the step's result, or has no result."""
        if not self._running or number != self.quorum.number:
            self.refused += yes
            return []  # whoever was in that quorum has been told that it is void
        if not yes:
            return self._void(f"replica {replica}: {why}", now)
        self._votes.add(replica)
        self._waiting_since = self._waiting_since or now
        members = tuple(each.replica for each in self.quorum.members)
        if self._votes != set(members):
            return []
        self.committed.append(CommittedStep(self.step, number, members))
        message = {"kind": "commit", "number": number, "step": self.step}
        self.step, self._running, self._waiting_since = self.step + 1, False, None
        return [(each, message) for each in members]

    def lost(self, replica: int, address: str, why: str, now: float) -> list[tuple[int, dict]]:
        """A process is gone or silent."""
        if self._living.get(replica) != address:
            return []  # another process of this replica lives
        del self._living[replica]
        self._ready.pop(replica, None)
        if self.quorum is None:
            self._given_up.add(replica)
        told = [(replica, {"kind": "dropped"})]
        if self._running and replica in {each.replica for each in self.quorum.members}:
            told = self._void(f"replica {replica} {why}", now) + told
        return told + self._form(now)

    def leave(self, replica: int, address: str) -> list[tuple[int, dict]]:
        """A process has come to the end of the run."""
        self.finished = True
        if self._living.get(replica) == address:
            del self._living[replica]
        late, self._ready = self._ready, {}
        return [(each, {"kind": "finished"}) for each in late]

    def tick(self, now: float) -> list[tuple[int, dict]]:
        """Time has passed: do not wait for ever."""
        if self._waiting_since is None or now - self._waiting_since < self.patience:
            return []
        self._waiting_since = None
        if self._running:
            return self._drop({each.replica for each in self.quorum.members} - self._votes, now)
        if awaited := self._awaited():
            return self._drop(awaited, now)
        waiting, self._ready = self._ready, {}
        return [(replica, {"kind": "no quorum", "why": self._lacking(waiting)}) for replica in waiting]

    def check_invariants(self) -> None:
        """Each step is committed once, in order; each quorum has a majority of the one before; numbers only grow."""
        steps = [each.step for each in self.committed]
        assert steps == list(range(self.step - len(steps), self.step)), "a step is missing, or counts twice"
        assert sorted(each.quorum for each in self.committed) == [each.quorum for each in self.committed]
        for before, after in zip([set(self.expected), *self.formed], self.formed, strict=False):
            assert 2 * len(before & after) > len(before), "no majority"
        over = {each.quorum: each.step for each in self.voided}
        assert all(each.step < over.get(each.quorum, self.step) for each in self.committed), "a void quorum went on"
        assert not self._running or self._votes < {each.replica for each in self.quorum.members}, "an undecided step"

    def _awaited(self) -> set[int]:
        """Whom the next quorum waits for."""
        if self.quorum is None:
            awaited = self.expected - self._given_up
        else:
            awaited = {each.replica for each in self.quorum.members if each.replica in self._living}
        return (awaited | self._coming) - self._ready.keys()

    def _form(self, now: float) -> list[tuple[int, dict]]:
        """The next quorum, if everybody whom it waits for is ready, and enough are."""
        if self._running or not self._ready:
            return []
        self._waiting_since = self._waiting_since or now
        if self._awaited() or self._lacking(self._ready):
            return []
        members = tuple(sorted(self._ready.values(), key=lambda each: each.replica))
        before = self.quorum
        self.step = max(each.step for each in members)
        same = before and [each.address for each in before.members] == [each.address for each in members]
        over = self.voided and self.voided[-1].quorum == getattr(before, "number", 0)
        if not same or over:
            self.formed.append({each.replica for each in members})
        number = len(self.formed)
        self.quorum = Quorum(number, self.step, members)
        self._running, self._votes, self._ready, self._waiting_since = True, set(), {}, None
        return [(each.replica, self.quorum.message()) for each in members]

    def _lacking(self, ready: dict[int, QuorumMember]) -> str:
        """Why these may not go on; empty if they may."""
        before = self.expected if self.quorum is None else {each.replica for each in self.quorum.members}
        kept = sorted(before & ready.keys())
        if 2 * len(kept) <= len(before):
            return f"only {kept} of {sorted(before)} are there, and more than half of them are needed"
        if max(each.step for each in ready.values()) < self.step:
            return f"nobody who is there has the state before step {self.step}: begin again from a checkpoint"
        return ""

    def _void(self, why: str, now: float) -> list[tuple[int, dict]]:
        """The step of the running quorum is not taken, by nobody."""
        self.voided.append(VoidedStep(self.step, self.quorum.number, why))
        self._running, self._waiting_since = False, now
        return [(each.replica, {"kind": "void", "number": self.quorum.number}) for each in self.quorum.members]

    def _drop(self, silent: Iterable[int], now: float) -> list[tuple[int, dict]]:
        told = []
        for replica in sorted(silent):
            self._given_up.add(replica)
            self._coming.discard(replica)
            address = self._living.get(replica, "")
            told += self.lost(replica, address, f"lives, and did nothing for {self.patience:g} s", now)
        return told + self._form(now)
