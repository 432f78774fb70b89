"""One way to lay a training run over GPUs, and which ways there are.

    GPUs = dp · pp · cp · tp          expert parallelism adds none: ep · etp divides the dp · cp · tp ranks of a stage

So the fewest GPUs of a layout are pp · max(tp · cp, ep · etp), and not their product: DeepSeek-V3 with tp 2, pp 16 and
ep 64 runs on 1,024 GPUs, where tp · pp · ep is 2,048.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.basics.checks import check_whole
from minilib.parallel.zero.ledger import check_stage
from minilib.ranks.mesh_shape import MeshShape, Regrouping
from minilib.training.planner.shape import TrainedShape

RECOMPUTE = ("none", "selective", "full")


class LayoutDoesNotFit(ValueError):
    """A layout that this model, batch or number of GPUs does not allow; the message says why."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all axes, and how a step is made.

    Args:
        dp, pp, cp, tp: ranks of data, pipeline, context and tensor parallelism.
        ep, etp: ranks of expert parallelism, and of tensor parallelism within an expert.
        interleave: stages of each pipeline rank (virtual pipeline); 1 for plain 1F1B.
        zero: stage of ZeRO over dp · cp ranks.
        recompute: what backward computes again: "none", "selective" (attention's scores) or "full" layers.
        microbatch: sequences of one forward.
    """

    dp: int
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    interleave: int = 1
    zero: int = 1
    recompute: str = "none"
    microbatch: int = 1

    def __post_init__(self) -> None:
        sizes = (self.dp, self.pp, self.cp, self.tp, self.ep, self.etp, self.interleave, self.microbatch)
        if any(type(size) is not int or size < 1 for size in sizes) or self.recompute not in RECOMPUTE:
            raise LayoutDoesNotFit(f"sizes are whole numbers ≥ 1 and recompute one of {', '.join(RECOMPUTE)}: {self!r}")
        check_stage(self.zero)

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Ranks that share a rank's dense parameters: ZeRO cuts its state into so many."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that have the same experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @cached_property
    def mesh(self) -> MeshShape:
        """Its ranks, tp the fastest: the order of Megatron-LM."""
        return MeshShape.of(pp=self.pp, dp=self.dp, cp=self.cp, tp=self.tp)

    @cached_property
    def expert_mesh(self) -> Regrouping:
        """The same ranks as the experts have them."""
        return self.mesh.regrouped(("dp", "cp", "tp"), edp=None, ep=self.ep, etp=self.etp)

    def microbatches(self, batch: int) -> int:
        """Forwards of a step on each rank.

        Raises:
            LayoutDoesNotFit: if the batch is no multiple of what all ranks take at once.
        """
        check_whole("batch", batch, 1, LayoutDoesNotFit)
        each = self.dp * self.microbatch
        if batch % each:
            raise LayoutDoesNotFit(f"{batch} sequences are no multiple of dp · microbatch = {each}")
        return batch // each

    def layers_per_rank(self, shape: TrainedShape) -> int:
        """Layers of the pipeline rank that has most."""
        return ceil_div(shape.layers, self.pp * self.interleave) * self.interleave

    def check(self, shape: TrainedShape, gpus: int, batch: int, sequence: int) -> None:
        """Raise LayoutDoesNotFit, with the reason, unless this model can be trained so."""
        check_whole("gpus", gpus, 1, LayoutDoesNotFit)
        check_whole("sequence", sequence, 1, LayoutDoesNotFit)
        for wrong, why in self._objections(shape, gpus, batch, sequence):
            if wrong:
                raise LayoutDoesNotFit(why)

    def _objections(self, shape: TrainedShape, gpus: int, batch: int, sequence: int) -> Iterator[tuple[bool, str]]:
        inside, experts = self.dp * self.cp * self.tp, self.ep * self.etp
        yield self.gpus != gpus, f"dp · pp · cp · tp = {self.gpus}, and there are {gpus} GPUs"
        yield inside % experts > 0, f"ep · etp = {experts} does not divide the {inside} ranks of a stage"
        yield experts > 1 and not shape.experts, f"ep · etp = {experts}, and the model has no experts"
        yield shape.experts % self.ep > 0, f"{shape.experts} experts cannot be dealt to ep = {self.ep} ranks"
        yield shape.heads % self.tp > 0, f"{shape.heads} heads cannot be dealt to tp = {self.tp} ranks"
        yield (
            max(self.tp, shape.kv_heads) % min(self.tp, shape.kv_heads) > 0,
            f"{shape.kv_heads} heads of keys and tp = {self.tp}: neither divides the other",
        )
        stages = self.pp * self.interleave
        # The embedding and the output may have stages of their own, as in Llama 3's 128 stages of 126 layers.
        yield stages > shape.layers + 2, f"{stages} stages for {shape.layers} layers: a stage would be empty"
        yield self.interleave > 1 and self.pp == 1, "interleaving needs pp > 1"
        halves = 2 * self.cp
        yield self.cp > 1 and sequence % halves > 0, f"{sequence} tokens are no multiple of 2 · cp = {halves}"
        forwards = self.microbatches(batch)
        yield (
            self.interleave > 1 and forwards % self.pp > 0,
            f"{forwards} microbatches do not interleave over {self.pp}",
        )
        yield self.zero == 3 and self.pp > 1, "ZeRO 3 would gather a stage's parameters for every microbatch"

    def __str__(self) -> str:
        axes = {"dp": self.dp, "pp": self.pp, "cp": self.cp, "tp": self.tp, "ep": self.ep, "etp": self.etp}
        words = [f"{axis} {size}" for axis, size in axes.items() if size > 1] or ["one GPU"]
        words += [f"interleave {self.interleave}"] if self.interleave > 1 else []
        words += [f"ZeRO {self.zero}", f"microbatch {self.microbatch}"]
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return ", ".join(words)


def layouts(
    shape: TrainedShape, gpus: int, batch: int, sequence: int, domain: int, max_microbatch: int = 8
) -> Iterator[ParallelLayout]:
    """Every layout of some GPUs that passes `check`; tp stays within an NVLink domain, sizes but pp are powers of two.

    Args:
        shape: of the model.
        gpus: how many.
        batch: sequences a step.
        sequence: tokens of each.
        domain: GPUs that NVLink joins.
        max_microbatch: sequences of one forward, at most.

    Raises:
        LayoutDoesNotFit: if one of these is no whole number ≥ 1.
    """
    given = {"gpus": gpus, "batch": batch, "sequence": sequence, "domain": domain, "max_microbatch": max_microbatch}
    for name, number in given.items():
        check_whole(name, number, 1, LayoutDoesNotFit)
    pipelines = [pp for pp in range(1, shape.layers + 1) if gpus % pp == 0]
    contexts = [cp for cp in _powers(16) if cp == 1 or sequence // cp >= 4096]
    experts = [ep for ep in _powers(shape.experts) if shape.experts % ep == 0] if shape.experts else [1]
    for tp, pp, cp in product(_powers(min(domain, shape.heads)), pipelines, contexts):
        if gpus % (tp * pp * cp) or (gpus > domain and domain % tp):  # a group of tp would lie in two domains
            continue
        choices = product(experts, _interleavings(shape, pp), (1, 2, 3), RECOMPUTE, _powers(max_microbatch))
        for ep, interleave, zero, recompute, microbatch in choices:
            layout = ParallelLayout(
                gpus // (tp * pp * cp), pp, cp, tp, ep, 1, interleave, zero, recompute, microbatch
            )  # fmt: skip
            try:
                layout.check(shape, gpus, batch, sequence)
            except LayoutDoesNotFit:
                continue
            yield layout


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(max(1, largest).bit_length())]


def _interleavings(shape: TrainedShape, pp: int) -> list[int]:
    """Stages a rank: numbers that divide the layers, or those with embedding and output, or leave few places empty."""
    if pp == 1:
        return [1]
    every, most = range(2, 1 + (shape.layers + 2) // pp), shape.layers + 2
    even = {v for v in every if shape.layers % (pp * v) == 0 or most % (pp * v) == 0}
    near = {v for v in _powers(most // pp) if v in every and ceil_div(shape.layers, pp * v) * pp * v <= 1.1 * most}
    return [1, *sorted(even | near)]
