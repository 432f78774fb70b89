"""What torch.profiler has exported on each rank, merged on one clock.

    profile.export_chrome_trace(…)    one file a rank; process and thread ids of one machine may be those of another
    merge_profiles                    pid = rank, and arrows between sides of the n-th collective of a name

torch.profiler's times are those of the wall clock (`baseTimeNanoseconds` + `ts`), so the offsets of ranks are those of
`exchange_clocks(clock=time.time_ns)`.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from minilib.operations.tracing.chrome import TraceDocument
from minilib.operations.tracing.clocks import SAME_CLOCK, ClockLine

COLLECTIVES = ("gloo:", "nccl:")  # how torch.distributed names the spans of its collectives
ARROWS = "stf"  # the kinds of events that an arrow is made of


def load_profile(path: Path) -> TraceDocument:
    """The export of one rank, also where it is compressed.

    Raises:
        ValueError: if the file is none, or says no rank because torch.distributed was not initialised.
    """
    data = path.read_bytes()
    try:
        document = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        base, events = document["baseTimeNanoseconds"], document["traceEvents"]
    except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no export of torch.profiler: {error!r}") from error
    if not isinstance(base, int) or not isinstance(events, list):
        raise ValueError(f"{path} is no export of torch.profiler: baseTimeNanoseconds is {base!r}")
    if "rank" not in document.get("distributedInfo", {}):
        raise ValueError(f"{path} says no rank; profile between init_process_group and destroy_process_group")
    return document


def merge_profiles(profiles: Iterable[TraceDocument], clocks: Mapping[int, ClockLine] | None = None) -> TraceDocument:
    """One document of all ranks, for `write_chrome_trace`.

    Args:
        profiles: of `load_profile`, one of each rank.
        clocks: offset of each rank's wall clock from that of rank 0; None if they are one machine's.

    Raises:
        ValueError: if there is none, two are of one rank, or a rank has no clock.
    """
    profiles = list(profiles)
    of_rank = {profile["distributedInfo"]["rank"]: profile for profile in profiles}
    if len(of_rank) != len(profiles) or not profiles:
        raise ValueError(f"one profile of each rank is needed, got {len(profiles)} of ranks {sorted(of_rank)}")
    if clocks is not None and (without := of_rank.keys() - clocks.keys()):
        raise ValueError(f"a clock of every rank is needed, got none of {sorted(without)}")
    base = min(profile["baseTimeNanoseconds"] for profile in profiles)
    events: list[dict] = []
    for rank in sorted(of_rank):
        events += _of_rank(rank, of_rank[rank], clocks[rank] if clocks else SAME_CLOCK, base)
    return {"traceEvents": [*events, *_arrows(events)], "displayTimeUnit": "ms", "baseTimeNanoseconds": base}


def _of_rank(rank: int, profile: TraceDocument, line: ClockLine, base: int) -> Iterator[dict]:
    own_base, host = profile["baseTimeNanoseconds"], profile.get("host_name", "")
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank} {host}".strip()}}
    for event in profile["traceEvents"]:
        if event.get("name") in ("process_name", "process_sort_index"):
            continue
        moved = event | {"pid": rank}
        if "ts" in event:
            moved["ts"] = (line.to_reference(own_base + round(event["ts"] * 1000)) - base) / 1000
        if event.get("ph") in ARROWS:
            moved["id"] = f"rank {rank}, {event['id']}"  # numbered by each rank for itself
        yield moved


def _arrows(events: list[dict]) -> Iterator[dict]:
    """From the side that came first to those that came later, for each collective that several ranks took part in."""
    seen: dict[tuple[int, str], int] = defaultdict(int)
    sides: dict[tuple[str, int], list[dict]] = defaultdict(list)
    spans = [event for event in events if event.get("ph") == "X" and event["name"].startswith(COLLECTIVES)]
    for event in sorted(spans, key=lambda event: event["ts"]):
        key = event["pid"], event["name"]
        sides[event["name"], seen[key]].append(event)
        seen[key] += 1
    for (name, number), of_one in sides.items():
        for place, side in enumerate(of_one if len(of_one) > 1 else ()):
            kind = "s" if place == 0 else "f" if place == len(of_one) - 1 else "t"
            where = {key: side[key] for key in ("pid", "tid", "ts")}
            arrow = {"ph": kind, "id": f"{name} {number}", "name": name, "cat": "collective", **where}
            yield arrow | ({"bp": "e"} if kind == "f" else {})
