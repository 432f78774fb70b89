"""Recordings of ranks that were refused, killed amid a name, or run from oddly named folders; files that are none."""

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilib.operations.flight_recorder import (
    NotARecording,
    RecordedCommunicator,
    RecordedGroup,
    Recorder,
    analyse,
    read_dump,
    read_dumps,
)
from minilib.operations.flight_recorder.recorder import NAME_BYTES, group_text, recording_bytes


class Unfinished:
    """A collective that goes on."""

    done = False


def starts_or_refuses(tensor, op, plan, async_op):
    if op == "nonsense":
        raise ValueError(f"no reduction {op!r}")
    return Unfinished()


def test_a_refused_call_is_none_that_the_rank_has_entered():
    dumps = []
    for rank, op in enumerate(("sum", "nonsense")):
        content = bytearray(recording_bytes(4))
        comm = SimpleNamespace(rank=rank, world_size=2, device=torch.device("cpu"), all_reduce=starts_or_refuses)
        recorded = RecordedCommunicator(comm, Recorder(content, rank, capacity=4), "dp", (0, 1))
        with suppress(ValueError):
            recorded.all_reduce(torch.ones(4), op, async_op=True)
        dumps.append(read_dump(content))
    assert [list(dump.entered.values()) for dump in dumps] == [[1], [0]]
    later = [replace(dump, read_ns=dump.read_ns + 10**10) for dump in dumps]
    assert (analyse(later).kind, analyse(later).ranks) == ("not_entered", (1,))


def test_a_group_whose_name_is_half_written_costs_no_other_call():
    content = bytearray(recording_bytes(4))
    recorder = Recorder(content, 0, capacity=4)
    group, kind = recorder.group("dp", (0, 1)), recorder.name("all_reduce|sum||float32")
    with recorder.lock:
        recorder.begin(group, kind, 0, 0, 0, (4,), True, 1)
    whole = group_text(RecordedGroup("tp", (*range(0, 300, 2), 1))).encode()
    recorder._names.append(b"n" + whole[: NAME_BYTES - 1])  # the rank is killed before the next piece
    dump = read_dump(content)
    assert [(call.op, call.group.name) for call in dump.calls] == [("all_reduce", "dp")]
    assert dump.entered == {RecordedGroup("dp", (0, 1)): 1}


@pytest.mark.parametrize("folder_name", ["group of | models", "group [1, 2]", "d\udcffa"])
def test_lines_of_code_in_oddly_named_folders_are_recorded(folder_name):
    content = bytearray(recording_bytes(4))
    recorder = Recorder(content, 0, capacity=4)
    scope = {"recorder": recorder, "found": []}
    source = "def train():\n    found.append(recorder.site(0))\ntrain()\n"
    exec(compile(source, f"/home/{folder_name}/train.py", "exec"), scope)
    with recorder.lock:
        recorder.begin(0, 0, scope["found"][0], 0, 0, (4,), True, 1)
    assert read_dump(content).calls[0].site.endswith("/train.py:2 train")


def test_of_many_files_the_one_that_is_none_is_named(tmp_path):
    Recorder(tmp_path / "rank0", 0, capacity=1)
    Recorder(tmp_path / "rank1", 1, capacity=1)
    content = (tmp_path / "rank1").read_bytes()
    for wrong in (b"", content[:10], content[:-1], bytes(len(content))):
        (tmp_path / "rank1").unlink()
        (tmp_path / "rank1").write_bytes(wrong)
        with pytest.raises(NotARecording, match="rank1"):
            read_dumps(tmp_path)
    with pytest.raises(NotARecording, match=f"cut.*{len(content)} bytes.*{len(content) - 1}"):
        read_dump(content[:-1])
