"""Policies that the tests beside this file serve by, and what must hold at every step under each of them."""

import random

import torch

from minilib.mechanisms.scheduling import (
    AgedPriority,
    EarliestDeadline,
    FairShare,
    FirstComeFirstServed,
    MultiLevelFeedback,
    ShortestRemaining,
    TimeSlicing,
)
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams, SchedulingParams
from minilib.serving.sequence import Status
from tests.model.random_weights import randomize

TENANTS = {"a": 1, "b": 2, "c": 0.5}
POLICIES = {
    "fcfs": FirstComeFirstServed,
    "priority": lambda: AgedPriority(patience=20),
    "srpt": lambda: ShortestRemaining(patience=2),
    "fair share": FairShare,
    "fair share by weight": lambda: FairShare(TENANTS),
    "deadline": lambda: EarliestDeadline(horizon=100),
    "round robin": lambda: TimeSlicing(3),
    "feedback": lambda: MultiLevelFeedback((2, 8), boost=60),
}
CONFIG = ModelConfig(31, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)


def drawn(choices, now=0):
    """Scheduling parameters of all kinds."""
    return SchedulingParams(
        priority=choices.randrange(4),
        tenant=choices.choice(sorted(TENANTS)),
        predicted_tokens=choices.choice([None, 1, 5, 30]),
        deadline=now + choices.choice([5, 50, 500, float("inf")]),
    )


def counted(engine):
    """Put arrivals and deadlines on a clock that counts units of work, and watch every step; returns the engine."""
    engine.clock = lambda: engine.scheduler.policy.served_units
    return watch(engine)


def watch(engine):
    """Check at every step what must hold under any policy; returns the engine.

    The budget is kept; nobody is in the batch twice, or has given way; pages are there for exactly what is computed;
    whoever runs is in the batch as long as there is budget; nobody is admitted at a step at which somebody gave way,
    and nobody before the first that waits; no chunk samples; and the next step begins with the policy's order.
    """
    scheduler, schedule, step = engine.scheduler, engine.scheduler.schedule, engine.step
    engine.last_work = []

    def watched_schedule():
        waiting = scheduler.waiting
        work = schedule()
        engine.last_work = work
        counts = dict(work)
        assert len(counts) == len(work), "a sequence is in the batch twice"
        assert sum(counts.values()) <= scheduler.max_batch_tokens, "the token budget is exceeded"
        assert sum(len(sequence.samples_due) for sequence in scheduler.running) <= scheduler.max_sequences
        for sequence, count in work:
            assert sequence.status is Status.RUNNING, "it gave way and is in the batch"
            assert 1 <= count <= sequence.num_uncomputed_tokens
            assert sequence.table.length == sequence.num_computed_tokens + count
        if sum(counts.values()) < scheduler.max_batch_tokens:
            assert set(scheduler.running) == set(counts), "a runnable sequence was skipped"
        admitted = [sequence for sequence in waiting if sequence.status is Status.RUNNING]
        assert admitted == waiting[: len(admitted)], "somebody was admitted before the first that waited"
        engine.catching_up = {sequence for sequence, count in work if count < sequence.num_uncomputed_tokens}
        return work

    def watched_step():
        tokens = {sequence: len(sequence.token_ids) for sequence in scheduler.running + scheduler.waiting}
        engine.last_work, engine.catching_up = [], set()
        outputs = step()
        assert scheduler.running == scheduler.policy.order(scheduler.running), "service changed the order, unnoticed"
        assert all(len(sequence.token_ids) == tokens[sequence] for sequence in engine.catching_up), "a chunk sampled"
        return outputs

    scheduler.schedule, engine.step = watched_schedule, watched_step
    return engine


class NoModel(Engine):
    """An engine whose every token is 0, without computing anything: for what happens around the model."""

    def __init__(self, *sizes, **options):
        super().__init__(randomize(Decoder(CONFIG), seed=5), *sizes, **options)

    def _forward(self, work, interrupts):
        rows = sum(count == sequence.num_uncomputed_tokens for sequence, count in work)
        return torch.zeros(rows, CONFIG.vocab_size)


def greedy(count, **options):
    return SamplingParams(max_tokens=count, temperature=0, **options)


def request_of(choices, longest_prompt=12, most_tokens=8):
    """A random prompt and greedy parameters."""
    prompt = [choices.randrange(CONFIG.vocab_size) for _ in range(choices.randint(1, longest_prompt))]
    return prompt, greedy(choices.randint(1, most_tokens), n=choices.choice([1, 1, 1, 2]))


def numbers(seed):
    return random.Random(f"scheduling/{seed}")
