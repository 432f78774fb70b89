"""Dominant resource fairness: tenants share several resources by what each of them needs most of.

    dominant share of a tenant = max over resources of what it holds / what there is

The tenant whose dominant share is least, for its weight, goes next. With one resource this is max-min fairness.

    9 CPUs, 18 GB        a task of A: 1 CPU, 4 GB        a task of B: 3 CPUs, 1 GB
    A runs 3 tasks, 12 of 18 GB;  B runs 2 tasks, 6 of 9 CPUs:  2/3 each

Shares are of what is held now, not of service received: `FairShare` remembers, this rule does not. So a tenant one of
whose tasks runs for long is passed by whoever holds less, as often as such tasks come: the rule by itself bounds no
wait. A gang that lost its GPUs while its tenant's other gangs run stands behind every newcomer (volcano#5805); whoever
uses the rule for gangs has to let the interrupted ones go first.

Source: Ghodsi et al., "Dominant Resource Fairness: Fair Allocation of Multiple Resource Types", NSDI 2011: algorithm 1
(tasks), section 4 (divisible ones), and the four properties that tests hold it to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from minilib.mechanisms.basics.checks import check_quantity
from minilib.mechanisms.scheduling.fair_share import InvalidWeight, SharingPolicy
from minilib.mechanisms.scheduling.policy import Place, check_positive
from minilib.mechanisms.scheduling.task import Load, Task, UnknownTenant


class InvalidDemand(ValueError):
    """A demand that is negative, no number, empty, or for a resource that nobody has."""


class DominantResourceFairness(SharingPolicy):
    """The tenant with the least dominant share next; within a tenant, the most urgent, and among equals the oldest.

    Args:
        capacity: of each resource by name, above 0.
        use: what a tenant holds now, of each resource, as whoever runs its tasks knows it.
        weights: of each tenant, above 0; None to let anybody in with a weight of 1.

    Raises:
        ValueError: if a capacity is not above 0, or there is none.
        InvalidWeight: if a weight is not above 0.

    Bound: none; see above.
    """

    def __init__(
        self,
        capacity: Mapping[str, float],
        use: Callable[[str], Mapping[str, float]],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weights)
        self.capacity, self.use = _checked_capacity(capacity), use

    def share(self, tenant: str) -> float:
        """Dominant share of what a tenant holds now, 0 to 1."""
        return float(dominant_share(self.use(tenant), self.capacity))

    def group_rank(self, group: str) -> Place:
        """By the tenant's dominant share, for its weight."""
        return (self.share(group) / self.weight(group),)

    def rank(self, task: Task) -> Place:
        """By priority."""
        return (task.priority,)

    def wait_bound(self, task: Task, load: Load) -> float:
        """Infinite: tasks of tenants that hold less may go first again and again."""
        return math.inf


def dominant_share(use: Mapping[str, float], capacity: Mapping[str, float]) -> float | Fraction:
    """The largest share of any resource.

    Raises:
        InvalidDemand: if something is used that there is none of, or its amount is no finite number ≥ 0.
    """
    for resource, amount in use.items():
        if resource not in capacity:
            raise InvalidDemand(f"{resource!r} is none of the resources that there are: {', '.join(capacity)}")
        check_quantity(f"an amount of {resource!r}", amount, error=InvalidDemand)
    return max((amount / capacity[resource] for resource, amount in use.items()), default=0)


def progressive_filling(
    demands: Mapping[str, Mapping[str, float]],
    capacity: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
) -> dict[str, Fraction]:
    """How many tasks each tenant is entitled to if tasks can be divided and each tenant has more than enough of them.

    All dominant shares grow at the pace of their weights. When a resource is used up, those who need it stop, and the
    others go on.

    Args:
        demands: what one task of each tenant takes, of each resource.
        capacity: of each resource, above 0.
        weights: of each tenant, above 0; 1 for all if left out.

    Returns:
        Tasks by tenant, exactly.

    Raises:
        InvalidDemand: if a task takes nothing, or what there is none of.
        InvalidWeight: if a weight is not above 0.
        UnknownTenant: if there are weights, and a tenant has none.
        ValueError: if a capacity is not above 0, or there is none.
    """
    left = {resource: Fraction(amount) for resource, amount in _checked_capacity(capacity).items()}
    exact = {tenant: _exact(tenant, demand, capacity) for tenant, demand in demands.items()}
    paces = {}  # tasks for each unit of dominant share and weight
    for tenant, demand in exact.items():
        if weights is not None and tenant not in weights:
            raise UnknownTenant(f"tenant {tenant!r} has no weight; those with one are {', '.join(map(repr, weights))}")
        weight = 1 if weights is None else weights[tenant]
        check_positive(f"weight of tenant {tenant!r}", weight, InvalidWeight)
        paces[tenant] = Fraction(weight) / dominant_share(demand, left)
    tasks = dict.fromkeys(demands, Fraction(0))
    growing = set(demands)
    while growing:
        rates = {name: sum(paces[tenant] * exact[tenant].get(name, 0) for tenant in growing) for name in left}
        growth = min(left[name] / rate for name, rate in rates.items() if rate)
        for tenant in growing:
            tasks[tenant] += paces[tenant] * growth
        left = {name: amount - rates[name] * growth for name, amount in left.items()}
        growing = {tenant for tenant in growing if all(left[name] for name, need in exact[tenant].items() if need)}
    return tasks


def _checked_capacity(capacity: Mapping[str, float]) -> dict[str, float]:
    """Capacities, each above 0.

    Raises:
        ValueError: if one is not, or there is none.
    """
    if not capacity:
        raise ValueError("capacity has an amount of each resource, got none")
    for resource, amount in capacity.items():
        check_positive(f"capacity of {resource!r}", amount)
    return dict(capacity)


def _exact(tenant: str, demand: Mapping[str, float], capacity: Mapping[str, float]) -> dict[str, Fraction]:
    if not dominant_share(demand, capacity):
        raise InvalidDemand(f"a task of {tenant!r} takes something of one resource at least, got {dict(demand)}")
    return {resource: Fraction(amount) for resource, amount in demand.items()}
