"""Saves behind the steps: the run stands still while its state is copied, and one thread does the rest.

    run       step │ copy │ step │ step │ step │ …
    thread                │ write, or send, and commit ── │        wait() returns, or raises why

Whatever keeps the copies, a disk or the memory of hosts, saves in this way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from minilib.operations.checkpoint.format.folder import json_error
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch
from minilib.operations.checkpoint.format.writing import snapshot
from minilib.operations.checkpoint.plan import Planner, SavePlan
from minilib.operations.checkpoint.states.cuts import prepared_to_save
from minilib.operations.checkpoint.together import fail_together, tried
from minilib.ranks.collectives import Communicator

NICENESS = 10  # of the thread, beyond that of the steps: they come first
BUSY = ("wait", "refuse")


class AlreadySaved(ValueError):
    """There is a checkpoint of this step; its parts are not written over."""


class SaveInProgress(RuntimeError):
    """The save before still goes on."""


class SaveFailed(RuntimeError):
    """A save is not known to be kept on all ranks; earlier checkpoints are as they were. The message says why."""


class BackgroundSaves:
    """The saves of one rank, one at a time.

    Args:
        comm: between all ranks, for these saves alone; None on one process.
        busy: "wait" for a save that goes on when the next one begins, or "refuse" the next.

    Attributes:
        staged_bytes: memory of the host that this rank holds for copies, at most its own part.

    Raises:
        ValueError: for another choice.
    """

    def __init__(self, comm: Communicator | None, busy: str = "wait") -> None:
        if busy not in BUSY:
            raise ValueError(f"busy is one of {BUSY}; got {busy!r}")
        self._comm, self._busy, self._planner = comm, busy, Planner(comm)
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_step_back)
        self._running: Future[None] | None = None

    @property
    def staged_bytes(self) -> int:
        return self._staging.numel()

    def begin(
        self, state: Mapping[str, object], step: int, check: Callable[[], None]
    ) -> tuple[SavePlan, list[Fragment], dict]:
        """Who saves what of a state, this rank's fragments, and the values. A collective.

        Args:
            state: as `Checkpointer.save` takes it.
            step: 0 or more.
            check: raises if there may be no save of this step.

        Raises:
            SaveFailed: if the save before failed.
            SaveInProgress: if it goes on, with busy="refuse".
            ValueError: if the step is no number of a step.
            StateMismatch: if ranks do not hold one whole state, or some of it cannot be saved.
            OtherRankFailed: if another rank raises one of these.
        """
        self.settle(self._busy == "refuse")
        prepared, error = tried(lambda: _prepared(state, step, check))
        fail_together(error, self._comm)
        fragments, held, values = prepared
        return self._planner.plan(held), fragments, values

    def staged(self, plan: SavePlan, fragments: Sequence[Fragment]) -> Tensor:
        """A copy of this rank's part, (size,) uint8; valid until the next save."""
        contents = plan.parts[0 if self._comm is None else self._comm.rank]
        views = contents.views(fragments)
        if self._staging.numel() != contents.size:
            self._staging = torch.empty(0, dtype=torch.uint8)  # never two at a time
            pinned = any(view.is_cuda for view in views)
            self._staging = torch.zeros(contents.size, dtype=torch.uint8, pin_memory=pinned)
        snapshot(contents, views, self._staging)
        return self._staging

    def run(self, step: int, job: Callable[[], None], wait: bool) -> None:
        """Do what is left of a save, here or behind the steps.

        Raises:
            SaveFailed: with wait, if the job raises anything.
        """
        if wait:
            _told(step, job)
        else:
            self._running = self._thread.submit(_told, step, job)

    def settle(self, refuse: bool = False) -> None:
        """Wait for the save that goes on, if there is one, and say once if it failed.

        Raises:
            SaveFailed: if it did.
            SaveInProgress: instead of waiting, with refuse.
        """
        running = self._running
        if running is None:
            return
        if refuse and not running.done():
            raise SaveInProgress("the save before is still being written; wait(), or save less often")
        try:
            running.result()
        finally:
            if running.done():  # else the user has interrupted the wait, and the thread still reads the copy
                self._running = None

    def close(self) -> None:
        """Settle, and end the thread."""
        try:
            self.settle()
        finally:
            self._thread.shutdown()


def _prepared(state: Mapping[str, object], step: int, check: Callable[[], None]) -> tuple:
    if type(step) is not int or step < 0:
        raise ValueError(f"step is a whole number, 0 or more; got {step!r}")
    check()
    prepared = prepared_to_save(state)
    if problem := json_error(prepared[2]):
        raise StateMismatch(problem)
    return prepared


def _told(step: int, job: Callable[[], None]) -> None:
    try:
        job()
    except SaveFailed:
        raise
    except Exception as error:
        raise SaveFailed(f"the save of step {step} failed: {type(error).__name__}: {error}") from error


def _step_back() -> None:
    """Let this thread run when others leave processor time."""
    with suppress(OSError, AttributeError):  # Linux takes a thread for what it knows as a process
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + NICENESS)
