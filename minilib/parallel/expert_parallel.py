"""Expert parallelism: each rank keeps a part of every layer's experts, and sends each token to its experts' ranks.

    rank 0: tokens ─ router ─ rows by expert ┐            ┌ experts 0, 1 ┐            ┌─ combine
    rank 1: tokens ─ router ─ rows by expert ┴ all-to-all ┴ experts 2, 3 ┴ all-to-all ┴─ combine

All other parameters are replicated, as in data parallelism: the ranks that share a batch also share the experts. The
router decides in every layer of every step how many rows each rank sends to each other one, so ranks exchange these
counts before the rows.

If no pair is dropped, the ranks take the same steps as one process. With a capacity, an expert has a part of its room
for each rank's tokens, as in GShard's groups; and with choice="expert" experts choose among one rank's tokens.

In production: DeepSpeed-MoE, Megatron-LM; DeepEP for the exchange.
Sources: Lepikhin et al. 2020, "GShard"; Rajbhandari et al. 2022, "DeepSpeed-MoE".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from minilib.mechanisms.replication import LinkLike, plans, seconds
from minilib.model.moe import Experts, MoE, counts_of
from minilib.parallel.rows import exchange_rows
from minilib.ranks.collectives import Communicator


class ExpertsDoNotDivide(ValueError):
    """A layer's experts cannot be dealt evenly to ranks."""


class ExpertParallel:
    """Cuts a model's experts, in place, and exchanges rows between ranks in forward and backward. A collective.

    Args:
        model: with any number of `MoE`; ranks begin with the experts of rank 0.
        comm: between the ranks that share each batch.

    Attributes:
        parameters: of this rank's experts, (num_experts / world_size, …) each.

    Raises:
        ExpertsDoNotDivide: if some layer's num_experts is no multiple of world_size.

    Cost: see `ExpertExchange`; memory for experts falls to 1/world_size; while a layer is cut, its
    whole experts are held beside this rank's.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        self.comm = comm
        self.parameters: list[nn.Parameter] = []
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        for layer in layers:
            if layer.router.config.num_experts % comm.world_size:
                raise ExpertsDoNotDivide(
                    f"{layer.router.config.num_experts} experts cannot be dealt evenly to {comm.world_size} ranks; "
                    "make num_experts a multiple of world_size"
                )
        for layer in layers:
            for linear in (layer.gate_up, layer.down):
                comm.broadcast(linear.weight)
                own = self.own(linear.weight.detach()).clone()
                linear.weight = nn.Parameter(own, requires_grad=linear.weight.requires_grad)
                self.parameters.append(linear.weight)
            layer.exchange = ExpertExchange(comm)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's experts out of all: (num_experts, …) → (num_experts / world_size, …), a view."""
        return whole.tensor_split(self.comm.world_size)[self.comm.rank]

    def whole(self, own: Tensor) -> Tensor:
        """All experts on every rank, from each rank's: the inverse of `own`. A collective."""
        everything = own.new_empty(len(own) * self.comm.world_size, *own.shape[1:])
        self.own(everything).copy_(own)
        self.comm.all_gather(everything)
        return everything

    def finish(self) -> None:
        """Call once after backward, as `DataParallel.finish`: divide this rank's experts' gradients by world_size.

        An expert computes the rows of all ranks, so its gradient is a sum over ranks already; after the division it is
        the gradient of the mean over ranks of their losses.
        """
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.comm.world_size)

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of this rank's experts within a model."""
        mine = set(self.parameters)
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter in mine)


class ExpertExchange:
    """Sends rows to their experts' ranks and answers back, by two all-to-alls of uneven parts; two more in backward.

    Args:
        comm: between the ranks that have the experts, rank r the r-th part of them.

    Attributes:
        received: rows from each rank that this rank's experts computed in the latest call.

    Cost: each all-to-all sends one row for every pair of a token and an expert on another rank; one all-to-all of
    num_experts counts precedes them.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.received: list[int] = []

    def __call__(self, rows: Tensor, offsets: Tensor, experts: Experts) -> Tensor:
        """See `minilib.model.moe.Exchange`. A collective."""
        n = self.comm.world_size
        counts = counts_of(offsets).view(n, -1)  # (rank that has them, its experts)
        arriving = torch.empty_like(counts)  # (rank that they come from, experts here)
        self.comm.all_to_all(list(arriving), list(counts))
        sent, self.received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        arrived = exchange_rows(rows, sent, self.received, self.comm)
        # Rows arrive by source rank, and within one source by expert; experts take them sorted by expert alone.
        expert = torch.arange(arriving.shape[1], device=arriving.device).repeat(n).repeat_interleave(arriving.flatten())
        order = expert.sort(stable=True).indices
        answers = experts(arrived[order], arriving.sum(0).cumsum(0).int())
        return exchange_rows(answers[order.argsort()], self.received, sent, self.comm)


def step_seconds(
    pairs: Sequence[Sequence[int]],
    row_bytes: int,
    seconds_per_row: float | Callable[[int], float],
    link: LinkLike,
    bus: LinkLike | None = None,
) -> float:
    """Predicted time of one layer's experts, forward and backward: the busiest rank's rows, and four all-to-alls.

    Args:
        pairs: pairs[src][dst] rows go from rank src to the experts of rank dst.
        row_bytes: of one row.
        seconds_per_row: of forward and backward of a row in its expert; or a function of the number of busy ranks,
            where ranks share a machine's cores, caches and memory.
        link: between any two ranks, with `latency` and `bandwidth`.
        bus: a link that messages of a round take one after another; see `minilib.mechanisms.replication.seconds`.

    Returns:
        Seconds. No rank can combine before the busiest one is done: where ranks share no hardware, the experts take
        max/mean load times as long as with even loads.
    """
    n = len(pairs)
    price = seconds_per_row if callable(seconds_per_row) else lambda busy: seconds_per_row
    rows = sorted((sum(column) for column in zip(*pairs, strict=True)), reverse=True)
    # While the k-th busiest rank goes on and the one after it is done, k are busy.
    experts = sum(
        (count - after) * price(k) for k, (count, after) in enumerate(itertools.pairwise([*rows, 0]), start=1)
    )
    there = [row_bytes * count for row in pairs for count in row]
    back = [row_bytes * pairs[dst][src] for src in range(n) for dst in range(n)]
    exchange = plans.all_to_all(n)
    return experts + 2 * sum(seconds(exchange, sizes, link, bus=bus) for sizes in (there, back))
