"""Fair share by virtual time: every tenant has a counter of the service that it received, divided by its weight, and
the tenant with the smallest counter is served next.

Who was away must not come back with credit: when a tenant joins the line again, its counter is lifted to the smallest
of those that wait. And nobody loses what others do not use: whoever waits is served, however large its counter.

Source: Sheng et al., "Fairness in Serving Large Language Models", 2024, arXiv:2401.00588: the Virtual Token Counter,
weighted. Start-time fair queueing (Goyal, Vin and Cheng, 1996) is the same for packets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from minilib.mechanisms.scheduling.policy import Place, SchedulingPolicy, check_positive
from minilib.mechanisms.scheduling.task import Load, Task, UnknownTenant


class InvalidWeight(ValueError):
    """A tenant's weight that is negative, zero or no finite number."""


class SharingPolicy(SchedulingPolicy):
    """Tenants in proportion to their weights.

    Args:
        weights: of each tenant, above 0; None to let anybody in with a weight of 1.

    Raises:
        InvalidWeight: if a weight is not above 0.
        ValueError: if there are weights, but no tenant has one.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        if weights is not None and not weights:
            raise ValueError("weights has a weight for each tenant, got none; give None to let anybody in")
        for tenant, weight in (weights or {}).items():
            check_positive(f"weight of tenant {tenant!r}", weight, InvalidWeight)
        super().__init__()
        self.weights = None if weights is None else dict(weights)

    def weight(self, tenant: str) -> float:
        """The share of a tenant, in proportion to those of others."""
        return 1 if self.weights is None else self.weights[tenant]

    def group(self, task: Task) -> str:
        """Its tenant."""
        return task.tenant

    def _check(self, task: Task) -> None:
        if self.weights is not None and task.tenant not in self.weights:
            raise UnknownTenant(
                f"task {task.key!r} is of tenant {task.tenant!r}, who has no weight; those with one are "
                f"{', '.join(map(repr, self.weights))}"
            )


class FairShare(SharingPolicy):
    """Service in proportion to weights among the tenants that want it; within a tenant, first come, first served.

    Two tenants that have tasks in the line all the time receive the same service for their weights, up to
    2 · `step` / weight, where `step` is the most that a tenant receives for one decision, as the paper proves.

    Args:
        weights: of each tenant, above 0; None to let anybody in with a weight of 1.

    Attributes:
        counters: tenant → service received, divided by its weight, and lifted. A tenant that is away and would be
            lifted on its return is forgotten after a while.

    Raises:
        InvalidWeight: if a weight is not above 0.
        ValueError: if there are weights, but no tenant has one.

    Bound: what the tenant's own tasks and this one take, as often as the weights of all others exceed its own; and two
    steps of each other tenant. It needs a number of tenants: an endless row of newcomers each gets its share.
    """

    reorders = True

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.counters: dict[str, float] = {}
        self._present: Counter[str] = Counter()  # tasks of each tenant that are here
        self._last_left = ""  # the tenant whose task left the line last
        self._departures = 0

    def group_rank(self, group: str) -> Place:
        """By the tenant's counter."""
        return (self.counters[group],)

    def wait_bound(self, task: Task, load: Load) -> float:
        """Until the task is completed, its tenant receives its own tasks' work at most, and others their shares."""
        own = (load.others + 1) * load.largest
        mine = self.weight(task.tenant)
        if self.weights is None:
            others = [1.0] * (load.tenants - 1)
        else:
            others = [weight for tenant, weight in self.weights.items() if tenant != task.tenant]
        slack = 2 * load.step * max([1 / mine, *(1 / weight for weight in others)])
        return load.others * load.largest + sum(weight * (own / mine + slack) for weight in others)

    def check_invariants(self) -> None:
        """Tenants that are here are counted, and have a counter that is a number."""
        super().check_invariants()
        assert self._present == Counter(task.tenant for task in self._number), "tasks of tenants are miscounted"
        assert self._present.keys() <= self.counters.keys(), "a tenant has no counter"
        assert all(0 <= counter < math.inf for counter in self.counters.values()), f"counters {self.counters}"

    def _enter(self, task: Task) -> None:
        self._present[task.tenant] += 1
        self.counters.setdefault(task.tenant, 0)

    def _inherit(self, task: Task, child: Task) -> None:
        self._present[child.tenant] += 1

    def _charge(self, task: Task, units: float) -> None:
        self.counters[task.tenant] += units / self.weight(task.tenant)

    def _join(self, task: Task) -> None:
        if task.tenant not in self._lines:
            self.counters[task.tenant] = max(self.counters[task.tenant], self._floor())
        super()._join(task)

    def _leave(self, task: Task) -> None:
        super()._leave(task)
        self._last_left = task.tenant

    def _forget(self, task: Task) -> None:
        self._present[task.tenant] -= 1
        if not self._present[task.tenant]:
            del self._present[task.tenant]
        self._departures += 1
        if 2 * self._departures >= len(self.counters):  # so that this takes O(1) a task
            self._departures, floor = 0, self._floor()
            needed = {*self._present, self._last_left}
            self.counters = {key: value for key, value in self.counters.items() if key in needed or value > floor}

    def _floor(self) -> float:
        """Where a tenant begins: the smallest counter in the line; if nobody waits, that of the last who did."""
        if self._lines:
            return min(self.counters[tenant] for tenant in self._lines)
        return self.counters.get(self._last_left, 0)
