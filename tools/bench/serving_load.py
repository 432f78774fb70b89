"""Predict what a load makes of this machine, then measure it: latencies of an open loop at several loads.

Called by `make bench`. A linear price is fitted to steps of the engine behind asyncio, under loads of other requests
than those that are predicted: on two cores the threads of a step share them with the event loop, and steps take longer
than alone. With that price the simulator predicts each load, before the load is offered. Every try is recorded.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

from tqdm import tqdm

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.numbers.neighbours import Watch
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.cpu.packing import pack
from minilib.serving.engine import Engine
from minilib.serving.load.arrivals import Arrival, gamma_times, random_arrivals
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.metrics import SLO, RequestTimes, ServingMetrics, goodput, slo_attainment
from minilib.serving.load.open_loop import offer, run_open_loop
from minilib.serving.load.request_lengths import long_tailed
from minilib.serving.load.simulation import (
    FittedPrice,
    MachinePrice,
    SimulatedEngine,
    StepCounts,
    TimedEngine,
    pages_that_fit,
)
from minilib.serving.request import SamplingParams
from tools.bench.batching import batching
from tools.bench.paging import MODEL

SIZES = {"page_size": 16, "max_batch_tokens": 512, "max_sequences": 32}
REQUESTS, PROMPT, NEW, LONGEST = 100, 120, 40, 480  # of a load: how many, mean lengths, the longest prompt
BATCHES, PROMPTS, REPEATS = (1, 2, 4, 8, 16, 32), (8, 64, 256, 480), 5  # of the steps that a price is fitted to
MOST_TOKENS = 4096  # of the prompts of one such case
CALIBRATION = (0.2, 0.5, 1.0)  # utilizations of the loads that the price is fitted to
PAUSE = 0.002  # seconds; longer ones are waits for a request
TRIES = 3
ELSEWHERE = ("h100-sxm", "b200")
LARGE = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, tie_embeddings=False)  # the shape of Llama 3.1 8B


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Args:
        utilization: their rate, as a share of the rate at which the simulated engine serves them all at once.
        cv: coefficient of variation of the gaps between them.
    """

    utilization: float
    cv: float = 1.0


LOADS = (Load(0.3), Load(0.6), Load(0.85), Load(0.6, cv=3.0))


def serving_load() -> dict:
    """The figures of chapter 13, JSON values in SI units."""
    model = pack(Decoder(MODEL).eval())
    alone = FittedPrice.fit(steps_alone(model))
    measured = steps_in_service(model, rate_at_once(alone))
    price = FittedPrice.fit(measured)
    capacity = rate_at_once(price)
    slo = SLO(ttft=20 * price(_one(PROMPT)), tpot=4 * price(_one(1)))
    bar = tqdm(LOADS, desc="loads", leave=False)
    return {
        "parameters": MODEL.num_parameters,
        "price_alone": asdict(alone),
        "price": asdict(price),
        "fit": _fit(price, measured),
        "capacity": capacity,
        "slo": {"ttft": slo.ttft, "tpot": slo.tpot},
        "loads": [_load(load, model, price, capacity, slo) for load in bar],
        "batching": batching(model, TRIES),
        "elsewhere": [_elsewhere(name, load) for name in ELSEWHERE for load in LOADS],
    }


def steps_alone(model: Decoder) -> list[tuple[StepCounts, float]]:
    """Steps of the real engine and their seconds, each the median of REPEATS runs that make the same plans.

    Prompts alone and together, the tokens behind them, and a prompt that joins those that decode.
    """
    shapes = [(b, p) for b in BATCHES for p in PROMPTS if b * p <= MOST_TOKENS and p < model.config.max_position - 8]
    found: list[tuple[StepCounts, float]] = []
    _steps(model, 1, PROMPTS[0])  # what is done once, such as compiling
    for batch, prompt in tqdm(shapes, desc="steps", leave=False):
        runs = [_steps(model, batch, prompt) for _ in range(REPEATS)]
        plans = [[counts for counts, _ in run] for run in runs]
        assert all(plan == plans[0] for plan in plans), "runs of the same requests made different plans"
        seconds = [statistics.median(taken) for taken in zip(*([s for _, s in run] for run in runs), strict=True)]
        found += zip(plans[0], seconds, strict=True)
    return found


def steps_in_service(model: Decoder, capacity: float) -> list[tuple[StepCounts, float]]:
    """Steps of the engine behind asyncio and their seconds, with what the thread does until the next step begins."""
    found: list[tuple[StepCounts, float]] = []
    for utilization in tqdm(CALIBRATION, desc="steps in service", leave=False):
        engine = TimedEngine(model, _num_pages(), **SIZES)
        times = gamma_times(REQUESTS, utilization * capacity, 1.0, seed=7)
        _offered(engine, _arrivals(times, seed=5))
        for (started, seconds, counts), later in pairwise(engine.history):
            pause = later.started - started - seconds
            found.append((counts, seconds + (pause if pause < PAUSE else 0.0)))
    return found


def rate_at_once(price: Callable[[StepCounts], float]) -> float:
    """Requests a second that the simulated engine serves if all of a load is there from the beginning."""
    return ServingMetrics.of(_simulated(price, _arrivals([0.0] * REQUESTS))).request_throughput


def _steps(model: Decoder, batch: int, prompt: int, new: int = 6) -> list[tuple[StepCounts, float]]:
    """All steps of so many equal requests, and of one more that joins when the others have decoded twice."""
    engine = TimedEngine(model, num_pages=(batch + 1) * ceil_div(prompt + new, SIZES["page_size"]), **SIZES)
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    for name in range(batch):
        engine.add_request(str(name), [1 + name] * prompt, params)
    decoded = 0
    while engine.has_unfinished:
        outputs = engine.step()
        decoded += len(outputs) == batch
        if decoded == 3 and len(outputs) == batch:
            engine.add_request("late", [batch + 1] * prompt, params)
    return [(counts, seconds) for _, seconds, counts in engine.history]


def _arrivals(times: list[float], seed: int = 1) -> list[Arrival]:
    prompts = long_tailed(len(times), PROMPT, LONGEST, seed=seed)
    news = long_tailed(len(times), NEW, MODEL.max_position - LONGEST, seed=seed + 1)
    return random_arrivals(times, prompts, news, MODEL.vocab_size)


def _num_pages() -> int:
    return SIZES["max_sequences"] * ceil_div(MODEL.max_position, SIZES["page_size"]) // 2


def _simulated(price: Callable[[StepCounts], float], arrivals: list[Arrival]) -> list[RequestTimes]:
    clock = VirtualClock()
    return run_open_loop(SimulatedEngine(MODEL, price, clock, _num_pages(), **SIZES), arrivals, clock)


def _offered(engine: Engine, arrivals: list[Arrival]) -> list[RequestTimes]:
    async def main() -> list[RequestTimes]:
        async with AsyncEngine(engine, max_waiting=len(arrivals)) as served:
            return await offer(served, arrivals)

    return asyncio.run(main())


def _load(load: Load, model: Decoder, price: FittedPrice, capacity: float, slo: SLO) -> dict:
    """One load, predicted and then measured TRIES times."""
    arrivals = _arrivals(gamma_times(REQUESTS, load.utilization * capacity, load.cv, seed=3))
    predicted = _figures(_simulated(price, arrivals), slo)
    tries = []
    for _ in range(TRIES):
        watch = Watch()
        figures = _figures(_offered(Engine(model, _num_pages(), **SIZES), arrivals), slo)
        tries.append({**figures, "busy": watch.busy})
    medians = {name: statistics.median(one[name]["p50"] for one in tries) for name in ("ttft", "itl")}
    ratios = {name: predicted[name]["p50"] / seconds for name, seconds in medians.items()}
    return {**asdict(load), "predicted": predicted, "tries": tries, "predicted_over_measured": ratios}


def _elsewhere(name: str, load: Load) -> dict:
    """The same requests on a data sheet's machine, served by a larger model; their rate is a share of its capacity."""
    machine = Machine.datasheet(name)
    price, pages = MachinePrice(machine, LARGE), pages_that_fit(machine, LARGE)

    def run(times: list[float]) -> list[RequestTimes]:
        clock = VirtualClock()
        return run_open_loop(SimulatedEngine(LARGE, price, clock, pages, **SIZES), _arrivals(times), clock)

    capacity = ServingMetrics.of(run([0.0] * REQUESTS)).request_throughput
    slo = SLO(ttft=20 * price(_one(PROMPT)), tpot=4 * price(_one(1)))
    times = gamma_times(REQUESTS, load.utilization * capacity, load.cv, seed=3)
    return {"machine": name, "capacity": capacity, **asdict(load), "predicted": _figures(run(times), slo)}


def _figures(times: list[RequestTimes], slo: SLO) -> dict:
    metrics = ServingMetrics.of(times)
    rates = {"request_throughput": metrics.request_throughput, "output_throughput": metrics.output_throughput}
    return {**asdict(metrics), **rates, "goodput": goodput(times, slo), "slo_attainment": slo_attainment(times, slo)}


def _fit(price: FittedPrice, measured: list[tuple[StepCounts, float]]) -> dict:
    """How far the fitted price is from the steps that it was fitted to."""
    ratios = sorted(price(counts) / seconds for counts, seconds in measured)
    within = sum(0.67 <= ratio <= 1.5 for ratio in ratios) / len(ratios)
    return {"steps": len(ratios), "least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1],
            "within": within}  # fmt: skip


def _one(tokens: int) -> StepCounts:
    """A step of one sequence with nothing behind it."""
    return StepCounts((tokens,), (tokens,), 1)
