"""Exports of torch.profiler on ranks, merged on one clock; and readers of traces that we did not write."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from minilib.operations.tracing.chrome import chrome_trace, write_chrome_trace
from minilib.operations.tracing.clocks import ClockLine, ClockOffset
from minilib.operations.tracing.merging import merge_recordings
from minilib.operations.tracing.torch_profiles import load_profile, merge_profiles
from minilib.ranks.launch import run
from tests.operations.tracing.recordings import step_of

STEPS = 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")

    def on_rank():
        import os

        import torch
        import torch.distributed as dist
        from torch.profiler import ProfilerActivity, profile

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler writes lines to the file descriptor itself
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                dist.all_reduce(torch.randn(8, 8) @ torch.randn(8, 8))
        profiler.export_chrome_trace(str(folder / f"{dist.get_rank()}.json"))

    run(on_rank, 2, timeout=120)
    return [folder / "0.json", folder / "1.json"]


def test_profiles_are_merged(exported, tmp_path):
    packed = tmp_path / "1.json.gz"
    packed.write_bytes(gzip.compress(exported[1].read_bytes()))
    merged = merge_profiles([load_profile(packed), load_profile(exported[0])])
    events = merged["traceEvents"]
    sides = [event for event in events if event["ph"] == "X" and event["name"] == "gloo:all_reduce"]
    assert sorted(event["pid"] for event in sides) == [0] * STEPS + [1] * STEPS
    arrows = [event for event in events if event["ph"] in "sf" and event["cat"] == "collective"]
    assert [event["ph"] for event in arrows] == ["s", "f"] * STEPS
    for first, last in zip(arrows[::2], arrows[1::2], strict=True):
        assert first["id"] == last["id"] and first["pid"] != last["pid"] and first["ts"] <= last["ts"]
    for path in exported:  # no time has changed, as it is one machine
        profile = load_profile(path)
        rank, base = profile["distributedInfo"]["rank"], merged["baseTimeNanoseconds"]
        theirs = sorted(event["ts"] for event in profile["traceEvents"] if event["ph"] == "X")
        ours = sorted(event["ts"] for event in events if event["ph"] == "X" and event["pid"] == rank)
        shift = (profile["baseTimeNanoseconds"] - base) / 1000
        assert ours == pytest.approx([ts + shift for ts in theirs], abs=0.002, rel=0)


def test_profiles_move_by_the_offset_of_their_clock(exported):
    profiles = [load_profile(path) for path in exported]
    lines = {rank: ClockLine(*[ClockOffset(0, offset, 0)] * 2) for rank, offset in {0: 0, 1: -(10**9)}.items()}
    plain, moved = merge_profiles(profiles), merge_profiles(profiles, lines)
    for rank, shift in ((0, 0), (1, -1e6)):
        before, after = (
            [e["ts"] for e in merged["traceEvents"] if e["pid"] == rank and e["ph"] == "X"] for merged in (plain, moved)
        )
        assert after == pytest.approx([ts + shift for ts in before], abs=0.002, rel=0)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x1f\x8bnot gzip", b'{"baseTimeNanoseconds": "1"}'])
def test_what_is_no_profile_is_refused_by_name(tmp_path, content):
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="wrong.json is no export of torch.profiler"):
        load_profile(path)


def test_refusals(tmp_path, exported):
    path = tmp_path / "alone.json"
    path.write_text(json.dumps({"baseTimeNanoseconds": 1, "traceEvents": []}))
    with pytest.raises(ValueError, match="says no rank"):
        load_profile(path)
    profile = load_profile(exported[0])
    for wrong in ([], [profile, profile]):
        with pytest.raises(ValueError, match="one profile of each rank"):
            merge_profiles(wrong)
    with pytest.raises(ValueError, match=r"got none of \[0\]"):
        merge_profiles([profile], {})


READ = """
import json, sys
from hta.common.trace import Trace
files = dict(enumerate(sys.argv[1:]))
trace = Trace(trace_files=files, trace_dir="")
trace.parse_traces(use_multiprocessing=False)
trace.decode_symbol_ids()
found = {rank: trace.get_trace(rank)[["s_name", "dur"]].values.tolist() for rank in files}
print("found", json.dumps(found))
"""


def test_holistic_trace_analysis_reads_what_we_write(tmp_path, exported):
    """Meta's reader of torch.profiler's traces; it leaves out the one event around all of a profile."""
    python = os.environ.get("TRACE_READERS_PYTHON")
    if not python or not Path(python).is_file():
        pytest.skip("TRACE_READERS_PYTHON names no Python that has holistictraceanalysis")
    merged = merge_recordings([step_of(rank, 2000 * rank).recording() for rank in range(2)])
    for name, document in {
        "ranks": chrome_trace(merged),
        "profiles": merge_profiles([load_profile(path) for path in exported]),
    }.items():
        files = [tmp_path / f"{name}-{rank}.json" for rank in range(2)]
        where = "tid" if name == "ranks" else "pid"
        expected = {}
        for rank, path in enumerate(files):  # HTA has a file for each rank
            events = [event for event in document["traceEvents"] if event[where] == rank]
            write_chrome_trace(document | {"traceEvents": events, "distributedInfo": {"rank": rank}}, path)
            shown = [event for event in events if event["ph"] == "X" and event["cat"] != "Trace"]
            expected[str(rank)] = sorted(event["name"] for event in shown)
        told = subprocess.run([python, "-c", READ, *files], capture_output=True, text=True, timeout=300, check=True)
        found = json.loads(told.stdout.partition("found ")[2])
        assert {rank: sorted(name for name, _ in rows) for rank, rows in found.items()} == expected
