"""What a router counts, as Prometheus reads it.

Numbers of the moment are read when somebody asks; counters never fall.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from minilib.classic.gateway.hooks import Ending
from minilib.classic.gateway.messages import Headers
from minilib.mechanisms.balancing import Dispatcher, Policy
from minilib.serving.router.discovery import ReplicaAddress
from minilib.serving.router.prefix_aware import PrefixAware


class RouterMetrics:
    """Counts by replica and outcome.

    Args:
        dispatcher: whose loads are shown.
        policy: whose hits are shown, if it estimates any.
    """

    def __init__(self, dispatcher: Dispatcher, policy: Policy) -> None:
        self._dispatcher, self._policy, self._names = dispatcher, policy, dict[int, str]()
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"router_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"router_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests at replicas, by how they ended there", "replica", "outcome")
        self._retries = counter("retries", "Requests that were sent once more, to this replica", "replica")
        self._in_flight = gauge("in_flight", "Requests dispatched and not over", "replica")
        self._ready = gauge("replica_ready", "Whether a replica gets new requests", "replica")
        asked = gauge("prompt_blocks", "Whole blocks of all prompts that were routed so far")
        matched = gauge("prompt_blocks_matched", "Those of them that were expected to be held where they were sent")
        if isinstance(policy, PrefixAware):
            asked.set_function(lambda: policy.asked_blocks)
            matched.set_function(lambda: policy.matched_blocks)

    def name(self, target: int) -> str:
        """The address of a replica."""
        return self._names[target]

    def added(self, target: int, address: ReplicaAddress) -> None:
        """A replica has this number."""
        self._names[target] = str(address)

    def dispatched(self, target: int, again: bool) -> None:
        """A request goes to a replica, for the first time or once more."""
        if again:
            self._retries.labels(self._names[target]).inc()

    def ended(self, target: int, ending: Ending) -> None:
        """A request is over at a replica."""
        self._requests.labels(self._names[target], ending.value).inc()

    def count(self, ending: Ending) -> int:
        """Requests that ended so at any replica."""
        return int(sum(self._requests.labels(name, ending.value)._value.get() for name in set(self._names.values())))

    def text(self) -> tuple[bytes, Headers]:
        """All of it in Prometheus' text format, and the header that says so."""
        for target, name in self._names.items():
            self._in_flight.labels(name).set(self._dispatcher.in_flight[target])
            self._ready.labels(name).set(not self._dispatcher.health[target].draining)
        return generate_latest(self.registry), [(b"content-type", CONTENT_TYPE_LATEST.encode())]
