"""Stages: a Decoder cut by layers. The first stage has the embedding too, the last one norm, unembedding and loss.

    stage 0                    stage 1              stage 2
    embed, layers 0, 1         layers 2, 3, 4       layers 5, 6, norm, unembed, loss

Tied embeddings are one parameter on the first and the last stage. Where different ranks have these stages, each rank
has a copy, and the gradient is the sum of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from minilib.model.decoder import Decoder
from minilib.model.ops import IGNORED
from minilib.model.rope import rotation


class StageWithoutLayers(ValueError):
    """There are not enough layers for every stage to have one."""


class Microbatch(NamedTuple):
    """A part of a step's batch, as `Decoder.loss` takes it.

    Args:
        token_ids: (sequences, tokens) int64.
        positions: (sequences, tokens) int64.
        targets: (sequences, tokens) int64; IGNORED where a token does not count.
    """

    token_ids: Tensor
    positions: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return int((self.targets != IGNORED).sum())


def cut_batch(token_ids: Tensor, positions: Tensor, targets: Tensor, num_microbatches: int) -> list[Microbatch]:
    """Cut a batch into microbatches by sequences, whose numbers differ by at most 1.

    Args:
        token_ids: (sequences, tokens) int64.
        positions: the same, or (tokens,) or (1, tokens), those of every sequence.
        targets: (sequences, tokens) int64.
        num_microbatches: how many.

    Raises:
        ValueError: if there are fewer sequences than microbatches, or for tensors of other shapes.
    """
    if positions.shape in (token_ids.shape[1:], (1, *token_ids.shape[1:])):
        positions = positions.expand_as(token_ids)
    if not token_ids.shape == positions.shape == targets.shape:
        raise ValueError(
            f"token_ids, positions and targets are all (sequences, tokens), positions perhaps (tokens,); got "
            f"{tuple(token_ids.shape)}, {tuple(positions.shape)} and {tuple(targets.shape)}"
        )
    if not 1 <= num_microbatches <= len(token_ids):
        raise ValueError(
            f"{len(token_ids)} sequences cannot be cut into {num_microbatches} microbatches of at least one; make the "
            "batch larger, or the microbatches fewer"
        )
    parts = (whole.tensor_split(num_microbatches) for whole in (token_ids, positions, targets))
    return [Microbatch(*part) for part in zip(*parts, strict=True)]


def layers_per_stage(num_layers: int, num_stages: int, lighter_ends: bool = False) -> list[int]:
    """How many layers each stage gets: as even as can be, earlier stages one more where they do not divide.

    Args:
        num_layers: of the model.
        num_stages: to cut it into.
        lighter_ends: count the embedding, and norm and unembedding, as a layer each: where that divides evenly, the
            first and the last stage have one layer fewer than the others, as torchtitan cuts by default.

    Raises:
        StageWithoutLayers: if a stage would get none.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages is 1 or more, got {num_stages!r}")
    ends = int(lighter_ends)
    each, more = divmod(num_layers + 2 * ends, num_stages)
    counts = [each + (stage < more) for stage in range(num_stages)]
    counts[0] -= ends
    counts[-1] -= ends
    try:
        check_layers(counts, num_layers)
    except StageWithoutLayers as error:
        if lighter_ends and num_layers >= num_stages:
            raise StageWithoutLayers(f"{error}, or lighter_ends=False") from None
        raise
    return counts


def check_layers(counts: Sequence[int], num_layers: int) -> None:
    """Refuse a cut that leaves a stage without layers, or does not use every layer once.

    Raises:
        StageWithoutLayers: if a stage has none.
        ValueError: if the layers of all stages are not the model's.
    """
    empty = [stage for stage, count in enumerate(counts) if count < 1]
    if empty:
        raise StageWithoutLayers(
            f"stage {empty[0]} would have {counts[empty[0]]} layers of {num_layers} in {len(counts)} stages, "
            f"{list(counts)}; every stage needs one or more: use fewer stages"
        )
    if sum(counts) != num_layers:
        raise ValueError(f"the stages have {list(counts)} layers, {sum(counts)} in all, and the model has {num_layers}")


class DecoderStage(nn.Module):
    """One stage of a decoder. Its parameters are the decoder's own, under the decoder's names.

    Args:
        model: what is cut; it is left as it is.
        counts: layers of each stage.
        stage: which one this is.
    """

    def __init__(self, model: Decoder, counts: Sequence[int], stage: int) -> None:
        super().__init__()
        check_layers(counts, len(model.layers))
        begin = sum(counts[:stage])
        self.first, self.last = stage == 0, stage == len(counts) - 1
        self.embed = model.embed if self.first else None
        self.layers = nn.ModuleDict({str(n): model.layers[n] for n in range(begin, begin + counts[stage])})
        self.norm, self.unembed = (model.norm, model.unembed) if self.last else (None, None)
        self.register_buffer("inv_freq", model.inv_freq, persistent=False)
        scaling = model.config.rope_scaling
        self._attention_factor = scaling.attention_factor if scaling else 1.0
        self._ops = model.ops

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Through the layers: (sequences, tokens, hidden_size) → the same."""
        rope = rotation(positions, self.inv_freq, x.dtype, self._attention_factor)
        for layer in self.layers.values():
            x = layer(x, rope, self._ops.causal_attention)
        return x

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats of the tokens that count, from the last layer's output; 0 if none counts."""
        if not bool((targets != IGNORED).any()):
            return x.sum() * 0
        return self._ops.loss(self.norm(x), self.unembed.weight, targets)


def trained_parameters(stages: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters of some stages that have gradients, each once."""
    every = (parameter for stage in stages for parameter in stage.parameters() if parameter.requires_grad)
    return list(dict.fromkeys(every))
