"""The simulator makes the engine's plans, step for step; queues grow as queueing theory says; prices add up."""

import math
import random

import numpy as np
import pytest

from minilib.model.config import ModelConfig
from minilib.model.moe.config import MoEConfig
from minilib.numbers.machine import Machine
from minilib.serving.engine import Engine
from minilib.serving.generation import tokens_with_cache
from minilib.serving.load.arrivals import gamma_times, poisson_times, random_arrivals
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.metrics import ServingMetrics
from minilib.serving.load.open_loop import run_open_loop
from minilib.serving.load.simulation import (
    FittedPrice,
    MachinePrice,
    SimulatedEngine,
    StepCounts,
    TimedEngine,
    pages_that_fit,
)
from minilib.serving.request import SamplingParams
from tests.serving.served import assert_idle, likeliest
from tests.serving.test_engine_random import CONFIG, model

LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, tie_embeddings=False)


def one_second(counts):
    return 1.0


def watch_plans(engine):
    """A list that grows by what each step computes."""
    plans, schedule = [], engine.scheduler.schedule

    def watched():
        work = schedule()
        plans.append(
            [(s.request_id, s.sample, s.num_computed_tokens, count, tuple(s.table.frames)) for s, count in work]
        )
        return work

    engine.scheduler.schedule = watched
    return plans


def engines(**options):
    """A real engine and a simulated one of the same sizes, and the plans that each makes."""
    pair = Engine(model(), **options), SimulatedEngine(CONFIG, one_second, VirtualClock(), **options)
    return pair, [watch_plans(engine) for engine in pair]


@pytest.mark.parametrize("seed", range(14))
def test_simulator_and_engine_take_the_same_decisions(seed):
    """In lockstep: the same requests join and are aborted before the same steps; with preemption, chunks and forks."""
    choices = random.Random(seed)
    page_size = choices.choice([1, 2, 4, 16])
    preemption = choices.choice(["recompute", "swap"])
    (real, simulated), plans = engines(
        num_pages=-(-40 // page_size) + choices.choice([0, 3, 20]),
        page_size=page_size,
        num_swap_pages=choices.choice([9, 60]) // page_size + 1 if preemption == "swap" else 0,
        max_batch_tokens=choices.choice([3, 8, 17, 100]),
        max_sequences=choices.choice([3, 6, 20]),
        preemption=preemption,
    )
    names, dropped = [], 0
    for step in range(150):
        while choices.random() < 0.25:
            names.append(f"request {len(names)}")
            text = [choices.randrange(CONFIG.vocab_size) for _ in range(choices.randint(1, 20))]
            params = SamplingParams(choices.randint(1, 16), temperature=choices.choice([0, 1.0]), seed=step,
                                    n=choices.choice([1, 1, 1, 3]), ignore_eos=True)  # fmt: skip
            for engine in (real, simulated):
                engine.add_request(names[-1], text, params)
        if real.requests and choices.random() < 0.05:
            name = choices.choice(list(real.requests))
            assert real.abort(name) and simulated.abort(name)
            dropped += 1
        made = [[(o.request_id, o.sample, o.finish_reason) for o in engine.step()] for engine in (real, simulated)]
        assert made[0] == made[1]
        assert plans[0] == plans[1]
    while real.has_unfinished or simulated.has_unfinished:
        real.step(), simulated.step()
    assert plans[0] == plans[1] and len(names) > 20 and dropped
    assert_idle(real)
    assert_idle(simulated)
    busy = [plan for plan in plans[1] if plan]
    assert [sum(count for *_, count, _ in plan) for plan in busy] == [t.counts.tokens for t in simulated.history]


def test_the_random_plans_have_preemption_chunks_and_swaps_in_them():
    """What the test above compares is worth comparing."""
    seen = set()
    for preemption in ("recompute", "swap"):
        (_, simulated), (_, plans) = engines(
            num_pages=20, page_size=2, num_swap_pages=30, max_batch_tokens=8, preemption=preemption
        )
        for number in range(4):
            simulated.add_request(str(number), [1] * (9 + number), likeliest(16))
        while simulated.has_unfinished:
            simulated.step()
            seen |= {sequence.status.value for sequence in simulated.scheduler.waiting}
        seen |= {"chunk" for plan in plans for *_, count, _ in plan if 1 < count < 9}
        seen |= {"moved" for taken in simulated.history if taken.counts.moved_tokens}
    assert seen == {"waiting", "swapped", "chunk", "moved"}


class OneSecondEngine(Engine):
    """A real engine whose steps take one second of a virtual clock, if they compute anything."""

    def __init__(self, clock, *sizes, **options):
        super().__init__(*sizes, **options)
        self.clock, self._time = clock.now, clock

    def _forward(self, *inputs):
        self._time.advance(1.0)
        return super()._forward(*inputs)


@pytest.mark.parametrize("seed", range(4))
def test_counted_in_steps_all_times_are_the_same(seed):
    """Through the same open loop: each token of each request comes at the same time."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, 20, (2, 40)).tolist()
    arrivals = random_arrivals(gamma_times(40, 0.4, 2.0, seed), *lengths, CONFIG.vocab_size, seed)
    sizes = {"num_pages": 14, "page_size": 4, "max_batch_tokens": 16, "max_sequences": 5}
    clocks = VirtualClock(), VirtualClock()
    real = run_open_loop(OneSecondEngine(clocks[0], model(), **sizes), arrivals, clocks[0])
    simulated = run_open_loop(SimulatedEngine(CONFIG, one_second, clocks[1], **sizes), arrivals, clocks[1])
    assert real == simulated
    assert all(one.completed and len(one.token_times) == new for one, new in zip(real, lengths[1], strict=True))


# Queueing theory


def served_one_at_a_time(rate, lengths, seed):
    """Seconds that each request waited: steps of 1 s, batches of one, as many steps as its length; Poisson arrivals."""
    clock, count = VirtualClock(), len(lengths)
    engine = SimulatedEngine(CONFIG, one_second, clock, 16, page_size=4, max_sequences=1)
    load = random_arrivals(poisson_times(count, rate, seed), [1] * count, lengths, CONFIG.vocab_size)
    times = run_open_loop(engine, load, clock)
    assert len(engine.history) == sum(lengths)
    return np.array([one.ttft - 1.0 for one in times]), engine.history, times


def mean_and_error(waits, batches=30):
    """Mean and its standard error, from the means of consecutive batches: neighbours wait alike."""
    means = [batch.mean() for batch in np.array_split(waits, batches)]
    return np.mean(means), np.std(means, ddof=1) / math.sqrt(batches)


@pytest.mark.parametrize("utilization", [0.3, 0.7])
def test_waiting_of_md1(utilization):
    """Deterministic service of 1 s: Wq = ρ / (2 (1 − ρ))."""
    waits, _, _ = served_one_at_a_time(utilization, [1] * 9000, seed=3)
    mean, error = mean_and_error(waits)
    expected = utilization / (2 * (1 - utilization))
    assert abs(mean - expected) < 3 * error and error < 0.1 * expected
    assert abs(mean - 2 * expected) > 5 * error, "M/M/1 would wait twice as long"


def test_waiting_of_mg1():
    """Pollaczek–Khinchine: Wq = λ E[S²] / (2 (1 − ρ)), with services of 1 or 9 s."""
    lengths = np.where(np.random.default_rng(7).random(6000) < 0.2, 9, 1)
    mean_service, square = 0.2 * 9 + 0.8, 0.2 * 81 + 0.8
    rate = 0.5 / mean_service
    waits, _, _ = served_one_at_a_time(rate, lengths.tolist(), seed=5)
    mean, error = mean_and_error(waits)
    expected = rate * square / (2 * (1 - 0.5))
    assert abs(mean - expected) < 3 * error and error < 0.15 * expected


def test_work_is_conserved():
    """The server is never idle while somebody waits: Lindley's recursion gives every wait exactly."""
    lengths = np.random.default_rng(1).integers(1, 6, 400).tolist()
    waits, history, times = served_one_at_a_time(0.3, lengths, seed=2)
    free = 0.0
    for wait, one, length in zip(waits, times, lengths, strict=True):
        start = max(free, one.due)
        assert wait == pytest.approx(start - one.due, abs=1e-9)
        free = start + length
    assert sum(taken.seconds for taken in history) == sum(lengths)
    ends = [taken.started + taken.seconds for taken in history]
    arrivals = [one.due for one in times]
    for end, following in zip(ends, history[1:], strict=False):
        idle = following.started - end
        assert idle <= 1e-9 or min(abs(following.started - due) for due in arrivals) < 1e-9


@pytest.mark.parametrize("budget", [5, 64, 2048])
def test_tokens_computed_are_those_of_the_closed_form(budget):
    clock, draws = VirtualClock(), np.random.default_rng(4)
    prompts, news = draws.integers(1, 30, (2, 60)).tolist()
    engine = SimulatedEngine(CONFIG, one_second, clock, 2000, page_size=4, max_batch_tokens=budget)
    run_open_loop(engine, random_arrivals(poisson_times(60, 3.0), prompts, news, CONFIG.vocab_size), clock)
    counts = [taken.counts for taken in engine.history]
    assert sum(one.tokens for one in counts) == sum(map(tokens_with_cache, prompts, news))
    assert sum(one.rows for one in counts) == sum(news), "logits for each new token and for no chunk"
    assert max(one.tokens for one in counts) <= budget
    pairs = sum((p + n - 1) * (p + n) // 2 for p, n in zip(prompts, news, strict=True))
    assert sum(one.pairs for one in counts) == pairs, "each token sees itself and those before it, once"


# Prices


def test_a_decode_step_reads_all_weights_and_the_cache():
    """By hand, of an 8 B model in bf16 on an H100: bytes of weights and of keys and values over 3.35 TB/s."""
    machine = Machine.datasheet("h100-sxm")
    priced, counts = MachinePrice(machine, LLAMA_8B), StepCounts((1,) * 8, (1000,) * 8, 8)
    weights, cache = LLAMA_8B.num_parameters - 128256 * 4096, 8 * 1000 * 2 * 32 * 8 * 128
    new = 8 * 2 * 32 * 8 * 128
    assert priced.weights_cost(counts).bytes == 2 * (weights + new)
    assert priced.weights_cost(counts).flops == 2 * 8 * weights
    queries_and_results, tables = 8 * 2 * 32 * 32 * 128, 32 * 8 * 63
    assert priced.attention_cost(counts).bytes == 2 * (cache + queries_and_results) + 4 * tables
    assert priced.predict(counts).bound == "memory"
    seconds = 2 * (weights + new + cache + queries_and_results) / machine.memory_bandwidth
    assert priced(counts) == pytest.approx(seconds, rel=1e-3)
    assert MachinePrice(machine, LLAMA_8B, overhead=1.0)(counts) == pytest.approx(1 + seconds, rel=1e-3)


def test_a_long_prompt_is_bound_by_arithmetic():
    machine = Machine.datasheet("h100-sxm")
    priced, counts = MachinePrice(machine, LLAMA_8B), StepCounts((4096,), (4096,), 1)
    head = 128256 * 4096
    flops = 2 * 4096 * (LLAMA_8B.num_parameters - 2 * head) + 2 * head
    assert priced.weights_cost(counts).flops == flops
    assert priced.attention_cost(counts).flops == 32 * 4 * 32 * 128 * (4096 * 4097 // 2)
    assert priced.predict(counts).bound == "compute"
    assert priced(counts) > flops / machine.flops["bf16"]
    chunk = StepCounts((4096,), (8192,), 0)
    assert priced.weights_cost(chunk).flops == flops - 2 * head, "a chunk that samples nothing needs no logits"


def test_experts_are_read_as_tokens_hit_them():
    moe = ModelConfig(32000, 512, 1024, 4, 8, 4, 64, 4096, moe=MoEConfig(8, 2, 256))
    priced = MachinePrice(Machine.datasheet("h200"), moe)

    def read(tokens):
        values = priced.weights_cost(StepCounts((tokens,), (tokens,), 1)).bytes / 2
        return values - tokens * moe.kv_values_per_token

    assert read(1) == pytest.approx(moe.num_active_parameters)
    assert read(10_000) == pytest.approx(moe.num_parameters)
    one, two = read(1), read(2)
    experts_per_layer = (moe.num_parameters - moe.num_active_parameters) / 6
    assert two - one == pytest.approx(1.5 * experts_per_layer), "of the second token's two experts 1.5 are new"
    every = ModelConfig(32000, 512, 1024, 4, 8, 4, 64, 4096, moe=MoEConfig(2, 2, 256))
    assert MachinePrice(Machine.datasheet("h200"), every).weights_cost(StepCounts((1,), (1,), 1)).bytes > 0


def test_pages_that_move_take_time_on_a_link():
    machine = Machine.datasheet("h100-sxm")
    link = next(name for name in machine.links if "pcie" in name.lower())
    priced = MachinePrice(machine, LLAMA_8B, host_link=link)
    still, moving = StepCounts((1,), (100,), 1), StepCounts((1,), (100,), 1, moved_tokens=160)
    moved = 160 * LLAMA_8B.kv_values_per_token * 2 / machine.links[link].bandwidth
    assert priced(moving) - priced(still) == pytest.approx(moved + machine.links[link].latency)


def test_faster_machines_answer_sooner():
    """The same load on two data sheets: every request's first token comes sooner on the faster one."""
    load = random_arrivals(poisson_times(40, 20.0), [512] * 40, [16] * 40, LLAMA_8B.vocab_size)
    found = []
    for name in ("a100-80g-sxm", "h100-sxm", "b200"):
        machine, clock = Machine.datasheet(name), VirtualClock()
        engine = SimulatedEngine(LLAMA_8B, MachinePrice(machine, LLAMA_8B), clock, pages_that_fit(machine, LLAMA_8B))
        found.append(ServingMetrics.of(run_open_loop(engine, load, clock)))
    assert [metrics.completed for metrics in found] == [40] * 3
    for metric in ("ttft", "itl", "e2e"):
        medians = [getattr(metrics, metric).p50 for metrics in found]
        assert medians == sorted(medians, reverse=True) and len(set(medians)) == 3


def test_pages_are_what_the_weights_leave():
    machine = Machine.datasheet("h100-sxm")
    pages = pages_that_fit(machine, LLAMA_8B, page_size=16, share=0.9)
    assert pages == (0.9 * machine.memory_bytes - 2 * LLAMA_8B.num_parameters) // (
        2 * 16 * LLAMA_8B.kv_values_per_token
    )
    with pytest.raises(ValueError, match="leave no page"):
        pages_that_fit(Machine.datasheet("rtx-4090"), LLAMA_8B, dtype="fp32")


# Fits


def random_steps(count, seed=0):
    draws = random.Random(seed)
    steps = []
    for _ in range(count):
        counts = [draws.choice([1, 1, 1, draws.randint(2, 300)]) for _ in range(draws.randint(1, 16))]
        steps.append(StepCounts(tuple(counts), tuple(n + draws.randint(0, 400) for n in counts), len(counts)))
    return steps


def test_a_fit_finds_the_coefficients_of_steps_that_are_linear():
    truth = FittedPrice(5e-3, 3e-4, 2e-5, 1e-7, 4e-10)
    fitted = FittedPrice.fit([(counts, truth(counts)) for counts in random_steps(40)])
    for name in ("step", "sequence", "token", "context", "pair"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-6)


def test_a_fit_is_never_negative_and_best_among_those():
    """Steps that a longer context makes shorter: no other non-negative coefficients have smaller relative errors."""
    draws = random.Random(3)
    measured = [
        (counts, 1e-3 + 2e-5 * counts.tokens - 1e-7 * sum(counts.contexts) + 1e-4 * draws.random())
        for counts in random_steps(30, seed=2)
    ]
    measured = [(counts, max(seconds, 1e-4)) for counts, seconds in measured]

    def loss(fitted):
        return sum((fitted(counts) / seconds - 1) ** 2 for counts, seconds in measured)

    fitted = FittedPrice.fit(measured)
    values = [fitted.step, fitted.sequence, fitted.token, fitted.context, fitted.pair]
    assert min(values) >= 0 and 0 in values
    for place in range(5):
        for change in (-0.02, 0.02):
            nearby = [*values]
            nearby[place] = max(0.0, values[place] * (1 + change) if values[place] else change * 1e-7)
            assert loss(FittedPrice(*nearby)) >= loss(fitted) - 1e-9


def test_what_cannot_be_fitted_is_refused():
    steps = random_steps(5)
    with pytest.raises(ValueError, match="got 4"):
        FittedPrice.fit([(counts, 1.0) for counts in steps[:4]])
    with pytest.raises(ValueError, match="each above 0 s"):
        FittedPrice.fit([(counts, 0.0) for counts in steps])
    same = StepCounts((1,), (10,), 1)
    assert FittedPrice.fit([(same, 2.0)] * 6)(same) == pytest.approx(2.0)


def test_a_timed_engine_notes_what_every_step_computes():
    engine = TimedEngine(model(), 64, page_size=4, max_batch_tokens=8)
    for number, length in enumerate((11, 3)):
        engine.add_request(str(number), [1] * length, likeliest(4))
    tokens = []
    while engine.has_unfinished:
        tokens += engine.step()
    assert len(tokens) == 8 and engine.step() == [] and not engine.has_unfinished
    assert [step.counts.counts for step in engine.history] == [(8,), (3, 3), (1, 1), (1, 1), (1, 1)]
    assert [step.counts.contexts for step in engine.history][:3] == [(8,), (11, 3), (12, 4)]
    assert sum(step.counts.tokens for step in engine.history) == 11 + 3 + 2 * 3
    assert all(step.seconds > 0 for step in engine.history)
    started = [step.started for step in engine.history]
    assert started == sorted(started)
