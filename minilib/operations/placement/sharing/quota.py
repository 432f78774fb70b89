"""Quotas of GPUs: what a tenant owns, what it may borrow of others, and what others may borrow of it.

    nominal quota      GPUs that a tenant has a right to
    cohort             tenants that lend each other what they do not use
    borrowing limit    GPUs beyond its nominal quota that a tenant may have; no limit but the cohort if left out
    lending limit      GPUs of its nominal quota that others may have; all if left out

        a  nominal 8, uses 12  ████████████            borrowed 4
        b  nominal 8, uses 3   ███·····                unused 5, of which 4 are lent: one more can be borrowed

Borrowed GPUs are never more than what the cohort leaves unused, and an owner who needs its GPUs reclaims them.

Source: kueue.sigs.k8s.io, "ClusterQueue" (nominalQuota, borrowingLimit, lendingLimit, cohortName) and "Cohort".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from minilib.mechanisms.basics.checks import check_whole, is_whole, whole
from minilib.mechanisms.scheduling import UnknownTenant

RECLAIM = "finish or preempt jobs first"


class InvalidQuota(ValueError):
    """A quota that contradicts itself, or quotas beyond what the cluster has."""


class QuotaInUse(ValueError):
    """A quota below what runs, or a tenant that leaves while its jobs are here; the message says by how much."""


@dataclass(frozen=True)
class TenantQuota:
    """What a tenant may have.

    Args:
        nominal: GPUs that it has a right to.
        cohort: name of the tenants that it lends to and borrows from; none if left out.
        borrowing_limit: GPUs beyond nominal that it may have; as many as the cohort lends if left out.
        lending_limit: GPUs of nominal that its cohort may have; all if left out.

    Raises:
        InvalidQuota: if a number is no whole one ≥ 0, a limit has no cohort, or more is lent than owned.
    """

    nominal: int
    cohort: str = ""
    borrowing_limit: int | None = None
    lending_limit: int | None = None

    def __post_init__(self) -> None:
        numbers = {"nominal": self.nominal, "borrowing_limit": self.borrowing_limit,
                   "lending_limit": self.lending_limit}  # fmt: skip
        for name, number in numbers.items():
            if not (number is None and name != "nominal") and not is_whole(number, 0):
                raise InvalidQuota(f"{name} is a whole number of GPUs ≥ 0, got {number!r}")
            if number is not None and name != "nominal" and not self.cohort:
                raise InvalidQuota(f"{name} is about a cohort; name one, or leave out {name}={number}")
            object.__setattr__(self, name, whole(number))  # one of numpy may have too few bits for a sum
        if self.lendable > self.nominal:
            raise InvalidQuota(f"lending_limit is at most nominal = {self.nominal}, got {self.lending_limit}")

    @property
    def lendable(self) -> int:
        """GPUs that its cohort may have."""
        if not self.cohort:
            return 0
        return self.nominal if self.lending_limit is None else self.lending_limit

    @property
    def guaranteed(self) -> int:
        """GPUs that nobody else may have."""
        return self.nominal - self.lendable


class TenantUse(NamedTuple):
    """What a tenant has at a time.

    Args:
        tenant: who.
        entitled: GPUs of its nominal quota.
        used: GPUs that it has.
        borrowed: of those, how many are beyond nominal.
        lendable: GPUs that it does not use, and others may.
    """

    tenant: str
    entitled: int
    used: int
    borrowed: int
    lendable: int


class Quotas:
    """The quotas of all tenants, and how many GPUs each uses.

    Args:
        quotas: by tenant.
        gpus: that the cluster has; nominal quotas are not more in all.

    Raises:
        InvalidQuota: if they are more, or gpus is no whole number ≥ 0.
    """

    def __init__(self, quotas: Mapping[str, TenantQuota], gpus: int) -> None:
        check_whole("gpus", gpus, error=InvalidQuota)
        self.gpus = gpus
        self._quotas = dict(quotas)
        self._used: Counter[str] = Counter()
        self._check_total(self._quotas)

    @property
    def tenants(self) -> list[str]:
        """All of them, in the order in which they came."""
        return list(self._quotas)

    def quota(self, tenant: str) -> TenantQuota:
        """What a tenant may have.

        Raises:
            UnknownTenant: if it has no quota; so do all methods that take a tenant.
        """
        if tenant not in self._quotas:
            known = ", ".join(map(repr, self._quotas)) or "nobody"
            raise UnknownTenant(f"tenant {tenant!r} has no quota; those with one: {known}. Give it one by `change`")
        return self._quotas[tenant]

    def used(self, tenant: str) -> int:
        """GPUs that a tenant has."""
        self.quota(tenant)
        return self._used[tenant]

    def use(self) -> list[TenantUse]:
        """What each tenant is entitled to, has and borrows."""
        return [
            TenantUse(name, quota.nominal, self._used[name], max(0, self._used[name] - quota.nominal),
                      max(0, min(quota.lendable, quota.nominal - self._used[name])))
            for name, quota in self._quotas.items()
        ]  # fmt: skip

    def ceiling(self, tenant: str) -> int:
        """The most that a tenant ever has: if its whole cohort is idle."""
        quota = self.quota(tenant)
        lent = sum(self._quotas[other].lendable for other in self.cohort(tenant) if other != tenant)
        return quota.nominal + (lent if quota.borrowing_limit is None else min(lent, quota.borrowing_limit))

    def available(self, tenant: str) -> int:
        """How many GPUs more a tenant may have now, by quotas alone."""
        quota, used = self.quota(tenant), self._used[tenant]
        own = max(0, quota.guaranteed - used)
        found = own + self._unlent(quota.cohort, self._quotas) if quota.cohort else quota.nominal - used
        return found if quota.borrowing_limit is None else min(found, quota.nominal + quota.borrowing_limit - used)

    def entitled(self, tenant: str, gpus: int) -> bool:
        """Whether a tenant may have so many more without borrowing."""
        return self.used(tenant) + gpus <= self.quota(tenant).nominal

    def cohort(self, tenant: str) -> list[str]:
        """The tenants of a tenant's cohort, itself among them."""
        quota = self.quota(tenant)
        if not quota.cohort:
            return [tenant]
        return [name for name, other in self._quotas.items() if other.cohort == quota.cohort]

    def take(self, tenant: str, gpus: int) -> None:
        """A tenant has so many more.

        Raises:
            InvalidQuota: if it may not; nothing was changed.
        """
        check_whole("gpus", gpus, error=InvalidQuota)
        if gpus > self.available(tenant):
            raise InvalidQuota(f"tenant {tenant!r} may have {self.available(tenant)} GPUs more, and takes {gpus}: "
                               f"{gpus - self.available(tenant)} too many")  # fmt: skip
        self._used[tenant] += gpus

    def give_back(self, tenant: str, gpus: int) -> None:
        """A tenant has so many fewer.

        Raises:
            InvalidQuota: if it does not have so many; nothing was changed.
        """
        check_whole("gpus", gpus, error=InvalidQuota)
        if gpus > self.used(tenant):
            raise InvalidQuota(f"tenant {tenant!r} has {self.used(tenant)} GPUs, and gives back {gpus}")
        self._used[tenant] -= gpus

    def scratch(self) -> Quotas:
        """A copy to try things on."""
        twin = Quotas.__new__(Quotas)
        twin.gpus, twin._quotas, twin._used = self.gpus, self._quotas, self._used.copy()
        return twin

    def with_more(self, tenant: str, gpus: int) -> Quotas:
        """A copy in which a tenant has so many more, whether it may or not; then less is available, or less than 0."""
        twin = self.scratch()
        twin._used[tenant] += gpus
        return twin

    def change(self, tenant: str, quota: TenantQuota) -> None:
        """A tenant has another quota from now on, or joins.

        Raises:
            QuotaInUse: if more runs than it would allow; nothing was changed.
            InvalidQuota: if nominal quotas would be more than the cluster has.
        """
        changed = self._quotas | {tenant: quota}
        self._check_total(changed)
        self._check_use(changed, f"with {quota} for {tenant!r}")
        self._quotas = changed

    def remove(self, tenant: str) -> None:
        """A tenant leaves.

        Raises:
            QuotaInUse: if it has GPUs, or others have borrowed them.
        """
        if used := self.used(tenant):
            raise QuotaInUse(f"tenant {tenant!r} has {used} GPUs; finish its jobs before it leaves")
        left = {name: quota for name, quota in self._quotas.items() if name != tenant}
        self._check_use(left, f"without {tenant!r}")
        self._quotas = left

    def check_invariants(self) -> None:
        """Nobody has more than nominal and borrowed GPUs, and what is borrowed is what others do not use."""
        assert all(tenant in self._quotas for tenant in +self._used), "somebody without a quota has GPUs"
        for cohort in {quota.cohort for quota in self._quotas.values()}:
            use = [each for each in self.use() if self._quotas[each.tenant].cohort == cohort]
            assert sum(each.borrowed for each in use) <= sum(each.lendable for each in use), f"{cohort!r} lends more"
            for each in use:
                limit = self._quotas[each.tenant].borrowing_limit
                assert 0 <= each.used <= self.ceiling(each.tenant), f"{each} is beyond what it ever may have"
                assert limit is None or each.borrowed <= limit, f"{each} borrows more than {limit}"

    def _unlent(self, cohort: str, quotas: Mapping[str, TenantQuota]) -> int:
        """What a cohort lends, less what its tenants use of it."""
        members = {name: quota for name, quota in quotas.items() if quota.cohort == cohort}
        taken = sum(max(0, self._used[name] - quota.guaranteed) for name, quota in members.items())
        return sum(quota.lendable for quota in members.values()) - taken

    def _check_total(self, quotas: Mapping[str, TenantQuota]) -> None:
        if (total := sum(quota.nominal for quota in quotas.values())) > self.gpus:
            raise InvalidQuota(f"nominal quotas are {total} GPUs in all, and the cluster has {self.gpus}: "
                               f"{total - self.gpus} too many")  # fmt: skip

    def _check_use(self, quotas: Mapping[str, TenantQuota], why: str) -> None:
        for cohort in sorted({quota.cohort for quota in (*quotas.values(), *self._quotas.values())}):
            if cohort and (over := -self._unlent(cohort, quotas)) > 0:
                raise QuotaInUse(f"{why} cohort {cohort!r} has lent {over} GPUs more than it can; {RECLAIM}")
        for name, quota in quotas.items():
            limit = 0 if not quota.cohort else quota.borrowing_limit
            if limit is not None and (over := self._used[name] - quota.nominal - limit) > 0:
                raise QuotaInUse(f"{why} {name!r} has {self._used[name]} GPUs, {over} more than it may; {RECLAIM}")
