"""The planner: every layout of a run, its memory and its time, those that do not fit left out by name, the rest ranked.

    plans = plan_training(shape, Cluster.of("h100-sxm", 512), batch=1024, sequence=4096)
    plans.table()          the fastest first
    plans.explain()        in words, which term decides

Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", for
which axes belong on which links; Isaev et al. 2023, "Calculon", for pricing layouts before running them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.basics.format import Table, gib, si
from minilib.training.planner.cluster import Cluster
from minilib.training.planner.layout import ParallelLayout, layouts
from minilib.training.planner.memory import MemoryPrice, price_memory
from minilib.training.planner.shape import TrainedShape
from minilib.training.planner.step_time import StepPrice, price_step

WORDS = {
    "products": "matrix products: the GPUs compute, a faster layout has none of the other terms left to save",
    "attention": "attention's scores, which grow with the sequence",
    "elementwise": "reading and writing the stream between products: more tensor parallelism divides it",
    "recomputed": "forward computed again, the price of the memory that it saves",
    "tensor": "the collectives of tensor parallelism, on the critical path of every layer",
    "expert": "rows on their way to experts and back",
    "context": "keys and values that go round the ring longer than attention lasts",
    "data": "gradients and parameters of the data axis that no backward hides",
    "bubble": "the pipeline's bubble: more microbatches or interleaving shorten it",
    "optimizer": "the update, which ZeRO divides",
}


class NothingFits(LookupError):
    """No layout of these GPUs holds the model; the message says what was missing."""


@dataclass(frozen=True)
class TrainingPlan:
    """One layout with its price.

    Args:
        layout: of the run.
        memory: of the fullest GPU.
        step: of one step.
        flops: model FLOP/s of one GPU.
        mfu: that, of the data sheet's peak in the dtype of the products.
    """

    layout: ParallelLayout
    memory: MemoryPrice
    step: StepPrice
    flops: float
    mfu: float

    def explain(self) -> str:
        """Which terms decide, in words."""
        shares = [(name, share) for name, share in self.step.shares().items() if share >= 0.03]
        lines = [f"{share:4.0%} {WORDS[name]}" for name, share in shares]
        return "\n".join([f"{self.layout}: {si(self.step.seconds, 's')} a step, {self.mfu:.0%} MFU", *lines])


@dataclass(frozen=True)
class Plans:
    """What a search found.

    Args:
        ranked: layouts that fit, the fastest first.
        pruned: how many did not, by reason.
    """

    ranked: tuple[TrainingPlan, ...]
    pruned: dict[str, int]

    def table(self, count: int = 10) -> Table:
        """The fastest layouts, a row each."""
        check_whole("count", count)
        rows = [
            (
                str(plan.layout),
                gib(plan.memory.total),
                si(plan.step.seconds, "s"),
                f"{plan.step.bubble / plan.step.seconds:.0%}",
                f"{plan.step.exposed / plan.step.seconds:.0%}",
                f"{plan.mfu:.1%}",
            )
            for plan in self.ranked[:count]
        ]
        return Table(("layout", "memory", "step", "bubble", "exposed messages", "MFU"), rows)

    def explain(self) -> str:
        """The fastest layout in words, and why others were left out."""
        left_out = [f"{count:,} layouts left out: {reason}" for reason, count in self.pruned.items()]
        return "\n".join([self.ranked[0].explain(), *left_out])

    def rank_of(self, layout: ParallelLayout) -> int | None:
        """Place of a layout, counted from 1; None if it does not fit."""
        return next((place for place, plan in enumerate(self.ranked, 1) if plan.layout == layout), None)


def price_layout(
    shape: TrainedShape,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: int,
    sequence: int,
    dtype: str = "bf16",
    causal: bool = True,
    overlap_tensor: bool = True,
) -> TrainingPlan:
    """Memory and time of one layout, whether it fits into memory or not.

    Args:
        shape: of the model.
        layout: of the run.
        cluster: what it runs on.
        batch: sequences a step.
        sequence: tokens of each.
        dtype: of matrix products.
        causal: count visible pairs alone as the model's FLOPs; see `TrainedShape.flops_per_token`.
        overlap_tensor: see `price_step`.

    Raises:
        LayoutDoesNotFit: if the model cannot be trained so; it says why.
        NotOnThisMachine: if the cluster has no rate of products in this dtype.
    """
    layout.check(shape, cluster.gpus, batch, sequence)
    step = price_step(shape, layout, cluster, batch, sequence, dtype, overlap_tensor)
    flops = shape.flops_per_token(sequence, causal) * batch * sequence / cluster.gpus / step.seconds
    memory = price_memory(shape, layout, batch, sequence)
    return TrainingPlan(layout, memory, step, flops, flops / cluster.gpu.peak(dtype))


def plan_training(
    shape: TrainedShape,
    cluster: Cluster,
    batch: int,
    sequence: int,
    dtype: str = "bf16",
    overlap_tensor: bool = True,
    max_microbatch: int = 8,
) -> Plans:
    """Price every layout, leave out those that do not fit into memory, and rank the others by time.

    Args:
        shape: of the model.
        cluster: what it runs on.
        batch: sequences a step.
        sequence: tokens of each.
        dtype: of matrix products.
        overlap_tensor: see `price_step`.
        max_microbatch: sequences of one forward, at most.

    Raises:
        NothingFits: if no layout does.
        LayoutDoesNotFit: if a number is no whole one ≥ 1.
        NotOnThisMachine: if the cluster has no rate of products in this dtype.
    """
    cluster.product_rate(dtype)
    found: list[TrainingPlan] = []
    pruned: Counter[str] = Counter()
    for layout in layouts(shape, cluster.gpus, batch, sequence, cluster.domain, max_microbatch):
        memory = price_memory(shape, layout, batch, sequence)
        if memory.total > cluster.room:
            pruned[_too_large(memory, cluster)] += 1
        else:
            found.append(price_layout(shape, layout, cluster, batch, sequence, dtype, overlap_tensor=overlap_tensor))
    if not found:
        said = "; ".join(f"{count:,}: {reason}" for reason, count in pruned.items()) or "no layout divides them"
        raise NothingFits(f"no layout of {cluster.gpus} {cluster.gpu.title} holds this model ({said}): take more GPUs")
    return Plans(tuple(sorted(found, key=lambda plan: plan.step.seconds)), dict(pruned))


def _too_large(memory: MemoryPrice, cluster: Cluster) -> str:
    state = memory.parameters + memory.gradients + memory.optimizer
    what = "parameters, gradients and optimizer alone" if state > cluster.room else "with activations"
    return f"more than {gib(cluster.room)} {what}"
