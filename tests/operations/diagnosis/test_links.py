"""A slow link is told from a late sender, by both ends of many messages."""

import pytest
import torch

from minilib.mechanisms.replication import plans
from minilib.numbers.machine import Link
from minilib.operations.diagnosis.links import MessageEnd, TimedTransport, link_times, slow_links
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

MS = 1_000_000


def test_a_message_takes_no_longer_than_the_shorter_of_its_ends():
    sent = [MessageEnd(0, 1, 8, 100, 130)]
    received = [MessageEnd(0, 1, 8, 20, 125)]  # it waited for the sender
    assert link_times([sent, []], [[], received]) == {(0, 1): [(8, 30)]}
    assert link_times([sent, []], [[], []]) == {(0, 1): []}  # the run ended before the other end
    with pytest.raises(ValueError, match="rank 0 sent 8 bytes where rank 1 received 9"):
        link_times([sent], [[], [MessageEnd(0, 1, 9, 20, 125)]])


def times_of(quickest, count=40):
    """A ring whose messages take these ms at best, and three times as long as a rule."""
    return {(r, (r + 1) % 4): [(4096, int(q * MS) * (1 if n % 10 == 0 else 3)) for n in range(count)]
            for r, q in enumerate(quickest)}  # fmt: skip


def test_the_slow_link_is_named_with_both_ends():
    [found] = slow_links(times_of([0.2, 5, 0.3, 0.2]))
    assert (found.kind, found.rank, found.peer) == ("slow_link", 1, 2) and "5.00 ms" in found.evidence
    assert slow_links(times_of([0.2, 1.9, 0.3, 0.2])) == []  # less than 2 ms
    [found] = slow_links(times_of([5.79, 0.55, 0.55, 1.8]))  # links behind the slow one seem slower, too
    assert (found.rank, found.peer) == (0, 1)
    assert slow_links(times_of([5, 5, 5, 5])) == []  # a slow network has no slow link
    assert slow_links(times_of([0.2, 5, 0.3, 0.2], 20)) == slow_links({}) == []  # too few messages


def test_small_messages_say_nothing_about_a_links_bandwidth():
    times = times_of([0.2, 5, 0.3, 0.2])
    times[1, 2] = [message for large in times[1, 2] for message in (large, (8, MS // 10))]
    assert [(found.rank, found.peer) for found in slow_links(times)] == [(1, 2)]


def all_reduces(slow, late, count=12):
    """On each rank: ring all-reduces over a slow link, or behind a rank that comes late."""
    transport = ShapedTransport(SharedMemoryTransport(), lambda src, dst: Link(1e12, 0.004 * ((src, dst) == slow)))
    timed = TimedTransport(transport)
    comm = Communicator(timed)
    values = torch.full((4096,), float(comm.rank))
    results = []
    for _ in range(count):
        if comm.rank == late:
            torch.randn(400, 400).matmul(torch.randn(400, 400))
        result = values.clone()
        comm.all_reduce(result, plan=plans.ring("all_reduce", comm.world_size))
        results.append(result[0].item())
    comm.close()
    return timed.sent, timed.received, set(results)


@pytest.mark.parametrize("slow, late", [((2, 3), None), ((3, 0), 1), (None, 2)])
def test_on_ranks_a_slow_link_is_found_and_a_late_rank_makes_none(slow, late):
    """Whatever the machine does, no other link is named; a slow one is, in one of three tries."""
    tries = []
    while len(tries) < 3 and tries[-1:] != [[slow] if slow else []]:
        sent, received, results = zip(*run(all_reduces, 4, slow, late, timeout=120), strict=True)
        assert results == ({6.0},) * 4
        found = slow_links(link_times(sent, received))
        tries.append([(finding.rank, finding.peer) for finding in found])
        print("named:", tries[-1])
        assert set(tries[-1]) <= {slow}
    assert tries[-1] == ([slow] if slow else [])
