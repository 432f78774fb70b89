"""Prices against closed forms and published figures; simulated splits against schedules worked out by hand."""

import itertools

import pytest

from minilib.model.config import ModelConfig
from minilib.numbers.machine import Link, Machine
from minilib.serving.disaggregation.pricing import (
    Phases,
    kv_links,
    kv_page_bytes,
    moves_over,
    price_move,
    price_phases,
    several,
    token_gap,
    wider,
)
from minilib.serving.disaggregation.split_simulation import SimulatedDecodeEngine, SimulatedWorkers
from minilib.serving.load.arrivals import Arrival, poisson_times, random_arrivals
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.metrics import ServingMetrics
from minilib.serving.load.open_loop import run_open_loop
from minilib.serving.load.simulation import MachinePrice, pages_that_fit
from minilib.serving.request import SamplingParams
from tests.serving.disaggregation.workers import CONFIG

LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, tie_embeddings=False)
LLAMA_70B = ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 131072, tie_embeddings=False)
H100 = Machine.datasheet("h100-sxm")


def one_second(counts):
    return 1.0


def a_second_a_token(counts):
    return float(counts.tokens)


def test_bytes_are_whole_pages_of_all_tokens_but_the_last():
    per_token = 2 * 32 * 8 * 128 * 2
    for length, tokens in ((1, 0), (2, 16), (16, 16), (17, 16), (18, 32), (8193, 8192)):
        assert kv_page_bytes(LLAMA_8B, length) == tokens * per_token
    assert kv_page_bytes(LLAMA_70B, 32769) == 32768 * 327_680, "320 KiB a token"


def test_bytes_are_those_that_distserve_states():
    """Section 3.3: 512 tokens of OPT-66B are approximately 1.13 GB (of 2³⁰ bytes), 64 layers of 9216 values."""
    opt = ModelConfig(50272, 9216, 36864, 64, 72, 72, 128, 2048)
    assert kv_page_bytes(opt, 513) / 2**30 == pytest.approx(1.13, abs=0.006)


@pytest.mark.parametrize(("bandwidth", "latency"), [(1e9, 0.0), (1e6, 0.0), (1e4, 0.0), (1e9, 0.01), (1e12, 2.0)])
def test_one_chunk_is_a_pipeline_of_two_stages(bandwidth, latency):
    """Makespan of L equal parts through computing c and sending s: c + (L − 1) · max(c, s) + s."""
    move = price_move(LLAMA_8B, 1025, one_second, Link(bandwidth, latency), chunk=1024)
    layers = LLAMA_8B.num_layers
    c, s = 1 / layers, latency + move.nbytes / layers / bandwidth
    assert move.prefill == pytest.approx(1.0) and move.travel == pytest.approx(layers * s)
    assert move.prefill + move.exposed == pytest.approx(c + (layers - 1) * max(c, s) + s)
    assert move.messages == layers


@pytest.mark.parametrize(("chunk", "chunks"), [(3, 3), (4, 3), (5, 3), (6, 2), (100, 1)])
def test_messages_are_those_that_workers_send(chunk, chunks):
    """As counted in test_tokens.py."""
    move = price_move(CONFIG, 12, one_second, Link(1e9), page_size=4, chunk=chunk)
    assert move.messages == CONFIG.num_layers * chunks
    assert move.nbytes == 3 * 4 * CONFIG.kv_values_per_token * 2


def test_a_fast_link_hides_all_but_the_last_layer_and_a_slow_one_hides_the_computing():
    price = MachinePrice(H100, LLAMA_8B)
    fast, slow = (price_move(LLAMA_8B, 8193, price, link) for link in (Link(450e9), Link(1.25e9)))
    assert fast.exposed == pytest.approx(fast.travel / fast.messages)
    assert fast.exposed < fast.travel / 100
    assert slow.exposed > 0.8 * slow.travel, "sent at 10 Gb/s, four fifths and more are waited for"
    moves = moves_over(kv_links(), LLAMA_8B, 8193, price)
    assert list(moves) == ["NVLink", "InfiniBand, 400 Gb/s", "Ethernet, 100 Gb/s"]
    exposed = [move.exposed for move in moves.values()]
    assert exposed == sorted(exposed)


def test_several_gpus_are_so_many_times_one():
    pair = several(H100, 2)
    assert pair.peak("bf16") == 2 * H100.peak("bf16") and pair.memory_bytes == 2 * H100.memory_bytes
    assert pair.link("nvlink") == wider(H100.link("nvlink"), 2)
    with pytest.raises(ValueError, match="one GPU or more"):
        several(H100, 0)


@pytest.mark.parametrize(("prefill", "decode"), [*itertools.product([0.1, 1, 3, 20], repeat=2)])
def test_no_split_does_more_than_mixed_replicas_and_a_balanced_one_as_much(prefill, decode):
    phases = Phases(prefill, decode, step=0.01)
    rates = {x: phases.rate(x, 8 - x) for x in range(1, 8)}
    assert max(rates.values()) <= phases.mixed_rate(8) * (1 + 1e-12)
    assert rates[phases.best_split(8)[0]] == max(rates.values())
    balanced = Phases(3.0, 1.0, step=0.01)
    assert balanced.best_split(8) == (6, 2) and balanced.rate(6, 2) == balanced.mixed_rate(8) == 2.0
    assert balanced.prefill_share == 0.75 and balanced.slowdown == 4.0


def test_phases_are_sums_of_steps():
    phases = price_phases(10, 6, 4, a_second_a_token, chunk=4)
    assert phases == Phases(prefill=10.0, decode=6 * 4 / 4, step=4.0)
    assert token_gap(4, 100, a_second_a_token) == 4.0 and token_gap(4, 100, a_second_a_token, chunk=7) == 11.0


def test_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="2 tokens"):
        price_move(CONFIG, 1, one_second, Link(1e9))
    with pytest.raises(ValueError, match="≥ 1"):
        price_phases(0, 1, 1, one_second)
    with pytest.raises(ValueError, match="of each kind"):
        Phases(1, 1, 1).rate(0, 2)
    with pytest.raises(ValueError, match="two workers"):
        Phases(1, 1, 1).best_split(1)
    with pytest.raises(ValueError, match="one worker or more"):
        SimulatedWorkers(CONFIG, one_second, 64, {}).mixed([], 0)


def request(due, length, new):
    return Arrival(due, [0] * length, SamplingParams(new, temperature=0, ignore_eos=True))


def test_a_split_in_steps_of_one_second():
    """8 of 9 tokens take 2 steps of 4; half a second later 3 tokens follow; who comes second waits for the first."""
    workers = SimulatedWorkers(CONFIG, one_second, 64, {"page_size": 4, "max_batch_tokens": 4})
    load = [request(0.0, 9, 3), request(0.0, 9, 2)]
    times = workers.split(load, 1, 1, exposed=lambda tokens: 0.5)
    assert [each.token_times for each in times] == [(3.5, 4.5, 5.5), (5.5, 6.5)]
    assert [each.ttft for each in times] == [3.5, 5.5]
    times = workers.split(load, 2, 2, exposed=lambda tokens: 0.5)
    assert [each.token_times for each in times] == [(3.5, 4.5, 5.5), (3.5, 4.5)]


def test_a_worker_that_decodes_computes_one_token_of_each_sequence():
    load = [request(0.1 * k, 5 + k % 9, 1 + k % 7) for k in range(60)]
    clock = VirtualClock()
    engine = SimulatedDecodeEngine(CONFIG, one_second, clock, 12, page_size=4, max_sequences=6)
    times = run_open_loop(engine, load, clock)
    assert [len(each.token_times) for each in times] == [each.params.max_tokens for each in load]
    first_steps = [step.counts for step in engine.history if len(set(step.counts.counts)) > 1]
    recomputed = sum(sum(counts.counts) - len(counts.counts) for counts in first_steps)
    assert all(max(step.counts.counts) == 1 for step in engine.history) or recomputed, "only what was preempted"
    assert engine.cache.pool.num_used == 0
    engine.check_invariants()


def metrics(prompt, new, share, chunk=2048, requests=60):
    """Two replicas at a share of their rate, and one worker of each kind: Llama 3.1 8B, H100s, InfiniBand."""
    price = MachinePrice(H100, LLAMA_8B)
    rate = share * price_phases(prompt, new, 64, price).mixed_rate(2)
    load = random_arrivals(poisson_times(requests, rate), [prompt] * requests, [new] * requests, 100)
    workers = SimulatedWorkers(LLAMA_8B, price, pages_that_fit(H100, LLAMA_8B), {"max_batch_tokens": chunk})
    exposed = price_move(LLAMA_8B, prompt, price, kv_links()["InfiniBand, 400 Gb/s"], chunk=chunk).exposed
    split = workers.split(load, 1, 1, lambda tokens: exposed)
    return ServingMetrics.of(workers.mixed(load, 2)), ServingMetrics.of(split)


def test_where_a_split_pays():
    """Long prompts and short answers: tokens come evenly, and first tokens later."""
    mixed, split = metrics(8000, 100, 0.5)
    assert split.tpot.p99 < 0.6 * mixed.tpot.p99 and split.itl.p99 < 0.3 * mixed.itl.p99
    assert split.ttft.p99 > mixed.ttft.p99, "one worker computes prompts, where two did"


def test_where_it_does_not():
    """Short prompts and long answers: the worker that computes prompts is idle, the other has all the rest."""
    mixed, split = metrics(200, 400, 0.5)
    assert split.tpot.p99 > mixed.tpot.p99 and split.ttft.p99 > mixed.ttft.p99
    assert split.output_throughput < mixed.output_throughput


def test_small_chunks_are_the_other_remedy():
    """A chunk of 256 tokens makes a mixed replica's longest gaps a few times shorter than one of 2048."""
    large, _ = metrics(8000, 100, 0.4, requests=30)
    small, _ = metrics(8000, 100, 0.4, chunk=256, requests=30)
    assert small.itl.p99 < 0.5 * large.itl.p99
