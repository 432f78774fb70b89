"""Train from wherever the newest checkpoint stands: the function to run under `run_elastic` and torchrun alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minilib.mechanisms.basics.checks import check_whole
from minilib.operations.checkpoint import Checkpointer
from minilib.operations.checkpoint.together import decided_by_first
from minilib.operations.elastic.progress import report_step
from minilib.ranks.collectives import Communicator
from minilib.training.trainer import Trainer


def resume_and_train(
    trainer: Trainer,
    folder: Path | str,
    every: int,
    comm: Communicator | None = None,
    after_step: Callable[[Trainer], None] = lambda trainer: None,
    bar: bool = True,
) -> None:
    """Load the newest checkpoint if there is one, train to the end, and save behind the steps. A collective.

    Args:
        trainer: of this rank.
        folder: of the run's checkpoints, which all attempts share.
        every: steps between two saves.
        comm: between all ranks, for checkpoints alone; not the trainer's own. None on one process.
        after_step: called after every step, before a save of it.
        bar: show a progress bar, on rank 0.

    Raises:
        CannotResume: if the folder has the checkpoints of another run.
        SaveFailed: if a save failed; steps up to the next save are taken meanwhile.
    """
    check_whole("every", every, 1)
    with Checkpointer(folder, comm) as checkpointer:
        if decided_by_first(checkpointer.latest, comm) is not None:
            checkpointer.load({"run": trainer})
        report_step(trainer.step)

        def stepped(trainer: Trainer) -> None:
            report_step(trainer.step)
            after_step(trainer)
            if trainer.step % every == 0:
                checkpointer.save({"run": trainer}, trainer.step)

        trainer.run(after_step=stepped, bar=bar)
        checkpointer.wait()
