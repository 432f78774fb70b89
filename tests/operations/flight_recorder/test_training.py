"""Training with recorded collectives is the same training."""

from pathlib import Path

import pytest
import torch.distributed as dist

from minilib.operations.flight_recorder import RecordedCommunicator, RecordedGroup, Recorder, read_dump
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.operations.checkpoint.runs import trainer_of

WORLD = RecordedGroup("world", (0, 1))


def trains(parallel: str, folder: Path | None) -> tuple:
    comm, rank = Communicator(SharedMemoryTransport()), dist.get_rank()
    if folder:
        comm = RecordedCommunicator(comm, Recorder(folder / f"{parallel}{rank}", rank))
    trainer = trainer_of(parallel, comm)
    trainer.run()
    return trainer.losses, trainer.grad_norms, trainer.validation_losses


@pytest.mark.parametrize("parallel", ["data", "zero1", "zero2", "zero3", "tensor", "sequence"])
def test_training_is_bitwise_the_same_and_all_of_it_is_recorded(parallel, folder):
    plain, recorded = run(trains, 2, parallel, None, timeout=120), run(trains, 2, parallel, folder, timeout=120)
    assert plain == recorded
    assert len(plain[0][0]) == len(plain[0][1]) == 6
    dumps = [read_dump(folder / f"{parallel}{rank}") for rank in range(2)]
    assert dumps[0].entered == dumps[1].entered and dumps[0].entered[WORLD] > 6
    assert [call.signature for call in dumps[0].calls] == [call.signature for call in dumps[1].calls]
    assert all(call.state == "completed" for dump in dumps for call in dump.calls)
