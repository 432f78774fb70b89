"""Checkpoints of a run on any ranks: each writes its part, one publishes the manifest, and any other ranks load it.

    checkpointer = Checkpointer(folder, comm, keep=2)
    checkpointer.save({"run": trainer, "rng": RngState(rank, world_size)}, step)     returns once the state is copied
    …steps…                                                                          the copy is written behind them
    checkpointer.wait()                                                              it is durable, or this raises why
    checkpointer.load({"run": trainer, …})                                           also on other ranks, in other cuts

A save has four phases:

    1. copy      every rank copies its share of the state into memory of the host; after that steps may change it
    2. write     every rank writes its part and waits until its bytes are durable
    3. commit    once all have, rank 0 publishes the manifest: only now is there a checkpoint of this step
    4. retire    rank 0 removes checkpoints that are not kept, each one's manifest first

Phases 2 to 4 run on a thread, and checksums on a second one; both take processor time when others leave some, and call
into the interpreter a few times for each megabyte. With wait=True there is no copy: blocks are written from where the
state lies.

In production: torch.distributed.checkpoint (async_save), Megatron-LM's dist_checkpointing, ByteCheckpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from minilib.classic.write_ahead_log.disks.real_disk import RealDisk
from minilib.mechanisms.journaling import SyncFolder
from minilib.operations.checkpoint.background import AlreadySaved, BackgroundSaves
from minilib.operations.checkpoint.commit import OpenDisk, SaveJob
from minilib.operations.checkpoint.format.folder import (
    CheckpointFolder,
    committed_steps,
    leftover_steps,
    read_committed,
    retire_steps,
    steps_to_keep,
)
from minilib.operations.checkpoint.format.writing import BLOCK, cut_blocks, staged_blocks
from minilib.operations.checkpoint.loading import Loaded, load_state
from minilib.operations.checkpoint.states.cuts import saveables
from minilib.operations.checkpoint.together import decided_by_first, fail_together, tried
from minilib.ranks.collectives import Communicator


class Checkpointer:
    """Saves and loads the state of a run. On several ranks all methods but `latest` and `steps` are collectives.

    Args:
        folder: of the checkpoints; made if there is none. All ranks see the same one, and no other run uses it.
        comm: between all ranks, for checkpoints alone: a save behind the steps uses it. None on one process.
        keep: newest checkpoints to keep, 1 or more.
        keep_every: keep those whose step is a multiple of this for good; 0 for none.
        busy: "wait" for a save that is being written when the next one begins, or "refuse" the next.
        block_bytes: of the blocks that have a checksum each.
        open_disk: opens the folder, for whoever wants another disk in its place.

    Attributes:
        staged_bytes: memory of the host that this rank holds for copies, at most its own part.

    Raises:
        DiskInUse: if another run has the folder; ranks other than 0 raise OtherRankFailed.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        folder: Path | str,
        comm: Communicator | None = None,
        *,
        keep: int = 2,
        keep_every: int = 0,
        busy: str = "wait",
        block_bytes: int = BLOCK,
        open_disk: OpenDisk | None = None,
    ) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes is 1 or more; got {block_bytes!r}")
        self._saves = BackgroundSaves(comm, busy)
        self._kept: Callable[[Collection[int]], list[int]] = partial(steps_to_keep, keep=keep, every=keep_every)
        self._kept([])
        self._folder, self._comm, self._block_bytes = Path(folder), comm, block_bytes
        self._open_disk: OpenDisk = open_disk or partial(CheckpointFolder, self._folder)
        self._lock: RealDisk | None = None
        _, error = tried(self._begin) if self._rank == 0 else (None, None)
        fail_together(error, comm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def staged_bytes(self) -> int:
        return self._saves.staged_bytes

    def save(self, state: Mapping[str, object], step: int, wait: bool = False) -> None:
        """Save the state of a run as it is now.

        Args:
            state: by names of the caller: a Trainer, a model, what has fragments (see `Saveable`), or what has
                state_dict and load_state_dict with values that JSON can say, such as a sampler.
            step: 0 or more, of no checkpoint that is there.
            wait: return once it is durable; otherwise once it is copied.

        Raises:
            SaveFailed: if the save before failed, or with wait this one.
            SaveInProgress: if that one is being written, with busy="refuse".
            AlreadySaved: if there is a checkpoint of this step.
            StateMismatch: if ranks do not hold one whole state, or some of it cannot be saved.
            OtherRankFailed: if another rank raises one of these.

        Cost: without wait a copy of this rank's share, and two small collectives. Each byte of the state is written
            once, whatever number of ranks hold it; an fsync a rank, and three of rank 0.
        """
        plan, fragments, values = self._saves.begin(state, step, lambda: self._refuse_saved(step))
        if wait:
            contents = plan.parts[self._rank]
            views = contents.views(fragments)
            blocks = partial(staged_blocks, contents, views, self._block_bytes)
        else:
            blocks = partial(cut_blocks, memoryview(self._saves.staged(plan, fragments).numpy()), self._block_bytes)
        job = SaveJob(step, plan, blocks, values, self._block_bytes, self._open_disk, self._comm, self._kept)
        self._saves.run(step, job.run, wait)

    def wait(self) -> int | None:
        """Return when nothing is being written: the step of the newest checkpoint; None if there is none.

        Raises:
            SaveFailed: if the save that was being written failed.
        """
        self._saves.settle()
        return self.latest()

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none. A save that is being written does not count."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        with self._open_disk() as disk:
            return committed_steps(disk)

    def load(self, state: Mapping[str, object], step: int | None = None, ignore: Sequence[str] = ()) -> Loaded:
        """Load a checkpoint into a state that is there, whatever ranks saved it and however they had cut it.

        Args:
            state: as it was saved, in the cut of these ranks.
            step: which; the newest if left out.
            ignore: patterns of names of tensors and of states to leave as they are, such as "optimizer.*" or "rng*".

        Raises:
            NoCheckpoint: if there is none, or none of this step.
            ManifestDamaged, PartDamaged, UnknownFormat: if its files are not what was written. `load` an older one.
            StateMismatch, ValueError, OtherRankFailed: see `load_state`.
            SaveFailed: as `wait`.

        Cost: the blocks with the bytes that this rank's fragments need; memory of a few windows (see format/blocks.py).
        """
        self._saves.settle()
        chosen = decided_by_first(lambda: self._chosen(step), self._comm)
        with self._open_disk() as disk:
            found, error = tried(lambda: (saveables(state), read_committed(disk, chosen)))
            fail_together(error, self._comm)
            return load_state(*found, disk, self._comm, ignore)

    def discard(self, step: int) -> None:
        """Remove a checkpoint, such as one of steps that a run that went back will take again.

        Raises:
            NoCheckpoint: if there is none of this step.
            SaveFailed: as `wait`.
        """
        self._saves.settle()
        decided_by_first(lambda: self._discard(step), self._comm)

    def close(self) -> None:
        """Wait for what is being written, and give the folder back.

        Raises:
            SaveFailed: as `wait`.
        """
        try:
            self._saves.close()
        finally:
            if self._lock is not None:
                self._lock.close()

    @property
    def _rank(self) -> int:
        return 0 if self._comm is None else self._comm.rank

    def _begin(self) -> None:
        """Rank 0: make the folder, keep other runs out, and remove what no manifest holds."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with RealDisk(self._folder.absolute().parent, locked=False) as parent:
            parent.run([SyncFolder()])
        self._lock = RealDisk(self._folder)
        try:
            with self._open_disk() as disk:
                disk.run([*leftover_steps(disk.names()), SyncFolder()])
        except BaseException:
            self._lock.close()
            raise

    def _refuse_saved(self, step: int) -> None:
        if self._rank == 0 and step in self.steps():
            raise AlreadySaved(f"there is a checkpoint of step {step}; discard({step}) first if the run went back")

    def _chosen(self, step: int | None) -> int:
        """Rank 0: the step to load, whose manifest's name is durable from now on."""
        with self._open_disk() as disk:
            disk.run([SyncFolder()])
            return read_committed(disk, step).step

    def _discard(self, step: int) -> None:
        with self._open_disk() as disk:
            if step not in committed_steps(disk):
                read_committed(disk, step)  # raises, and says what there is
            disk.run(retire_steps(disk, step))
