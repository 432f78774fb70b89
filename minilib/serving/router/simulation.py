"""Routing without processes: conversations, a policy, and replicas whose steps take what they cost.

    conversations ──► policy ──► replica 0    SimulatedEngine: own clock, own pages, own prefix cache
          ▲               ├────► replica 1
          └── answers ────┴────► …

The replica whose clock is furthest behind steps first, and a request is routed when no replica is behind its time. So
nothing is decided with what happens later: the loads are those that a router would count at that moment.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace

from minilib.mechanisms.balancing import Policy
from minilib.numbers.load_metrics import Delay, max_over_mean
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.conversations import ChatSession
from minilib.serving.load.metrics import RequestTimes
from minilib.serving.load.simulation import SimulatedEngine
from minilib.serving.request import SamplingParams
from minilib.serving.router.prefix_aware import RoutingKey

NewReplica = Callable[[VirtualClock], SimulatedEngine]


@dataclass(frozen=True)
class RoutedTurn:
    """What became of one turn of one conversation.

    Args:
        session, turn: which one.
        replica: where it was sent.
        prompt_tokens, cached_tokens: of its prompt, and those of them that the replica had.
        times: when it was due, and when its tokens came.
    """

    session: int
    turn: int
    replica: int
    prompt_tokens: int
    cached_tokens: int
    times: RequestTimes


@dataclass(frozen=True)
class RoutingReport:
    """A load in numbers: its turns, in the order in which they ended, and seconds that each replica computed."""

    turns: Row[RoutedTurn]
    busy: Row[float]

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens that were not computed."""
        return sum(turn.cached_tokens for turn in self.turns) / sum(turn.prompt_tokens for turn in self.turns)

    @property
    def ttft(self) -> Delay:
        """Time to first token, in seconds."""
        return Delay.of([turn.times.ttft for turn in self.turns])

    @property
    def imbalance(self) -> float:
        """The busiest replica's seconds over the mean."""
        return max_over_mean(self.busy)

    @property
    def counts(self) -> list[int]:
        """Turns that each replica was sent."""
        sent = [turn.replica for turn in self.turns]
        return [sent.count(replica) for replica in range(len(self.busy))]


class ExactPrefixes:
    """What replicas hold as they tell it: without delay, and exactly. Blocks are pages of tokens.

    Args:
        replicas: engines with a prefix cache.
    """

    def __init__(self, replicas: Row[SimulatedEngine]) -> None:
        self.replicas = replicas

    def depths(self, key: RoutingKey, num_targets: int) -> list[int]:
        """Pages of the longest prefix that each replica holds."""
        return [len(replica.prefix.index.match(key.blocks, key.salt).values) for replica in self.replicas]

    def sent(self, target: int, key: RoutingKey) -> None:
        """Nothing: the replica knows."""

    def withdraw(self, target: int, key: RoutingKey) -> None:
        """Nothing: the replica knows."""

    def forget(self, target: int) -> None:
        """Nothing: the replica knows."""


def simulate_routing(
    sessions: Row[ChatSession],
    make_policy: Callable[[Row[SimulatedEngine]], Policy],
    new_replica: NewReplica,
    num_replicas: int = 4,
) -> RoutingReport:
    """Serve conversations on several replicas.

    Args:
        sessions: the load.
        make_policy: the replicas → the policy, whose keys are `RoutingKey`s of pages of tokens, and whose loads are
            requests in flight. Most policies have no use for the replicas.
        new_replica: a clock → an engine with a prefix cache.
        num_replicas: how many of them.

    Raises:
        ValueError: if there is no session or no replica.
    """
    if not sessions or num_replicas < 1:
        raise ValueError(f"a session and a replica or more are needed, got {len(sessions)} and {num_replicas!r}")
    clocks = [VirtualClock() for _ in range(num_replicas)]
    return _Routing(sessions, make_policy, [new_replica(clock) for clock in clocks], clocks).run()


class _Routing:
    """A simulation under way."""

    def __init__(self, sessions, make_policy, replicas: list[SimulatedEngine], clocks: list[VirtualClock]) -> None:
        self.sessions, self.replicas, self.clocks = sessions, replicas, clocks
        self.policy = make_policy(replicas)
        self.loads = [0] * len(replicas)
        self.due = [(session.due, number, 0) for number, session in enumerate(sessions)]
        heapq.heapify(self.due)
        self.said = [list(session.system) for session in sessions]
        self.running: dict[str, RoutedTurn] = {}
        self.ended: list[RoutedTurn] = []

    def run(self) -> RoutingReport:
        """Go on until every conversation has ended."""
        while self.due or self.running:
            busy = [number for number, replica in enumerate(self.replicas) if replica.has_unfinished]
            behind = min(busy, key=lambda number: self.clocks[number].now(), default=None)
            if self.due and (behind is None or self.clocks[behind].now() >= self.due[0][0]):
                self._route(*heapq.heappop(self.due))
            else:
                self._step(behind)
        busy = [sum(step.seconds for step in replica.history) for replica in self.replicas]
        return RoutingReport(self.ended, busy)

    def _route(self, due: float, session: int, turn: int) -> None:
        prompt, asked = self.said[session], self.sessions[session].turns[turn]
        prompt.extend(asked.question)
        page_size = self.replicas[0].cache.page_size
        chosen = self.policy.choose(RoutingKey.of_tokens(prompt, f"session {session}", size=page_size), self.loads)
        self.loads[chosen] += 1
        self.clocks[chosen].wait_until(due)
        params = SamplingParams(max_tokens=asked.answer_length, temperature=0, ignore_eos=True)
        name = f"{session}/{turn}"
        self.replicas[chosen].add_request(name, prompt, params)
        self.running[name] = RoutedTurn(session, turn, chosen, len(prompt), 0, RequestTimes(due, (), due))

    def _step(self, replica: int) -> None:
        outputs = self.replicas[replica].step()
        now = self.clocks[replica].now()
        for output in outputs:
            assert output.error is None, output.error
            turn = self.running[output.request_id]
            self.said[turn.session].append(output.token_id)
            times = RequestTimes(turn.times.due, (*turn.times.token_times, now), now)
            turn = replace(turn, cached_tokens=output.cached_tokens, times=times)
            self.running[output.request_id] = turn
            if output.finish_reason:
                self._end(self.running.pop(output.request_id))

    def _end(self, turn: RoutedTurn) -> None:
        self.ended.append(turn)
        self.loads[turn.replica] -= 1
        turns, following = self.sessions[turn.session].turns, turn.turn + 1
        if following < len(turns):
            heapq.heappush(self.due, (turn.times.ended + turns[following].pause, turn.session, following))
