"""A service under load on a simulated clock: requests, a router, replicas that start slowly, and an autoscaler.

Each second: requests end, others arrive, the router gives each to the replica that has fewest, as long as one has a
slot free; then the autoscaler looks, every 15 s. A request that finds no slot waits at the router.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.placement.gangs.job import GangPlacement
from minilib.operations.placement.replicas.autoscaling import Autoscaler
from minilib.operations.placement.replicas.controller import ReplicaController


@dataclass(frozen=True)
class LoadDrillReport:
    """What became of the requests.

    Args:
        arrived: all of them.
        served: those that ended.
        late: those that waited longer at the router than they were to.
        dropped: those whose replica was lost under them.
        longest: seconds that one waited.
        replica_seconds: of replicas that had GPUs, whether they served or not.
        history: replicas wanted and replicas that serve, second by second.
    """

    arrived: int
    served: int
    late: int
    dropped: int
    longest: int
    replica_seconds: int
    history: tuple[tuple[int, int], ...]

    @property
    def late_share(self) -> float:
        """Part of the requests that waited too long."""
        return self.late / self.arrived if self.arrived else 0.0


class LoadDrill:
    """One service and its requests.

    Args:
        controller: which asks this drill from now on how many requests a replica has.
        service: its name there.
        scaler: says how many replicas are wanted; None for as many as there are.
        slots: requests that a replica has at a time.
        seconds_each: that a request takes at a replica.
        patience: seconds that a request may wait.
        every: seconds between two looks of the autoscaler.

    Raises:
        UnknownJob: if there is no such service.
        ValueError: for numbers that are none.
    """

    def __init__(
        self,
        controller: ReplicaController,
        service: str,
        scaler: Autoscaler | None,
        slots: int = 8,
        seconds_each: int = 8,
        patience: float = 1.0,
        every: int = 15,
    ) -> None:
        controller.wanted(service)
        for name, number in (("slots", slots), ("seconds_each", seconds_each), ("every", every)):
            check_whole(name, number, 1)
        check_quantity("patience", patience)
        self.controller, self.service, self.scaler = controller, service, scaler
        self.slots, self.seconds_each, self.patience, self.every = slots, seconds_each, patience, every
        self._waiting: deque[int] = deque()  # seconds of arrival
        self._ends: dict[str, deque[int]] = {}  # when the requests of each replica end
        self._where: dict[str, GangPlacement] = {}  # where it was when it got the last of them
        self._served = self._dropped = self._late = self._longest = 0
        controller.in_flight = lambda name: len(self._ends.get(name, ()))

    def run(self, arrivals: Sequence[int]) -> LoadDrillReport:
        """Serve a load, and then what is left of it as long as a replica serves.

        Args:
            arrivals: requests that arrive in each second.
        """
        history: list[tuple[int, int]] = []
        now = used = 0
        while now < len(arrivals) or self._waiting or any(self._ends.values()):
            self._end(now)
            self._waiting.extend([now] * (arrivals[now] if now < len(arrivals) else 0))
            if self.scaler is not None and now % self.every == 0:
                self._scale(now)
            self.controller.step(float(now))
            ready = self.controller.ready(self.service, float(now))
            self._dispatch(ready, now)
            used += sum(name in self.controller.scheduler.running for name in self.controller.replicas(self.service))
            history.append((self.controller.wanted(self.service).replicas, len(ready)))
            now += 1
            if now > 2 * len(arrivals) + 86_400:
                raise RuntimeError(f"{len(self._waiting)} requests wait and no replica serves: is there room for one?")
        return LoadDrillReport(
            sum(arrivals), self._served, self._late, self._dropped, self._longest, used, tuple(history)
        )  # fmt: skip

    def _end(self, now: int) -> None:
        """Requests that have ended, and those whose replica is not placed any more."""
        running = self.controller.scheduler.running
        for name, ends in self._ends.items():
            while ends and ends[0] <= now:
                ends.popleft()
                self._served += 1
            if running.get(name) is not self._where[name]:  # gone, or started again elsewhere
                self._dropped += len(ends)
                ends.clear()

    def _scale(self, now: int) -> None:
        ready = self.controller.ready(self.service, float(now))
        loads = [float(self.controller.in_flight(name)) for name in ready]
        wanted = self.controller.wanted(self.service).replicas
        self.controller.scale(self.service, self.scaler.decide(now, wanted, loads, len(self._waiting)), float(now))

    def _dispatch(self, ready: Sequence[str], now: int) -> None:
        """Give waiting requests to the replicas that have fewest."""
        running = self.controller.scheduler.running
        while self._waiting and ready:
            name = min(ready, key=self.controller.in_flight)
            if self.controller.in_flight(name) == self.slots:
                return
            waited = now - self._waiting.popleft()
            self._late += waited > self.patience
            self._longest = max(self._longest, waited)
            self._ends.setdefault(name, deque()).append(now + self.seconds_each)
            self._where[name] = running[name]
