"""A rank whose memory is lost gets its part back from its neighbour, and the run goes on bit by bit."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.operations.checkpoint import NoCheckpoint
from minilib.operations.checkpoint.format.folder import part_name
from minilib.operations.checkpoint.neighbours import NeighbourMemory
from minilib.ranks.launch import run
from tests.operations.checkpoint.runs import comm_of_ranks, outcome, trainer_of


def of_rank(folder: str, **options) -> NeighbourMemory:
    return NeighbourMemory(Path(folder) / f"host{dist.get_rank()}", comm_of_ranks(), **options)


@pytest.fixture
def hosts():
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield folder


def trains(folder: str, parallel: str) -> dict:
    """Each save is behind the step that follows it."""
    trainer, memory = trainer_of(parallel, comm_of_ranks()), of_rank(folder)
    sizes = []
    with memory:
        for _ in range(3):
            trainer.run(trainer.step + 1)
            sizes.append(memory.nbytes)
            memory.save({"run": trainer}, trainer.step)
        trainer.run()
        memory.wait()
        sizes.append(memory.nbytes)
    files = sorted(path.name for path in (Path(folder) / f"host{dist.get_rank()}").iterdir())
    return outcome(trainer) | {"files": files, "sizes": sizes, "keepers": memory.keepers}


def goes_on_after_a_loss(folder: str, parallel: str) -> dict:
    """New processes; nothing else is known to them than their memory."""
    trainer, memory = trainer_of(parallel, comm_of_ranks(), seed=70), of_rank(folder)
    loaded = memory.load({"run": trainer})
    nbytes, received = memory.nbytes, memory.received
    trainer.run()
    return outcome(trainer) | {"at": loaded.step, "received": received, "nbytes": nbytes}


@pytest.mark.parametrize("parallel", ["zero3", "data"])
def test_a_lost_host_is_restored_from_its_neighbour(hosts, parallel):
    expected = run(trains, 3, hosts, parallel, timeout=200)
    for rank, each in enumerate(expected):
        held = sorted({part_name(3, rank), part_name(3, (rank - 1) % 3)})
        assert each["files"] == ["manifest-000000000003", *held], "its own, its neighbour's, of the newest step alone"
        assert each["keepers"] == [[0, 1], [1, 2], [2, 0]]
    shutil.rmtree(Path(hosts) / "host1")
    found = run(goes_on_after_a_loss, 3, hosts, parallel, timeout=200)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["at"] == 3 and mine["losses"] == theirs["losses"]
        if "model" in theirs:
            torch.testing.assert_close(mine["model"], theirs["model"], rtol=0, atol=0)
        assert mine["nbytes"] == theirs["sizes"][-1], "again as many copies as before, and no more"
    kept = expected[1]["sizes"][-1]
    assert found[1]["received"] >= kept, "what it has to keep"
    assert all(each["received"] < kept for each in (found[0], found[2])), "at most the one part that it has not"


def loses_too_much(folder: str) -> list[str]:
    trainer, memory = trainer_of("zero3", comm_of_ranks()), of_rank(folder)
    memory.save({"run": trainer}, 0, wait=True)
    if dist.get_rank() in (0, 1):
        memory.forget()
    try:
        memory.load({"run": trainer})
    except NoCheckpoint as error:
        return str(error)


def test_too_many_lost_hosts_are_told_on_every_rank(tmp_path):
    for said in run(loses_too_much, 3, str(tmp_path), timeout=100):
        assert "no step of which every part is somewhere: load from the disk" in said


def is_refused(folder: str) -> str:
    with pytest.raises(NoCheckpoint) as refused:
        of_rank(folder).load({"run": trainer_of("zero3", comm_of_ranks())})
    return str(refused.value)


def test_another_number_of_ranks_loads_from_the_disk(tmp_path):
    run(trains, 3, str(tmp_path), "zero3", timeout=100)
    assert "3 ranks kept step 3 in memory, and here are 2" in run(is_refused, 2, str(tmp_path), timeout=100)[0]


def keepers_of(folder: str) -> tuple:
    memory = of_rank(folder, places=[0, 0, 1, 1])
    try:
        of_rank(folder, copies=5)
    except ValueError as error:
        return memory.keepers, str(error)


def test_copies_are_on_another_host_and_spread(tmp_path):
    for keepers, said in run(keepers_of, 4, str(tmp_path), timeout=100):
        assert all(first // 2 != second // 2 for first, second in keepers)
        assert "copies" in said
