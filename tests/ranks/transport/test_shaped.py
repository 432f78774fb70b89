"""A shaped transport computes the same, and no faster than its links allow."""

import time

import torch

from minilib.mechanisms.replication import plans
from minilib.numbers.machine import Link
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

NEAR, FAR = Link(bandwidth=1e12, latency=0.0), Link(bandwidth=2e7, latency=2e-3)


def reduce(plan, link):
    comm = Communicator(ShapedTransport(SharedMemoryTransport(), link))
    x = torch.arange(60_000.0) + comm.rank
    comm.barrier()
    started = time.perf_counter()
    comm.all_reduce(x, plan=plan)
    seconds = time.perf_counter() - started
    comm.close()
    return torch.equal(x, 4 * torch.arange(60_000.0) + 6), seconds


def test_sums_are_right_and_take_at_least_what_the_links_need():
    by_host = lambda src, dst: NEAR if src // 2 == dst // 2 else FAR  # noqa: E731
    flat = launch.run(reduce, 4, plans.ring("all_reduce", 4), by_host)
    two = launch.run(reduce, 4, plans.two_level([0, 0, 1, 1]), by_host)
    assert all(right for right, _ in flat + two)
    size = 4 * 60_000
    assert min(seconds for _, seconds in flat) >= 6 * (2e-3 + size / 4 / 2e7)
    assert min(seconds for _, seconds in two) >= 2 * (2e-3 + size / 4 / 2e7)


def test_one_link_for_all():
    results = launch.run(reduce, 4, plans.ring("all_reduce", 4), FAR)
    assert all(right and seconds >= 6 * (2e-3 + 6e4 / 2e7) for right, seconds in results)
