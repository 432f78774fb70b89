"""What goes wrong on one rank is said on every rank, by name and before the timeout."""

import dataclasses
import os
import time

import pytest
import torch
import torch.distributed as dist

from minilib.parallel.pipeline import SCHEDULES, PipelineParallel, StageTimes
from minilib.parallel.pipeline.stage import Microbatch
from minilib.ranks import launch
from minilib.ranks.launch import RankFailed
from minilib.ranks.torch_communicator import TorchCommunicator
from tests.parallel.pipeline.models import communicator, decoder, microbatches

TIMEOUT = 5.0
F1B = SCHEDULES["1f1b"]


def said(fn):
    """What a call raises on this rank, and after how many seconds."""
    started = time.monotonic()
    try:
        fn()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


def test_ranks_with_different_schedules_cuts_or_models():
    """And schedules that do not fit: every rank says so, and can go on."""

    def on_rank():
        rank, comm = dist.get_rank(), communicator(timeout=TIMEOUT)
        sound = F1B(3, 4)
        shorter = dataclasses.replace(sound, actions=(sound.actions[0], sound.actions[1][:-1], sound.actions[2]))
        calls = {
            "order": lambda: PipelineParallel(decoder(), comm, SCHEDULES["gpipe" if rank == 2 else "1f1b"](3, 4)),
            "microbatches": lambda: PipelineParallel(decoder(), comm, F1B(3, 4 + (rank == 1))),
            "cut": lambda: PipelineParallel(decoder(), comm, sound, [2, 1, 1] if rank < 2 else [1, 1, 2]),
            "model": lambda: PipelineParallel(decoder(vocab_size=19 + rank), comm, sound),
            "unsound": lambda: PipelineParallel(decoder(), comm, shorter),
            "ranks": lambda: PipelineParallel(decoder(), comm, F1B(2, 4)),
            "layers": lambda: PipelineParallel(decoder(num_layers=2), comm, sound),
            "stages": lambda: PipelineParallel(decoder(), comm, sound, [2, 2]),
            "times": lambda: PipelineParallel(decoder(), comm, sound, least=[StageTimes()] * 2),
        }
        found = {name: said(call)[:2] for name, call in calls.items()}
        PipelineParallel(decoder(), comm, sound).step(microbatches(0, 4))
        found["transport"] = said(lambda: PipelineParallel(decoder(), TorchCommunicator(), sound))[:2]
        return found

    for found in launch.run(on_rank, 3, timeout=100):
        kinds = {name: kind for name, (kind, _) in found.items()}
        assert kinds == {
            "order": "SchedulesDiffer", "microbatches": "SchedulesDiffer", "cut": "SchedulesDiffer",
            "model": "RanksDiffer", "unsound": "UnsoundSchedule", "ranks": "ValueError",
            "layers": "StageWithoutLayers", "stages": "ValueError", "times": "ValueError", "transport": "TypeError",
        }  # fmt: skip
        assert "rank 0 has [1f1b, 4 microbatches], rank 2 has [gpipe, 4 microbatches]" in found["order"][1]
        assert "rank 1 has [1f1b, 5 microbatches]" in found["microbatches"][1]
        assert "rank 0 has [layers [2, 1, 1]], rank 2 has [layers [1, 1, 2]]" in found["cut"][1]
        assert "rank 1 lacks 1B3" in found["unsound"][1]
        assert "is for 2 ranks, and there are 3" in found["ranks"][1]


@pytest.mark.parametrize("transport", ["group", "shared"])
def test_a_rank_that_fails_in_a_step_leaves_nobody_waiting(transport):
    """It raises in a forward, has other microbatches, or fewer; whoever depends on it hears before the timeout."""

    def fails(case):
        comm = communicator(transport, timeout=TIMEOUT)
        pipeline, parts = PipelineParallel(decoder(), comm, F1B(3, 4)), microbatches(0, 4)
        if comm.rank == 1 and case == "raises":
            pipeline.stages[1].layers["2"].register_forward_hook(lambda *_: 1 / 0)
        if comm.rank == 2 and case == "shapes":
            parts[0] = Microbatch(*(part[:, :1] for part in parts[1]))
        if comm.rank == 0 and case == "fewer":
            parts.pop()
        if case == "ignored":
            parts = [part._replace(targets=torch.full_like(part.targets, -100)) for part in parts]
        return said(lambda: pipeline.step(parts)), said(lambda: pipeline.step(parts))[:2]

    def on_rank():
        return [fails(case) for case in ("raises", "shapes", "fewer", "ignored")]

    ranks = launch.run(on_rank, 3, timeout=100)
    raises, shapes, fewer, ignored = zip(*ranks, strict=True)
    for case, origin, kind, words in (
        (raises, 1, "ZeroDivisionError", "division by zero"),
        (shapes, 2, "CollectiveMismatch", "step 1 of 1f1b, 1F0"),
        (fewer, 0, "ValueError", "1f1b is made for 4 microbatches, got 3"),
    ):
        for rank, ((found, text, seconds), (later, again)) in enumerate(case):
            assert found == kind if rank == origin else found in ("CollectiveFailed", "CollectiveMismatch"), (
                text,
                rank,
            )
            assert words in text if rank == origin else "step 1 of 1f1b" in text
            assert text.count(" (in ") <= 1, "wrapped by the message and again by the step"
            assert seconds < TIMEOUT + 5 * 0.5 + 5, "the machine is shared"
            assert later == "CollectiveFailed" and "an earlier call failed" in again
    assert {first[0] for first, _ in ignored} == {"ValueError"} and "no token of this batch counts" in ignored[0][0][1]


def test_a_rank_that_dies_in_a_step():
    def on_rank():
        pipeline = PipelineParallel(decoder(), communicator(), SCHEDULES["zero-bubble"](2, 4))
        pipeline.step(microbatches(0, 4))
        if dist.get_rank() == 1:
            pipeline.stages[1].layers["2"].register_forward_hook(lambda *_: os.kill(os.getpid(), 9))
        pipeline.step(microbatches(1, 4))

    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL") as caught:
        launch.run(on_rank, 2, timeout=100)
    assert caught.value.rank == 1
