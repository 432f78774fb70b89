"""Replicas that compare what they hold, every few steps: a bit that flipped on one rank is found, and the rank named.

    check = ReplicaCheck({"run": trainer}, comm)
    verdict = check.compare(trainer.step)        8 bytes a rank, and one pass over the state
    verdict.suspects, verdict.tensors            which rank, and which tensor

What several ranks hold is compared among them. What one rank alone holds cannot be: with ZeRO a slice of the optimizer,
with tensor parallelism alone a part of a matrix, and each rank's generators of random numbers. `covered_bytes` and
`uncovered` say how much and what.

With three or more replicas the majority names the rank; with two it is one of both. An error that reaches all ranks
alike, such as a wrong gradient that is averaged into all of them, is not seen here: see recompute.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.table import Fragment
from minilib.operations.checkpoint.states.cuts import saveables
from minilib.operations.checkpoint.together import told_by_all
from minilib.operations.integrity.checksums import combined_checksum, content_checksum, told_checksums
from minilib.operations.integrity.verdict import IntegrityVerdict, suspects_of
from minilib.ranks.collectives import Communicator


class ReplicaCheck:
    """Compares the replicated parts of a run's state between ranks.

    Args:
        state: by names, as `Checkpointer.save` takes it.
        comm: between all ranks.
        ignore: patterns of names of tensors that may differ between replicas, such as "*.running_mean" of a batch
            normalization that each replica makes of its own batches.

    Attributes:
        checked_bytes: of this rank's state that went through a checksum so far.
    """

    def __init__(self, state: Mapping[str, object], comm: Communicator, ignore: Sequence[str] = ()) -> None:
        self._states, self._comm, self._ignore, self.checked_bytes = saveables(state), comm, tuple(ignore), 0
        self._names: list[str] | None = None
        self._holders: dict[tuple[int, ...], list[str]] = {}

    def compare(self, step: int) -> IntegrityVerdict:
        """Whether all ranks hold the same bytes wherever they hold the same part. A collective.

        Args:
            step: of the run, for the verdict.

        Cost: a pass over the replicated bytes; 8 bytes a rank sent around for each set of ranks that share parts, so
            8 with data parallelism. Once more, if ranks differ, for each of their parts.
        """
        checksums = self._checksums()
        groups = {holders: {name: checksums.get(name, 0) for name in names} for holders, names in self._shared()}
        told = told_checksums([combined_checksum(parts) for parts in groups.values()], self._comm)
        suspects, named, tensors = set(), True, set()
        for number, (holders, parts) in enumerate(groups.items()):
            found, sure = suspects_of([told[rank][number] for rank in holders], holders)
            if found:
                suspects |= set(found)
                named = named and sure
                tensors |= self._differing(holders, list(parts), list(parts.values()))
        return IntegrityVerdict(step, tuple(sorted(suspects)), bool(suspects) and named, tuple(sorted(tensors)))

    def checksum(self) -> int:
        """64 bits of what this rank holds together with others; to note while replicas agree. A collective.

        Cost: a pass over those bytes.
        """
        checksums = self._checksums()
        return combined_checksum({name: checksums[name] for _, names in self._shared() for name in names
                                  if name in checksums})  # fmt: skip

    def parts(self) -> dict[str, Fragment]:
        """This rank's parts of the state, by the names that verdicts have."""
        every = (fragment for state in self._states.values() for fragment in state.fragments())
        compared = (each for each in every if not any(fnmatch(each.name, pattern) for pattern in self._ignore))
        return {_part_name(fragment): fragment for fragment in compared}

    @property
    def uncovered(self) -> list[str]:
        """Tensors of this rank, or parts of them, that no other rank holds; known after the first comparison."""
        covered = {name for names in self._holders.values() for name in names}
        return sorted(set(self._names or ()) - covered)

    @property
    def covered_bytes(self) -> int:
        """Of this rank's state; known after the first comparison."""
        covered = {name for holders, names in self._holders.items() if self._comm.rank in holders for name in names}
        return sum(fragment.data.nbytes for name, fragment in self.parts().items() if name in covered)

    def _checksums(self) -> dict[str, int]:
        """Of each part that this rank holds together with others."""
        fragments = self.parts()
        names = sorted(fragments)
        anew = self._names != names
        told = told_checksums([int(anew)], self._comm)
        if any(flags[0] for flags in told):  # such as after the first step, when the optimizer has moments
            self._names = names
            self._find_holders([json.loads(text) for text in told_by_all(json.dumps(names), self._comm)])
        mine = {name for holders, parts in self._shared() if self._comm.rank in holders for name in parts}
        self.checked_bytes += sum(fragments[name].data.nbytes for name in mine)
        return {name: content_checksum(fragments[name].data) for name in sorted(mine)}

    def _find_holders(self, held: Sequence[Sequence[str]]) -> None:
        holders: dict[str, list[int]] = {}
        for rank, names in enumerate(held):
            for name in names:
                holders.setdefault(name, []).append(rank)
        self._holders = {}
        for name, ranks in holders.items():
            if len(ranks) > 1:
                self._holders.setdefault(tuple(ranks), []).append(name)

    def _shared(self) -> list[tuple[tuple[int, ...], list[str]]]:
        """Sets of ranks, and the parts that exactly these ranks hold; in the same order on all ranks."""
        return [(holders, sorted(self._holders[holders])) for holders in sorted(self._holders)]

    def _differing(self, holders: tuple[int, ...], names: Sequence[str], mine: Sequence[int]) -> set[str]:
        """Which of the parts that these ranks hold differ among them. A collective."""
        told = told_checksums(mine, self._comm)
        return {name for number, name in enumerate(names) if len({told[rank][number] for rank in holders}) > 1}


def _part_name(fragment: Fragment) -> str:
    """A tensor's name, and which part of it where it is not all."""
    whole = fragment.box == Box.whole(fragment.shape)
    extents = zip(fragment.box.start, fragment.box.shape, strict=True)
    return fragment.name if whole else f"{fragment.name}[{', '.join(f'{at}:{at + size}' for at, size in extents)}]"
