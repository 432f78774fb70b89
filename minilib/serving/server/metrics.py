"""Numbers for Prometheus, named as vLLM names them where it has them.

What the engine counts is read when somebody asks. What the server sees itself is added up once for each wake-up of a
stream, which may bring many tokens.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from minilib.serving.asynchronous.status import EngineStatus

PREFIX = "minilib_"
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


class ServerMetrics(Collector):
    """What one server counts, in a registry of its own.

    Args:
        status: the engine's newest counters.
    """

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status
        self.registry = CollectorRegistry()
        self.first_token, self.between_tokens, self.end_to_end = Distribution(), Distribution(), Distribution()
        self.pace = Pace()
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

    def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that a scraper accepts, and the name of the format."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers and the histograms."""
        status = self._status()
        used = 1 - status.num_free_pages / status.num_pages if status.num_pages else 0.0
        gauges = (
            ("num_requests_running", "Requests that run.", status.num_running),
            ("num_requests_waiting", "Requests that wait and have never run.", status.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV cache's pages that is in use, 1 is all.", used),
            ("ready", "1 while requests are taken.", float(status.state == "ready")),
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
        yield self.first_token.family(PREFIX + "time_to_first_token_seconds", "From a request to its first token.")
        yield self.between_tokens.family(PREFIX + "inter_token_latency_seconds", "From one token to the next.")
        yield self.end_to_end.family(PREFIX + "e2e_request_latency_seconds", "From a request to its last token.")
