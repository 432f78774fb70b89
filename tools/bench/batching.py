"""Measure what batches and policies are worth: continuous against static, chunks against whole prompts, and each policy
against first come, first served.

Called by `make bench`. Every ratio is the median of pairs of runs that alternate in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tqdm import tqdm

from minilib.mechanisms.scheduling import POLICIES
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.load.arrivals import Arrival, poisson_times, random_arrivals
from minilib.serving.load.clock import WallClock
from minilib.serving.load.metrics import RequestTimes, ServingMetrics
from minilib.serving.load.open_loop import run_open_loop
from minilib.serving.load.request_lengths import long_tailed
from minilib.serving.request import SchedulingParams

BATCH, PAGES, TURNS = 16, 1024, 5
WHOLE, CHUNKED = 2048, 128  # tokens of a step


def batching(model: Decoder, turns: int = TURNS, requests: int = 48) -> dict:
    """Figures of chapter 13, JSON values in SI units.

    Args:
        model: on a CPU, packed.
        turns: pairs of runs for each ratio.
        requests: of a load.
    """
    return {
        "static": _static(model, turns, requests),
        "chunks": _chunks(model, turns),
        "policies": _policies(model, turns, requests),
    }


def _static(model: Decoder, turns: int, requests: int) -> dict:
    """Output tokens per second: requests as they come, and in static batches padded to their longest."""
    vocabulary = model.config.vocab_size
    lengths = long_tailed(requests, 40, 200, seed=5), long_tailed(requests, 30, 160, seed=6)
    load = random_arrivals(poisson_times(requests, 80, seed=4), *lengths, vocabulary)
    ways = {"continuous": lambda: _serve(model, load), "static": lambda: _in_batches(model, load)}
    rates = _in_turns({name: lambda way=way: _rate(way()) for name, way in ways.items()}, turns)
    ratios = [a / b for a, b in zip(rates["continuous"], rates["static"], strict=True)]
    return {**rates, "continuous_over_static": statistics.median(ratios), "ratios": ratios}


def _chunks(model: Decoder, turns: int) -> dict:
    """Eight requests decode while prompts of 512 tokens arrive, whole or in chunks."""
    vocabulary = model.config.vocab_size
    decoding = random_arrivals([0.0] * 8, [20] * 8, [160] * 8, vocabulary)
    joining = random_arrivals([0.15 * k + 0.1 for k in range(6)], [512] * 6, [4] * 6, vocabulary, seed=9)

    def run(budget: int) -> tuple[float, float]:
        times = _serve(model, [*decoding, *joining], max_batch_tokens=budget)
        return ServingMetrics.of(times[:8]).itl.p99, _rate(times)

    found = _in_turns({str(budget): lambda budget=budget: run(budget) for budget in (WHOLE, CHUNKED)}, turns)
    pairs = list(zip(found[str(CHUNKED)], found[str(WHOLE)], strict=True))
    return {
        "budgets": {budget: {"itl_p99": [p99 for p99, _ in runs], "rate": [rate for _, rate in runs]}
                    for budget, runs in found.items()},
        "itl_p99_over_whole": statistics.median(chunked[0] / whole[0] for chunked, whole in pairs),
        "rate_over_whole": statistics.median(chunked[1] / whole[1] for chunked, whole in pairs),
    }  # fmt: skip


def _policies(model: Decoder, turns: int, requests: int) -> dict:
    """Output tokens per second of each policy over those of first come, first served; all requests come at once."""
    lengths = long_tailed(requests, 60, 300, seed=7), long_tailed(requests, 40, 200, seed=8)
    load = []
    for number, one in enumerate(random_arrivals([0.0] * requests, *lengths, model.config.vocab_size)):
        wish = {"scheduling": SchedulingParams(priority=number % 3, tenant="abc"[number % 3])}
        load.append(Arrival(one.due, one.prompt_token_ids, one.params, wish))
    ways = {policy: lambda policy=policy: _rate(_serve(model, load, policy=policy)) for policy in POLICIES}
    rates = _in_turns(ways, turns)
    return {
        policy: statistics.median(a / b for a, b in zip(found, rates["fcfs"], strict=True))
        for policy, found in rates.items()
    }


def _in_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, list]:
    """What each function returns, turn by turn, after one turn that does not count."""
    for run in ways.values():
        run()
    found: dict[str, list] = {name: [] for name in ways}
    for _ in tqdm(range(turns), desc=", ".join(ways)[:40], leave=False):
        for name, run in ways.items():
            found[name].append(run())
    return found


def _serve(model: Decoder, load: Sequence[Arrival], **options) -> list[RequestTimes]:
    return run_open_loop(Engine(model, PAGES, max_sequences=BATCH, **options), load, WallClock())


def _in_batches(model: Decoder, load: Sequence[Arrival]) -> list[RequestTimes]:
    """Static batches: each waits until it is full, and all of its rows are as long as the longest."""
    found, clock = [], WallClock()
    for batch in (load[first : first + BATCH] for first in range(0, len(load), BATCH)):
        clock.wait_until(batch[-1].due)
        width = max(len(one.prompt_token_ids) for one in batch)
        longest = max((one.params for one in batch), key=lambda params: params.max_tokens)
        padded = [Arrival(one.due, [0] * width, longest) for one in batch]
        times = run_open_loop(Engine(model, PAGES, max_sequences=BATCH), padded, clock)
        for one, at in zip(batch, times, strict=True):
            found.append(RequestTimes(one.due, at.token_times[: one.params.max_tokens], at.ended))
    return found


def _rate(times: list[RequestTimes]) -> float:
    return ServingMetrics.of(times).output_throughput
