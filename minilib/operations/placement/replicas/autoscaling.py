"""How many replicas a load needs: target tracking, as Kubernetes' HorizontalPodAutoscaler computes it.

    desired = ⌈ replicas · metric / target ⌉        unless the ratio is within the tolerance of 1
    then    the largest that was desired in the last 300 s counts where it is fewer,
            and only so many come or go in a period

The metric of a replica is what its server exports: requests that run and requests that wait. Where no replica serves
there is no metric of one, and the requests that wait at the router are all there is to count.

Source: kubernetes.io, "Horizontal Pod Autoscaling" (algorithm details, scaling policies, stabilization window, default
behavior); kubernetes/kubernetes, pkg/controller/podautoscaler/replica_calculator.go (calcPlainMetricReplicas: who has
no metric counts as 0 on the way up and as the target on the way down; getUsageRatioReplicaCount: from 0 replicas).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from minilib.mechanisms.basics.checks import check_quantity, check_whole

IN_FLIGHT = ("minilib_num_requests_running", "minilib_num_requests_waiting")  # gauges of minilib/serving/server
MILLI = 1000  # Kubernetes counts metrics in thousandths, so that no rounding of fractions adds a replica


class InvalidMetric(ValueError):
    """A metric, a target or a limit that nothing can be scaled by; the message says what came."""


@dataclass(frozen=True)
class ScalingLimit:
    """How many replicas come, or go, in a period: the larger of two numbers.

    Args:
        pods: so many,
        percent: or such a part of those that there were at its beginning.
        period: seconds.

    Raises:
        InvalidMetric: for numbers that are none.
    """

    pods: int = 0
    percent: float = 0.0
    period: float = 15.0

    def __post_init__(self) -> None:
        check_whole("pods of a limit", self.pods, error=InvalidMetric)
        check_quantity("percent of a limit", self.percent, error=InvalidMetric)
        check_quantity("period of a limit", self.period, above_zero=True, error=InvalidMetric)

    def most(self, replicas: int) -> int:
        """Up to how many replicas from so many."""
        return max(replicas + self.pods, math.ceil(replicas * (1 + self.percent / 100) - 1e-9))

    def fewest(self, replicas: int) -> int:
        """Down to how many replicas from so many."""
        return max(min(replicas - self.pods, math.floor(replicas * (1 - self.percent / 100) + 1e-9)), 0)


@dataclass(frozen=True)
class ScalingRules:
    """What a service is scaled by; the defaults are those of Kubernetes.

    Args:
        target: metric that each replica is to have.
        least, most: replicas; least 0 lets a service sleep.
        tolerance: a ratio of metric to target that is as near to 1 changes nothing.
        window: seconds for which the largest desired number counts where it would be fewer replicas.
        up, down: how many come and go in a period.

    Raises:
        InvalidMetric: for a target ≤ 0, more replicas at least than at most, and other numbers that are none.
    """

    target: float
    least: int = 1
    most: int = 10
    tolerance: float = 0.1
    window: float = 300.0
    up: ScalingLimit = field(default_factory=lambda: ScalingLimit(pods=4, percent=100))
    down: ScalingLimit = field(default_factory=lambda: ScalingLimit(percent=100))

    def __post_init__(self) -> None:
        check_quantity("target", self.target, above_zero=True, error=InvalidMetric)
        if self.target * MILLI < 1:
            raise InvalidMetric(f"a target is counted in thousandths, got {self.target!r}: take a larger unit")
        check_whole("least", self.least, error=InvalidMetric)
        check_whole("most", self.most, max(self.least, 1), InvalidMetric)
        check_quantity("tolerance", self.tolerance, error=InvalidMetric)
        check_quantity("window", self.window, error=InvalidMetric)


def desired_replicas(replicas: int, metric: float, target: float, tolerance: float = 0.1) -> int:
    """So many replicas would have the target, if these have the metric on average.

    Args:
        replicas: that serve; with 0, `metric` is of all requests.
        metric: average over them.
        target: that each is to have.
        tolerance: within which nothing changes.

    Raises:
        InvalidMetric: for a metric that is NaN, infinite or negative, or a target ≤ 0.
    """
    check_whole("replicas", replicas, error=InvalidMetric)
    check_quantity("metric", metric, error=InvalidMetric)
    check_quantity("target", target, above_zero=True, error=InvalidMetric)
    return _for_total(replicas, max(replicas, 1) * round(metric * MILLI), target, tolerance)


def load_of(metrics: str) -> float:
    """Requests in flight at a replica, as its server's /metrics tells them.

    Args:
        metrics: the page, in Prometheus' text format.

    Raises:
        InvalidMetric: if it does not tell them.
    """
    families = text_string_to_metric_families(metrics)
    found = {sample.name: sample.value for family in families for sample in family.samples if sample.name in IN_FLIGHT}
    if missing := [name for name in IN_FLIGHT if name not in found]:
        raise InvalidMetric(f"the page has no {missing[0]}; it is of a server of minilib/serving at /metrics")
    return sum(found.values())


class Autoscaler:
    """Decides again and again how many replicas are wanted; Kubernetes does so every 15 s.

    Args:
        rules: what by.
    """

    def __init__(self, rules: ScalingRules) -> None:
        self.rules = rules
        self._desired: deque[tuple[float, int]] | None = None  # when, how many
        self._changes: deque[tuple[float, int]] = deque()  # when, how many more

    def decide(self, now: float, wanted: int, loads: list[float], waiting: float = 0) -> int:
        """How many replicas are wanted from now on.

        Args:
            now: seconds; never less than before.
            wanted: replicas until now, those that have not started among them.
            loads: metric of each replica that serves.
            waiting: requests at the router that no replica has.

        Raises:
            InvalidMetric: for a metric that is NaN, infinite or negative; nothing is decided.
        """
        desired = self._desire(wanted, loads, waiting)
        if self._desired is None:
            self._desired = deque([(now, wanted)])  # as if it had been desired until now
        while self._desired and self._desired[0][0] <= now - self.rules.window:
            self._desired.popleft()
        self._desired.append((now, desired))
        if desired < wanted:
            desired = min(max(number for _, number in self._desired), wanted)
        decided = min(max(self._limited(now, wanted, desired), self.rules.least), self.rules.most)
        if decided != wanted:
            self._changes.append((now, decided - wanted))
        return decided

    def _desire(self, wanted: int, loads: list[float], waiting: float) -> int:
        """By the metric alone: whoever has none counts as 0 on the way up, and as the target on the way down."""
        for load in loads:
            check_quantity("metric", load, error=InvalidMetric)
        check_quantity("waiting", waiting, error=InvalidMetric)
        total, target = sum(loads) + waiting, self.rules.target
        silent = max(wanted - len(loads), 0)
        up = total > target * len(loads)
        counted = total if up else total + silent * target
        desired = _for_total(len(loads) + silent, round(counted * MILLI), target, self.rules.tolerance)
        against = wanted and (desired < wanted if up else desired > wanted)
        return wanted if against else desired

    def _limited(self, now: float, wanted: int, desired: int) -> int:
        """No more come or go than a period allows."""
        up, down = self.rules.up, self.rules.down
        while self._changes and self._changes[0][0] <= now - max(up.period, down.period):
            self._changes.popleft()
        if desired > wanted:
            return min(desired, max(up.most(wanted - self._changed(now - up.period)), wanted))
        return max(desired, min(down.fewest(wanted - self._changed(now - down.period)), wanted))

    def _changed(self, since: float) -> int:
        """How many more replicas there are than at that time."""
        return sum(change for when, change in self._changes if when > since)


def _for_total(replicas: int, total: int, target: float, tolerance: float) -> int:
    """So many replicas would have the target; as many as there are, if these nearly have.

    Args:
        replicas: among which the total is shared now.
        total: metric of all of them, in thousandths.
        target: that each is to have.
        tolerance: part of the target.
    """
    want = max(round(target * MILLI), 1)
    if replicas and abs(total - replicas * want) <= tolerance * replicas * want:
        return replicas
    return -(-total // want)
