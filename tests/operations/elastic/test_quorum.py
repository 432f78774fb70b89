"""The lighthouse's decisions under losses, sleep and late messages in any order: one history, held by a majority."""

import random

import pytest

from minilib.operations.elastic.quorum import Quorum, QuorumDecisions, QuorumMember


class Process:
    """A replica as an automaton; its state is the history of the steps that it has applied."""

    def __init__(self, replica: int, address: str) -> None:
        self.replica, self.address = replica, address
        self.applied: list[tuple[int, int]] = []  # (step, number of the quorum)
        self.quorum: Quorum | None = None  # the one it votes in
        self.inbox: list[dict] = []
        self.outbox: list[dict] = [{"kind": "ready", "step": 0}]
        self.asleep = self.ended = False

    def read(self, peers: dict[str, "Process"], healthy: bool) -> None:
        said = self.inbox.pop(0)
        kind, number = said["kind"], said.get("number")
        if self.quorum is None:
            if kind == "quorum":
                self._compute(Quorum.from_message(said), peers, healthy)
            elif kind == "dropped":
                self._ready()
            elif kind in ("finished", "no quorum"):
                self.ended = True
        elif number == self.quorum.number and (kind == "void" or said.get("step") == self.quorum.step):
            if kind == "commit":
                self.applied.append((self.quorum.step, number))
            self.quorum = None
            self._ready()

    def will_stand_before(self, step: int) -> bool:
        """Whether it has the state before a step, or will have once it has read what it was told."""
        told = self.quorum is not None and any(
            (said["kind"], said.get("step"), said.get("number")) == ("commit", step - 1, self.quorum.number)
            for said in self.inbox
        )
        return len(self.applied) + told == step

    def _compute(self, quorum: Quorum, peers: dict[str, "Process"], healthy: bool) -> None:
        donors = [peers[each.address] for each in quorum.members if each.step == quorum.step]
        if len(self.applied) < quorum.step and healthy:
            self.applied = list(donors[0].applied[: quorum.step])
        self.quorum = quorum
        self.outbox.append({"kind": "vote", "number": quorum.number, "yes": healthy})

    def _ready(self) -> None:
        self.outbox.append({"kind": "ready", "step": len(self.applied)})


class World:
    """Processes, the decisions, and messages between them, which keep their order on each connection alone."""

    def __init__(self, seed: int, replicas: int = 3) -> None:
        self.chance, self.now, self.made = random.Random(seed), 0.0, 0
        self.decisions = QuorumDecisions(frozenset(range(replicas)), patience=50.0)
        self.processes: dict[int, Process] = {}  # the newest of each replica
        self.all: dict[str, Process] = {}
        for replica in range(replicas):
            self.start(replica)

    def start(self, replica: int) -> None:
        self.made += 1
        process = Process(replica, f"process {self.made}")
        if (older := self.processes.get(replica)) is not None:
            self.send(self.decisions.lost(replica, older.address, "was replaced", self.now))
            if self.chance.random() < 0.3:
                self.decisions.expect(replica)
        self.processes[replica] = self.all[process.address] = process

    def send(self, told: list[tuple[int, dict]]) -> None:
        for replica, message in told:
            self.processes[replica].inbox.append(message)

    def lose(self, process: Process, why: str) -> None:
        self.send(self.decisions.lost(process.replica, process.address, why, self.now))

    def hear(self, process: Process) -> None:
        said = process.outbox.pop(0)
        self.decisions.alive(process.replica, process.address)
        if said["kind"] == "ready":
            self.send(self.decisions.ready(QuorumMember(process.replica, process.address, said["step"]), self.now))
        else:
            self.send(self.decisions.vote(process.replica, said["number"], said["yes"], "no result", self.now))

    def act(self, faults: bool) -> None:
        """One event."""
        self.now += 1
        process = self.chance.choice(list(self.processes.values()))
        fault = self.chance.random() if faults else 1.0
        if process.ended and fault < 0.2:
            self.start(process.replica)
        elif fault < 0.01:
            process.ended = True
            self.lose(process, "is gone")
        elif fault < 0.02 and not process.ended:
            process.asleep = True
            self.lose(process, "was silent")
        elif fault < 0.05 or not faults:
            process.asleep = False
        if not (process.ended or process.asleep):
            if process.inbox and (not process.outbox or self.chance.random() < 0.5):
                process.read(self.all, not faults or self.chance.random() > 0.02)
            elif process.outbox:
                self.hear(process)
        self.send(self.decisions.tick(self.now))
        self.check()

    def check(self) -> None:
        self.decisions.check_invariants()
        history = [(each.step, each.quorum) for each in self.decisions.committed]
        for process in self.all.values():
            assert process.applied == history[: len(process.applied)], "a process has applied what does not count"


@pytest.mark.parametrize("seed", range(60))
def test_there_is_one_history_whatever_is_lost(seed):
    world = World(seed, replicas=2 + seed % 4)
    for _ in range(1500):
        world.act(faults=True)
    assert world.made > len(world.processes), "nobody was lost"


@pytest.mark.parametrize("seed", range(20))
def test_steps_go_on_once_nothing_is_lost_any_more(seed):
    world = World(seed, replicas=3 + seed % 3)
    for _ in range(300):
        world.act(faults=True)
    for process in list(world.processes.values()):
        if process.ended:
            world.start(process.replica)
    before = world.decisions.step
    state_is_left = any(process.will_stand_before(before) for process in world.processes.values())
    for _ in range(3000):
        for process in list(world.processes.values()):
            if process.ended:
                world.start(process.replica)
        world.act(faults=False)
    if state_is_left:
        assert world.decisions.step >= before + 50
    else:
        assert world.decisions.step == before, "nobody may go on with an older state"


def ready(decisions: QuorumDecisions, replica: int, step: int, now: float = 0.0) -> list[tuple[int, dict]]:
    decisions.alive(replica, str(replica))
    return decisions.ready(QuorumMember(replica, str(replica), step), now)


def test_the_first_quorum_waits_for_all_and_gives_up_who_never_comes():
    decisions = QuorumDecisions(frozenset(range(3)), patience=10.0)
    assert ready(decisions, 0, 0) == ready(decisions, 1, 0, 1.0) == decisions.tick(9.0) == []
    told = decisions.tick(11.0)
    assert [replica for replica, _ in told] == [0, 1] and decisions.quorum.number == 1
    assert ready(decisions, 2, 0, 12.0) == [], "it is for the next step"


def test_half_is_not_a_majority_and_a_stranger_does_not_make_one():
    decisions = QuorumDecisions(frozenset({0, 1}), patience=10.0)
    ready(decisions, 0, 0)
    decisions.alive(1, "1")
    assert decisions.lost(1, "1", "is gone", 0.0) == [(1, {"kind": "dropped"})]
    assert ready(decisions, 7, 0) == []
    why = "only [0] of [0, 1] are there, and more than half of them are needed"
    assert decisions.tick(20.0) == [(replica, {"kind": "no quorum", "why": why}) for replica in (0, 7)]


def test_a_state_that_is_lost_is_not_replaced_by_an_older_one():
    decisions = QuorumDecisions(frozenset({0}), patience=10.0)
    ready(decisions, 0, 0)
    assert decisions.vote(0, 1, True, "", 0.0)[0][1]["kind"] == "commit"
    decisions.lost(0, "0", "is gone", 0.0)
    assert ready(decisions, 0, 0) == []
    assert "nobody who is there has the state before step 1" in decisions.tick(20.0)[0][1]["why"]
    [(replica, refusal)] = ready(decisions, 0, 5)
    assert (replica, refusal["kind"]) == (0, "no quorum") and "belongs to another run" in refusal["why"]


def test_a_vote_for_a_quorum_that_is_over_does_not_count():
    decisions = QuorumDecisions(frozenset(range(3)), patience=10.0)
    for replica in range(3):
        ready(decisions, replica, 0)
    decisions.vote(0, 1, True, "", 0.0)
    assert [message["kind"] for _, message in decisions.vote(1, 1, False, "no result", 0.0)] == ["void"] * 3
    assert decisions.vote(2, 1, True, "", 0.0) == [] and decisions.refused == 1
    assert (decisions.step, decisions.voided[0].why, decisions.committed) == (0, "replica 1: no result", [])


def test_who_lives_and_does_nothing_is_dropped():
    decisions = QuorumDecisions(frozenset(range(3)), patience=10.0)
    for replica in range(3):
        ready(decisions, replica, 0)
    for replica in (0, 1):
        decisions.vote(replica, 1, True, "", 0.0)
    assert decisions.tick(9.0) == []
    assert {message["kind"] for _, message in decisions.tick(11.0)} == {"void", "dropped"}
    assert decisions.voided[0].why == "replica 2 lives, and did nothing for 10 s"


def test_who_was_started_is_waited_for_until_patience_ends():
    decisions = QuorumDecisions(frozenset({0}), patience=10.0)
    ready(decisions, 0, 0)
    decisions.vote(0, 1, True, "", 1.0)
    decisions.expect(5)
    assert ready(decisions, 0, 1, 2.0) == decisions.tick(11.0) == []
    assert [replica for replica, _ in ready(decisions, 5, 0, 11.5)] == [0, 5]
    decisions.vote(5, 2, True, "", 12.0)
    decisions.vote(0, 2, True, "", 12.0)
    decisions.expect(6)
    assert ready(decisions, 0, 2, 13.0) == ready(decisions, 5, 2, 13.0) == []
    assert [replica for replica, _ in decisions.tick(24.0)] == [0, 5]
