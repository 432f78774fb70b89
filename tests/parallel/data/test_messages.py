"""What data parallelism sends, and when: counts, and the order of events."""

import pytest
import torch
from torch import nn

from minilib.parallel.data.data_parallel import METHODS, DataParallel
from minilib.ranks.collectives import SMALL_BYTES, Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport


class Wide(nn.Module):
    """Six matrices of 48 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 128, bias=False) for _ in range(6))

    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)


def sends(cases: list) -> list[tuple[list[int], tuple[int, int]]]:
    comm = Communicator(GroupTransport())
    return [sends_by(method, bucket_bytes, comm) for method, bucket_bytes, _ in cases]


def sends_by(method: str, bucket_bytes: int, comm: Communicator) -> tuple[list[int], tuple[int, int]]:
    model = Wide()
    dp = DataParallel(model, comm, method, bucket_bytes=bucket_bytes)
    messages, nbytes = comm.traffic.messages, comm.traffic.bytes
    for _ in range(2):
        model(torch.randn(2, 96)).backward()
        dp.finish()
    sent = (comm.traffic.messages - messages) // 2, (comm.traffic.bytes - nbytes) // 2
    return [bucket.flat.nbytes for bucket in dp.buckets], sent


MATRIX = 96 * 128 * 4


CASES = [  # method, bucket_bytes, the buckets' bytes
    ("flat", 1, [6 * MATRIX]),
    ("buckets", 2 * MATRIX, [2 * MATRIX] * 3),
    ("buckets", 2 * MATRIX + 1, [3 * MATRIX] * 2),
    ("buckets", 4 * MATRIX, [4 * MATRIX, 2 * MATRIX]),
]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_messages_and_bytes_are_the_closed_form(n):
    """A ring sends 2·(n-1) messages a bucket, and 2·(n-1)/n of its bytes."""
    for found in run(sends, n, CASES):
        for (_, _, buckets), (sizes, (messages, nbytes)) in zip(CASES, found, strict=True):
            assert sizes == buckets
            assert messages == len(buckets) * 2 * (n - 1)
            assert nbytes == sum(2 * (n - 1) * size // n for size in buckets)


def sends_naively() -> tuple[tuple[int, int], int]:
    comm = Communicator(GroupTransport())
    model = nn.Sequential(nn.Linear(301, 101), nn.Linear(101, 3))
    dp = DataParallel(model, comm, "naive")
    messages, nbytes = comm.traffic.messages, comm.traffic.bytes
    model(torch.randn(2, 301)).sum().backward()
    dp.finish()
    return comm.traffic.messages - messages, comm.traffic.bytes - nbytes


def test_naive_sends_messages_for_every_parameter():
    """Two ranks: the large matrix by a ring, two halves a rank of odd sizes; the small ones by a tree, up and down."""
    sizes = [4 * n for n in (301 * 101, 101, 303, 3)]
    assert [size > SMALL_BYTES for size in sizes] == [True, False, False, False]
    for messages, nbytes in run(sends_naively, 2):
        assert messages == 2 + 3
        assert nbytes == sum(sizes)


# When it is sent


def records() -> list[list]:
    comm = Communicator(SharedMemoryTransport())
    return [records_of(*case, comm) for case in (("buckets", True), ("flat", True), ("buckets", False))]


def records_of(method: str, trace: bool, comm: Communicator) -> list:
    model = Wide()
    dp = DataParallel(model, comm, method, bucket_bytes=2 * MATRIX, trace=trace)
    for _ in range(2):
        dp.events.clear()
        loss = model(torch.randn(2, 96))
        dp.mark("backward begin")
        loss.backward()
        dp.finish()
    return [tuple(event) for event in dp.events]


def test_events_tell_what_overlaps_and_are_recorded_only_if_asked():
    for events, flat, untraced in run(records, 2):
        at = {(what, bucket): seconds for what, bucket, seconds in events}
        assert len(at) == len(events) == 2 + 3 * 3
        assert at["backward begin", None] < at["bucket ready", 0] < at["backward end", None]
        assert at["all-reduce begin", 0] < at["backward end", None]
        for bucket in range(3):
            ready, begin, end = (at[what, bucket] for what in ("bucket ready", "all-reduce begin", "all-reduce end"))
            assert ready <= begin <= end
        assert all(at["all-reduce end", b] <= at["all-reduce begin", b + 1] for b in range(2))  # one after another
        assert [what for what, _, _ in flat] == [
            "backward begin", "backward end", "bucket ready", "all-reduce begin", "all-reduce end"
        ]  # fmt: skip
        assert untraced == []


def closes() -> list[int]:
    """Wrapping the same model anew, as a chapter does."""
    comm, model, sent = Communicator(GroupTransport()), Wide(), []
    for method in METHODS:
        dp = DataParallel(model, comm, method, trace=True)
        before = comm.traffic.bytes
        model(torch.randn(2, 96)).backward()
        dp.finish()
        sent.append(comm.traffic.bytes - before)
        dp.close()
    before = comm.traffic.bytes
    model(torch.randn(2, 96)).backward()
    return [*sent, comm.traffic.bytes - before]


def test_a_closed_one_lets_go_of_the_model():
    assert run(closes, 2) == [[6 * MATRIX] * 3 + [0]] * 2
