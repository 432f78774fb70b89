"""Seconds of one training step, term by term: what a GPU computes, and what of its waiting nothing hides.

    one microbatch on one stage     products + attention + element by element (+ computed again)
                                    + exposed messages of tp, ep and cp
    one step                        microbatches · slowest stage + bubble + exposed messages of dp + optimizer

A layer's times are in layer_time.py. Every term is a count (FLOPs, bytes, messages) over a rate of the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.basics.format import Table, si
from minilib.training.planner.cluster import Cluster
from minilib.training.planner.layer_time import LayerRates
from minilib.training.planner.layout import LayoutDoesNotFit, ParallelLayout
from minilib.training.planner.memory import parameters_of_rank
from minilib.training.planner.shape import TrainedShape

OPTIMIZER_TRAFFIC = 30  # bytes a parameter: master and moments read and written, gradient read, parameter written


@dataclass(frozen=True)
class StepPrice:
    """Seconds of one step on the GPU that everyone waits for.

    Args:
        products: matrix products.
        attention: scores and their sums.
        elementwise: norms, rotations, activations, sums: limited by memory.
        recomputed: forward that backward does again.
        tensor, expert, context, data: messages of each axis that nothing hides.
        bubble: waiting for other pipeline stages.
        optimizer: the update.
    """

    products: float
    attention: float
    elementwise: float
    recomputed: float
    tensor: float
    expert: float
    context: float
    data: float
    bubble: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def exposed(self) -> float:
        """Messages that nothing hides."""
        return self.tensor + self.expert + self.context + self.data

    def shares(self) -> dict[str, float]:
        """Each term's share of the step, the largest first."""
        terms = {each.name: getattr(self, each.name) / self.seconds for each in fields(self)}
        return dict(sorted(terms.items(), key=lambda item: -item[1]))

    def table(self) -> Table:
        """A row for each term."""
        rows = [(name, si(share * self.seconds, "s"), f"{share:.1%}") for name, share in self.shares().items()]
        return Table(("of a step", "", ""), [*rows, ("together", si(self.seconds, "s"), "")])


def price_step(
    shape: TrainedShape,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: int,
    sequence: int,
    dtype: str = "bf16",
    overlap_tensor: bool = True,
    domains: Sequence[int] | None = None,
) -> StepPrice:
    """Predict one step.

    Args:
        shape: of the model.
        layout: which `ParallelLayout.check` accepts.
        cluster: what it runs on.
        batch: sequences a step.
        sequence: tokens of each.
        dtype: of matrix products; attention and messages stay in bf16.
        overlap_tensor: cut tensor parallelism's collectives into pieces that overlap with products.
        domains: NVLink domain of each rank; as many ranks in a row to each as it has GPUs, if left out.

    Raises:
        LayoutDoesNotFit: if the batch cannot be dealt so, there is no such sequence, or not one domain for each rank.
        NotOnThisMachine: if the cluster has no rate of products in this dtype.
    """
    check_whole("sequence", sequence, 1, LayoutDoesNotFit)
    rates = LayerRates(shape, layout, cluster, sequence, dtype, overlap_tensor, domains)
    forward, backward = rates.forward(), rates.backward()
    again = {"none": 0.0, "selective": 0.0, "full": forward.seconds}[layout.recompute]
    layers, count = layout.layers_per_rank(shape) * shape.all_layers / shape.layers, layout.microbatches(batch)
    layer = forward.seconds + backward.seconds + again
    empty = min(layers, layers * layout.pp - shape.all_layers)  # places of the last stage, if layers do not divide
    head = max(0.0, rates.head() - empty * layer)  # what the last stage does longer than the others
    fill = (layout.pp - 1) / layout.interleave * (layers * layer + head / layout.pp)
    fill += 2 * (layout.pp * layout.interleave - 1) * rates.hop()
    dense, experts = parameters_of_rank(shape, layout)
    updated = dense / layout.shards + experts / layout.expert_shards if layout.zero else dense + experts
    total = {
        name: count * layers * (getattr(forward, name) + getattr(backward, name))
        for name in ("products", "attention", "elementwise", "tensor", "expert", "context")
    }
    total["products"] += count * head
    return StepPrice(
        **total,
        recomputed=count * layers * again,
        data=rates.data(count, layers * forward.seconds, layers * (backward.seconds + again)),
        bubble=fill,
        optimizer=updated * OPTIMIZER_TRAFFIC / cluster.memory,
    )
