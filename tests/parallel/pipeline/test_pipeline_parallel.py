"""Every schedule on ranks against one process on the whole batch: losses, gradients, norms and weights."""

import functools

import pytest
import torch

from minilib.parallel.pipeline import SCHEDULES, PipelineParallel
from minilib.parallel.pipeline.pricing import most_activations
from minilib.ranks import launch
from tests.parallel.pipeline.models import (
    CLIP,
    EXPERTS,
    communicator,
    decoder,
    largest_difference,
    microbatches,
    train,
    train_alone,
    whole,
)

STEPS = 10


def frozen(model):
    """The embedding, all of one layer, and some of another."""
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    model.layers[3].qkv.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    return model


CASES = {
    "4 layers": lambda seed: decoder(seed, num_layers=4),
    "8 layers": lambda seed: decoder(seed, num_layers=8),
    "untied, partly frozen": lambda seed: frozen(decoder(seed, num_layers=4, tie_embeddings=False)),
    "mixture of experts": lambda seed: decoder(seed, num_layers=4, moe=EXPERTS),
}


def trained(case, schedule, transport="shared", layers=None, steps=STEPS):
    """On a rank: a model that begins with other weights on every rank; what came of it."""
    comm = communicator(transport)
    pipeline = PipelineParallel(CASES[case](comm.rank), comm, schedule, layers)
    losses, norms, gradients = train(pipeline, steps)
    assert pipeline.most_held == most_activations(schedule.actions[comm.rank])
    return losses, norms, gradients, pipeline.full_state_dict()


@functools.cache
def alone(case, steps, num_microbatches):
    """On one process."""
    model = CASES[case](0)
    return *train_alone(model, steps, num_microbatches), model.state_dict()


def check(case, schedule, ranks, steps=STEPS):
    """Of all ranks, against one process."""
    losses, norms, gradients, weights = alone(case, steps, schedule.num_microbatches)
    assert max(norms) > 2 * CLIP, "nothing was clipped"
    seen = {}
    for rank, (mine, mine_norms, mine_gradients, state) in enumerate(ranks):
        if rank == schedule.rank_of[-1]:
            assert mine == pytest.approx(losses, abs=1e-12)
        else:
            assert mine == [None] * steps
        assert mine_norms == pytest.approx(norms, rel=1e-11)
        assert largest_difference(state, weights) < 1e-10, (schedule.name, rank)
        for name, gradient in mine_gradients.items():
            if name in seen:
                assert name == "embed.weight" and torch.equal(gradient, seen[name]), "copies differ"
            seen[name] = gradient
    assert largest_difference(seen, gradients) < 1e-10


@pytest.mark.parametrize(("world_size", "transport"), [(2, "group"), (4, "shared")])
def test_every_schedule_is_one_process(world_size, transport):
    case = f"{2 * world_size} layers"
    schedules = [make(world_size, 2 * world_size) for make in SCHEDULES.values()]
    ranks = launch.run(lambda: [trained(case, each, transport) for each in schedules], world_size, timeout=200)
    for schedule, found in zip(schedules, zip(*ranks, strict=True), strict=True):
        check(case, schedule, found)


@pytest.mark.parametrize("case", ["untied, partly frozen", "mixture of experts"])
def test_other_models_in_whole_and_split_backwards(case):
    schedules = [SCHEDULES[name](2, 4) for name in ("1f1b", "zero-bubble", "zbv")]
    ranks = launch.run(lambda: [trained(case, each, steps=4) for each in schedules], 2, timeout=200)
    for schedule, found in zip(schedules, zip(*ranks, strict=True), strict=True):
        check(case, schedule, found, steps=4)


def test_fewer_microbatches_than_stages_numbers_that_do_not_divide_uneven_stages_and_one_rank():
    cuts = [("gpipe", 2, [6, 1, 1]), ("1f1b", 1, [2, 4, 2]), ("1f1b", 5, [1, 1, 6]), ("zero-bubble", 2, None),
            ("breadth-first", 4, [1, 1, 2, 2, 1, 1]), ("interleaved", 2, None), ("zbv", 4, None)]  # fmt: skip
    cases = [(SCHEDULES[name](3, m), layers) for name, m, layers in cuts]

    def on_rank():
        return [trained("8 layers", schedule, layers=layers, steps=3) for schedule, layers in cases]

    ranks = launch.run(on_rank, 3, timeout=200)
    for (schedule, _), found in zip(cases, zip(*ranks, strict=True), strict=True):
        check("8 layers", schedule, found, steps=3)
    single = [SCHEDULES[name](1, 3) for name in ("gpipe", "interleaved", "zero-bubble", "zbv")]
    [found] = launch.run(lambda: [trained("4 layers", schedule, steps=3) for schedule in single], 1)
    for schedule, one in zip(single, found, strict=True):
        check("4 layers", schedule, [one], steps=3)


def test_steps_add_up_to_one_batch():
    """Gradient accumulation, with a tied table whose copies must not be added twice; nothing is scaled again."""
    schedules = [SCHEDULES[name](2, 4) for name in ("1f1b", "zbv")]
    tokens = sum(part.num_tokens for step in range(3) for part in microbatches(step, 4))

    def on_rank():
        found = []
        for schedule in schedules:
            pipeline = PipelineParallel(decoder(0), communicator(), schedule)
            for step in range(3):
                pipeline.step(microbatches(step, 4), num_tokens=tokens)
            found.append(({name: p.grad for name, p in pipeline.named_parameters()}, pipeline.grad_norm()))
        return found

    model = decoder(0)
    model.loss(*whole([part for step in range(3) for part in microbatches(step, 4)])).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    for rank in launch.run(on_rank, 2):
        for gradients, found in rank:
            assert max((g - expected[name]).abs().max().item() for name, g in gradients.items()) < 1e-12
            assert found == pytest.approx(norm, rel=1e-12)
