"""What a simulated job does: where it saves, how it recovers, and what of it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.goodput.failures import LOSSES, FailureCause, Fleet, LemonHosts


@dataclass(frozen=True)
class CheckpointLevel:
    """Checkpoints in one place.

    Args:
        name: of the place.
        every: seconds of running between two saves; rounded to whole steps, one at least.
        stall: seconds that steps wait for a save.
        write: seconds from then until it is durable; the next save of this level waits for it.
        load: seconds to load one.
        survives: the losses after which it can be loaded; see LOSSES.

    Raises:
        ValueError: if a time is no time, or `survives` has something else.
    """

    name: str
    every: float
    stall: float
    write: float = 0.0
    load: float = 0.0
    survives: tuple[str, ...] = LOSSES

    def __post_init__(self) -> None:
        check_quantity("every", self.every, above_zero=True)
        for name in ("stall", "write", "load"):
            check_quantity(name, getattr(self, name))
        if not set(self.survives) <= set(LOSSES):
            raise ValueError(f"survives has some of {', '.join(LOSSES)}; got {self.survives!r}")


def memory_level(
    every: float, stall: float, write: float = 0.0, load: float = 0.0, copies: int = 2, apart: str = "host"
) -> CheckpointLevel:
    """Checkpoints in the memory of hosts, as `NeighbourMemory` keeps them.

    Args:
        every, stall, write, load: see `CheckpointLevel`.
        copies: of each part; 1 is lost with its host.
        apart: "host" or "rack": no two copies of a part are on the same one.
    """
    check_whole("copies", copies, 1)
    if apart not in ("host", "rack"):
        raise ValueError(f"copies are apart by host or by rack; got {apart!r}")
    survives = LOSSES[:1] if copies == 1 else LOSSES[:2] if apart == "host" else LOSSES
    return CheckpointLevel("memory", every, stall, write, load, survives)


@dataclass(frozen=True)
class RecoveryPlan:
    """How a job goes on after a failure; times in seconds.

    Args:
        detection: until the failure is known, such as a watchdog's timeout.
        restart: until processes run and communicate again; loading comes on top.
        replace: more for a host to be replaced by a spare.
        spares: hosts that wait for that; None for always enough.
        repair: until a lost host is a spare again.
        replicas: 1 to restart the whole job; with more, the others go on when one of them fails.
        stall: that the other replicas wait; the step in which the failure came is taken again.
        rejoin: from then until the replica is back.

    Raises:
        ValueError: if an argument is out of range.
    """

    detection: float = 0.0
    restart: float = 0.0
    replace: float = 0.0
    spares: int | None = None
    repair: float = 0.0
    replicas: int = 1
    stall: float = 0.0
    rejoin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("detection", "restart", "replace", "repair", "stall", "rejoin"):
            check_quantity(name, getattr(self, name))
        check_whole("replicas", self.replicas, 1)
        if self.spares is not None:
            check_whole("spares", self.spares)


@dataclass(frozen=True)
class JobPlan:
    """A job to simulate.

    Args:
        step_seconds: of a step with all replicas.
        levels: where it saves; a failure that none of them survives sends it back to its beginning.
        recovery: how it goes on.
        fleet: what it runs on.
        causes: what fails.
        lemons: hosts that fail more often.

    Raises:
        ValueError: if the times are no times, or the fleet has less than a host a replica.
    """

    step_seconds: float
    levels: Sequence[CheckpointLevel]
    recovery: RecoveryPlan
    fleet: Fleet
    causes: Sequence[FailureCause]
    lemons: LemonHosts = field(default_factory=LemonHosts)

    def __post_init__(self) -> None:
        check_quantity("step_seconds", self.step_seconds, above_zero=True)
        if self.recovery.replicas > self.fleet.hosts:
            raise ValueError(f"{self.recovery.replicas} replicas on {self.fleet.hosts} hosts: a replica has a host "
                             "at least")  # fmt: skip

    def seconds_between_saves(self, level: CheckpointLevel) -> float:
        """A level's `every`, in whole steps."""
        return max(1, math.floor(level.every / self.step_seconds + 0.5)) * self.step_seconds
