"""Ranks that step with different batches or pipelines hear of it; a batch that no step can run costs nothing."""

import pytest
import torch

from minilib.parallel.pipeline import SCHEDULES, Microbatch, PipelineParallel
from minilib.parallel.pipeline.stage import IGNORED
from minilib.ranks import launch
from tests.parallel.pipeline.models import communicator, decoder, microbatches, whole
from tests.parallel.pipeline.test_failures import TIMEOUT, said

SCHEDULE = SCHEDULES["1f1b"](2, 4)
OTHERS = {
    "tokens": lambda part: part._replace(token_ids=part.token_ids.flip(1)),
    "positions": lambda part: part._replace(positions=part.positions.flip(1)),
    "targets": lambda part: part._replace(targets=part.targets.flip(1)),
}


def test_other_microbatches_of_equal_shapes_other_num_tokens_and_other_pipelines_are_a_mismatch():
    def differs(case):
        comm, parts, num_tokens = communicator(timeout=TIMEOUT), microbatches(0, 4), None
        pipelines = [PipelineParallel(decoder(seed), comm, SCHEDULE) for seed in range(2)]
        for pipeline in pipelines:
            pipeline.step(parts, 9)
        if comm.rank == 1:
            parts = [OTHERS[case](part) for part in parts] if case in OTHERS else parts
            num_tokens = 10 if case == "num_tokens" else None
            pipelines = pipelines[::-1] if case == "pipelines" else pipelines
        return said(lambda: pipelines[0].step(parts, num_tokens))[:2]

    cases = [*OTHERS, "num_tokens", "pipelines"]
    first, second = launch.run(lambda: {case: differs(case) for case in cases}, 2, timeout=100)
    for case in cases:
        assert first[case][0] == "CollectiveFailed" and second[case][0] == "CollectiveMismatch", case
        assert "rank 1 expects [step 2 of 1f1b, 0F0, pipeline" in second[case][1]
    assert (
        "pipeline 2, batch" in second["pipelines"][1]
        and "got [step 2 of 1f1b, 0F0, pipeline 1" in (second["pipelines"][1])
    )


def test_what_no_step_can_run_is_refused_before_anything_is_sent():
    """On all ranks alike; the next step is as if nothing had been."""
    good = microbatches(0, 4)
    narrow = [good[0], good[1]._replace(targets=good[1].targets[:, :1]), *good[2:]]
    refused = [
        ([good[:3]], ValueError, "1f1b is made for 4 microbatches, got 3"),
        ([[tuple(part) for part in good]], TypeError, "microbatch 0 has to be a Microbatch, .* got a tuple"),
        ([narrow], ValueError, "microbatch 1 has token_ids of shape .* every token needs one target"),
        *(([good, number], ValueError, f"num_tokens is a whole number ≥ 1, got {number}")
          for number in (0, -3, 1.5, float("nan"), float("inf"), True)),
    ]  # fmt: skip

    def on_rank():
        pipeline = PipelineParallel(decoder(), communicator(timeout=TIMEOUT), SCHEDULE)
        traffic = pipeline.comm.traffic.messages
        pipeline.comm.barrier()
        barrier = pipeline.comm.traffic.messages - traffic
        for number, (given, error, words) in enumerate(refused, 2):
            with pytest.raises(error, match=words):
                pipeline.step(*given)
            assert pipeline.comm.traffic.messages - traffic == number * barrier, "no more than a barrier"
        for off in (torch.no_grad, torch.inference_mode):
            with off(), pytest.raises(RuntimeError, match="gradients are off"):
                pipeline.step(good)
        return pipeline.step(good)

    alone = decoder().loss(*whole(good)).item()
    assert launch.run(on_rank, 2, timeout=100)[1] == pytest.approx(alone, abs=1e-12)


def test_a_tied_table_that_is_frozen_has_no_gradient_or_belongs_to_a_step_that_fails():
    """Earlier sums stay; a table that is frozen on one rank alone is a mismatch."""

    def table(pipeline):
        return dict(pipeline.named_parameters())["embed.weight"]

    def on_rank():
        pipeline, parts = PipelineParallel(decoder(), communicator(timeout=TIMEOUT), SCHEDULE), microbatches(0, 4)
        pipeline.step(parts)
        before = table(pipeline).grad.clone()
        table(pipeline).requires_grad_(False)
        pipeline.step(parts)
        kept = [torch.equal(table(pipeline).grad, before)]
        table(pipeline).requires_grad_(True)
        nothing = [Microbatch(part[0], part[1], torch.full_like(part[2], IGNORED)) for part in parts]
        pipeline.step(nothing, num_tokens=1)
        kept.append(torch.equal(table(pipeline).grad, before))
        pipeline.zero_grad()
        table(pipeline).requires_grad_(False)
        pipeline.step(parts)
        kept.append(table(pipeline).grad is None)
        table(pipeline).requires_grad_(True)
        pipeline.step(parts)
        kept.append(torch.equal(table(pipeline).grad, before))
        broken = [part._replace(token_ids=part.token_ids + 1000) for part in parts]
        found = [said(lambda: pipeline.step(broken))[0]]
        kept.append(torch.equal(table(pipeline).grad, before))
        pipeline = PipelineParallel(decoder(), communicator(timeout=TIMEOUT), SCHEDULE)
        table(pipeline).requires_grad_(pipeline.comm.rank == 0)
        found.append(said(lambda: pipeline.step(parts))[:2])
        return kept, found

    ranks = launch.run(on_rank, 2, timeout=100)
    assert [kept for kept, _ in ranks] == [[True] * 5] * 2
    assert [found[0] for _, found in ranks] == ["IndexError", "CollectiveFailed"]
    errors = [found[1] for _, found in ranks]
    assert {kind for kind, _ in errors} <= {"CollectiveMismatch", "CollectiveFailed"}
    assert any("a tied embedding that is frozen" in text and kind == "CollectiveMismatch" for kind, text in errors)


def test_a_norm_that_is_not_finite_clips_as_torch_does():
    def on_rank():
        found = []
        for tied in (True, False):
            pipeline = PipelineParallel(decoder(tie_embeddings=tied), communicator(timeout=TIMEOUT), SCHEDULE)
            for number in (float("nan"), float("inf")):
                pipeline.zero_grad()
                pipeline.step(microbatches(0, 4))
                if pipeline.comm.rank == 1:
                    dict(pipeline.named_parameters())["layers.2.qkv.weight"].grad[0, 0] = number
                norm = pipeline.clip_grad_norm(0.5)
                found.append((norm, {name: p.grad for name, p in pipeline.named_parameters()}))
        return found

    ranks = launch.run(on_rank, 2, timeout=100)
    cases = [(tied, number) for tied in (True, False) for number in (float("nan"), float("inf"))]
    for place, (tied, number) in enumerate(cases):
        model = decoder(tie_embeddings=tied)
        model.loss(*whole(microbatches(0, 4))).backward()
        model.layers[2].qkv.weight.grad[0, 0] = number
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        for rank in ranks:
            assert rank[place][0] == pytest.approx(norm, nan_ok=True)
            for name, gradient in rank[place][1].items():
                assert torch.equal(gradient.isnan(), model.get_parameter(name).grad.isnan()), (tied, number, name)
                assert torch.equal(gradient == 0, model.get_parameter(name).grad == 0), (tied, number, name)
