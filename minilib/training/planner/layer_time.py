"""Seconds of one microbatch in one layer: what a GPU computes, and what its axes send.

Messages that can hide behind work are priced first and exposed as far as they are longer than that work. With
tensor parallelism's overlap each collective is cut into tp pieces, and the first one is always exposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache

from minilib.mechanisms.basics.checks import check_whole
from minilib.training.planner.cluster import Cluster, GroupPlace
from minilib.training.planner.layout import LayoutDoesNotFit, ParallelLayout
from minilib.training.planner.memory import GRADIENT, PARAMETER, VALUE, parameters_of_rank
from minilib.training.planner.shape import TrainedShape


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one microbatch in one layer, in one direction.

    Args:
        products, attention, elementwise, tensor, expert, context: see `StepPrice`.
    """

    products: float
    attention: float
    elementwise: float
    tensor: float
    expert: float
    context: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(getattr(self, each.name) for each in fields(self))


class LayerRates:
    """What one microbatch of one layer costs in a layout on a cluster.

    Args:
        shape, layout, cluster, sequence, dtype, overlap_tensor, domains: see `step_time.price_step`.
    """

    def __init__(
        self,
        shape: TrainedShape,
        layout: ParallelLayout,
        cluster: Cluster,
        sequence: int,
        dtype: str,
        overlap_tensor: bool,
        domains: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.layout, self.cluster, self.sequence = shape, layout, cluster, sequence
        self.overlap_tensor = overlap_tensor
        if domains is not None and len(domains) != layout.gpus:
            raise LayoutDoesNotFit(f"domains has one entry for each of {layout.gpus} ranks, got {len(domains)}")
        self.domains = None if domains is None else tuple(domains)
        self.product_rate, self.output_rate = cluster.product_rate(dtype), cluster.product_rate("bf16")
        self.tokens = layout.microbatch * sequence / layout.cp

    def forward(self) -> LayerTime:
        """Of one layer."""
        attention = self.attention(1)
        return self._pass(1, attention, self.elementwise(1))

    def backward(self) -> LayerTime:
        """Of one layer: two products for each of forward's, five in attention instead of two."""
        return self._pass(2, self.attention(2), self.elementwise(2))

    def _pass(self, products: int, attention: float, elementwise: float) -> LayerTime:
        seconds = products * self.products()
        return LayerTime(
            seconds, attention, elementwise, self.tensor(seconds), self.expert(), self.context(products, attention)
        )

    def products(self) -> float:
        """Forward of one layer's matrix products."""
        shape = self.shape
        mixtures = shape.expert_layers / shape.all_layers
        each = shape.attention_parameters + (1 - mixtures) * shape.dense_parameters
        each += mixtures * (shape.beside_experts + shape.top_k * shape.expert_parameters)
        return 2 * self.tokens * each / self.layout.tp / self.product_rate

    def head(self) -> float:
        """Forward and backward of the output and its loss, on the last stage."""
        values = self.tokens * self.shape.vocab / self.layout.tp
        products = 6 * values * self.shape.hidden / self.output_rate * (1 + self.shape.predicted_tokens)
        return products + values * 5 * 4 / self.cluster.memory  # read twice, written once, both ways in fp32

    def attention(self, direction: int) -> float:
        """Scores and sums: as FlashAttention, or stored and read again, which memory limits."""
        flops = self.tokens * self.shape.attention_flops(self.sequence) / self.layout.tp
        if self.layout.recompute == "none":
            passes = (4, 7)[direction - 1]  # over the scores, see flash_attention.materialised_cost
            scores = self.tokens * self.sequence * self.shape.heads / self.layout.tp
            matmul = 2 * flops * direction / self.output_rate  # of all pairs, the hidden ones too
            return max(matmul, passes * VALUE * scores / self.cluster.memory)
        return flops * (1, 2.5)[direction - 1] / self.cluster.attention

    def elementwise(self, direction: int) -> float:
        """Bytes that fused operations read and write: twice as many in backward."""
        shape = self.shape
        stream = 9 * shape.hidden  # norm 2, sum and norm 4, sum 3
        heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim  # turned by position
        if shape.experts:
            width = 3 * (shape.shared_ffn + shape.top_k * shape.expert_ffn)
            stream += 4 * shape.top_k * shape.hidden  # rows sorted by expert, and back
        else:
            width = (3 if shape.gated else 2) * shape.ffn
        return direction * self.tokens * VALUE * (stream + heads + width) / self.layout.tp / self.cluster.memory

    def tensor(self, products: float) -> float:
        """Two all-gathers and two reduce-scatters of the stream each way, as far as products do not hide them."""
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        seconds = 4 * self.ring(self.tokens * self.shape.hidden * VALUE, "tp")
        return max(seconds - products, 0) + seconds / tp if self.overlap_tensor else seconds

    def expert(self) -> float:
        """Rows to their experts and back: two all-to-alls in each direction."""
        if self.layout.ep == 1:
            return 0.0
        rows = self.tokens / self.layout.tp * self.shape.top_k
        mixtures = self.shape.expert_layers / self.shape.all_layers
        return 2 * mixtures * self.ring(rows * self.shape.hidden * VALUE, "ep")

    def context(self, direction: int, attention: float) -> float:
        """Keys and values round the ring, backward with their gradients, as far as attention does not hide them."""
        cp = self.layout.cp
        if cp == 1:
            return 0.0
        values = self.tokens * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim) / self.layout.tp
        seconds = direction * self.ring(cp * values * VALUE, "cp")
        return max(seconds - attention, 0.0)

    def hop(self) -> float:
        """One microbatch's stream from a stage to the next."""
        if self.layout.pp == 1:
            return 0.0
        bandwidth, latency = self._link("pp")
        return latency + self.tokens * self.shape.hidden * VALUE / self.layout.tp / bandwidth

    def data(self, count: int, forward: float, backward: float) -> float:
        """Gradients and parameters over dp · cp ranks, as far as work does not hide them.

        ZeRO 1: one microbatch's backward hides the gradients, one forward the parameters. ZeRO 2 reduces for every
        microbatch, in a pipeline once, since it goes breadth-first; ZeRO 3 gathers twice for every microbatch, too.
        """
        dense, experts = parameters_of_rank(self.shape, self.layout)
        exposed = 0.0
        for parameters, shards, axes in (
            (dense, self.layout.shards, "dp·cp"),
            (experts, self.layout.expert_shards, "edp"),
        ):
            if shards == 1 or not parameters:
                continue
            calls = self.layout.layers_per_rank(self.shape)  # a bucket for each layer
            reduce, gather = (self.ring(parameters * size, axes, calls) for size in (GRADIENT, PARAMETER))
            if self.layout.zero == 3:
                exposed += count * (max(0.0, gather - forward) + max(0.0, gather + reduce - backward))
            else:
                times = count if self.layout.zero == 2 and self.layout.pp == 1 else 1
                exposed += times * max(0.0, reduce - backward) + max(0.0, gather - forward)
        return exposed

    def ring(self, nbytes: float, axes: str, calls: int = 1) -> float:
        """An all-gather, reduce-scatter or all-to-all along an axis of what each rank has in the end, in some calls."""
        bandwidth, latency = self._link(axes)
        ranks = self._group(axes).size
        return calls * (ranks - 1) * latency + nbytes * (ranks - 1) / ranks / bandwidth

    def _link(self, axes: str) -> tuple[float, float]:
        """Bandwidth and latency of a ring's step through the group along an axis that everyone waits for."""
        group = self._group(axes)
        return self.cluster.bandwidth(group), self.cluster.latency(group)

    def _group(self, axes: str) -> GroupPlace:
        if self.domains is None:
            return place_of_group(self.layout, self.cluster.domain, axes)
        places = _places(self.layout, self.domains, axes)
        return min(places, key=lambda place: (self.cluster.bandwidth(place), -self.cluster.latency(place)))


def place_of_group(layout: ParallelLayout, domain: int, axes: str) -> GroupPlace:
    """How the group of rank 0 along an axis, such as "tp", "dp·cp" or "edp", lies in NVLink domains.

    All groups lie alike where domains are a power of two, as sizes are; say 64 of an NVL72's GPUs.

    Raises:
        ValueError: if a domain is no whole number of GPUs.
        NoSuchAxis: if there is no such axis.
    """
    check_whole("domain", domain, 1)
    expert = axes in ("ep", "edp")
    sizes = (layout.pp, layout.dp, layout.cp, layout.tp) + ((layout.ep, layout.etp) if expert else (1, 1))
    return _place(sizes, domain, axes)


@cache
def _place(sizes: tuple[int, ...], domain: int, axes: str) -> GroupPlace:
    pp, dp, cp, tp, ep, etp = sizes
    layout = ParallelLayout(dp, pp, cp, tp, ep, etp)
    mesh = layout.expert_mesh if axes in ("ep", "edp") else layout.mesh
    ranks = mesh.group(0, *axes.split("·"))
    return GroupPlace.of([rank // domain for rank in ranks])


@lru_cache(maxsize=1024)
def _places(layout: ParallelLayout, domains: tuple[int, ...], axes: str) -> tuple[GroupPlace, ...]:
    """The different ways in which the groups along an axis lie in the domains of their ranks."""
    mesh = layout.expert_mesh if axes in ("ep", "edp") else layout.mesh
    groups = mesh.groups(*axes.split("·"))
    return tuple({GroupPlace.of([domains[rank] for rank in group]) for group in groups})
