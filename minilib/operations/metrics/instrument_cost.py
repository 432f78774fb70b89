"""What instruments cost a step: how often it calls them, and how long a call takes on this machine.

    seconds a step = calls_per_step(accumulate) · nanoseconds_per_call()["phase"] + nanoseconds_per_call()["step"]

A scrape costs milliseconds beside the training loop, whenever Prometheus asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import generate_latest

from minilib.mechanisms.basics.checks import check_whole
from minilib.operations.metrics.rank_metrics import RankMetrics

ONCE_A_STEP = ("data", "gradients", "optimizer", "loss")
ONCE_A_BACKWARD = ("forward", "backward")


def calls_per_step(accumulate: int = 1) -> int:
    """Phases that a step of the trainer enters.

    Args:
        accumulate: backwards a step.

    Raises:
        ValueError: if there is none.
    """
    check_whole("accumulate", accumulate, 1)
    return len(ONCE_A_STEP) + len(ONCE_A_BACKWARD) * accumulate


def nanoseconds_per_call(times: int = 2000, repeats: int = 5) -> dict[str, float]:
    """Nanoseconds of one phase, of the end of one step, and of one scrape: the least of several means, since whatever
    else a machine does only adds to them.

    Args:
        times: calls in a mean; of scrapes a hundredth of them.
        repeats: means.

    Raises:
        ValueError: if either is below 1.
    """
    check_whole("times", times, 1)
    check_whole("repeats", repeats, 1)
    metrics = RankMetrics("instruments")

    def phase() -> None:
        with metrics.phase("data"):
            pass

    def step() -> None:
        metrics.step_ended(1, 0.1, 100.0, 2.0, 1.0, 1e-3)

    def scrape() -> None:
        generate_latest(metrics.registry)

    calls = (("phase", phase, times), ("step", step, times), ("scrape", scrape, max(1, times // 100)))
    return {name: min(_mean(call, count) for _ in range(repeats)) for name, call, count in calls}


def _mean(call: Callable[[], None], times: int) -> float:
    began = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - began) / times
