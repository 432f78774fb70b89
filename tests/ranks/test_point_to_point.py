"""Messages between two ranks: sends that cross, in order, of any size, among collectives; and what fails by name."""

import os
import time

import pytest
import torch

from minilib.numbers.machine import Link
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.point_to_point import PointToPoint
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.ranks.transport.base import CollectiveFailed, CollectiveMismatch
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.ranks.transport.shared_memory import SLOT_BYTES, SLOTS

TRANSPORTS = {"group": GroupTransport, "shared": SharedMemoryTransport}
LARGE = 2 * SLOTS * SLOT_BYTES + 13  # more than all slots hold


def content(source, target, number, numel):
    return torch.full((numel,), 100 * source + 10 * target + number, dtype=torch.uint8)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_everybody_sends_everything_before_anybody_receives(transport):
    """Ten messages to every other rank, some empty, one larger than all slots; twice, with a collective in between."""
    sizes = (1, 0, LARGE, 7, 0, 1, SLOT_BYTES, 3, 1, 1)

    def on_rank():
        comm = Communicator(TRANSPORTS[transport]())
        mail, others = PointToPoint(comm), [rank for rank in range(comm.world_size) if rank != comm.rank]
        for _ in range(2):
            for number, numel in enumerate(sizes):
                for other in others:
                    mail.send(content(comm.rank, other, number, numel), other, f"message {number}")
            for other in others:  # not by turns, so that one rank's messages wait for those of another
                for number, numel in enumerate(sizes):
                    found = mail.receive(torch.empty(numel, dtype=torch.uint8), other, f"message {number}")
                    assert torch.equal(found, content(other, comm.rank, number, numel))
            mail.settle()
            total = torch.ones(1)
            comm.all_reduce(total)
            assert total == comm.world_size
        if comm.rank == 0:
            mail.send(torch.ones(LARGE, dtype=torch.uint8), 1, "not settled")
        if comm.rank == 1:
            assert mail.receive(torch.zeros(LARGE, dtype=torch.uint8), 0, "not settled").all()
        comm.barrier()  # waits until what was sent before is out
        view = torch.zeros(2, 3, dtype=torch.float64)
        if comm.rank == 0:
            mail.send(torch.arange(6.0).double().view(2, 3), 1, "a matrix")
        if comm.rank == 1:
            mail.receive(view, 0, "a matrix")
            assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
        mail.settle()
        return comm.traffic.messages, comm.traffic.bytes

    found = run(on_rank, 3, timeout=120)
    sent = [messages for messages, _ in found]
    assert min(sent) >= 2 * 2 * len(sizes) and all(total >= 4 * sum(sizes) for _, total in found)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_labels_shapes_and_ranks_that_are_gone(transport):
    def on_rank(case):
        comm = Communicator(TRANSPORTS[transport](timeout=3))
        mail, x = PointToPoint(comm), torch.zeros(4)
        try:
            if comm.rank == 0:
                mail.send(x, 1, "step 3")
                mail.settle()
                if case == "gone":
                    comm.close()
                    return "left", ""
                mail.receive(x, 1, "an answer")
            elif case == "shape":
                mail.receive(torch.zeros(2, 2), 0, "step 3")
            elif case == "label":
                mail.receive(x, 0, "step 4")
            else:
                mail.receive(x, 0, "step 3")
                mail.receive(x, 0, "step 4")
        except CollectiveFailed as error:
            with pytest.raises(CollectiveFailed, match="earlier call failed"):
                comm.all_reduce(x)
            return type(error), str(error)
        return "nothing", ""

    for case, said in (("shape", "(2, 2)"), ("label", "step 4")):
        (kind, _), (mismatch, text) = run(on_rank, 2, case, timeout=60)
        assert kind is CollectiveFailed and mismatch is CollectiveMismatch and said in text
    (kind, _), (failed, text) = run(on_rank, 2, "gone", timeout=60)
    assert (kind, failed) == ("left", CollectiveFailed) and "rank 0" in text


def test_a_rank_that_is_killed_while_others_wait_for_it():
    def on_rank():
        comm = Communicator(SharedMemoryTransport())
        if comm.rank == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), 9)
        PointToPoint(comm).receive(torch.zeros(1), 1, "never")

    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL") as caught:
        run(on_rank, 2, timeout=60)
    assert caught.value.rank == 1


def test_what_cannot_be_sent():
    def on_rank():
        comm = Communicator(SharedMemoryTransport())
        mail = PointToPoint(comm)
        if comm.rank == 1:
            with pytest.raises(ValueError, match="contiguous"):
                mail.send(torch.zeros(2, 3).T, 0, "transposed")
            with pytest.raises(ValueError, match="dense"):
                mail.send(torch.eye(2).to_sparse(), 0, "sparse")
            for peer in (-1, 1, 2):
                with pytest.raises(ValueError, match=f"rank 1 sends to .* another of 2 ranks, got {peer}"):
                    mail.send(torch.zeros(1), peer, "to nobody")
            mail.send(torch.ones(1), 0, "it still works")
        else:
            mail.receive(torch.zeros(1), 1, "it still works")
        for other in (TorchCommunicator(), Communicator(ShapedTransport(SharedMemoryTransport(), Link(1e9, 0)))):
            with pytest.raises(TypeError, match="need a Communicator over a SharedMemoryTransport or a GroupTransport"):
                PointToPoint(other)
        comm.close()
        with pytest.raises(CollectiveFailed, match="settle on a communicator that is closed"):
            mail.settle()

    run(on_rank, 2)
