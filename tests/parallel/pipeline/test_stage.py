"""Cutting a decoder by layers, and a batch by sequences; a stage without layers is refused."""

import re

import pytest
import torch

from minilib.parallel.pipeline import StageWithoutLayers, cut_batch, layers_per_stage
from minilib.parallel.pipeline.stage import DecoderStage
from tests.parallel.pipeline.models import decoder, microbatches, whole


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "lighter", "expected"),
    [
        (8, 4, False, [2, 2, 2, 2]),
        (7, 3, False, [3, 2, 2]),
        (1, 1, False, [1]),
        (1, 1, True, [1]),
        (126, 16, True, [7, *[8] * 14, 7]),  # Llama 3 405B, as its authors cut it
        (6, 4, True, [1, 2, 2, 1]),
        (7, 4, True, [2, 2, 2, 1]),
        (2, 2, True, [1, 1]),
    ],
)
def test_layers_are_dealt_evenly(num_layers, num_stages, lighter, expected):
    assert layers_per_stage(num_layers, num_stages, lighter) == expected


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((3, 4), "stage 3 would have 0 layers of 3 in 4 stages"),
        ((0, 1), "stage 0 would have 0 layers"),
        ((2, 3, True), "stage 0 would have 1|stage 2 would have 0 layers of 2"),
        ((4, 4, True), "stage 3 would have 0 layers of 4 .* use fewer stages, or lighter_ends=False$"),
        ((1, 3, True), "use fewer stages$"),
    ],
)
def test_a_stage_without_layers(numbers, said):
    with pytest.raises(StageWithoutLayers, match=said):
        layers_per_stage(*numbers)


def test_cuts_that_are_none():
    with pytest.raises(ValueError, match="num_stages is 1 or more, got 0"):
        layers_per_stage(4, 0)
    with pytest.raises(StageWithoutLayers, match="stage 1 would have 0 layers of 4"):
        DecoderStage(decoder(), [4, 0], 0)
    with pytest.raises(ValueError, match=r"the stages have \[2, 3\] layers, 5 in all, and the model has 4"):
        DecoderStage(decoder(), [2, 3], 0)


def test_stages_one_after_the_other_are_the_decoder():
    """Parameters and names are the decoder's own, and the decoder itself stays as it was."""
    model = decoder()
    before = {name: id(value) for name, value in model.named_parameters()}
    stages = [DecoderStage(model, [2, 1, 1], stage) for stage in range(3)]
    batch = whole(microbatches(0, 3))
    x = stages[0].embed(batch.token_ids)
    for stage in stages:
        x = stage(x, batch.positions)
    assert torch.equal(stages[-1].loss(x, batch.targets), model.loss(*batch))
    named = {name: id(value) for stage in stages for name, value in stage.named_parameters()}
    assert named == {**before, "unembed.weight": before["embed.weight"]}
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert stages[-1].loss(x, torch.full_like(batch.targets, -100)) == 0


def test_a_batch_that_does_not_divide():
    tokens = torch.arange(10).view(5, 2)
    parts = cut_batch(tokens, tokens, tokens, 3)
    assert [len(part.token_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), tokens)
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"5 sequences cannot be cut into {number} microbatches of at least one"):
            cut_batch(tokens, tokens, tokens, number)


def test_positions_of_every_sequence_and_tensors_that_do_not_match():
    """Positions that Decoder.loss takes are cut as if each sequence had its own."""
    batch = whole(microbatches(0, 4))
    for positions in (batch.positions[0], batch.positions[:1]):
        parts = cut_batch(batch.token_ids, positions, batch.targets, 3)
        expected = cut_batch(*batch, 3)
        assert all(torch.equal(one, other) for mine, theirs in zip(parts, expected, strict=True)
                   for one, other in zip(mine, theirs, strict=True))  # fmt: skip
    tokens = torch.zeros(4, 2, dtype=torch.int64)
    for bad in ((tokens, tokens, tokens[:3]), (tokens, tokens[:3], tokens), (tokens, tokens[0, :1], tokens),
                (tokens, tokens[:, :1], tokens), (tokens, tokens, tokens[0])):  # fmt: skip
        shapes = re.escape(f"{tuple(bad[0].shape)}, {tuple(bad[1].shape)} and {tuple(bad[2].shape)}")
        with pytest.raises(ValueError, match=rf"all \(sequences, tokens\).*got {shapes}"):
            cut_batch(*bad, 2)
