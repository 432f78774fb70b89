"""Whether a target may get requests, as its requests show (passive), checks show (active), and an operator says.

    up ── max_failures requests in a row failed ──► paused ── the pause is over ──► on trial: one request at a time
     ▲                                                ▲                                     │            │
     └──────────────── a request succeeded ───────────┼─────────────────────────────────────┘            │
                                                      └────────────── the request failed ────────────────┘

    healthy ── `fall` checks in a row failed ──► unhealthy ── `rise` checks in a row passed ──► healthy

A target gets requests if it is healthy, not paused, and not draining. Both machines are pure: they hold no clock, and
the caller says what time it is.

Source: Envoy, "Outlier detection" and "Health checking"; nginx, max_fails and fail_timeout; HAProxy, rise and fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HealthRule:
    """When a target is taken out, and when it comes back.

    Args:
        max_failures: requests in a row that fail before the target is paused.
        pause: seconds without requests after that; then it is on trial.
        fall: checks in a row that fail before it is unhealthy.
        rise: checks in a row that pass before it is healthy again.
        begins_healthy: whether a target gets requests before its first check.

    Raises:
        ValueError: if a number is out of range.
    """

    max_failures: int = 3
    pause: float = 1.0
    fall: int = 3
    rise: int = 2
    begins_healthy: bool = True

    def __post_init__(self) -> None:
        if min(self.max_failures, self.fall, self.rise) < 1 or not 0 <= self.pause < math.inf:
            raise ValueError(f"thresholds are 1 or more, a pause is finite and 0 or more, got {self}")


class Health:
    """The health of one target.

    Args:
        rule: thresholds.

    Attributes:
        draining: while True the target gets no new request, whatever its health.
    """

    def __init__(self, rule: HealthRule) -> None:
        self.rule, self.draining = rule, False
        self._failures, self._paused_until = 0, -math.inf  # requests in a row; when the trial may begin
        self._healthy, self._against = rule.begins_healthy, 0  # checks in a row that say the opposite

    def failed(self, now: float) -> None:
        """A request has shown that the target does not work."""
        self._failures += 1
        if self._failures >= self.rule.max_failures:
            self._paused_until = now + self.rule.pause

    def succeeded(self) -> None:
        """A request has been answered."""
        self._failures, self._paused_until = 0, -math.inf

    def checked(self, passed: bool) -> None:
        """A check has passed or failed; a target whose checks have brought it back owes nothing to its past."""
        self._against = 0 if passed == self._healthy else self._against + 1
        if self._against >= (self.rule.rise if passed else self.rule.fall):
            self._healthy, self._against = passed, 0
            if passed:
                self.succeeded()

    def takes_requests(self, now: float, unanswered: int) -> bool:
        """Whether the target may get one more request; `unanswered` are those that it has and has not begun to answer.

        On trial it has one at a time. That nothing but this number is remembered is why a trial whose client leaves
        blocks nobody.
        """
        if self.draining or not self._healthy or now <= self._paused_until:
            return False
        return not self.on_trial or unanswered == 0

    @property
    def on_trial(self) -> bool:
        """Whether the target has failed and has not succeeded since."""
        return self._failures >= self.rule.max_failures

    def state(self, now: float) -> str:
        """One of "draining", "unhealthy", "paused", "on trial", "up"; the first that is so."""
        if self.draining:
            return "draining"
        if not self._healthy:
            return "unhealthy"
        if now <= self._paused_until:
            return "paused"
        return "on trial" if self.on_trial else "up"

    def check_invariants(self) -> None:
        """Who is paused has failed, and counters of checks are below the threshold that resets them."""
        assert self._paused_until == -math.inf or self.on_trial, "paused without a failure"
        assert 0 <= self._against < (self.rule.fall if self._healthy else self.rule.rise), f"{self._against} checks"
