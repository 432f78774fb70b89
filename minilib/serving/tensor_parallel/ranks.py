"""The two sides of serving on ranks: rank 0 has the engine, the others compute what it plans.

    if comm.rank == 0:
        engine = LeadingEngine(model, comm)      an Engine like any other, until dismiss(comm)
    else:
        follow(model, comm)                      returns when rank 0 dismisses the ranks

A rank has a part of every layer, and the keys and values of its heads in pages of the same numbers as on rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minilib.mechanisms.paging import Copy, FramePool
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.parallel.tensor_parallel.layout import config_of_rank
from minilib.ranks.collectives import Communicator
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention
from minilib.serving.engine import Engine
from minilib.serving.sequence import Sequence
from minilib.serving.tensor_parallel.plan import RecordedPages, StepPlan, broadcast

KEEP_WAITING, DISMISSED = "keep waiting", "dismissed"


class LeadingEngine(Engine):
    """The engine of rank 0: it plans every step, and tells the plan to the others before all compute it.

    An error in a step leaves the others within it: after one, the ranks are of no more use.

    Args:
        model: cut by `TensorParallel`.
        comm: between the ranks that share the model.
        options: more arguments of `Engine`. The pages are as many as one process would have, each a part on every rank.

    Raises:
        ValueError: as `Engine`, and for `pack` or `second_tier`, whose pages or weights are those of one process.
    """

    def __init__(self, model: Decoder, comm: Communicator, **options) -> None:
        for name in ("pack", "second_tier"):
            if options.get(name):
                raise ValueError(f"{name} is for one process; leave it out where ranks share the model")
        self.comm = comm
        super().__init__(model, **options)
        pages = self.cache
        broadcast((pages.pool.num_frames, pages.page_size, pages.swap_pool.num_frames), comm)

    def new_cache(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        num_swap_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        pool_type: type[FramePool],
    ) -> RecordedPages:
        mine = config_of_rank(config, self.comm.world_size)
        return RecordedPages(mine, num_pages, page_size, num_swap_pages, dtype, device, pool_type)

    def _forward(self, work: list[tuple[Sequence, int]], interrupts: list[int]) -> torch.Tensor:
        moves, self.cache.moves = self.cache.moves, []
        broadcast(StepPlan.of(moves, work), self.comm)
        return super()._forward(work, [])  # not given up between layers: others are in the midst of it

    def keep_waiting(self) -> None:
        """Call now and then while there is nothing to do: a rank that hears nothing takes rank 0 for lost."""
        broadcast(KEEP_WAITING, self.comm)


def dismiss(comm: Communicator) -> None:
    """Let the other ranks return from `follow`, also where no engine could be made; rank 0 calls it."""
    broadcast(DISMISSED, comm)


@torch.inference_mode()
def follow(model: Decoder, comm: Communicator) -> None:
    """Compute what rank 0 plans, until it dismisses this rank.

    Args:
        model: cut by `TensorParallel`.
        comm: between the ranks that share the model.

    Raises:
        CollectiveFailed: if rank 0 is lost, or silent for longer than the transport's timeout.
    """
    sizes = broadcast(None, comm)
    if sizes == DISMISSED:
        return
    weight = model.eval().norm.weight
    cache = PagedCache(config_of_rank(model.config, comm.world_size), *sizes, weight.dtype, weight.device)
    while (plan := broadcast(None, comm)) != DISMISSED:
        if plan == KEEP_WAITING:
            continue
        for kind, copies in plan.moves:
            if kind == "copy":
                cache.copy(copies)
            else:
                getattr(cache, kind)(_Moved(copies))
        inputs = (torch.tensor(row, device=weight.device) for row in (plan.token_ids, plan.positions))
        indices = torch.tensor(plan.logits_indices, dtype=torch.int64, device=weight.device)
        model(*inputs, PagedAttention(cache, plan.work), logits_indices=indices)


@dataclass(frozen=True)
class _Moved:
    """A page table that has moved on rank 0: the cache only asks for the copies to make."""

    copies: list[Copy]

    def move(self, pool: FramePool) -> list[Copy]:
        return self.copies
