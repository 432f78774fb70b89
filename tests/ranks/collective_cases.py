"""What ranks need to test collectives: values that differ per rank, every plan there is, and torch's own answer."""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist

from minilib.mechanisms.replication import Plan, Transfer, plans
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
BITWISE = ("band", "bor", "bxor")
CARRIED = {  # what gloo carries
    **dict.fromkeys(FLOATS, ("sum", "avg", "product", "min", "max")),
    **dict.fromkeys(INTEGERS, ("sum", "product", "min", "max", *BITWISE)),
    **dict.fromkeys(COMPLEX, ("sum", "avg")),
    torch.bool: ("min", "max", *BITWISE),
}
TORCH = {op: getattr(dist.ReduceOp, op.upper()) for op in ("sum", "avg", "product", "min", "max", *BITWISE)}


def communicators(timeout: float = 20.0) -> dict[str, Communicator]:
    """One of each kind."""
    return {name: Communicator(kind(timeout=timeout)) for name, kind in TRANSPORTS.items()}


def over_both(check: Callable[[Communicator], None]) -> None:
    """Check both kinds, one after the other."""
    for comm in communicators().values():
        check(comm)


def values(numel: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> torch.Tensor:
    """Small integers, others on every rank: up to 4 of them add and multiply exactly, in any dtype and order."""
    rank = dist.get_rank() if rank is None else rank
    few = torch.randint(1, 4, (1009,), generator=torch.Generator().manual_seed(rank))
    if dtype == torch.bool:
        few = few == 2
    elif dtype.is_complex:
        few = torch.complex(few.double(), few.flip(0).double())
    return few.to(dtype).repeat(-(-numel // 1009))[:numel]


def same_everywhere(x: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    mine = x.detach().contiguous().view(-1).view(torch.uint8)
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    return all(torch.equal(theirs, mine) for theirs in everybody)


@cache
def all_reduce_plans(n: int) -> list[Plan | None]:
    found = [None, plans.ring("all_reduce", n), plans.halving_doubling(n)]
    for root in {0, n - 1}:
        found.append(plans.star("all_reduce", n, root))
        found.append(plans.chain("all_reduce", n, root, num_chunks=1 + 3 * root))
        found.append(plans.tree("all_reduce", n, root, num_chunks=1 + 2 * root))
    found.append(plans.two_level([rank // 2 for rank in range(n)]))  # [0, 0, 1, 1]; uneven for 3: [0, 0, 1]
    found.append(plans.two_level([rank % 2 for rank in range(n)]))
    return found + ([recursive_doubling(n)] if n in (1, 2, 4) else [])


def recursive_doubling(n: int) -> Plan:
    """Partners swap all they have: each sends a chunk and receives the same one in one round."""
    swaps = [[Transfer(rank, rank ^ distance, 0, reduce=True) for rank in range(n)] for distance in (1, 2)]
    return Plan("recursive-doubling", "all_reduce", n, 1, tuple(map(tuple, swaps[: n.bit_length() - 1])))


@cache
def rooted_plans(collective: str, n: int, root: int) -> list[Plan | None]:
    chain, tree = plans.chain(collective, n, root, num_chunks=3), plans.tree(collective, n, root, num_chunks=2)
    return [None, plans.star(collective, n, root), chain, tree]
