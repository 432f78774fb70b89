"""Published runs (published.toml) beside what the planner predicts for them; nothing in it was fitted to them.

What a source does not say of a layout, such as the microbatch, is the planner's choice: of all that fit into memory the
fastest.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from minilib.mechanisms.basics.checks import check_quantity
from minilib.training.planner.cluster import Cluster
from minilib.training.planner.layout import RECOMPUTE, LayoutDoesNotFit, ParallelLayout
from minilib.training.planner.planner import NothingFits, TrainingPlan, price_layout
from minilib.training.planner.shape import TrainedShape

PUBLISHED = Path(__file__).with_name("published.toml")
COUNTS = ("all", "visible", "unsaid")
CHOICES = {"microbatch": (1, 2, 4, 8), "recompute": RECOMPUTE, "interleave": (1, 2, 4, 8, 16), "zero": (1, 2)}


@dataclass(frozen=True)
class PublishedRun:
    """One run as its source has it.

    Args:
        title, year, source: what it is, and where it is published.
        shape: of the model.
        gpu, gpus, domain: which GPUs, how many, and how many NVLink joins.
        batch, sequence: sequences a step, tokens of each.
        layout: fields of a `ParallelLayout` that the source says.
        tflops: model TFLOP/s of one GPU.
        counts: "all" pairs, "visible" ones, or "unsaid".
        tokens_per_second: of one GPU, where the source says that, too.
        dtype: of matrix products.
        attention: figure of the attention kernel of its day; the GPU's latest if empty.
        overlap_tensor: whether tensor parallelism's collectives are cut to overlap.

    Raises:
        ValueError: if tflops is no number > 0, or counts another word.
    """

    title: str
    year: int
    source: str
    shape: TrainedShape
    gpu: str
    gpus: int
    batch: int
    sequence: int
    layout: Mapping[str, int | str]
    tflops: float
    counts: str
    domain: int = 8
    tokens_per_second: float | None = None
    dtype: str = "bf16"
    attention: str = ""
    overlap_tensor: bool = True
    causal: bool = field(init=False)

    def __post_init__(self) -> None:
        check_quantity("tflops", self.tflops, above_zero=True)
        if self.counts not in COUNTS:
            raise ValueError(f"counts is one of {', '.join(COUNTS)}; got {self.counts!r}")
        object.__setattr__(self, "causal", self.counts != "all")

    def cluster(self, best_shapes: bool = False) -> Cluster:
        """What it ran on; see `Cluster.of`."""
        return Cluster.of(
            self.gpu, self.gpus, self.domain, attention=self.attention or None, best_shapes=best_shapes
        )  # fmt: skip

    def layouts(self) -> Iterator[ParallelLayout]:
        """Every layout that the source leaves open, and that `check` accepts."""
        free = {name: values for name, values in CHOICES.items() if name not in self.layout}
        for values in product(*free.values()):
            layout = ParallelLayout(**self.layout, **dict(zip(free, values, strict=True)))
            try:
                layout.check(self.shape, self.gpus, self.batch, self.sequence)
            except LayoutDoesNotFit:
                continue
            yield layout

    def predict(self, best_shapes: bool = False) -> TrainingPlan:
        """The fastest of those that fit into memory; the smallest if by these formulas none does.

        Raises:
            NothingFits: if none is what the source says.
        """
        cluster = self.cluster(best_shapes)
        plans = [
            price_layout(
                self.shape, layout, cluster, self.batch, self.sequence, self.dtype, self.causal, self.overlap_tensor
            )
            for layout in self.layouts()
        ]
        if not plans:
            raise NothingFits(f"{self.title}: no layout of {self.gpus} GPUs is what the source says, {self.layout}")
        fitting = [plan for plan in plans if plan.memory.total <= cluster.room]
        if not fitting:
            return min(plans, key=lambda plan: plan.memory.total)
        return max(fitting, key=lambda plan: plan.flops)


def published_runs() -> dict[str, PublishedRun]:
    """All runs of the file by name, in its order."""
    content = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {name: PublishedRun(**entry | {"shape": TrainedShape(**entry["shape"])}) for name, entry in content.items()}


def residuals(runs: Sequence[PublishedRun], best_shapes: bool = False) -> list[float]:
    """Predicted over published FLOP/s of one GPU."""
    return [run.predict(best_shapes).flops / (run.tflops * 1e12) for run in runs]
