"""What became of a load: latencies and rates as the field defines them, from the times at which things happened.

    due            first token              last token
     │←─── TTFT ───→│← ITL →│← ITL →│ … │← ITL →│
     │←──────────────── end to end ────────────→│      TPOT = (end to end − TTFT) / (tokens − 1)

    TTFT, time to first token; end to end     one number a request
    ITL, inter-token latency                  one number for each gap between two tokens: long answers weigh more
    TPOT, time per output token               one number a request of two tokens or more, the mean of its gaps

Every latency counts from the moment at which the request was due, whether or not the load generator or the server was
ready then; otherwise a stall would hide in the requests that were sent late ("coordinated omission", Tene, "How NOT to
Measure Latency", 2013).

Sources: `calculate_metrics` in vLLM's vllm/benchmarks/serve.py for all four, for rates and for goodput as requests
within the SLO a second. NVIDIA's GenAI-Perf and AIPerf call ITL what is TPOT here, and define goodput like vLLM. Zhong
et al., "DistServe", OSDI 2024: SLO attainment, and goodput as the highest rate at which it is high enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass
from itertools import pairwise

from minilib.numbers.load_metrics import Delay


@dataclass(frozen=True)
class RequestTimes:
    """When things happened to one request, in seconds on one clock.

    Args:
        due: when it should arrive.
        token_times: when each of its tokens came, ascending.
        ended: when it ended.
        error: why it was refused or ended early; None for a request that was completed.

    Raises:
        ValueError: if a time is no number, or comes before an earlier one.
    """

    due: float
    token_times: tuple[float, ...]
    ended: float
    error: str | None = None

    def __post_init__(self) -> None:
        times = (self.due, *self.token_times, self.ended)
        if not all(map(math.isfinite, times)) or any(later < earlier for earlier, later in pairwise(times)):
            raise ValueError(f"due, token_times and ended are finite and in this order, got {times}")

    @property
    def completed(self) -> bool:
        """Whether it ended as it should."""
        return self.error is None

    @property
    def ttft(self) -> float | None:
        """Time to first token; None without a token."""
        return self.token_times[0] - self.due if self.token_times else None

    @property
    def itls(self) -> list[float]:
        """Gaps between tokens, none with fewer than two."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token behind the first; None with fewer than two."""
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps > 0 else None

    @property
    def e2e(self) -> float:
        """Time from due to ended."""
        return self.ended - self.due


@dataclass(frozen=True)
class SLO:
    """A service level objective: what a request must not exceed, in seconds; what is left out may take for ever.

    Args:
        ttft: time to first token.
        tpot: time per output token; a request of one token meets any.
        e2e: end to end.

    Raises:
        ValueError: if one is not positive.
    """

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot", "e2e"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a number of seconds > 0, got {getattr(self, name)!r}")

    def met_by(self, times: RequestTimes) -> bool:
        """Whether a request was completed in time; refused ones and those without a token were not."""
        if not times.completed or times.ttft is None:
            return False
        return times.ttft <= self.ttft and (times.tpot or 0.0) <= self.tpot and times.e2e <= self.e2e


@dataclass(frozen=True)
class ServingMetrics:
    """One load in numbers; latencies are of completed requests.

    Args:
        completed: requests that ended as they should.
        failed: requests that were refused or ended by an error.
        output_tokens: tokens of the completed requests.
        duration: seconds from the first request's due time to the last end.
        ttft: time to first token; None if no request has one, as with the others.
        itl: inter-token latency.
        tpot: time per output token.
        e2e: end to end.
    """

    completed: int
    failed: int
    output_tokens: int
    duration: float
    ttft: Delay | None
    itl: Delay | None
    tpot: Delay | None
    e2e: Delay | None

    @classmethod
    def of(cls, times: Row[RequestTimes]) -> ServingMetrics:
        """Sum up one request or more.

        Raises:
            ValueError: if there is none.
        """
        done = [one for one in times if one.completed]
        return cls(
            completed=len(done),
            failed=len(times) - len(done),
            output_tokens=sum(len(one.token_times) for one in done),
            duration=_duration(times),
            ttft=_delay([one.ttft for one in done if one.ttft is not None]),
            itl=_delay([gap for one in done for gap in one.itls]),
            tpot=_delay([one.tpot for one in done if one.tpot is not None]),
            e2e=_delay([one.e2e for one in done]),
        )

    @property
    def request_throughput(self) -> float:
        """Completed requests a second."""
        return _rate(self.completed, self.duration)

    @property
    def output_throughput(self) -> float:
        """Tokens of completed requests a second."""
        return _rate(self.output_tokens, self.duration)


def goodput(times: Row[RequestTimes], slo: SLO) -> float:
    """Requests within the SLO a second, as vLLM's benchmark and AIPerf define it.

    Raises:
        ValueError: if there is no request.
    """
    return _rate(sum(map(slo.met_by, times)), _duration(times))


def slo_attainment(times: Row[RequestTimes], slo: SLO) -> float:
    """Share of all requests that are within the SLO.

    Raises:
        ValueError: if there is no request.
    """
    _duration(times)
    return sum(map(slo.met_by, times)) / len(times)


def highest_good_rate(attainments: Mapping[float, float], least: float = 0.9) -> float:
    """The highest rate up to which the SLO attainment is high enough, as DistServe defines goodput; 0.0 if none is.

    Args:
        attainments: request rate → SLO attainment, as measured at this rate.
        least: share of requests that must be within the SLO, above 0 and at most 1.

    Raises:
        ValueError: if there is no rate, or the share is none.
    """
    if not attainments or not 0 < least <= 1:
        raise ValueError(f"one rate or more and a share in (0, 1] are needed, got {len(attainments)} and {least!r}")
    highest = 0.0
    for rate, attainment in sorted(attainments.items()):
        if attainment < least:
            break
        highest = rate
    return highest


def _duration(times: Row[RequestTimes]) -> float:
    if not times:
        raise ValueError("metrics need the times of one request or more, got none")
    return max(one.ended for one in times) - min(one.due for one in times)


def _delay(seconds: list[float]) -> Delay | None:
    return Delay.of(seconds) if seconds else None


def _rate(count: int, seconds: float) -> float:
    """Of nothing it is 0, of something in no time infinite."""
    return count / seconds if seconds else math.inf if count else 0.0
