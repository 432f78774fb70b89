"""Numbers for Prometheus, named as vLLM names them where it has them.

What the engine counts is read when somebody asks. What the server sees itself is added up once for each wake-up of a
stream, which may bring many tokens.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from minilib.serving.asynchronous.status import EngineStatus
from minilib.serving.server.records import OpenRecords, PromptRecord

PREFIX = "minilib_"
TENANTS = 64  # that have numbers of their own; those that come later share "other"
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Distribution:
    """A histogram that takes one value several times at once.

    Attributes:
        total: sum of all values.
    """

    def __init__(self, bounds: tuple[float, ...] = LATENCY) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def family(self, name: str, text: str) -> Metric:
        """As Prometheus has it: how many values are at most each bound."""
        return HistogramMetricFamily(name, text, buckets=self.buckets(), sum_value=self.total)

    def buckets(self) -> list[tuple[str, int]]:
        """Each bound as Prometheus writes it, and how many values are at most as large."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else repr(float(bound)), total))
        return buckets


class Pace:
    """How fast requests end, and so how long a queue takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._interval = clock, clock(), 1.0

    def ended(self) -> None:
        """One more request has ended."""
        now = self._clock()
        self._interval += (now - self._last - self._interval) / 8
        self._last = now

    def wait(self, num_waiting: int) -> float:
        """Seconds until so many requests have probably ended."""
        return num_waiting * self._interval


@dataclass
class TenantCounts:
    """What the requests of one tenant have cost, and how long they waited."""

    prompts: int = 0
    prompt_tokens: int = 0
    queue_seconds: float = 0.0


class ServerMetrics(Collector):
    """What one server counts, in a registry of its own.

    Args:
        status: the engine's newest counters.
        records: of open requests.

    Attributes:
        tokens_sent: to the writers of all streams.
    """

    def __init__(self, status: Callable[[], EngineStatus], records: OpenRecords) -> None:
        self._status, self._records = status, records
        self.tokens_sent, self._tenants = 0, {"other": TenantCounts()}
        self.registry = CollectorRegistry()
        self.first_token, self.between_tokens, self.end_to_end = Distribution(), Distribution(), Distribution()
        self.queue_time, self.pace = Distribution(), Pace()
        self.registry.register(self)
        self.http = Counter(
            PREFIX + "http_requests", "HTTP requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.ended = Counter(
            PREFIX + "request_success", "Samples that ended, by reason.", ("finished_reason",), registry=self.registry
        )
        self.aborted = Counter(
            PREFIX + "requests_aborted", "Requests that ended early, by reason.", ("reason",), registry=self.registry
        )

    def waited(self, tenant: str, prompt: PromptRecord) -> None:
        """A prompt's wait in the queue is over, and its first token there."""
        seconds = max(prompt.started_ns - prompt.submitted_ns, 0) / 1e9
        self.queue_time.observe(seconds)
        counts = self._tenants.get(tenant)
        if counts is None:
            counts = self._tenants["other"]
            if len(self._tenants) < TENANTS:
                counts = self._tenants[tenant] = TenantCounts()
        counts.prompts += 1
        counts.prompt_tokens += prompt.prompt_tokens
        counts.queue_seconds += seconds

    def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that a scraper accepts, and the name of the format."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers and the histograms."""
        status = self._status()
        shown = self._records.shown()
        silence = max((one["silent_seconds"] for one in shown if one["state"] == "running"), default=0.0)
        used = 1 - status.num_free_pages / status.num_pages if status.num_pages else 0.0
        gauges = (
            ("num_requests_running", "Requests that run.", status.num_running),
            ("num_requests_waiting", "Requests that wait and have never run.", status.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV cache's pages that is in use, 1 is all.", used),
            ("ready", "1 while requests are taken.", float(status.state == "ready")),
            ("longest_silence_seconds", "Since the last token of the running request that waits longest.", silence),
        )
        counters = (
            ("prompt_tokens", "Tokens of prompts.", status.prompt_tokens),
            ("prefix_cache_hits", "Tokens of prompts that were in the prefix cache.", status.cached_tokens),
            ("generation_tokens", "Tokens that were generated.", status.generated_tokens),
            ("num_preemptions", "Sequences that had to give way.", status.preemptions),
            ("engine_steps", "Steps of the engine.", status.steps),
            ("engine_restarts", "Engines that were started in place of one that died.", status.restarts),
        )
        yield from (GaugeMetricFamily(PREFIX + name, text, value) for name, text, value in gauges)
        yield from (CounterMetricFamily(PREFIX + name, text, value) for name, text, value in counters)
        yield from self._of_tenants()
        yield self.queue_time.family(PREFIX + "request_queue_time_seconds", "From its submission to its first step.")
        yield self.first_token.family(PREFIX + "time_to_first_token_seconds", "From a request to its first token.")
        yield self.between_tokens.family(PREFIX + "inter_token_latency_seconds", "From one token to the next.")
        yield self.end_to_end.family(PREFIX + "e2e_request_latency_seconds", "From a request to its last token.")

    def _of_tenants(self) -> Iterator[Metric]:
        for field in fields(TenantCounts):
            text = (
                f"{field.name.replace('_', ' ').capitalize()} of requests by their user, the first {TENANTS} by name."
            )
            family = CounterMetricFamily(f"{PREFIX}tenant_{field.name}", text, labels=("tenant",))
            for tenant, counts in self._tenants.items():
                family.add_metric((tenant,), getattr(counts, field.name))
            yield family
