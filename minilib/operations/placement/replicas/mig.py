"""A GPU cut in hardware: which MIG profiles there are, where they may start, and what is lost by cutting.

    memory slices    0 1 2 3 4 5 6 7        one eighth of the memory each
    7g.80gb          ├─────────────┤        starts at 0
    4g.40gb          ├─────┤                starts at 0 alone
    3g.40gb          ├─────┤ ├─────┤        starts at 0 or 4
    2g.20gb          ├─┤ ├─┤ ├─┤            starts at 0, 2, 4
    1g.20gb          ├─┤ ├─┤ ├─┤ ├─┤        starts at 0, 2, 4, 6
    1g.10gb          ┤ ┤ ┤ ┤ ┤ ┤ ┤          starts at 0 … 6

An instance has the memory slices from its start on, and no other instance has one of them. So where an instance starts
decides what else fits: a 3g.40gb at 0 leaves no start to a 4g.40gb, at 4 it does.

Source: NVIDIA, "Multi-Instance GPU User Guide", supported MIG profiles, H100; the starts as `nvidia-smi mig -lgipp`
lists them on an H100 80GB HBM3, the multiprocessors as `nvidia-smi mig -lgip` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import whole

MEMORY_SLICES, COMPUTE_SLICES = 8, 7
MULTIPROCESSORS = 132  # of an H100 SXM that is whole


class NoSuchProfile(ValueError):
    """A part of a GPU that there is not: 1.5 GPUs, half a GPU; the message lists the profiles."""


class SliceTaken(RuntimeError):
    """A start of a profile that is none, or whose memory slices another instance has."""


@dataclass(frozen=True)
class MigProfile:
    """A size of instance.

    Args:
        name: such as 3g.40gb: compute slices, and gigabytes of an 80 GB GPU.
        compute: compute slices, of 7.
        memory: memory slices, of 8.
        starts: memory slices at which it may start.
        multiprocessors: that it has.
    """

    name: str
    compute: int
    memory: int
    starts: tuple[int, ...]
    multiprocessors: int

    def slices(self, start: int) -> frozenset[int]:
        """Memory slices that it has if it starts there."""
        return frozenset(range(start, start + self.memory))


H100_PROFILES = {
    profile.name: profile
    for profile in (
        MigProfile("7g.80gb", 7, 8, (0,), 132),
        MigProfile("4g.40gb", 4, 4, (0,), 64),
        MigProfile("3g.40gb", 3, 4, (0, 4), 60),
        MigProfile("2g.20gb", 2, 2, (0, 2, 4), 32),
        MigProfile("1g.20gb", 1, 2, (0, 2, 4, 6), 26),
        MigProfile("1g.10gb", 1, 1, (0, 1, 2, 3, 4, 5, 6), 16),
    )
}  # the largest first


def mig_profile(name: object) -> MigProfile:
    """A profile by its name.

    Raises:
        NoSuchProfile: for anything else, such as a fraction of a GPU.
    """
    if isinstance(name, str) and name in H100_PROFILES:
        return H100_PROFILES[name]
    raise NoSuchProfile(f"{name!r} is no MIG profile: a GPU is given whole, or as one of {', '.join(H100_PROFILES)}")


def smallest_profile(memory: float, multiprocessors: int = 1) -> MigProfile:
    """The profile with least memory, then fewest multiprocessors, that suffices.

    Args:
        memory: part of a whole GPU's, above 0 and at most 1.
        multiprocessors: at least so many.

    Raises:
        NoSuchProfile: for more than a GPU, 1.5 of it, or no part of it.
    """
    fits = [
        profile
        for profile in H100_PROFILES.values()
        if 0 < memory * MEMORY_SLICES <= profile.memory and 0 < multiprocessors <= profile.multiprocessors
    ]
    if not fits:
        raise NoSuchProfile(f"no MIG profile is {memory!r} GPUs with {multiprocessors!r} multiprocessors: a GPU is cut "
                            f"into {', '.join(H100_PROFILES)}, and what needs more takes whole GPUs")  # fmt: skip
    return min(fits, key=lambda profile: (profile.memory, profile.multiprocessors))


class MigGpu:
    """One GPU that is cut: which instance has which memory slices.

    Attributes:
        instances: profile and start of each, by name.
    """

    def __init__(self) -> None:
        self.instances: dict[str, tuple[MigProfile, int]] = {}

    @property
    def taken(self) -> frozenset[int]:
        """Memory slices that instances have."""
        return frozenset().union(*(profile.slices(start) for profile, start in self.instances.values()))

    def starts(self, profile: MigProfile) -> list[int]:
        """Where an instance of a profile could start now."""
        taken = self.taken
        return [start for start in profile.starts if not taken & profile.slices(start)]

    def placeable(self) -> tuple[int, ...]:
        """For each profile, the largest first, how many starts are left."""
        return tuple(len(self.starts(profile)) for profile in H100_PROFILES.values())

    def best_start(self, profile: MigProfile) -> int | None:
        """The start that takes fewest starts from large profiles; the lowest among equals; None if there is none."""
        return min(self.starts(profile), key=lambda start: (self.cost(profile, start), start), default=None)

    def cost(self, profile: MigProfile, start: int) -> tuple[int, ...]:
        """How many starts of each profile, the largest first, an instance would take away."""
        taken, slices = self.taken, profile.slices(start)
        return tuple(
            sum(not other.slices(at) & taken and bool(other.slices(at) & slices) for at in other.starts)
            for other in H100_PROFILES.values()
        )

    def stranded(self) -> list[str]:
        """Profiles that would fit by their memory, and have no start: what is free lies in the wrong places."""
        left = MEMORY_SLICES - len(self.taken)
        return [name for name, each in H100_PROFILES.items() if each.memory <= left and not self.starts(each)]

    def create(self, name: str, profile: MigProfile, start: int) -> None:
        """A new instance.

        Raises:
            SliceTaken: if it cannot start there, or there is one of this name; nothing was changed.
        """
        if name in self.instances:
            raise SliceTaken(f"there is an instance {name!r} already; give each its own name")
        if whole(start) not in self.starts(profile):
            raise SliceTaken(f"{profile.name} cannot start at {start}: it can at {self.starts(profile)} now, and at "
                             f"{list(profile.starts)} of an empty GPU")  # fmt: skip
        self.instances[name] = (profile, whole(start))

    def destroy(self, name: str) -> None:
        """An instance is gone.

        Raises:
            SliceTaken: if there is none of this name.
        """
        if name not in self.instances:
            raise SliceTaken(f"there is no instance {name!r}; there are {', '.join(self.instances) or 'none'}")
        del self.instances[name]

    def check_invariants(self) -> None:
        """No memory slice is given twice, and no more compute slices than there are."""
        given = [each for profile, start in self.instances.values() for each in profile.slices(start)]
        assert len(given) == len(set(given)) and set(given) <= set(range(MEMORY_SLICES)), "a slice was given twice"
        assert all(start in profile.starts for profile, start in self.instances.values()), "an instance starts nowhere"
        assert sum(profile.compute for profile, _ in self.instances.values()) <= COMPUTE_SLICES, "too many to compute"


def lost_by_cutting(profiles: Iterable[MigProfile]) -> tuple[int, int]:
    """Multiprocessors and memory slices of a GPU that no instance has, if it is cut into these."""
    cut = list(profiles)
    return (MULTIPROCESSORS - sum(profile.multiprocessors for profile in cut),
            MEMORY_SLICES - sum(profile.memory for profile in cut))  # fmt: skip
