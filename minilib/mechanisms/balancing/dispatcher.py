"""What a proxy knows of its targets: the policy chooses, the load counts from that moment, health follows from the end.

    dispatch ──► began ──► ended         answered                         unanswered + 1, then in flight, then nothing
             │         └─► failed        died in the middle of its answer
             ├───────────► ended         the client left, or the target refused: says nothing about the target
             └───────────► failed        refused the connection, died, was too slow

Load counts at dispatch, before anything is sent: counted later, a burst would all go to whoever was idle before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from minilib.mechanisms.balancing.health import Health, HealthRule
from minilib.mechanisms.balancing.policies import Policy


class Dispatched:
    """One request at one target, from dispatch to its end; each step counts once, however often it is reported.

    Attributes:
        target: the number of the target.
    """

    def __init__(self, dispatcher: Dispatcher, target: int) -> None:
        self.target, self._dispatcher = target, dispatcher
        self._unanswered = self._in_flight = True
        dispatcher.unanswered[target] += 1
        dispatcher.in_flight[target] += 1

    def began(self) -> None:
        """The target has begun to answer, so it works."""
        if self._unanswered:
            self._dispatcher.health[self.target].succeeded()
            self._leave_unanswered()

    def ended(self) -> None:
        """The request is over, for whatever reason; says nothing about the target."""
        self._leave_unanswered()
        if self._in_flight:
            self._in_flight = False
            self._dispatcher.in_flight[self.target] -= 1

    def failed(self, now: float) -> None:
        """The target has shown that it does not work; after the end it is too late to say so."""
        if self._in_flight:
            self._dispatcher.health[self.target].failed(now)
        self.ended()

    def _leave_unanswered(self) -> None:
        if self._unanswered:
            self._unanswered = False
            self._dispatcher.unanswered[self.target] -= 1


class Dispatcher:
    """Chooses a target for each request, and keeps the loads and the health from which the policy chooses.

    Args:
        policy: gets the requests in flight of each target as loads, math.inf for one that takes no request.
        num_targets: at the start; `add` adds more.
        window: requests between two calls of policy.observe, which gets how many of them were sent to each target.
        rule: of the health of each target.

    Attributes:
        in_flight: requests dispatched to each target and not over.
        unanswered: those of them that the target has not begun to answer.
        health: of each target.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, policy: Policy, num_targets: int = 0, window: int = 64, rule: HealthRule | None = None) -> None:
        if num_targets < 0 or window < 1:
            raise ValueError(f"needs 0 targets or more and window ≥ 1, got {num_targets} and {window}")
        self.policy, self.rule, self._window = policy, rule or HealthRule(), window
        self.in_flight: list[int] = []
        self.unanswered: list[int] = []
        self.health: list[Health] = []
        self._sent: list[int] = []
        for _ in range(num_targets):
            self.add()

    def add(self) -> int:
        """One more target; returns its number. Numbers are never used again: one that is gone drains for ever."""
        self.health.append(Health(self.rule))
        for counts in (self.in_flight, self.unanswered, self._sent):
            counts.append(0)
        return len(self.health) - 1

    def loads(self, now: float, without: Collection[int] = ()) -> list[float]:
        """Requests in flight at each target; math.inf for one that takes no request, or is in `without`."""
        return [
            float(self.in_flight[target])
            if target not in without and health.takes_requests(now, self.unanswered[target])
            else math.inf
            for target, health in enumerate(self.health)
        ]

    def dispatch(self, key: Any, now: float, without: Collection[int] = ()) -> Dispatched:
        """Let the policy choose, and count.

        Args:
            key: what the policy chooses by.
            now: seconds, of any clock that never goes back.
            without: targets that this request has tried.

        Raises:
            NoTarget: if no target takes requests.
        """
        target = self.policy.choose(key, self.loads(now, without))
        self._sent[target] += 1
        if sum(self._sent) == self._window:
            seen = [sent if load < math.inf else load for sent, load in zip(self._sent, self.loads(now), strict=True)]
            self._sent = [0] * len(seen)
            self.policy.observe(seen)
        return Dispatched(self, target)

    def check_invariants(self) -> None:
        """Counters are never negative, who is unanswered is in flight, and no window is too full."""
        for unanswered, in_flight in zip(self.unanswered, self.in_flight, strict=True):
            assert 0 <= unanswered <= in_flight, f"{unanswered} unanswered of {in_flight} in flight"
        assert sum(self._sent) < self._window, f"{self._sent} requests in a window of {self._window}"
        for health in self.health:
            health.check_invariants()
