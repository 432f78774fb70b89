import os

import psutil
import pytest

from minilib.numbers.probes import compute, memory, system
from minilib.ranks import torch_all_reduce


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_bandwidths_are_positive_on_small_buffers():
    assert memory.copy_bandwidth(2**20, budget=0.02) > 0
    assert memory.read_bandwidth(2**20, budget=0.02) > 0
    assert memory.first_touch_bandwidth(2**20) > 0


def test_cache_sizes_grow_with_the_level():
    sizes = list(memory.cache_sizes().values())
    assert sizes == sorted(sizes)


def test_matmul_rates_leave_out_what_cannot_run():
    rates = compute.matmul_rates("cpu", budget=0.01)
    assert "fp32" in rates
    assert "tf32" not in rates  # a GPU format
    assert all(rate > 0 for rate in rates.values())


def test_a_product_that_torch_refuses_has_no_rate(monkeypatch):
    def refuse(dtype, device, n):
        raise RuntimeError("not implemented for this dtype")

    monkeypatch.setattr(compute, "_product", refuse)
    assert compute.matmul_rates("cpu", budget=0.01) == {}


def test_loopback_leaves_no_process_behind():
    before = children()
    assert 0 < system.loopback_round_trip(budget=0.02) < 1
    assert system.loopback_bandwidth(4 * 2**20) > 0
    assert system.loopback_duplex_bandwidth(4 * 2**20) > 0
    assert children() == before


def test_a_peer_that_dies_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(
        system, "_ECHO", "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    )
    before = children()
    with pytest.raises((ConnectionError, OSError)):
        system.loopback_duplex_bandwidth(64 * 2**20)
    assert children() == before


def test_disk_probes_clean_up(tmp_path):
    assert 0 < system.fsync_latency(tmp_path, budget=0.02) < 10
    answers = system.disk_bandwidths(tmp_path, nbytes=4 * 2**20)
    assert {"disk_write"} <= set(answers)
    assert hasattr(os, "posix_fadvise") == ("disk_read" in answers)
    assert list(tmp_path.iterdir()) == []


def test_all_reduce_sums_over_ranks_that_differ():
    assert torch_all_reduce.all_reduce(4096, world_size=2, repeats=1) > 0  # each rank checks the sum itself


@pytest.mark.parametrize(("nbytes", "world_size"), [(0, 2), (4096, 1)])
def test_all_reduce_needs_bytes_and_peers(nbytes, world_size):
    with pytest.raises(ValueError, match="needs"):
        torch_all_reduce.all_reduce(nbytes, world_size)
