"""Our recordings against torch.distributed's flight recorder: the same calls, its format, its analyser."""

import pickle
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.operations.flight_recorder import RecordedCommunicator, RecordedGroup, Recorder, analyse, read_dumps
from minilib.operations.flight_recorder.torch_format import TorchVerdict, from_torch, to_torch, torch_verdict
from minilib.ranks.launch import run
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.ranks.transport.base import CollectiveFailed
from tests.operations.flight_recorder.made import DP, LEFT, RIGHT, Job

GROUP = RecordedGroup("g", (0, 1, 2))


def both_record(folder: Path) -> dict:
    """The last call is not made by rank 1."""
    from torch._C._distributed_c10d import _dump_fr_trace  # of a build without distributed

    rank = dist.get_rank()
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=1.5), group_desc="g")
    comm = RecordedCommunicator(TorchCommunicator(group), Recorder(folder / f"rank{rank}", rank), "g")
    x = torch.ones(6, dtype=torch.float64)
    comm.all_reduce(x)
    comm.broadcast(x, 1)
    comm.reduce(x[:2], 2)
    comm.barrier()
    comm.all_to_all(list(torch.ones(3, 2)), list(torch.ones(3, 2)))
    comm.all_reduce(x, async_op=True).wait()
    if rank != 1:
        with pytest.raises(CollectiveFailed):
            comm.all_reduce(x)
    return pickle.loads(_dump_fr_trace())


@pytest.fixture(scope="module")
def recorded_by_both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FR_BUFFER_SIZE", "100")
        folder = tmp_path_factory.mktemp("rings")
        traces = run(both_record, 3, folder, timeout=60)
    return read_dumps(folder), dict(enumerate(traces))


def test_torch_has_recorded_the_same_calls(recorded_by_both):
    dumps, traces = recorded_by_both
    for dump in dumps:
        ours, theirs = to_torch(dump), traces[dump.rank]
        assert (ours["version"], set(ours)) == (theirs["version"], set(theirs) - {"comm_lib_version"})
        assert len(ours["entries"]) == len(theirs["entries"]) == 6 + (dump.rank != 1)
        same = ("collective_seq_id", "op_id", "profiling_name", "input_sizes", "output_sizes", "input_dtypes",
                "output_dtypes", "is_p2p", "p2p_seq_id")  # fmt: skip
        for own, other in zip(ours["entries"], theirs["entries"], strict=True):
            assert set(own) == set(other)
            assert [own[key] for key in same] == [other[key] for key in same]
            assert [frame["line"] for frame in own["frames"]][0] in [frame["line"] for frame in other["frames"]]


def test_a_dump_of_torch_is_analysed_as_ours_is(recorded_by_both):
    """Gloo's (torch 2.13) does not tell a group's ranks, and torch's own analyser cannot do without."""
    dumps, traces = recorded_by_both
    ours = analyse(dumps)
    assert (ours.kind, ours.ranks, ours.group, ours.sequence) == ("not_entered", (1,), GROUP, 6)
    names = {entry["process_group"][0] for entry in traces[0]["entries"]}
    theirs = [from_torch(trace, rank, dict.fromkeys(names, (0, 1, 2))) for rank, trace in traces.items()]
    assert all(call.site.startswith("ranks/torch_communicator.py:") for dump in theirs for call in dump.calls)
    assert {dump.last(group) for dump in theirs for group in dump.entered} == {5, 6}
    assert [dump.rank for dump in theirs for group in dump.entered if dump.last(group) == 5] == [1]
    # A call that timed out may pass for one that is over, so a wait is not always left to see.
    found = analyse(theirs, patience=0.1)
    assert (found.kind, found.ranks) in (("not_entered", (1,)), ("healthy", ()))


@pytest.mark.parametrize("fault", ["not_entered", "dtype", "shape", "op"])
@pytest.mark.parametrize("culprit", [1, 3])
def test_the_two_analysers_agree_where_torch_knows_enough(fault, culprit):
    odd = {"dtype": {"dtype": "int64"}, "shape": {"shape": (2, 2)}, "op": {"op": "barrier"}}.get(fault)
    others = set(range(4)) - {culprit}
    job = Job().call(range(4), DP).call((0, 1), LEFT).call((2, 3), RIGHT).call(others, DP, "started", at=9)
    if odd:
        job.call((culprit,), DP, "started", at=9, **odd)
    ours, theirs = analyse(job.dumps()), torch_verdict({dump.rank: to_torch(dump) for dump in job.dumps()})
    assert (ours.ranks, ours.sequence) == (theirs.ranks, theirs.sequence) == ((culprit,), 1)
    assert ours.kind == ("mismatch" if odd else "not_entered")
    name = {"not_entered": "missing", "dtype": "COLLECTIVE_DTYPE_MISMATCH", "shape": "SIZE_OR_SYNTAX_MISMATCH",
            "op": "COLLECTIVE_TYPE_MISMATCH"}  # fmt: skip
    assert theirs.kind == name[fault]


def test_a_healthy_job_is_healthy_for_both():
    job = (
        Job().call(range(4), DP).call((0, 1), LEFT).call(range(4), DP, op="all_gather").call(range(4), DP, op="barrier")
    )
    job.call(range(4), DP, op="reduce_scatter").call(range(4), DP, op="broadcast").call(range(4), DP, "refused")
    job.call((0,), LEFT, op="all_to_all", shape=(3, 5)).call((1,), LEFT, op="all_to_all", shape=(5, 3))
    traces = {dump.rank: to_torch(dump) for dump in job.dumps()}
    assert torch_verdict(traces) == TorchVerdict("healthy")
    assert analyse(job.dumps()).kind == "healthy"
    assert all(len(trace["entries"]) == 5 + 2 * (rank < 2) for rank, trace in traces.items())


def test_there_and_back_nothing_is_lost_that_the_format_has():
    job = Job().call(range(4), DP).call((0, 1), LEFT, shape=(2, 3), dtype="bfloat16").call((0,), DP, "started", at=9)
    for dump in job.dumps():
        back = from_torch(to_torch(dump), dump.rank)
        keys = ("sequence", "op", "dtype", "shape", "site", "state", "enqueued_ns", "started_ns", "ended_ns", "waiting")
        for call, again in zip(dump.calls, back.calls, strict=True):
            assert [getattr(call, key) for key in keys] == [getattr(again, key) for key in keys]
            assert call.group.ranks == again.group.ranks
