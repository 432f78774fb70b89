"""Retries as a share of requests, so that a system in trouble is not given several times its load ("retry storm").

With k attempts for each request, a system whose requests all fail gets k times as many; on three levels, k³. A budget
bounds the factor whatever fails: each request earns a part of a retry, and what is not spent does not pile up.

Source: Finagle and Linkerd, RetryBudget (20 % of requests + a floor); Envoy, retry_budget (20 %, at least 3 at once);
"The Site Reliability Workbook", 2018, chapter on overload: 10 % for each client.
"""

from __future__ import annotations

import math


class RetryBudget:
    """Allows at most `most` + `ratio` · requests + `per_second` · seconds retries, in every stretch of time.

    Args:
        ratio: retries that each request earns.
        per_second: retries that each second earns, so that a few requests an hour may be retried as well.
        most: retries that are saved at most, and that there are at the start.

    Attributes:
        requests, retries, refused: how many were counted so far; refused are retries that the budget did not allow.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, ratio: float = 0.2, per_second: float = 1.0, most: float = 10.0) -> None:
        if not (0 <= ratio < math.inf and 0 <= per_second < math.inf and 0 <= most < math.inf):
            raise ValueError(f"finite and not negative: {ratio=}, {per_second=}, {most=}")
        self.ratio, self.per_second, self.most = ratio, per_second, most
        self.requests = self.retries = self.refused = 0
        self._saved, self._at = most, -math.inf

    def request(self) -> None:
        """A request has come; its retries are not requests."""
        self.requests += 1
        self._saved = min(self.most, self._saved + self.ratio)

    def take(self, now: float) -> bool:
        """Spend one retry; False if there is none."""
        if self._at > -math.inf:
            self._saved = min(self.most, self._saved + self.per_second * max(0.0, now - self._at))
        self._at = max(self._at, now)
        allowed = self._saved >= 1 - 1e-9  # five times 0.2 is one retry
        self._saved = max(0.0, self._saved - allowed)
        self.retries += allowed
        self.refused += not allowed
        return allowed

    def check_invariants(self) -> None:
        """Nothing is owed, and not too much is saved."""
        assert 0 <= self._saved <= self.most, f"{self._saved} retries saved of {self.most}"
