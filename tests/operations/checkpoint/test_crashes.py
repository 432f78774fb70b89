"""Saves broken off anywhere: no acknowledged checkpoint is lost, and no torn one is read."""

import pytest

from minilib.classic.write_ahead_log.crashes.power_cuts import LOST, OUTCOMES, REFUSED, TORN, WHOLE, WatchedDisk
from minilib.mechanisms.journaling import SyncFile, SyncFolder
from minilib.operations.checkpoint.crashes import kills, power_cuts
from minilib.operations.checkpoint.crashes.kills import KillPoint, kill_saves, run_until_killed, values_of


@pytest.mark.parametrize(
    "world_size, wait, num_kills", [(1, False, 100), (1, True, 100), (2, False, 60), (3, True, 40)]
)
def test_killed_at_any_point_of_a_save(tmp_path, world_size, wait, num_kills):
    tally = kill_saves(tmp_path, num_kills, world_size, wait, seed=5)
    assert (tally.kills, tally.lost, tally.torn) == (num_kills, 0, 0)
    assert tally.acknowledged >= num_kills // 2


def test_the_check_finds_what_is_lost_or_torn(tmp_path, monkeypatch):
    run_until_killed(tmp_path / "checkpoints", KillPoint(0, 40), 1, True)
    assert kills._found(tmp_path / "checkpoints")[1]
    monkeypatch.setattr(kills, "values_of", lambda step: values_of(step + 1))
    assert not kills._found(tmp_path / "checkpoints")[1]
    monkeypatch.undo()
    (tmp_path / kills.ACKNOWLEDGED).write_text("1\n99\n")
    monkeypatch.setattr(kills, "run_until_killed", lambda *_: None)
    assert kill_saves(tmp_path, 1).lost == 1


@pytest.mark.parametrize("world_size, keep", [(1, 1), (2, 1), (2, 2)])
def test_all_states_that_a_power_cut_may_leave_are_whole(world_size, keep):
    tally = power_cuts.cut_saves(world_size=world_size, keep=keep)
    assert tally.exhaustive and tally.broken == 0
    assert tally.points > 40 and tally.states > 200
    assert set(tally.outcomes) == set(OUTCOMES)


class Without(WatchedDisk):
    """A disk that is not asked for some of its steps."""

    def __init__(self, disk, skipped):
        super().__init__(disk)
        self._skipped = skipped

    def run(self, steps):
        super().run(step for step in steps if not self._skipped(step))


@pytest.mark.parametrize(
    "skipped, outcome",
    [
        (lambda step: isinstance(step, SyncFile) and step.name.startswith("part"), REFUSED),
        (lambda step: isinstance(step, SyncFile) and step.name.startswith("manifest"), REFUSED),
        (lambda step: isinstance(step, SyncFolder), LOST),
    ],
)
def test_each_rule_of_the_protocol_is_needed(skipped, outcome):
    tally = power_cuts.cut_saves((1, 2), altered=lambda disk: Without(disk, skipped))
    assert tally.outcomes[outcome] > 0 and tally.outcomes[WHOLE] > 0
    assert tally.outcomes[TORN] == 0, "checksums find what the order does not prevent"
