"""What a step holds and sends, counted: bytes of activations, messages between stages, hooks of parameters."""

from collections import Counter

import pytest
import torch

from minilib.parallel.pipeline import SCHEDULES, PipelineParallel, StageTimes, measured_timeline, price_schedule
from minilib.parallel.pipeline.stage import Microbatch
from minilib.ranks import launch
from tests.parallel.pipeline.models import VOCABULARY, Saved, communicator, decoder

SEQUENCES, TOKENS, HIDDEN = 2, 5, 8


def equal_microbatches(number):
    tokens = torch.arange(SEQUENCES * (TOKENS + 1)).view(SEQUENCES, -1) % VOCABULARY
    positions = torch.arange(TOKENS).expand(SEQUENCES, TOKENS)
    return [Microbatch(tokens[:, :-1], positions, tokens[:, 1:])] * number


def counted(schedule):
    """Of one step on this rank: bytes that forwards saved, most and in the end; messages and bytes sent; hooks."""
    comm = communicator()
    pipeline = PipelineParallel(decoder(0, tie_embeddings=False), comm, schedule)
    hooks = Counter()
    for name, parameter in pipeline.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: hooks.update([name]))
    messages, sent = comm.traffic.messages, comm.traffic.bytes
    with Saved(pipeline.parameters()) as saved:
        pipeline.step(equal_microbatches(schedule.num_microbatches))
    assert set(hooks) == {name for name, _ in pipeline.named_parameters()}
    traffic = comm.traffic.messages - messages, comm.traffic.bytes - sent
    return saved.most, saved.now, *traffic, set(hooks.values())


def test_memory_messages_and_hooks():
    """Memory of 1F1B and its kin does not grow with the microbatches; each boundary between ranks is crossed twice."""
    schedules = {(name, m): make(2, m) for name, make in SCHEDULES.items() for m in (4, 8)}
    ranks = launch.run(lambda: {key: counted(schedule) for key, schedule in schedules.items()}, 2, timeout=200)
    crossings = {name: 3 if schedules[name, 4].num_stages == 4 else 1 for name in SCHEDULES}
    crossings |= {"zbv": 2, "dual-pipe-v": 2}  # stages 1 and 2 are neighbours on rank 1
    for (name, microbatches), schedule in schedules.items():
        messages = nbytes = 0
        for rank, found in enumerate(ranks):
            most, left, sent, size, hooks = found[name, microbatches]
            assert left == 0 and hooks == {microbatches}
            assert (most == found[name, 4][0]) == (microbatches == 4 or name not in ("gpipe", "breadth-first")), name
            messages, nbytes = messages + sent, nbytes + size
            assert sent == len(list(schedule.messages(rank, 1 - rank)))
        assert messages == 2 * microbatches * crossings[name]
        assert nbytes == messages * SEQUENCES * TOKENS * HIDDEN * 8
    first, last = ranks[0]["1f1b", 8][0], ranks[0]["gpipe", 8][0]
    assert last == pytest.approx(4 * first), "2 microbatches are held by the one, 8 by the other"


def test_a_step_notes_when_each_action_was_done_and_takes_the_least_time():
    """Spans of all ranks are the schedule's actions, none begins before what it reads has ended."""
    least = [StageTimes(0.002, 0.001, 0.003), StageTimes(0.004, 0.002, 0.001)]
    schedule = SCHEDULES["zero-bubble"](2, 4)

    def on_rank():
        pipeline = PipelineParallel(decoder(0), communicator(), schedule, least=least)
        for _ in range(2):
            pipeline.step(equal_microbatches(4))
        return pipeline.spans

    timeline = measured_timeline(launch.run(on_rank, 2))
    assert [[span.key for span in spans] for spans in timeline.workers] == [list(row) for row in schedule.actions]
    ended = {span.key: span.end for span in timeline}
    for span in timeline:
        source = schedule.source_of(span.key)
        assert source is None or ended[source] <= span.start
        assert span.end - span.start >= least[span.key.stage].of(span.key.kind)
    assert timeline.makespan >= price_schedule(schedule, least).seconds
    assert measured_timeline([[], []]).makespan == 0
