"""Processes killed with SIGKILL at points by chance: nothing that they told of is lost, and nothing torn is read."""

import subprocess
import sys

import pytest

from minilib.classic.write_ahead_log.crashes.kills import kill_rounds
from minilib.classic.write_ahead_log.crashes.victim import KINDS, nth_change, open_victim
from minilib.mechanisms.basics.child import child_environment

KILLS = 50


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_acknowledged_is_lost_and_nothing_torn_is_read(kind, tmp_path):
    tally = kill_rounds(kind, tmp_path, KILLS, seed=11)
    assert (tally.kills, tally.lost, tally.torn) == (KILLS, 0, 0)
    assert tally.recovered >= tally.acknowledged > KILLS
    assert tally.unasked <= KILLS


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_finds_a_loss(kind, tmp_path, monkeypatch):
    """A store that forgets its last records, and one that holds a wrong value, are found out."""

    def tampered(kind, folder):
        store = open_victim(kind, folder)
        store.put(b"key 0", b"wrong")
        store.commit()
        return store

    monkeypatch.setattr("minilib.classic.write_ahead_log.crashes.kills.open_victim", tampered)
    assert kill_rounds(kind, tmp_path, 1).torn == 1
    monkeypatch.undo()
    monkeypatch.setattr("minilib.classic.write_ahead_log.crashes.kills._killed", lambda *_: 10**6)
    assert kill_rounds(kind, tmp_path, 1).lost == 1


def test_a_victim_that_does_not_start_is_named(tmp_path):
    with pytest.raises(ValueError, match="kind is one of journal, sqlite full, sqlite normal; got 'other'"):
        open_victim("other", tmp_path)
    with pytest.raises(RuntimeError, match="ended by itself: [^$]*NotADirectoryError"):
        kill_rounds("journal", tmp_path / "nowhere", 1)


def test_what_is_written_follows_from_seed_and_number():
    changes = [nth_change(1, number) for number in range(200)]
    assert changes == [nth_change(1, number) for number in range(200)] != [nth_change(2, n) for n in range(200)]
    assert 10 < sum(value is None for _, value in changes) < 60


def test_a_victim_loads_no_torch():
    code = "import sys, minilib.classic.write_ahead_log.crashes.kills; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=child_environment()).returncode == 0
