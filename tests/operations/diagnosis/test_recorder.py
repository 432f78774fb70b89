"""What a rank records of its steps: every phase, what it computed, and a file that any process reads."""

import math
import os
import signal
from types import SimpleNamespace

import psutil
import pytest
import torch

from minilib.model.decoder import Decoder
from minilib.operations.diagnosis.breakdown import READY, REST, WAIT, draw_breakdown, step_breakdown
from minilib.operations.diagnosis.heartbeat import Heartbeat, read_pulse
from minilib.operations.diagnosis.recorder import StepRecorder, steps_path
from minilib.operations.diagnosis.step_record import StepRecord, in_step, read_step_records
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.phases import PHASES
from minilib.training.trainer import Trainer
from tests.operations.checkpoint.runs import CONFIG, HELD_OUT, ROW, SHAPE
from tests.operations.diagnosis.records import record, steps_of


def test_a_record_is_the_same_after_a_line_of_json():
    for each in (record(2, 7), record(0, 0, own_grad_norm=None, checksums={}), record(1, 1, loss=math.inf)):
        assert StepRecord.unpacked(each.packed()) == each and "\n" not in each.packed()


def test_a_line_that_a_killed_rank_left_half_written_is_left_out(tmp_path):
    path = tmp_path / "0.steps"
    assert read_step_records(path) == []
    path.write_text("".join(record(0, step).packed() + "\n" for step in range(3)) + record(0, 3).packed()[:50])
    assert [each.step for each in read_step_records(path)] == [0, 1, 2]


def test_a_rank_that_begins_again_writes_behind_the_whole_lines_and_leaves_nothing_open(tmp_path):
    path, model = steps_path(tmp_path, 0), torch.nn.Linear(2, 2)
    path.write_text(record(0, 0).packed() + "\n" + record(0, 1).packed()[:50])
    before = psutil.Process().num_fds()
    with StepRecorder(tmp_path, 0, model) as recorder:
        recorder.end_step(SimpleNamespace(samples=1, losses=[0.5], grad_norms=[1.0]))
    assert psutil.Process().num_fds() == before
    assert [each.loss for each in read_step_records(path)] == [record(0, 0).loss, 0.5]


def test_a_norm_whose_square_is_no_double_is_infinite(tmp_path):
    with StepRecorder(tmp_path, 0, torch.nn.Linear(2, 2)) as recorder:
        with recorder("backward"):
            recorder.see_gradients(torch.full((3,), 1e200, dtype=torch.float64), 1)
        recorder.end_step(SimpleNamespace(samples=1, losses=[0.5], grad_norms=[1.0]))
    assert read_step_records(steps_path(tmp_path, 0))[0].own_grad_norm == math.inf


def test_steps_that_not_all_ranks_have_recorded_are_left_out():
    ahead, behind = [record(0, step) for step in range(5)], [record(1, step) for step in range(1, 4)]
    assert [[each.step for each in row] for row in in_step([ahead, behind])] == [[1, 1], [2, 2], [3, 3]]
    assert in_step([]) == in_step([ahead, []]) == []


def trained(folder, killed_at=None):
    """On each rank: a run, recorded; returns what the trainer itself has kept."""
    comm = Communicator(SharedMemoryTransport())
    model = Decoder(SHAPE)
    model.initialize(0)
    with (
        Heartbeat(folder / f"{comm.rank}.beat") as heartbeat,
        StepRecorder(folder, comm.rank, model, 2, heartbeat) as recorder,
    ):

        def after(trainer):
            recorder.end_step(trainer)
            if killed_at == (comm.rank, trainer.step):
                os.kill(os.getpid(), signal.SIGKILL)

        trainer = Trainer(model, ROW, HELD_OUT, CONFIG, recorder.metered(comm), phases=recorder)
        trainer.run(after_step=after)
        return trainer.losses, trainer.grad_norms, trainer.samples


def test_every_step_is_recorded_as_the_trainer_took_it(tmp_path):
    kept = run(trained, 2, tmp_path, timeout=120)
    runs = [read_step_records(steps_path(tmp_path, rank)) for rank in range(2)]
    for rank, (losses, norms, samples) in enumerate(kept):
        assert [each.loss for each in runs[rank]] == losses and [each.grad_norm for each in runs[rank]] == norms
        assert sum(each.samples for each in runs[rank]) == samples == CONFIG.batch_size * CONFIG.steps / 2
        assert [each.step for each in runs[rank]] == list(range(CONFIG.steps))
        assert [bool(each.checksums) for each in runs[rank]] == [False, True] * 3
        for each in runs[rank]:
            assert tuple(each.phases) == PHASES and each.rss_bytes > 2**20
            assert all(min(phase) >= 0 for phase in each.phases.values())  # the kernel's counts lag behind the clock
            assert each.compute_ns <= each.wall_ns and each.wait_ns <= each.wall_ns
        assert sum(each.compute_ns for each in runs[rank]) > 0 and sum(each.wait_ns for each in runs[rank]) > 0
    assert runs[0][1].checksums == runs[1][1].checksums and len(set(runs[0][1].checksums.values())) > 5
    assert runs[0][0].own_grad_norm != runs[1][0].own_grad_norm


def own_norms():
    """On each rank: the norm of this rank's own gradient of the first step, without a recorder."""
    comm = Communicator(SharedMemoryTransport())
    model = Decoder(SHAPE)
    model.initialize(0)
    plain = Trainer(model, ROW, HELD_OUT, CONFIG)  # no communicator: nothing is averaged
    mine = Trainer(model, ROW, HELD_OUT, CONFIG, comm)._batches.draw(0)
    weight = comm.world_size * len(mine.starts) / mine.total
    loss = plain._loss(plain._tokens(ROW, mine.starts), weight)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.nn.utils.get_total_norm(gradients).item()


def test_the_own_norm_is_that_of_the_gradients_before_they_are_averaged(tmp_path):
    run(trained, 2, tmp_path, timeout=120)
    recorded = [read_step_records(steps_path(tmp_path, rank))[0].own_grad_norm for rank in range(2)]
    assert recorded == pytest.approx(run(own_norms, 2, timeout=120), rel=1e-5)


def test_a_killed_rank_leaves_its_steps_and_its_last_place(tmp_path):
    with pytest.raises(RankFailed, match="SIGKILL"):
        run(trained, 2, tmp_path, (1, 4), timeout=120)
    assert [each.step for each in read_step_records(steps_path(tmp_path, 1))] == [0, 1, 2, 3]
    assert (read_pulse(tmp_path / "1.beat").step, read_pulse(tmp_path / "1.beat").place) == (4, "between")


def test_a_breakdown_shows_that_all_take_as_long_and_one_does_not_wait():
    steps = steps_of(change=lambda rank, step: {"own": {"forward": 15} if rank == 2 else {}})
    rows = step_breakdown(steps)
    assert {row.step_ns for row in rows} == {20_000_000}
    waits = [row.parts[WAIT] for row in rows]
    assert min(range(4), key=waits.__getitem__) == 2 and waits[0] == waits[1] == waits[3]
    for row in rows:
        assert sum(row.parts.values()) == pytest.approx(row.step_ns) and row.parts[READY] == row.parts[REST] == 0
    ax = draw_breakdown(rows, "One rank does not wait")
    assert len(ax.patches) == 4 * 6 and ax.get_title(loc="left") == "One rank does not wait"
    with pytest.raises(ValueError, match="at least one step"):
        step_breakdown([])
