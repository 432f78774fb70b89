"""Whose checksum is the wrong one: the majority's is right, and without a majority nobody can say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class IntegrityVerdict:
    """What a comparison found; the same on all ranks that took part.

    Args:
        step: of the run.
        suspects: ranks whose bytes may be wrong; none if all agree.
        named: whether a majority of replicas says that it is these; otherwise it is one or more of them.
        tensors: that differ, where the comparison looked for them.
    """

    step: int
    suspects: tuple[int, ...] = ()
    named: bool = False
    tensors: tuple[str, ...] = ()

    @property
    def agreed(self) -> bool:
        return not self.suspects

    def __str__(self) -> str:
        if self.agreed:
            return f"step {self.step}: replicas agree"
        ranks = ", ".join(map(str, self.suspects))
        who = f"rank {ranks} differs from the others" if self.named else f"one of the ranks {ranks} is wrong"
        return f"step {self.step}: {who}" + (f", in {', '.join(self.tensors)}" if self.tensors else "")


def suspects_of(checksums: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """Ranks that hold another checksum than more than half do, and True; without such a majority all, and False.

    Args:
        checksums: of what these ranks hold alike.
        ranks: that hold it.
    """
    (common, count), *others = Counter(checksums).most_common()
    if not others:
        return (), False
    if 2 * count > len(checksums):
        return tuple(rank for rank, each in zip(ranks, checksums, strict=True) if each != common), True
    return tuple(ranks), False
