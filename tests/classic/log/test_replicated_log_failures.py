"""Whoever of a replicated log is killed, stopped or interrupted, and when: what was acknowledged is never lost."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from minilib.classic.log import group
from minilib.classic.log.channel import Channel
from minilib.classic.log.file import LogFile
from minilib.classic.log.follower import FILL, HALT, LINK
from minilib.classic.log.group import ReplicaFailed
from minilib.classic.log.replicated_log import QuorumLost, Recovery, ReplicatedLog
from minilib.mechanisms.replication import plans
from tests.classic.log.cases import contents, nothing_left_over, over_plans, records_in

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def leave_nothing(tmp_path):
    with nothing_left_over(tmp_path):
        yield


@pytest.fixture
def interruptible():
    """A shell makes what it starts in the background deaf to SIGINT, and children inherit that."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def gone(process):
    """Nobody may have waited for it yet: its parent is dead."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def before(monkeypatch, moment, action):
    """Have something happen just before the leader does what a moment names, the first time that it does."""

    def happens_first(owner, name, when):
        plain, happened = getattr(owner, name), []

        def does(*args):
            if when(*args) and not happened:
                happened.append(True)
                action()
            return plain(*args)

        monkeypatch.setattr(owner, name, does)

    kinds = {"halt": HALT, "fill": FILL, "link": LINK}
    if moment in kinds:
        happens_first(Channel, "post", lambda channel, kind, body: kind == kinds[moment])
    elif moment == "connect":
        happens_first(group, "connect", lambda port, greeting: True)
    else:
        happens_first(*{"write": (LogFile, "_index"), "send": (group.LogGroup, "send")}[moment], lambda *args: True)


def stop_for_good(log, rank):
    """A process that hangs: it neither answers nor ends."""
    os.kill(log.pid(rank), signal.SIGSTOP)


@over_plans
@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_nothing_acknowledged_is_lost(tmp_path, plan, seed):
    rng = random.Random(seed)
    n = rng.choice([2, 3, 3, 5])
    acknowledged = {}
    with ReplicatedLog(tmp_path, n, plan, quorum=rng.choice([None, 1, n])) as log:
        for step in range(40):
            log.check_invariants()
            followers, dead = log.living()[1:], sorted(set(range(n)) - set(log.living()))
            if followers and rng.random() < 0.1:
                log.kill(rng.choice(followers))
            if dead and rng.random() < 0.2:
                log.restart(rng.choice(dead))
            record = b"%d " % step + rng.randbytes(rng.choice([0, 1, 100, 100_000]))
            with suppress(QuorumLost):
                acknowledged[log.append(record)] = record
        for rank in set(range(n)) - set(log.living()):
            log.restart(rank)
    records = records_in(log.path(0))
    assert len(set(contents(log))) == 1 and all(records[index] == record for index, record in acknowledged.items())


@over_plans
@pytest.mark.parametrize("quorum", [2, 4])
def test_killed_during_an_append(tmp_path, plan, quorum):
    """At whatever point of it: the record is acknowledged, or QuorumLost says that it is not, and it is kept."""
    rng, record, acknowledged, kept = random.Random(quorum), bytes(1 << 18), 0, 0
    with ReplicatedLog(tmp_path, 4, plan, quorum=quorum) as log:
        for victim in (1, 2, 3, 1, 2):
            killer = threading.Timer(rng.random() * 0.003, os.kill, (log.pid(victim), signal.SIGKILL))
            killer.start()
            try:
                while victim in log.living():
                    log.append(record)
                    acknowledged += 1
            except QuorumLost as lost:
                assert quorum == 4
                kept += lost.index is not None
            killer.join()
            log.restart(victim)
            log.check_invariants()
        assert len(log) == acknowledged + kept
    assert len(set(contents(log))) == 1


@over_plans
def test_a_follower_that_hangs_is_taken_for_dead(tmp_path, plan):
    with ReplicatedLog(tmp_path, 3, plan, quorum=3, timeout=0.3) as log:
        log.append(b"all")
        stop_for_good(log, 1)
        began = time.monotonic()
        with pytest.raises(QuorumLost, match="record 1 is written and not.*replica 1 did not answer for 0.3 s") as lost:
            log.append(b"two of three")
        assert time.monotonic() - began < 3 and lost.value.index == 1
        assert log.restart(1) == Recovery(1, 0, 1)
        assert log.append(b"all again") == 2
    assert records_in(log.path(1)) == [b"all", b"two of three", b"all again"] and len(set(contents(log))) == 1


def test_a_follower_that_hangs_holds_up_the_others_for_a_while_and_not_for_ever(tmp_path):
    with ReplicatedLog(tmp_path, 3, plans.chain, quorum=1, timeout=0.3) as log:
        stop_for_good(log, 2)
        while log.living() != [0, 1]:
            log.append(bytes(1 << 20))
            assert len(log) < 200, "replica 1 keeps whatever replica 2 does not take"
        assert log.restart(2) == Recovery(0, 0, len(log))
    assert len(set(contents(log))) == 1


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("moment", ["halt", "fill", "connect", "link"])
def test_a_follower_may_die_while_a_plan_is_installed(tmp_path, monkeypatch, moment, victim):
    with ReplicatedLog(tmp_path, 3, plans.star, quorum=1) as log:
        log.append(b"all")
        log.kill(2)
        log.append(bytes(600_000))
        log.settle()
        before(monkeypatch, moment, lambda: log._group.members[victim].kill())
        with pytest.raises(ReplicaFailed, match="replica 2 .*killed by SIGKILL") if victim == 2 else nullcontext():
            log.restart(2)
        assert log.append(b"two") == 2 and log.living() == [0, 3 - victim]
        log.check_invariants()
        log.restart(victim)
    assert len(set(contents(log))) == 1


@pytest.mark.parametrize("moment", ["write", "send", "halt", "fill", "connect", "link"])
def test_an_interrupt_comes_in_time_and_spoils_nothing(tmp_path, monkeypatch, interruptible, moment):
    with ReplicatedLog(tmp_path, 3, plans.chain) as log:
        log.append(b"all")
        log.kill(2)
        for _ in range(3):
            log.append(bytes(400_000))
        before(monkeypatch, moment, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            log.restart(2)
            log.append(b"interrupted")
        log.check_invariants()
        assert log.append(b"goes on") == (5 if moment in ("write", "send") else 4)
        assert log.living() == [0, 1, 2]
    assert len(set(contents(log))) == 1


def test_an_interrupt_ends_waiting_for_a_follower_that_hangs(tmp_path, interruptible):
    with ReplicatedLog(tmp_path, 3, plans.tree, quorum=3, timeout=20) as log:
        stop_for_good(log, 2)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            log.append(b"nobody answers")
        os.kill(log.pid(2), signal.SIGCONT)
        assert log.append(b"goes on") == 1
    assert len(set(contents(log))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_followers_outlive_an_interrupt_but_not_their_leader(tmp_path, interruptible, number):
    program = f"""
        from minilib.classic.log.replicated_log import ReplicatedLog
        with ReplicatedLog({str(tmp_path)!r}, 3, quorum=3) as log:
            print(log.pid(1), log.pid(2), flush=True)
            try:
                while True:
                    log.append(bytes(4096))
            except KeyboardInterrupt:
                print(log.append(b"goes on"))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]  # no `if __name__ == "__main__"`, as in a notebook
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as leader:
        followers = [psutil.Process(int(pid)) for pid in leader.stdout.readline().split()]
        time.sleep(0.1)
        os.killpg(leader.pid, number)
        last = leader.stdout.read()
    deadline = time.monotonic() + 10
    while not all(map(gone, followers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with ReplicatedLog(tmp_path, 3) as log:
        assert len(log) == int(last) + 1 if number == signal.SIGINT else len(log) > 0
    assert len(set(contents(log))) == 1
