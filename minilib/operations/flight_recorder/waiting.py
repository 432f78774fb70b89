"""Who waits in which collective, and for whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minilib.operations.flight_recorder.recording import Dump, RecordedCall, RecordedGroup

Dumps = Mapping[int, Dump]  # by rank


@dataclass(frozen=True)
class WaitingRank:
    """A call that has not ended for long, or has failed.

    Args:
        rank: that has called.
        call: the first of its group that has not ended well.
        absent: members of the group that have not called it.
        unknown: members that left no dump.
    """

    rank: int
    call: RecordedCall
    absent: tuple[int, ...]
    unknown: tuple[int, ...]

    @property
    def blocks(self) -> bool:
        """Whether the rank does nothing else meanwhile."""
        return self.call.waiting or self.call.state == "failed"


def all_waiting(dumps: Dumps, patience: float) -> list[WaitingRank]:
    """Calls that have taken longer than `patience` seconds or have failed, the longest first; what was retried is not.

    A call that others did not make in time may have failed on some ranks and have been made again: in the same group,
    whose later calls went well, or in a new one with the same name and ranks.
    """
    given_up = abandoned(dumps)
    found = []
    for dump in dumps.values():
        for group, calls in calls_of(dump).items():
            first = _first_open(calls)
            if first is None or (first.state == "failed" and group in given_up):
                continue
            if first.state == "failed" or dump.read_ns - first.enqueued_ns >= patience * 1e9:
                absent = tuple(r for r in group.ranks if r in dumps and dumps[r].last(group) < first.sequence)
                unknown = tuple(r for r in group.ranks if r not in dumps)
                found.append(WaitingRank(dump.rank, first, absent, unknown))
    return sorted(found, key=lambda one: one.call.enqueued_ns)


def abandoned(dumps: Dumps) -> set[RecordedGroup]:
    """Groups that were made again, and of which at least one rank uses the new one."""
    newest: dict[tuple, int] = {}
    for dump in dumps.values():
        for group, entered in dump.entered.items():
            if entered:
                key = group.name, group.ranks
                newest[key] = max(newest.get(key, 0), group.generation)
    groups = {group for dump in dumps.values() for group in dump.entered}
    return {group for group in groups if group.generation < newest.get((group.name, group.ranks), 0)}


def calls_of(dump: Dump) -> dict[RecordedGroup, list[RecordedCall]]:
    """The numbered calls of each group with more than one rank, in order."""
    found: dict[RecordedGroup, list[RecordedCall]] = {}
    for call in dump.calls:
        if call.sequence >= 0 and call.state != "refused" and len(call.group.ranks) > 1:
            found.setdefault(call.group, []).append(call)
    return found


def cycle(waiting: Sequence[WaitingRank]) -> list[WaitingRank]:
    """Ranks of which each waits for the next, and the last for the first; empty if there are none.

    Args:
        waiting: of which each waits for ranks that wait, too.
    """
    by_rank = {one.rank: one for one in reversed(waiting)}
    for start in waiting:
        path = [start]
        while following := next((by_rank[rank] for rank in path[-1].absent if rank in by_rank), None):
            if following in path:
                return path[path.index(following) :]
            path.append(following)
    return []


def together(dumps: Dumps) -> Iterator[tuple[RecordedGroup, int, dict[int, RecordedCall]]]:
    """Calls of several ranks with the same number in the same group, by rank."""
    found: dict[tuple[RecordedGroup, int], dict[int, RecordedCall]] = {}
    for dump in dumps.values():
        for group, calls in calls_of(dump).items():
            for call in calls:
                found.setdefault((group, call.sequence), {})[dump.rank] = call
    for (group, sequence), calls in found.items():
        if len(calls) > 1:
            yield group, sequence, calls


def _first_open(calls: Sequence[RecordedCall]) -> RecordedCall | None:
    """The first call behind the last one that was completed."""
    first = None
    for call in reversed(calls):
        if not call.open:
            break
        first = call
    return first
