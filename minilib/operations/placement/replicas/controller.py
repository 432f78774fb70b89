"""Keeps services running: as many replicas as are wanted, apart from each other, and taken away only as budgets allow.

    waits ──placed──→ starts ──weights loaded──→ serves ──chosen to go──→ closes ──no request left──→ gone, or waits
                                                                                              of a drain ↑

A replica that closes gets no new request and ends those that it has. Failures end it at once, and ask no budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from minilib.mechanisms.basics.checks import is_whole
from minilib.operations.placement.gangs.fitting import fit_of
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, Refused, UnknownJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.replica_set import InvalidReplicaSet, ReplicaSet
from minilib.operations.placement.replicas.spread import SpreadPlacement


class DisruptionRefused(RuntimeError):
    """A budget has nothing left: fewer replicas would serve than have to; the message says how many do."""


class _Placed(NamedTuple):
    """Where a replica was placed, and when it serves."""

    placement: GangPlacement
    ready_at: float


class ReplicaController:
    """Services on a scheduler that other jobs use, too.

    Args:
        scheduler: whose `place` is a SpreadPlacement.
        in_flight: requests that a replica has; none if left out. A replica that closes goes when it has none.

    Raises:
        InvalidReplicaSet: if the scheduler packs replicas as it packs gangs.
    """

    def __init__(self, scheduler: GangScheduler, in_flight: Callable[[str], int] | None = None) -> None:
        if not isinstance(scheduler.place, SpreadPlacement):
            raise InvalidReplicaSet(f"replicas are spread: give GangScheduler place=SpreadPlacement(), not "
                                    f"{scheduler.place!r}")  # fmt: skip
        self.scheduler = scheduler
        self.in_flight = in_flight or (lambda name: 0)
        self._names = scheduler.place.names
        self._sets: dict[str, ReplicaSet] = {}
        self._service: dict[str, str] = {}  # of each replica, the oldest first
        self._count: dict[str, int] = {}  # replicas that a service has had
        self._placed: dict[str, _Placed] = {}
        self._closing: dict[str, bool] = {}  # whether a replica that closes is gone afterwards
        self._drains: list[int] = []

    def add(self, service: ReplicaSet, now: float) -> Refused | None:
        """A service with all its replicas joins, or is refused.

        Raises:
            InvalidReplicaSet: if there is one of this name.
            InvalidJob: if another job has the name of a replica; nothing was added.
        """
        if service.name in self._sets:
            raise InvalidReplicaSet(f"there is a service {service.name!r} already; scale it, or give another name")
        self._sets[service.name] = replace(service, replicas=0)
        self._names[service.name] = set()
        self._count.setdefault(service.name, 0)  # the scheduler keeps names of replicas that it refused
        refused, joined = None, False
        try:
            refused = self.scale(service.name, service.replicas, now)
            joined = refused is None
        finally:
            if not joined:
                self.scale(service.name, 0, now)
                del self._sets[service.name]
        return refused

    def scale(self, service: str, replicas: int, now: float) -> Refused | None:
        """Another number of replicas is wanted. Those that close for good stay, if more are wanted again.

        Those go first that wait, then those that start, then those with most siblings beside them, the newest first.

        Returns:
            Why replicas of this service never start; None if they start some time.

        Raises:
            UnknownJob: if there is no such service.
            InvalidReplicaSet: if the number is no whole number ≥ 0.
            InvalidJob: if another job has the name of a replica; those before it are here.
        """
        wanted = replace(self.wanted(service), replicas=replicas)
        staying = [name for name in self.replicas(service) if not self._closing.get(name)]
        closing = [name for name in self.replicas(service) if self._closing.get(name)]
        for name in closing[: max(replicas - len(staying), 0)]:
            del self._closing[name]
            staying.append(name)
        self._sets[service] = replace(wanted, replicas=len(staying))
        for number in range(len(staying), replicas):
            job = wanted.job(self._count[service])
            self._count[service] += 1
            if (refused := self.scheduler.submit(job, now)) is not None:
                return refused
            self._names[service].add(job.name)
            self._service[job.name] = service
            self._sets[service] = replace(wanted, replicas=number + 1)
        self._sets[service] = wanted
        for _ in range(len(staying) - replicas):
            staying.remove(name := self._next_to_go(staying, now))
            self._closing[name] = True
        self._let_go(now)
        return None

    def wanted(self, service: str) -> ReplicaSet:
        """A service with the number of replicas that is wanted now.

        Raises:
            UnknownJob: if there is no such service.
        """
        if service not in self._sets:
            raise UnknownJob(f"there is no service {service!r}; there are {', '.join(self._sets) or 'none'}")
        return self._sets[service]

    def replicas(self, service: str) -> list[str]:
        """All replicas that are here, the oldest first; those that close are among them."""
        return [name for name, its in self._service.items() if its == service]

    def ready(self, service: str, now: float) -> list[str]:
        """Replicas that get new requests."""
        running = self.scheduler.running
        return [name for name in self.replicas(service) if self._serves(name, running.get(name), now)]

    def allowed(self, service: str, now: float) -> int:
        """How many replicas that serve may be taken away by choice now."""
        wanted = self.wanted(service)
        return wanted.budget.allowed(wanted.replicas, len(self.ready(service, now)))

    def step(self, now: float) -> list[GangPlacement]:
        """Let go who has no request left, start what can start, and go on with drains as far as budgets allow."""
        self._let_go(now)
        for host in self._drains:
            self.scheduler.drain(self._gpus_of(host, None))  # those that were repaired since
        started = self.scheduler.start(now)
        self._note(now)
        for host in self._drains:
            for name in self.on_host(host):
                if name not in self._closing and self._may_go(name, now):
                    self._closing[name] = False
        if self._let_go(now):
            started += self.scheduler.start(now)
            self._note(now)
        return started

    def evict(self, name: str, now: float) -> None:
        """A replica gives way: it ends its requests, and waits for another place.

        Raises:
            UnknownJob: if it is not placed.
            DisruptionRefused: if it serves and its service's budget has nothing left.
        """
        if name not in self._service or name not in self.scheduler.running:
            raise UnknownJob(f"{name!r} is no replica that is placed")
        if not self._may_go(name, now):
            raise DisruptionRefused(f"{name} stays: {self._reason(self._service[name], now)}")
        self._closing.setdefault(name, False)

    def drain(self, host: int) -> None:
        """A host gets no new jobs, and its replicas go elsewhere, step by step. Gangs that run there go on.

        GPUs that have failed, or are reserved for others, stay so.

        Raises:
            IndexError: if there is no such host.
        """
        self.scheduler.drain(self._gpus_of(host, None))
        if host not in self._drains:
            self._drains.append(host)

    def undrain(self, host: int) -> None:
        """A host takes jobs again, except on GPUs that failed meanwhile.

        Raises:
            ValueError: if it was not drained.
        """
        if host not in self._drains:
            raise ValueError(f"host {host!r} is not drained; {self._drains or 'none'} are")
        self._drains.remove(host)
        self.scheduler.restore(self._gpus_of(host, "drained"))

    def on_host(self, host: int) -> list[str]:
        """Replicas that have GPUs of a host."""
        owners = map(self.scheduler.free.owner, self.scheduler.cluster.gpus_of(host))
        return [name for name in dict.fromkeys(owners) if name in self._service]

    def blocked(self, now: float) -> dict[str, str]:
        """For each host whose drain does not go on: why, and whether it ever does."""
        found = {}
        for host in self._drains:
            stay = [name for name in self.on_host(host) if name not in self._closing and not self._may_go(name, now)]
            if stay:
                reason = self._reason(self._service[stay[0]], now)
                found[self.scheduler.cluster.hosts[host].name] = f"{stay[0]} stays: {reason}"
        return found

    def victims(self, job: GangJob, now: float) -> list[str] | None:
        """Replicas whose GPUs a more urgent job could have without breaking a budget; None if they do not suffice.

        Replicas are given up one after the other, the least urgent first, until the job fits; those that it does not
        need after all stay. So it finds some that suffice, not the fewest.
        """
        trial, place = (
            self.scheduler.free.scratch(fit_of(job, self.scheduler.cluster.largest_host)),
            self.scheduler.place,
        )
        running, given = self.scheduler.running, list[str]()
        left = {service: self.allowed(service, now) for service in self._sets}
        order = sorted(self._service, key=lambda name: -self._sets[self._service[name]].priority)
        for name in order:
            service = self._sets[self._service[name]]
            if place(job, trial) is not None:
                break
            serves = self._serves(name, running.get(name), now)
            useful = name in running and not any(map(trial.out, running[name].gpus)) and name not in self._closing
            if useful and service.priority > job.priority and (not serves or left[service.name] > 0):
                left[service.name] -= serves
                trial.give_back(name)
                given.append(name)
        if place(job, trial) is None:
            return None
        for name in given.copy():
            trial.take(name, running[name].gpus)
            if place(job, trial) is None:
                trial.give_back(name)
            else:
                given.remove(name)
        return given

    def make_room(self, job: GangJob, now: float) -> list[str] | None:
        """Evict `victims` of a job. Who gets their GPUs is up to the scheduler's policy, which has to put it first."""
        names = self.victims(job, now)
        for name in names or ():
            self.evict(name, now)
        return names

    def check_invariants(self) -> None:
        """Each service has the replicas that it wants, and those that close beside them."""
        for service, its in self._sets.items():
            names = self.replicas(service)
            assert set(names) == self._names[service], f"{service} is spread by other names"
            assert sum(not self._closing.get(name) for name in names) == its.replicas, f"{service} has another number"
        here = self.scheduler.running.keys() | {job.name for job in self.scheduler.waiting}
        assert self._service.keys() <= here and self._closing.keys() <= self._service.keys(), "a replica is gone"

    def _gpus_of(self, host: int, why: str | None) -> list[int]:
        """GPUs of a host that are out of use for a reason; None for those in use."""
        if not is_whole(host, 0) or host >= len(self.scheduler.cluster.hosts):
            raise IndexError(f"host {host!r} is none of the {len(self.scheduler.cluster.hosts)}")
        return [gpu for gpu in self.scheduler.cluster.gpus_of(host) if self.scheduler.free.out(gpu) == why]

    def _serves(self, name: str, placement: GangPlacement | None, now: float) -> bool:
        placed = self._placed.get(name)
        here = placed is not None and placed.placement is placement  # and not failed or moved meanwhile
        return here and placed.ready_at <= now and name not in self._closing

    def _may_go(self, name: str, now: float) -> bool:
        """Whether the budget allows it; who does not serve may always go."""
        serves = self._serves(name, self.scheduler.running.get(name), now)
        return not serves or self.allowed(self._service[name], now) > 0

    def _reason(self, service: str, now: float) -> str:
        its, ready = self._sets[service], len(self.ready(service, now))
        least = its.budget.least(its.replicas)
        said = f"of {its.replicas} replicas of {service} {ready} serve, and {least} have to"
        if least >= its.replicas:
            return f"{said}: it never may go; want more replicas than that, or allow one to be unavailable"
        return f"{said}: it waits for others to be ready"

    def _next_to_go(self, names: list[str], now: float) -> str:
        running, free, place = self.scheduler.running, self.scheduler.free, self.scheduler.place

        def keep(name: str) -> tuple[int, int, int]:
            if name not in running:
                return (0, 0, -names.index(name))
            job = running[name].job
            groups = set(free.cluster.numbers_of(job.spread_over, running[name].gpus))
            beside = place.siblings(job, free)[job.spread_over]
            serves = self._serves(name, running[name], now)
            return (1 + serves, -max(beside[group] for group in groups), -names.index(name))

        return min(names, key=keep)

    def _let_go(self, now: float) -> list[str]:
        """Those that close and have no request left give back their GPUs; who they are."""
        running = self.scheduler.running
        gone = [name for name in self._closing if name not in running or self.in_flight(name) == 0]
        for name in gone:
            if self._closing.pop(name):
                self.scheduler.finish(name, now)
                self._names[self._service.pop(name)].remove(name)
                self._placed.pop(name, None)
            elif name in running:
                self.scheduler.preempt(name, now)
        return gone

    def _note(self, now: float) -> None:
        """Who was placed, or moved, starts from now on."""
        for name, placement in self.scheduler.running.items():
            if name in self._service and (name not in self._placed or self._placed[name].placement is not placement):
                start = self._sets[self._service[name]].start_seconds
                self._placed[name] = _Placed(placement, now + start)
