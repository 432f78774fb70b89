"""Our dumps as those of torch.distributed's flight recorder, theirs as ours, and the verdict of torch's analyser.

Written against version 2.10 of the format (torch 2.13). It has no place for a reduction's operation, for the root of a
broadcast or a reduction, and for failure; so ours say more than what is left of them there.

Source: torch/csrc/distributed/c10d/FlightRecorder.hpp; torch.distributed.flight_recorder.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.distributed.flight_recorder.components.builder import build_db
from torch.distributed.flight_recorder.components.config_manager import JobConfig

from minilib.operations.flight_recorder.recording import Dump, RecordedCall, RecordedGroup

VERSION = "2.10"
KEYS = ("entries", "version", "pg_config")
# Names under which torch's analyser compares no more than shapes: in our collectives a tensor is input and output.
NAMES = {"all_gather": "all_gather_v", "reduce_scatter": "reduce_scatter_v"}
DTYPES = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long",
          "int32": "Int", "uint8": "Byte", "bool": "Bool"}  # fmt: skip


class TorchVerdict(NamedTuple):
    """What torch's analyser says of the first collective in which it finds a fault.

    Args:
        kind: "missing", or the name of a torch MatchState; "healthy" if it finds nothing, "error" if it fails.
        ranks: those it names.
        sequence: of the collective, from 0.
        error: with which it failed.
    """

    kind: str
    ranks: tuple[int, ...] = ()
    sequence: int = -1
    error: str = ""


def to_torch(dump: Dump) -> dict:
    """What torch would have pickled on this rank; messages between two ranks are left out."""
    groups = {_name(group): group for group in dump.entered}
    numbers = {group: number for number, group in enumerate(groups.values())}
    calls = [call for call in dump.calls if call.sequence >= 0 and call.state != "refused"]
    return {
        "version": VERSION,
        "pg_config": {
            name: {"name": name, "desc": group.name, "ranks": str(list(group.ranks))} for name, group in groups.items()
        },
        "pg_status": {str(numbers[group]): _status(group, dump) for group in groups.values()},
        "entries": [_entry(call, number, numbers[call.group]) for number, call in enumerate(calls)],
    }


def from_torch(trace: Mapping, rank: int, ranks: Mapping[str, Sequence[int]] | None = None) -> Dump:
    """A dump of torch's flight recorder as one of ours.

    Args:
        trace: unpickled, as `torch._C._distributed_c10d._dump_fr_trace()` pickles it. In gloo's (torch 2.13) only
            `retired` tells that a call is over, which it is on some ranks when it has timed out, too.
        rank: whose dump it is.
        ranks: of the job, by names of process groups, where the dump does not say; gloo's (torch 2.13) does not.
    """
    known = {name: tuple(ast.literal_eval(group["ranks"])) for name, group in trace["pg_config"].items()}
    known |= {name: tuple(members) for name, members in (ranks or {}).items()}
    calls = tuple(_call(entry, known) for entry in trace["entries"] if not entry.get("is_p2p"))
    entered = {call.group: call.sequence + 1 for call in calls}
    first = trace["entries"][0]["record_id"] if trace["entries"] else 0
    return Dump(rank, calls, entered, lost=first, read_ns=time.time_ns())


def torch_verdict(traces: Mapping[int, Mapping]) -> TorchVerdict:
    """The verdict of torch's own analyser, `torchfrtrace`.

    Args:
        traces: by rank, as `to_torch` makes them or torch dumps them.
    """
    details = {
        f"rank{rank}": {"host_name": "", "rank": rank, **{key: copy.deepcopy(trace[key]) for key in KEYS}}
        for rank, trace in traces.items()
    }
    arguments = JobConfig().parse_args(["", "--allow-incomplete-ranks"])
    try:
        with _silent():
            found = build_db(details, arguments, VERSION).collectives
    except Exception as error:  # whatever it raises is its verdict
        return TorchVerdict("error", error=f"{type(error).__name__}: {error}")
    for collective in found:
        sequence = collective.collective_seq_id - 1
        if collective.missing_ranks:
            return TorchVerdict("missing", tuple(sorted(collective.missing_ranks)), sequence)
        if collective.mismatch_collectives:
            odd = collective.mismatch_collectives
            kinds = {other.type_of_mismatch.state.name for other in odd.values()}
            return TorchVerdict(" and ".join(sorted(kinds)), tuple(sorted(odd)), sequence)
    return TorchVerdict("healthy")


def _name(group: RecordedGroup) -> str:
    """Unique for each group of a rank; torch's analyser adds the ranks."""
    return f"{group.name}:{group.generation}"


def _status(group: RecordedGroup, dump: Dump) -> dict[str, int]:
    done = [call.sequence for call in dump.calls if call.group == group and call.state == "completed"]
    begun = [call.sequence for call in dump.calls if call.group == group and call.started_ns]
    return {
        "last_enqueued_collective": dump.entered[group],
        "last_started_collective": max(begun, default=-2) + 1,
        "last_completed_collective": max(done, default=-2) + 1,
    }


def _entry(call: RecordedCall, record: int, group: int) -> dict:
    location, _, function = call.site.partition(" ")
    file, _, line = location.rpartition(":")
    dtype = DTYPES.get(call.dtype, call.dtype)
    done = call.state == "completed"
    received, sent = ([size] for size in call.shape) if call.op == "all_to_all" else (list(call.shape),) * 2
    return {
        "frames": [{"name": function, "filename": file, "line": int(line or 0)}],
        "record_id": record,
        "pg_id": group,
        "process_group": (_name(call.group), call.group.name),
        "thread_name": "",
        "thread_id": "0",
        "collective_seq_id": call.sequence + 1,
        "p2p_seq_id": 0,
        "op_id": call.sequence + 1,
        "profiling_name": f"gloo:{NAMES.get(call.op, call.op)}",
        "time_created_ns": call.enqueued_ns,
        "input_sizes": [sent] if call.op != "barrier" else [],
        "input_dtypes": [dtype] if call.op != "barrier" else [],
        "output_sizes": [received] if call.op != "barrier" else [],
        "output_dtypes": [dtype] if call.op != "barrier" else [],
        "state": "started" if call.state == "failed" else call.state,
        "time_discovered_started_ns": call.started_ns or None,
        "time_discovered_completed_ns": call.ended_ns if done else None,
        "retired": done,
        "timeout_ms": 0,
        "is_p2p": False,
    }


def _call(entry: Mapping, ranks: Mapping[str, tuple[int, ...]]) -> RecordedCall:
    name, description = entry["process_group"]
    done = entry["state"] == "completed" or entry["retired"]
    frames = [frame for frame in entry.get("frames", ()) if "/torch/distributed/" not in frame["filename"]]
    frame = frames[0] if frames else {"filename": "?", "line": 0, "name": "?"}
    sizes, dtypes = entry["input_sizes"], entry["input_dtypes"]
    names = {torch_name: own for own, torch_name in (NAMES | DTYPES).items()}
    op = entry["profiling_name"].partition(":")[2]
    begun, ended = (entry[f"time_discovered_{what}_ns"] for what in ("started", "completed"))
    return RecordedCall(
        group=RecordedGroup(f"{name}:{description}", ranks.get(name, ())),
        sequence=entry["collective_seq_id"] - 1,
        op=names.get(op, op),
        reduce_op="",
        root=None,
        dtype=names.get(dtypes[0], dtypes[0]) if dtypes else "",
        shape=tuple(sizes[0]) if sizes else (),
        site=f"{'/'.join(Path(frame['filename']).parts[-2:])}:{frame['line']} {frame['name']}",
        state="completed" if done else entry["state"],
        asynchronous=False,
        enqueued_ns=entry["time_created_ns"],
        started_ns=begun or entry["time_created_ns"],
        ended_ns=(ended or begun or entry["time_created_ns"]) if done else 0,
        wait_ns=0,
        waiting=not done,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that torch's analyser logs."""
    logger = logging.getLogger("Flight Recorder")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
