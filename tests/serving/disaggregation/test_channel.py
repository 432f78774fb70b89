"""Packets arrive whole, in order and once, however the bytes are cut; what is no packet, and who is gone, is named."""

import socket
from pathlib import Path

import pytest
import torch

from minilib.serving.disaggregation.channel import ChannelClosed, Packet, StreamChannel, wait_for_packets
from minilib.serving.disaggregation.meeting import ChannelListener, WorkersDidNotMeet, connect_to_worker, meet_ranks
from tests.serving.disaggregation.workers import channels

TRANSPORTS = ("shared", "tcp")


def receive(channel, count, others=()):
    """So many packets; the other end sends on meanwhile."""
    packets = []
    for _ in range(10_000):
        packets += channel.receive()
        if len(packets) >= count:
            return packets
        for other in others:
            other.push()
        wait_for_packets([channel, *others], 0.05)
    raise AssertionError(f"{len(packets)} of {count} packets came")


def ramp(size):
    return (torch.arange(size) % 251).to(torch.uint8)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 9 * 2**20 + 3])
def test_contents_of_every_size_arrive_and_nobody_waits_to_send(transport, size):
    with channels(transport) as (near, far):
        near.post(Packet("pages", {"number": 1}, ramp(size)))
        near.post(Packet("done", {"number": 1}))
        assert near.idle or size > 2**20, "what fits has left at once"
        first, second = receive(far, 2, [near])
        assert first.kind == "pages" and first.fields == {"number": 1} and torch.equal(first.content, ramp(size))
        assert second.kind == "done" and near.idle
        assert near.num_sent == far.num_received == {"pages": 1, "done": 1}
        assert near.content_bytes_sent == far.content_bytes_received == size


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_packets_in_both_directions_keep_their_order(transport):
    with channels(transport) as (near, far):
        for number in range(3000):
            near.post(Packet("n", {"number": number}, ramp(number % 500)))
            far.post(Packet("f", {"number": number}))
        there, here = receive(far, 3000, [near]), receive(near, 3000, [far])
        assert [packet.fields["number"] for packet in there] == list(range(3000))
        assert all(torch.equal(packet.content, ramp(number % 500)) for number, packet in enumerate(there))
        assert [packet.fields["number"] for packet in here] == list(range(3000))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_was_sent_before_the_end_is_received_and_then_the_end(transport):
    with channels(transport) as (near, far):
        for number in range(3):
            near.post(Packet("n", {"number": number}))
        near.close()
        assert len(far.receive()) == 3
        with pytest.raises(ChannelClosed, match="the prefill worker is gone"):
            far.receive()
        with pytest.raises(ChannelClosed):
            for _ in range(5):
                far.post(Packet("late"))


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"kv 1" + b"\xff" * 12, b"kv 1" + b"\0" * 12, b"kv 1\x02\0\0\0" + b"\0" * 8 + b"[]"],
)
def test_what_is_no_packet_is_refused(data):
    ends = socket.socketpair()
    with ends[0], ends[1]:
        channel = StreamChannel(ends[1], "somebody")
        ends[0].sendall(data)
        for _ in range(2):
            with pytest.raises(ChannelClosed, match="somebody sent"):
                channel.receive()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_comes_and_nobody_answers(transport):
    with ChannelListener(transport) as listener:
        with pytest.raises(WorkersDidNotMeet, match=r"no worker came .* 0\.05 s"):
            listener.accept(timeout=0.05)
        address = listener.address
    with pytest.raises(WorkersDidNotMeet, match="nobody answers"):
        connect_to_worker(address, timeout=0.5)


@pytest.mark.parametrize("make", [ChannelListener, meet_ranks])
def test_an_unknown_transport(make):
    with pytest.raises(ValueError, match="shared, tcp; got 'carrier pigeon'"):
        make("carrier pigeon")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_left_behind(transport, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = set(Path("/dev/shm").iterdir())
    with channels(transport):
        pass
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with channels(transport) as (near, far):
            near.post(Packet("pages", {}, ramp(5 * 2**20)))
            far.receive()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not list(tmp_path.iterdir()) and set(Path("/dev/shm").iterdir()) <= memory
