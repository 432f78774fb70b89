"""What is recorded of collectives, in the foreground and in the background, and that nothing else changes by it."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minilib.operations.flight_recorder import NotARecording, RecordedCommunicator, RecordedGroup, Recorder, read_dump
from minilib.operations.flight_recorder.recorder import recording_bytes
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.point_to_point import PointToPoint
from minilib.ranks.torch_communicator import TorchCommunicator, TorchPending
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

COMMUNICATORS = {
    "group": lambda: Communicator(GroupTransport()),
    "shared": lambda: Communicator(SharedMemoryTransport()),
    "torch": TorchCommunicator,
}
WORLD = RecordedGroup("world", (0, 1))


def every_collective(comm) -> list[torch.Tensor]:
    """Each once in the foreground and, but for the barrier, once in the background."""
    generator = torch.Generator().manual_seed(comm.rank)
    results = []
    for asynchronous in (False, True):
        x = [torch.randn(2, 3, generator=generator) for _ in range(8)]
        calls = [
            comm.all_reduce(x[0], "max", async_op=asynchronous),
            comm.reduce_scatter(x[1], async_op=asynchronous),
            comm.all_gather(x[2], async_op=asynchronous),
            comm.broadcast(x[3], src=1, async_op=asynchronous),
            comm.reduce(x[4], dst=1, op="sum", async_op=asynchronous),
            comm.all_to_all([x[5][0], x[5][1]], [x[6][0], x[6][1]], async_op=asynchronous),
        ]
        for pending in calls if asynchronous else ():
            pending.wait()
            assert pending.done
        if not asynchronous:
            assert torch.equal(calls[1], x[1].view(-1).tensor_split(comm.world_size)[comm.rank])
        own = x[1].view(-1).tensor_split(comm.world_size)[comm.rank]
        results += [x[0], own, x[2], x[3], x[4] if comm.rank == 1 else x[0], x[5]]
    comm.barrier()
    return results


def compare(kind: str, folder: Path):
    rank, make = dist.get_rank(), COMMUNICATORS[kind]
    plain = every_collective(make())
    recorder = Recorder(folder / f"rank{rank}", rank)
    comm = RecordedCommunicator(make(), recorder)
    recorded = every_collective(comm)
    waited = sum(call.wait_ns for call in read_dump(folder / f"rank{rank}").calls)
    assert 0 < waited == recorder.waited_ns
    comm.close()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("kind", COMMUNICATORS)
def test_every_collective_gives_the_same_and_is_recorded(kind, folder):
    run(compare, 2, kind, folder, timeout=60)
    expected = [
        ("all_reduce", "max", None, (2, 3)),
        ("reduce_scatter", "sum", None, (2, 3)),
        ("all_gather", "", None, (2, 3)),
        ("broadcast", "", 1, (2, 3)),
        ("reduce", "sum", 1, (2, 3)),
        ("all_to_all", "", None, (6, 6)),
    ]
    for rank in range(2):
        dump = read_dump(folder / f"rank{rank}")
        assert (dump.rank, dump.lost, dump.entered, dump.process) == (rank, 0, {WORLD: 13}, "")
        found = [(call.op, call.reduce_op, call.root, call.shape) for call in dump.calls]
        assert found == [*expected, *expected, ("barrier", "", None, ())]
        assert [call.sequence for call in dump.calls] == list(range(13))
        assert [call.asynchronous for call in dump.calls] == [False] * 6 + [True] * 6 + [False]
        assert all(call.dtype == "float32" for call in dump.calls[:12])
        for call in dump.calls:
            assert call.state == "completed" and not call.waiting
            assert call.enqueued_ns <= call.started_ns <= call.ended_ns <= dump.read_ns
            assert call.site.startswith("flight_recorder/test_communicator.py:")
            assert call.site.endswith(" every_collective")
            assert call.asynchronous or call.wait_ns == call.ended_ns - call.enqueued_ns
        lines = [int(call.site.split(":")[1].split()[0]) for call in dump.calls]
        assert lines[:6] == lines[6:12] == list(range(lines[0], lines[0] + 6))


def waits_in_the_background(folder: Path):
    rank = dist.get_rank()
    path, go = folder / f"rank{rank}", folder / "go"
    comm = RecordedCommunicator(Communicator(SharedMemoryTransport(timeout=30)), Recorder(path, rank))
    if rank == 1:
        until(go.exists)
    pendings = [comm.all_reduce(torch.ones(4), async_op=True) for _ in range(3)]
    if rank == 0:
        until(lambda: read_dump(path).calls[0].state == "started")
        before = read_dump(path).calls
        assert [call.state for call in before] == ["started", "scheduled", "scheduled"]
        assert not any(call.waiting or call.wait_ns for call in before)
        go.touch()
    until(lambda: all(call.state == "completed" for call in read_dump(path).calls))  # nobody waits for them
    calls = read_dump(path).calls
    assert all(first.ended_ns <= second.started_ns for first, second in zip(calls, calls[1:], strict=False))
    for pending in pendings:
        pending.wait()
    comm.close()


def until(condition):
    while not condition():
        time.sleep(0.002)


def test_a_call_in_the_background_starts_and_ends_there(folder):
    run(waits_in_the_background, 2, folder, timeout=60)


def waits_and_fails(folder: Path):
    rank = dist.get_rank()
    comm = RecordedCommunicator(
        Communicator(SharedMemoryTransport(timeout=1)), Recorder(folder / f"rank{rank}", rank), "dp", range(2)
    )
    if rank == 0:
        first, second = (comm.all_reduce(torch.ones(4), async_op=True) for _ in range(2))
        for pending in (first, second):
            with pytest.raises(CollectiveFailed):
                pending.wait()
        with pytest.raises(CollectiveFailed):
            comm.broadcast(torch.ones(4))
    else:
        until((folder / "over").exists)


def test_failures_are_recorded_with_the_time_that_was_waited(folder):
    def job(folder):
        try:
            waits_and_fails(folder)
        finally:
            (folder / "over").touch()

    run(job, 2, folder, timeout=60)
    first, second, third = read_dump(folder / "rank0").calls
    assert [call.state for call in (first, second, third)] == ["failed"] * 3
    assert first.wait_ns > 0.9e9 and first.open
    assert read_dump(folder / "rank1").entered == {RecordedGroup("dp", (0, 1)): 0}


def alone(recorder: Recorder, name="world") -> RecordedCommunicator:
    return RecordedCommunicator(Communicator(SharedMemoryTransport()), recorder, name)


def refuses(folder: Path):
    comm = alone(Recorder(folder / "rank0", 0))
    comm.barrier()
    with pytest.raises(ValueError, match="no rank 7"):
        comm.broadcast(torch.ones(4), src=7)
    comm.broadcast(torch.ones(4))
    comm.close()


def test_a_call_that_is_refused_for_its_arguments_takes_no_number(folder):
    run(refuses, 1, folder, timeout=60)
    calls = read_dump(folder / "rank0").calls
    assert [(call.sequence, call.state) for call in calls] == [(0, "completed"), (1, "refused"), (1, "completed")]


def fills(folder: Path):
    recorder = Recorder(folder / "rank0", 0, capacity=5)
    first, second = alone(recorder, "first"), alone(recorder, "second")
    again = alone(recorder, "first")
    first.barrier()
    for _ in range(7):
        second.all_reduce(torch.ones(1, 2, 1, 3, 1, 4, 5), "sum")
    assert again.rank == 0
    recorder.close()


def test_what_is_overwritten_is_counted_for_each_group(folder):
    run(fills, 1, folder, timeout=60)
    dump = read_dump(folder / "rank0")
    first, second, again = dump.entered
    assert (dump.lost, dump.closed, dump.entered) == (3, True, {first: 1, second: 7, again: 0})
    assert (first.name, again.name, again.generation) == ("first", "first", 1)
    assert {call.group for call in dump.calls} == {second}
    assert {call.shape for call in dump.calls} == {(1, 2, 1, 3, 1, 20)}


def mails(folder: Path):
    rank = dist.get_rank()
    comm = RecordedCommunicator(Communicator(SharedMemoryTransport()), Recorder(folder / f"rank{rank}", rank))
    mail, x = PointToPoint(comm), torch.arange(3.0)
    comm.barrier()
    if rank == 0:
        mail.send(x, 1, "x")
        mail.settle()
    else:
        assert torch.equal(mail.receive(torch.empty(3), 0, "x"), x)
    comm.barrier()
    assert comm.traffic.messages
    comm.close()


def test_messages_between_two_ranks_are_recorded_beside_the_numbered_calls(folder):
    run(mails, 2, folder, timeout=60)
    for rank, messages in enumerate((2, 1)):
        calls = read_dump(folder / f"rank{rank}").calls
        assert [call.sequence for call in calls] == [0, *[-1] * messages, 1]
        assert calls[1].op == "message"


class SlowWork:
    """A collective on a GPU: to wait for it only makes a stream wait."""

    finished = False

    def wait(self):
        pass

    def is_completed(self):
        return self.finished


def test_on_a_gpu_a_call_that_has_returned_is_not_taken_for_done():
    works = [SlowWork(), SlowWork()]
    pendings = iter([TorchPending([work]) for work in works])
    comm = SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda"))
    comm.all_reduce = lambda tensor, op, plan, async_op: next(pendings) if async_op else pytest.fail("cannot be seen")
    content = bytearray(recording_bytes(10))
    recorded = RecordedCommunicator(comm, Recorder(content, 0, capacity=10))
    assert recorded.all_reduce(torch.ones(1)) is None
    assert [call.state for call in read_dump(content).calls] == ["started"]
    works[0].finished = True
    pending = recorded.all_reduce(torch.ones(1), async_op=True)
    pending.wait()
    assert [call.state for call in read_dump(content).calls] == ["completed", "started"]
    works[1].finished = True
    pending.wait()
    assert [call.state for call in read_dump(content).calls] == ["completed", "completed"]


def test_what_does_not_fit_together_is_refused():
    comm = SimpleNamespace(rank=1, world_size=2, device=torch.device("cpu"))
    content = bytearray(recording_bytes(1))
    with pytest.raises(NotARecording):
        read_dump(content)
    with pytest.raises(NotARecording):
        read_dump(b"")
    recorder = Recorder(content, 3, capacity=1)
    with pytest.raises(ValueError, match="rank 1 of 2 in group 'tp' is rank 3 of the job"):
        RecordedCommunicator(comm, recorder, "tp", (3, 2))
    with pytest.raises(ValueError, match="and the buffer has"):
        Recorder(content, 3, capacity=2)
    with pytest.raises(ValueError, match="at least 1 call"):
        Recorder(content, 3, capacity=0)
    ranks = (*range(0, 300, 2), 1)  # at unequal distances, so that their text is in pieces
    comm = SimpleNamespace(rank=150, world_size=151, device=torch.device("cpu"))
    RecordedCommunicator(comm, Recorder(content, 1, 1), "g", ranks)
    assert list(read_dump(content).entered) == [RecordedGroup("g", ranks)]


HOLDS_THE_GIL = """
import ctypes, sys, time
from minilib.operations.flight_recorder.recorder import Recorder
recorder = Recorder(sys.argv[1], 0)
group = recorder.group("world", (0,))
recorder.begin(group, recorder.name("all_reduce|sum||float32"), recorder.site(0), 0, 0, (4,), True, time.monotonic_ns())
print("ready", flush=True)
ctypes.PyDLL(None).sleep(600)
"""


def test_a_recording_is_read_while_the_rank_hangs_and_holds_the_gil(folder):
    hung = subprocess.Popen([sys.executable, "-c", HOLDS_THE_GIL, folder / "rank0"], stdout=subprocess.PIPE)
    try:
        assert hung.stdout.readline() == b"ready\n"
        dump = read_dump(folder / "rank0")
        assert [(call.op, call.state, call.waiting) for call in dump.calls] == [("all_reduce", "started", True)]
        assert dump.process in "RSD" and dump.process
    finally:
        hung.kill()
        hung.communicate()
    assert read_dump(folder / "rank0").process == ""
