"""A log over two racks, laid well and badly: what crosses the link is counted there and predicted by the plan."""

import math
import random
import time

import pytest

from minilib.classic.racks import LinkClosed, RackLink, expected_crossing, log_in_racks, records_lost
from minilib.mechanisms.sharding.placement import Crossing, places_of, spread
from tests.classic.log.cases import contents, nothing_left_over

RECORDS = [b"", b"x", bytes(5000), random.Random(0).randbytes(200_000)]
STORED = sum(len(record) + 8 for record in RECORDS)


@pytest.mark.parametrize(
    ("racks", "crossings"), [([0, 0, 1, 1], 1), ([0, 1, 0, 1], 3), ([0, 1, 1, 0], 2), ([0, 0, 0], 0)]
)
def test_what_crosses_is_what_the_plan_says(tmp_path, racks, crossings):
    with nothing_left_over(tmp_path / "log"):
        link = RackLink()
        try:
            with log_in_racks(tmp_path / "log", racks, link) as log:
                for record in RECORDS:
                    log.append(record)
                log.check_invariants()
            expected = [expected_crossing(racks, len(record)) for record in RECORDS]
            assert [each.messages for each in expected] == [crossings] * len(RECORDS)
            assert link.bytes == sum(each.bytes for each in expected) == crossings * STORED
            assert link.connections == crossings
        finally:
            link.close()
        assert len(set(contents(log))) == 1


def test_a_record_takes_at_least_as_long_as_the_link_does(tmp_path):
    link = RackLink(bandwidth=1e6, latency=1e-3)
    started = time.perf_counter()
    with log_in_racks(tmp_path, [0, 1, 0, 1], link) as log:
        log.append(bytes(50_000))
    assert time.perf_counter() - started >= link.bytes / 1e6 == 3 * 50_008 / 1e6
    link.close()


def test_a_replica_that_dies_is_passed_over(tmp_path):
    link = RackLink()
    try:
        with log_in_racks(tmp_path, [0, 0, 1, 1], link) as log:
            log.append(b"before")
            log.kill(1)
            deadline = time.monotonic() + 60
            while 1 in log.living() and time.monotonic() < deadline:
                time.sleep(0.01)
            log.append(b"after")  # the new chain goes 0 ═ 2 → 3, and all have what goes along it when the log is closed
        assert link.connections == 2 and link.bytes == len(b"before") + len(b"after") + 2 * 8
    finally:
        link.close()


def test_spread_copies_survive_a_rack_and_cross_as_often_as_their_order_has_it():
    racks = places_of(6, 3)
    chosen = spread(4, racks)
    assert sorted(chosen) == [0, 1, 3, 4]
    assert expected_crossing([racks[host] for host in sorted(chosen)], 92) == Crossing(1, 100, 1)
    assert expected_crossing([racks[host] for host in chosen], 92).messages == 3  # not put in order
    packed, apart = [[0, 1, 2], [3, 4, 5]], [spread(3, racks, first) for first in range(6)]
    assert [records_lost(rack, packed, racks) for rack in (0, 1)] == [1, 1]
    assert [records_lost(rack, apart, racks) for rack in (0, 1)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bandwidth": 0}, "bandwidth is a number > 0, got 0"),
        ({"latency": -1}, "latency is a finite number ≥ 0, got -1"),
        ({"latency": math.nan}, "latency is a finite number ≥ 0, got nan"),
        ({"latency": math.inf}, "latency is a finite number ≥ 0, got inf"),
        ({"latency": "1"}, "latency is a finite number ≥ 0, got '1'"),
        ({"bandwidth": math.nan}, "bandwidth is a number > 0, got nan"),
        ({"bandwidth": True}, "bandwidth is a number > 0, got True"),
        ({"bandwidth": None}, "bandwidth is a number > 0, got None"),
    ],
)
def test_no_link_has_such_figures(arguments, message):
    with pytest.raises(ValueError, match=message):
        RackLink(**arguments)


@pytest.mark.parametrize("behind", [0, -1, 65536, 80.0, "80", None])
def test_ports_that_do_not_exist_leave_the_link_as_it_is(behind):
    link = RackLink()
    with pytest.raises(ValueError, match="a port is a whole number from 1 to 65535"):
        link.port(behind)
    link.close()
    assert not link._thread.is_alive()


def test_a_link_is_closed_once_and_then_refuses(tmp_path):
    link = RackLink()
    link.close()
    link.close()
    with pytest.raises(LinkClosed, match="is closed"):
        link.port(80)
    with nothing_left_over(tmp_path / "log"), pytest.raises(LinkClosed), log_in_racks(tmp_path / "log", [0, 1], link):
        pass


@pytest.mark.parametrize(("racks", "size"), [([0, 1], -1), ([0, 1], 1.5), ([0, 1], math.nan), ([], 1)])
def test_records_and_chains_that_cannot_be(racks, size):
    with pytest.raises(ValueError, match="bytes of a record is a whole number ≥ 0|world_size"):
        expected_crossing(racks, size)
