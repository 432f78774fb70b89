"""What tenants were entitled to, used and borrowed over time: data for a figure of steps, and for a bill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from minilib.operations.placement.sharing.quota import Quotas, TenantUse


class UsageTimeline:
    """What each tenant has, from change to change.

    Attributes:
        times: at which something changed, ascending.
        uses: for each of them, what each tenant had from then on.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.uses: list[dict[str, TenantUse]] = []

    def note(self, now: float, quotas: Quotas) -> None:
        """What tenants have from now on; a second note of the same time replaces the first.

        Raises:
            ValueError: if time runs backwards, or is no finite number.
        """
        if not self._last <= now < math.inf:
            raise ValueError(f"times are finite numbers, noted in order: {now!r} comes after {self._last!r}")
        uses = {each.tenant: each for each in quotas.use()}
        if self.times and now == self.times[-1]:
            del self.times[-1], self.uses[-1]
        if not self.uses or uses != self.uses[-1]:
            self.times.append(now)
            self.uses.append(uses)

    def series(self, tenant: str) -> list[TenantUse]:
        """What a tenant had, one for each of `times`; nothing as long as it was not there."""
        absent = TenantUse(tenant, 0, 0, 0, 0)
        return [uses.get(tenant, absent) for uses in self.uses]

    def gpu_seconds(self, tenant: str, until: float) -> tuple[float, float]:
        """What a tenant used, and borrowed of that, in GPU-seconds.

        Args:
            tenant: who.
            until: when the last of `times` ends.

        Raises:
            ValueError: if it ends before, or never.
        """
        if not self._last <= until < math.inf:
            raise ValueError(f"the last note is of {self._last!r}; until is no earlier, and finite, got {until!r}")
        used = borrowed = 0.0
        for seconds, use in self._spans(tenant, until):
            used, borrowed = used + seconds * use.used, borrowed + seconds * use.borrowed
        return used, borrowed

    @property
    def _last(self) -> float:
        return self.times[-1] if self.times else -math.inf

    def _spans(self, tenant: str, until: float) -> Iterator[tuple[float, TenantUse]]:
        spans = (end - start for start, end in pairwise([*self.times, until]))
        yield from zip(spans, self.series(tenant), strict=True)
