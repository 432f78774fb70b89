"""Bytes of the fullest GPU: state of the parameters by ZeRO's formulas, activations by Korthikanti's.

What a rank keeps of one layer for its backward, in bytes for each token: 2 bytes for each value of

    the stream, width h     inputs of two norms, of the products to q, k, v and of the feed-forward layer
    heads                   q, k, v, and what the scores mix
    feed-forward            what its activation reads and writes: of experts for top_k of them

Tensor parallelism divides the last two, with sequence parallelism the first as well. For GPT with dropout that is
Korthikanti's s b h (10 + 24 / t), s b h · 34 / t, and + 5 a s / h / t where scores are stored.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", sections 4 and 5;
Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.basics.format import Table, gib
from minilib.training.planner.layout import RECOMPUTE, LayoutDoesNotFit, ParallelLayout
from minilib.training.planner.shape import TrainedShape

PARAMETER, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes: bf16, fp32 sums, fp32 master copy and two moments (Megatron-LM)
VALUE = 2  # bytes of an activation


@dataclass(frozen=True)
class MemoryPrice:
    """Bytes of the fullest GPU.

    Args:
        parameters, gradients, optimizer: state, as ZeRO leaves it.
        activations: of all microbatches in flight.
        logits: and their gradients, of one microbatch.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits

    def table(self) -> Table:
        """A row for each."""
        rows = [(name, gib(getattr(self, name))) for name in self.__dataclass_fields__]
        return Table(("on the fullest GPU", ""), [*rows, ("together", gib(self.total))])


def price_memory(shape: TrainedShape, layout: ParallelLayout, batch: int, sequence: int) -> MemoryPrice:
    """Bytes that a layout takes of its fullest GPU: a rank of the first pipeline stage or of the last.

    Args:
        shape: of the model.
        layout: of the run.
        batch: sequences a step.
        sequence: tokens of each.

    Raises:
        LayoutDoesNotFit: if the batch cannot be dealt so, or there is no such sequence.
    """
    check_whole("sequence", sequence, 1, LayoutDoesNotFit)
    dense, experts = parameters_of_rank(shape, layout)
    dense_state, expert_state = _state(dense, layout.shards, layout), _state(experts, layout.expert_shards, layout)
    state = [a + b for a, b in zip(dense_state, expert_state, strict=True)]
    tokens = layout.microbatch * sequence / layout.cp
    kept = tokens * layer_bytes(shape, layout.tp, sequence, layout.recompute)
    first = kept * layers_in_flight(shape, layout, batch)
    if layout.recompute == "full":  # a layer at a time is computed again, and kept whole for its backward
        first += tokens * layer_bytes(shape, layout.tp, sequence, "selective")
    logits = tokens * shape.vocab / layout.tp * (VALUE + 4)  # and in fp32 for the loss
    last = kept * layout.layers_per_rank(shape)
    if layout.pp == 1 or last + logits > first:
        return MemoryPrice(*state, activations=first if layout.pp == 1 else last, logits=logits)
    return MemoryPrice(*state, activations=first, logits=0)


def parameters_of_rank(shape: TrainedShape, layout: ParallelLayout) -> tuple[float, float]:
    """Parameters of a rank before ZeRO cuts them: of everything but experts, and of experts.

    Of the pipeline rank with most layers, and one table, or both without a pipeline.
    """
    layers, mixtures = layout.layers_per_rank(shape), shape.expert_layers / shape.all_layers
    beside = shape.attention_parameters + mixtures * shape.beside_experts + (1 - mixtures) * shape.dense_parameters
    tables = shape.vocab * shape.hidden * (2 if layout.pp == 1 and not shape.tied else 1)
    experts = layers * mixtures * shape.experts * shape.expert_parameters / (layout.ep * layout.etp)
    return (layers * beside + tables) / layout.tp, experts


def layer_bytes(
    shape: TrainedShape,
    tp: int,
    sequence: int,
    recompute: str,
    sequence_parallel: bool = True,
    dropout: bool = False,
) -> float:
    """Bytes that a rank keeps of one layer for each token of a microbatch.

    Args:
        shape: of the model; a layer of experts where most layers are.
        tp: tensor-parallel ranks.
        sequence: tokens that see each other.
        recompute: one of RECOMPUTE. "none" keeps scores, "selective" does not, as FlashAttention.
        sequence_parallel: divide the stream among tp ranks as well.
        dropout: keep the masks of two dropouts, and of the scores'.

    Raises:
        ValueError: if a number is no whole one ≥ 1, or recompute another word.
    """
    check_whole("tp", tp, 1)
    check_whole("sequence", sequence, 1)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is one of {', '.join(RECOMPUTE)}; got {recompute!r}")
    stream = 4 * shape.hidden * VALUE + (2 * shape.hidden if dropout else 0)
    split = tp if sequence_parallel else 1
    if recompute == "full":
        return shape.hidden * VALUE / split
    heads = shape.heads * (shape.head_dim + 2 * shape.value_dim) + shape.kv_heads * shape.head_dim
    heads += (shape.kv_heads - shape.heads) * shape.value_dim  # v has fewer heads than what is mixed
    scores = shape.heads * sequence * (2 * VALUE + 1 if dropout else 2 * VALUE) if recompute == "none" else 0
    return stream / split + (VALUE * (heads + _feed_forward(shape)) + scores) / tp


def layers_in_flight(shape: TrainedShape, layout: ParallelLayout, batch: int) -> float:
    """Layers, counted once for each microbatch, whose activations the first stage holds at most.

    1F1B holds pp microbatches of 1/pp of the layers; interleaved, with v stages a rank, 1 + (pp - 1) / (pp · v) times
    as much. ZeRO 2 takes the stages breadth-first, so that a stage's gradients are complete at once, and holds all.

    Source: Korthikanti et al. 2022, section 4.2.3; Lamy-Poirier 2023, "Breadth-First Pipeline Parallelism".
    """
    count = layout.microbatches(batch)
    held = float(min(layout.pp, count))
    if layout.interleave > 1:
        held = min(count, held * (1 + (layout.pp - 1) / (layout.pp * layout.interleave)))
    return layout.layers_per_rank(shape) * (count if layout.zero == 2 and layout.pp > 1 else held)


def _feed_forward(shape: TrainedShape) -> float:
    """Values kept of a feed-forward layer, the input of its first product apart."""
    if not shape.experts:
        return shape.ffn * (3 if shape.gated else 2)
    return 3 * shape.shared_ffn + shape.top_k * (2 * shape.hidden + 3 * shape.expert_ffn)  # rows in and out


def _state(parameters: float, shards: int, layout: ParallelLayout) -> list[float]:
    cut = [shards if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    return [parameters * each / n for each, n in zip((PARAMETER, GRADIENT, OPTIMIZER), cut, strict=True)]
