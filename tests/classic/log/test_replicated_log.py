"""Files that end up alike and counts that are the plan's, for every plan; quorums; torn, damaged and foreign files."""

import os
import random
import socket
from functools import partial

import pytest

from minilib.classic.log.file import HEADER, LogFile, LogInUse
from minilib.classic.log.group import LogsDiverged, ReplicaFailed, children_of
from minilib.classic.log.replicated_log import QuorumLost, Recovery, ReplicatedLog
from minilib.mechanisms.replication import PlanError, plans
from tests.classic.log.cases import contents, nothing_left_over, over_plans, records_in


@pytest.fixture(autouse=True)
def leave_nothing(tmp_path):
    with nothing_left_over(tmp_path):
        yield


def behind(plan, n):
    """How many replicas are reached through each, itself included."""
    children = children_of(plan("broadcast", n))
    count = lambda rank: 1 + sum(map(count, children[rank]))  # noqa: E731
    return [count(rank) for rank in range(n)]


@over_plans
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_all_files_are_alike_and_the_counts_are_those_of_the_plan(tmp_path, plan, n):
    records = [b"", b"x", bytes(5000), random.Random(n).randbytes(1 << 20), b"", b"last"]
    with ReplicatedLog(tmp_path, n, plan) as log:
        assert [log.append(record) for record in records] == list(range(len(records))) and len(log) == len(records)
        sent, promised = log.sent(), plan("broadcast", n)
        log.check_invariants()
        assert log.read(3) == records[3] and log.epoch == 1
    for rank in range(n):
        assert sent[rank].messages == len(records) * promised.messages(rank)
        assert sent[rank].bytes == sum(promised.bytes_sent(rank, [len(record) + HEADER.size]) for record in records)
        assert sent[rank].acks == (len(records) * behind(plan, n)[rank] if rank else 0)
    assert len(set(contents(log))) == 1 and records_in(log.path(0)) == records


@over_plans
def test_killed_in_the_middle_and_caught_up(tmp_path, plan):
    with ReplicatedLog(tmp_path, 4, plan) as log:
        for number in range(20):
            log.append(b"%d" % number)
        log.settle()
        log.kill(2)
        for number in range(20, 30):
            log.append(b"%d" % number)
        assert log.living() == [0, 1, 3] and log.epoch == 2
        assert log.restart(2) == Recovery(records=20, torn_bytes=0, missed=10)
        assert log.append(b"all again") == 30 and log.living() == [0, 1, 2, 3]
        log.check_invariants()
    assert len(set(contents(log))) == 1


@pytest.mark.parametrize("quorum", [1, 2, 3])
def test_appends_go_on_as_long_as_a_quorum_lives(tmp_path, quorum):
    with ReplicatedLog(tmp_path, 3, plans.star, quorum=quorum) as log:
        for living in (3, 2, 1):
            if living < quorum:
                with pytest.raises(QuorumLost, match=f"{living} of 3 .* {quorum}; nothing was written; .*SIGKILL"):
                    log.append(b"no")
            else:
                log.append(b"yes")
            if living > 1:
                log.kill(living - 1)
        assert len(log) == 4 - quorum
        assert log.restart(2).missed + log.restart(1).missed >= 2 - quorum
        assert log.append(b"yes") == 4 - quorum
    assert records_in(log.path(0)) == [b"yes"] * (5 - quorum) and len(set(contents(log))) == 1


@pytest.mark.parametrize("damage", [1, 5, 9])
def test_a_torn_end_is_cut_off_and_sent_again(tmp_path, damage):
    with ReplicatedLog(tmp_path, 3) as log:
        for record in (b"one", b"two"):
            log.append(record)
        log.settle()
        log.kill(2)
        os.truncate(log.path(2), log.path(2).stat().st_size - damage)
        assert log.restart(2) == Recovery(records=1, torn_bytes=3 + HEADER.size - damage, missed=1)
        log.kill(1)
        log.path(1).unlink()
        assert log.restart(1) == Recovery(records=0, torn_bytes=0, missed=2)
    assert len(set(contents(log))) == 1


def test_a_file_that_is_damaged_or_of_another_log_is_not_taken_in(tmp_path):
    with ReplicatedLog(tmp_path / "other", 1) as other:
        for record in (b"uno", b"dos"):
            other.append(record)
    with ReplicatedLog(tmp_path, 3) as log:
        for record in (b"one", b"two"):
            log.append(record)
        log.settle()
        good = log.path(2).read_bytes()
        damaged = good[:8] + b"X" + good[9:]
        ahead = LogFile(tmp_path / "ahead.log")
        for record in (b"one", b"two", b"three"):
            ahead.write(ahead.pack(record))
        ahead.close()
        for bad, error, says in [
            (damaged, ReplicaFailed, "replica 2 ended with code 1: .*LogCorrupt: .* record 0 is damaged"),
            (other.path(0).read_bytes(), LogsDiverged, "has 2 records, which the 2 of the leader do not begin with"),
            (ahead.path.read_bytes(), LogsDiverged, "has 3 records, which the 2 of the leader do not begin with"),
        ]:
            log.kill(2)
            log.path(2).write_bytes(bad)
            with pytest.raises(error, match=says):
                log.restart(2)
            assert log.living() == [0, 1] and log.path(2).read_bytes() == bad
            log.check_invariants()
            log.path(2).write_bytes(good)
            log.restart(2)
        assert log.append(b"three") == 2
    assert len(set(contents(log))) == 1


def test_a_stranger_who_connects_is_not_listened_to(tmp_path):
    with ReplicatedLog(tmp_path, 3) as log:
        port = log._group.members[2].answer["port"]
        with socket.create_connection(("127.0.0.1", port)) as loud, socket.create_connection(("127.0.0.1", port)):
            loud.sendall(bytes(1000))
            log.kill(1)
            assert log.append(b"two of three") == 0  # under a new plan, in which replica 2 awaits another parent
            log.restart(1)
            log.append(b"all")
            log.settle()
            assert log.living() == [0, 1, 2] and log.epoch == 3
    assert len(set(contents(log))) == 1


def test_a_folder_is_taken_up_again_by_more_replicas_and_another_plan(tmp_path):
    with ReplicatedLog(tmp_path, 2, plans.star, fsync=True) as log:
        log.append(b"before")
        with pytest.raises(LogInUse, match="replica-0.log is open already"):
            ReplicatedLog(tmp_path, 2)
    with pytest.raises(ValueError, match="the log is closed"):
        log.append(b"too late")
    log.close()
    with ReplicatedLog(tmp_path, 4, plans.tree) as log:
        assert log.append(b"after") == 1
    assert len(set(contents(log))) == 1 and records_in(log.path(3)) == [b"before", b"after"]
    log.path(0).unlink()
    with pytest.raises(LogsDiverged, match="has 2 records, which the 0 of the leader"):
        ReplicatedLog(tmp_path, 4)


def test_what_makes_no_replicated_log_is_refused(tmp_path):
    for size, options in [(0, {}), (3, {"quorum": 0}), (3, {"quorum": 4}), (3, {"timeout": 0})]:
        with pytest.raises(ValueError, match="needs 1 ≤ quorum ≤ world_size and timeout > 0"):
            ReplicatedLog(tmp_path, size, **options)
    for plan in (plans.ring, partial(plans.chain, num_chunks=2), lambda name, n: plans.star(name, n, n - 1)):
        with pytest.raises(PlanError):
            ReplicatedLog(tmp_path, 3, plan)
    with ReplicatedLog(tmp_path, 2) as log:
        for rank in (0, 2):
            with pytest.raises(ValueError, match=r"followers that live are \[1\], got"):
                log.kill(rank)
        with pytest.raises(ValueError, match=r"only the dead can be restarted, \[\]; got 1"):
            log.restart(1)
        with pytest.raises(TypeError, match="a record is bytes"):
            log.append("text")
        log.kill(1)
        log.kill(1)  # dead, and the leader has not looked yet
        with pytest.raises(QuorumLost):
            log.append(b"")
    assert records_in(log.path(0)) == []
