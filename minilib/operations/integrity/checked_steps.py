"""Which checkpoint is still good: what was noted at each comparison of replicas, and what a checkpoint is held against.

    checked = CheckedSteps(folder / "checked.json")
    checked.note(check.compare(step), check.checksum())     at the steps that are saved, before they are
    checked.newest_good(checkpointer.steps())               once replicas differ: the one to go back to
    checked.verify(step, check.checksum())                  it was loaded: is it what the replicas agreed upon?

A bit that flips after the comparison of step a is found at the next one, of step b. Checkpoints up to a are good, and
those after it may hold the flipped bit, however many of them were saved before b. If the run keeps too few, none is
left: so compare at least as often as the oldest kept checkpoint is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from minilib.mechanisms.basics.files import written_whole
from minilib.operations.integrity.verdict import IntegrityVerdict


class NoGoodCheckpoint(LookupError):
    """No checkpoint is left that is older than the error."""


class CheckpointNotAsNoted(ValueError):
    """A checkpoint does not hold what replicas agreed upon when it was saved."""


class CheckedSteps:
    """The steps at which replicas agreed, and the checksum of what they held then.

    Args:
        path: of a file to keep it in, as the run may be killed; written by whoever has one. None to keep it here.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._checksums, self._differed = path, {}, None
        if path is not None and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._checksums = {int(step): checksum for step, checksum in kept["agreed"].items()}
            self._differed = kept["differed"]

    def note(self, verdict: IntegrityVerdict, checksum: int) -> None:
        """Keep what a comparison found.

        Args:
            verdict: of the comparison.
            checksum: of this rank, `ReplicaCheck.checksum`.
        """
        if verdict.agreed and self._differed is None:
            self._checksums[verdict.step] = checksum
        elif not verdict.agreed and self._differed is None:
            self._differed = verdict.step
        self._write()

    def newest_good(self, steps: Collection[int]) -> int:
        """The newest of these checkpoints that cannot hold an error that a comparison would have found.

        Args:
            steps: of the checkpoints that there are.

        Raises:
            NoGoodCheckpoint: if all of them are newer than the last comparison in which replicas agreed.
        """
        agreed = max(self._checksums, default=-1)
        good = [step for step in steps if step <= agreed]
        if not good:
            raise NoGoodCheckpoint(
                f"replicas agreed last at step {agreed if agreed >= 0 else 'none'}, and the checkpoints are of steps "
                f"{sorted(steps)}: keep more of them (keep, keep_every), or compare more often"
            )
        return max(good)

    def verify(self, step: int, checksum: int) -> bool:
        """Hold what was loaded against what was noted.

        Args:
            step: of the checkpoint that was loaded.
            checksum: of it, on the same mesh.

        Returns:
            Whether anything was noted at that step, and so whether this says anything.

        Raises:
            CheckpointNotAsNoted: if it was something else.
        """
        if step not in self._checksums:
            return False
        if checksum != self._checksums[step]:
            raise CheckpointNotAsNoted(
                f"the checkpoint of step {step} is not what replicas agreed upon then: it was damaged between the "
                "comparison and the disk, or after it; load an older one"
            )
        return True

    def went_back(self, step: int) -> None:
        """The run goes on from this step: nothing later was noted about it."""
        self._checksums = {each: checksum for each, checksum in self._checksums.items() if each <= step}
        self._differed = None
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        with written_whole(self._path) as partial:
            partial.write_text(json.dumps({"agreed": self._checksums, "differed": self._differed}), encoding="utf-8")
