"""Every state that a power cut may leave of a small run is recovered whole, and not if a rule is left out."""

from functools import partial

import pytest

from minilib.classic.write_ahead_log.crashes.power_cuts import (
    COMMIT,
    LOST,
    REFUSED,
    SNAP,
    TORN,
    WHOLE,
    crash_everywhere,
    held_against,
    outcome_of,
    record_run,
)
from minilib.classic.write_ahead_log.crashes.rules import KEPT, RULES, SMALL_RUN, without_each_rule
from minilib.classic.write_ahead_log.crashes.sqlite_power_cuts import record_sqlite, sqlite_outcome
from minilib.classic.write_ahead_log.disks.faulty_disk import FaultyDisk
from tests.classic.write_ahead_log.cases import continued, some_changes


@pytest.mark.parametrize("page_size", [32, 64, 128, 4096])
def test_no_power_cut_breaks_a_small_run(page_size):
    for keep in (1, 2):
        run = record_run(SMALL_RUN, partial(FaultyDisk, page_size=page_size), keep=keep)
        tally = crash_everywhere(run)
        assert tally.exhaustive and tally.broken == 0 and tally.points == len(run.steps) + 1 > 40
        assert tally.states > 2 * tally.points
        assert run.acknowledged_after(0) == 0 and run.acknowledged_after(len(run.steps)) == 7


def test_no_power_cut_breaks_runs_by_chance():
    states = 0
    for seed in range(20):
        tally = crash_everywhere(record_run(some_changes(seed), keep=1 + seed % 2), limit=200, seed=seed)
        assert tally.broken == 0, seed
        states += tally.states
    assert states > 4000


def test_recovery_may_be_broken_off_as_well():
    """From each state that a cut has left, recovery and some more work are cut again after every step."""
    run, states, more = record_run(SMALL_RUN), 0, [(b"e", b"late " * 9), COMMIT, SNAP]
    for num_steps in range(0, len(run.steps) + 1, 2):
        for files in run.disk_after(num_steps).power_cut(limit=6).states[:6]:
            again = record_run(more, partial(FaultyDisk, files))
            assert again.acknowledged[0][1] >= run.acknowledged_after(num_steps)
            tally = crash_everywhere(again, limit=40)
            assert tally.broken == 0
            states += tally.states
    assert states > 3000


def test_a_process_may_die_at_any_step_and_the_power_go_later():
    """What the dead process wrote is in memory alone; the next one reads it, goes on, and only then the power goes."""
    run, more = record_run(SMALL_RUN), [(b"e", b"late"), COMMIT, SNAP]
    for num_steps in range(len(run.steps) + 1):
        again = record_run(more, partial(run.disk_after, num_steps))
        records, values = again.acknowledged[0][1], again.history[again.acknowledged[0][1]]
        assert records >= run.acknowledged_after(num_steps) and values == run.history[records]
        assert crash_everywhere(continued(run, num_steps, again), limit=200).broken == 0, num_steps


@pytest.fixture(scope="module")
def table():
    return without_each_rule(limit=400)


def test_each_rule_is_needed(table):
    assert list(table) == [rule.name for rule in RULES]
    kept = table[KEPT]
    assert kept.broken == 0 and kept.exhaustive and kept.states == 225 and kept.points == 49
    for name in (
        "no checksum of records",
        "acknowledged without fsync of the log",
        "renamed without fsync of the file",
        "no fsync of the folder",
        "manifest first, parts not checked",
        "one fsync fails, and is tried again",
    ):
        assert table[name].broken > 0, name
    assert table["one fsync fails, every rule kept"].broken == 0


def test_without_a_rule_the_failure_is_the_one_to_expect(table):
    assert table["no checksum of records"].outcomes[TORN] > 0
    assert table["no checksum of records"].outcomes[LOST] == 0, "all of it was synced"
    assert table["acknowledged without fsync of the log"].outcomes[LOST] > 0
    assert table["renamed without fsync of the file"].outcomes[REFUSED] > 0
    assert table["no fsync of the folder"].outcomes[LOST] > 0
    assert table["one fsync fails, and is tried again"].outcomes[LOST] > 0


def test_order_and_digests_back_each_other_up(table):
    """A manifest that comes first does harm only to a reader who does not check the parts, and the other way round."""
    assert table["manifest first"].broken == table["parts not checked"].broken == 0
    both = table["manifest first, parts not checked"]
    assert both.outcomes[TORN] == both.broken > 0


def test_outcomes_are_told_apart():
    history = {1: {b"a": b"1"}, 2: {b"a": b"2"}}
    assert held_against(2, {b"a": b"2"}, 2, history) == WHOLE == held_against(2, {b"a": b"2"}, 1, history)
    assert held_against(1, {b"a": b"1"}, 2, history) == LOST == held_against(0, {}, 1, history)
    assert held_against(1, {b"a": b"2"}, 2, history) == TORN == held_against(3, {}, 2, history)
    assert outcome_of({}, 0, {0: {}}) == WHOLE and outcome_of({}, 1, history) == LOST
    assert outcome_of({"log-000000000000": b"torn"}, 0, {0: {}}) == REFUSED


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
def test_sqlite_keeps_on_the_simulated_disk_what_its_documentation_promises(synchronous):
    """The oracle for the disk: a program that others wrote, whose losses are documented."""
    full = synchronous == "FULL"
    tally = crash_everywhere(record_sqlite(SMALL_RUN, synchronous), sqlite_outcome, limit=300 if full else 40)
    assert tally.outcomes[TORN] == tally.outcomes[REFUSED] == 0 and tally.states > 200
    assert (tally.outcomes[LOST] == 0) == full and (tally.exhaustive or not full)
