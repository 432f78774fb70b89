"""Saves into a neighbour's memory go on behind the steps, are counted, and may be broken off anywhere."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.operations.checkpoint import AlreadySaved, SaveFailed, neighbours
from minilib.operations.checkpoint.host_memory import HostMemory
from minilib.operations.checkpoint.neighbours import NeighbourMemory
from minilib.ranks.launch import RankFailed, run
from tests.operations.checkpoint.runs import comm_of_ranks

NUMEL = 3000  # float32 elements of what all ranks hold alike, so each saves a share
KILLED_AT = (0, 3, 7, 11, 12, 14, 16)  # changes of a rank's memory, of which a save makes 15


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Module()
    model.register_buffer("whole", torch.full((NUMEL,), float(value)))
    return model


def memory_of(folder: str) -> NeighbourMemory:
    neighbours.PIECE = 1024  # bytes, so that a part is several pieces
    return NeighbourMemory(Path(folder) / f"host{dist.get_rank()}", comm_of_ranks())


def changes_while_it_is_sent(folder: str) -> dict:
    model, memory = model_of(1), memory_of(folder)
    before = memory._comm.traffic.bytes
    memory.save({"model": model}, 1)
    model.whole.fill_(-1)  # a step that goes on
    memory.wait()
    sent, first = memory._comm.traffic.bytes - before, memory.nbytes
    most, extend = [0], HostMemory.extend

    def watched(host, name, data):
        extend(host, name, data)
        most[0] = max(most[0], host.nbytes)

    HostMemory.extend = watched
    memory.save({"model": model_of(2)}, 2)
    memory.wait()
    HostMemory.extend = extend
    with pytest.raises(AlreadySaved):
        memory.save({"model": model}, 2)
    memory.load({"model": model})
    memory.close()
    return {"sent": memory.sent, "traffic": sent, "kept": first, "most": most[0], "staged": memory.staged_bytes,
            "value": model.whole.unique().tolist()}  # fmt: skip


def test_a_save_behind_the_steps_holds_what_was_copied_and_its_bytes_are_counted(tmp_path):
    shares = [4 * NUMEL // 3] * 3
    for share, found in zip(shares, run(changes_while_it_is_sent, 3, str(tmp_path), timeout=100), strict=True):
        assert found["value"] == [2.0]
        assert found["sent"] == found["staged"] == share and found["kept"] == 2 * share
        assert share <= found["traffic"] < share + 20_000, "beside the part what ranks tell each other"
        assert found["most"] == 2 * found["kept"], "this step and the one before, for a time"


def saves_until_killed(folder: str, point: int, victim: int) -> None:
    memory, taken = memory_of(folder), [0]
    memory.save({"model": model_of(1)}, 1, wait=True)

    def counted(change):
        def wrapped(host, *arguments):
            if taken[0] == point and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            taken[0] += 1
            change(host, *arguments)

        return wrapped

    for name in ("begin", "extend", "finish", "remove"):
        setattr(HostMemory, name, counted(getattr(HostMemory, name)))
    for step in range(2, 4):
        memory.save({"model": model_of(step)}, step)
        memory.wait()


def loads(folder: str) -> tuple[int, list[float], int]:
    model, memory = model_of(0), memory_of(folder)
    step = memory.load({"model": model}).step
    memory.save({"model": model}, step + 1, wait=True)
    return step, model.whole.unique().tolist(), memory.nbytes


def test_a_save_that_a_kill_breaks_off_leaves_the_one_before(tmp_path):
    steps = set()
    for number, point in enumerate(KILLED_AT):
        folder = str(tmp_path / str(point))
        with pytest.raises(RankFailed, match="SIGKILL"):
            run(saves_until_killed, 2, folder, point, number % 2, timeout=100)
        found = run(loads, 2, folder, timeout=100)
        assert found[0] == found[1], "both ranks load the same step"
        step, values, nbytes = found[0]
        assert values == [float(step)] and nbytes == 4 * NUMEL, "whole, and nothing of it is left over"
        steps.add(step)
    assert steps == {1, 2}, "the one before, or the one that all ranks have"


def has_no_room(folder: str, room: int) -> str:
    model, memory, extend = model_of(1), memory_of(folder), HostMemory.extend
    memory.save({"model": model}, 1, wait=True)
    left = [room if dist.get_rank() == 1 else 10**9]

    def limited(host, name, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError("no space left")
        extend(host, name, data)

    HostMemory.extend = limited
    model.whole.fill_(2)
    memory.save({"model": model}, 2)
    with pytest.raises(SaveFailed, match="save of step 2 failed") as refused:
        memory.wait()
    HostMemory.extend = extend
    assert memory.load({"model": model}).step == 1 and model.whole[0] == 1
    memory.save({"model": model}, 2, wait=True)
    assert memory.load({"model": model}).step == 2
    return str(refused.value)


@pytest.mark.parametrize("room", [0, 4 * NUMEL // 2, 4 * NUMEL // 2 + 2000, 4 * NUMEL])
def test_no_room_on_one_rank_is_told_by_all_and_the_one_before_stays(tmp_path, room):
    """For its own part, for its neighbour's from the first or a later piece on, or for the manifest."""
    said = run(has_no_room, 2, str(tmp_path), room, timeout=100)
    assert "OSError: no space left" in said[1] and "rank 1 failed: OSError: no space left" in said[0]
