"""Runs of the store, for tests of what becomes of them."""

import random
from dataclasses import replace

from minilib.classic.write_ahead_log.crashes.power_cuts import COMMIT, SNAP


def some_changes(seed, count=14):
    """A run by chance: groups of several records, snapshots among them."""
    rng, changes = random.Random(seed), []
    for _ in range(count):
        value = None if rng.random() < 0.2 else bytes([rng.randrange(1, 256)]) * rng.choice((0, 1, 9, 40, 70))
        changes.append((b"k%d" % rng.randrange(4), value))
        if rng.random() < 0.4:
            changes.append(SNAP if rng.random() < 0.3 else COMMIT)
    return [*changes, COMMIT]


def continued(run, num_steps, again):
    """Until the second process has settled what it found, the promises of the first one hold, and no more."""
    records = again.acknowledged[0][1]
    before = {number: values for number, values in run.history.items() if number <= records}
    acknowledged = ((0, run.acknowledged_after(num_steps)), *again.acknowledged)
    return replace(again, history={**before, **again.history}, acknowledged=acknowledged)
