"""Find out from recorded collectives why a job does not go on: which rank, in which collective of which group.

A rank that reports a hang is as a rule one that waits. So who waits leads to whom is waited for:

1. Calls with the same number in the same group have to agree; where they do not, the rank in the minority is at fault.
2. A rank that has called a collective waits for the members of its group that have not. Whoever is waited for and
   waits for nobody has the fault: its process is gone, or it has not entered. If all that are waited for wait
   themselves, they wait in a circle.
3. If all have entered and it does not end, ranks that are stopped are at fault, or else nobody can be told from others.
4. If all has ended, whoever made the others wait for long is slow: its own call was short where theirs were long.

Times of waiting are measured on each rank by itself, so clocks of hosts need not agree.

In production: `torchfrtrace` of PyTorch, which matches calls in the order of the dumps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from minilib.mechanisms.basics.checks import check_quantity
from minilib.operations.flight_recorder.recording import Dump, RecordedCall
from minilib.operations.flight_recorder.verdict import Verdict
from minilib.operations.flight_recorder.waiting import Dumps, WaitingRank, abandoned, all_waiting, cycle, together

ROOTED = ("broadcast", "reduce")  # some ranks wait for one rank only, or for none


def analyse(dumps: Iterable[Dump], dead: Collection[int] = (), patience: float = 1.0) -> Verdict:
    """Name the fault and the ranks that have it.

    Args:
        dumps: one of each rank; of some, if others left none.
        dead: ranks that are known to have died first, as RankFailed tells. Of ranks that are gone while another one
            lives this is found out.
        patience: seconds that a call may take, or that a rank may come late, before it counts.

    Raises:
        ValueError: without a dump, with two of one rank, or for a patience that is not positive.

    Cost: O(calls).
    """
    by_rank = _by_rank(dumps)
    check_quantity("patience", patience, above_zero=True)
    waiting = all_waiting(by_rank, patience)
    return (
        _mismatch(by_rank)
        or _dead(all_waiting(by_rank, 0) if dead else waiting, by_rank, dead)
        or _waited_for(waiting, by_rank, patience)
        or _slow(by_rank, patience)
        or Verdict("healthy", (), f"{_count(by_rank)} calls of {len(by_rank)} ranks, none of which waits for long")
    )


def _mismatch(dumps: Dumps) -> Verdict | None:
    """The first calls with one number that do not agree."""
    given_up = abandoned(dumps)
    found = []
    for group, sequence, calls in together(dumps):
        signatures = Counter(call.signature for call in calls.values())
        if len(signatures) > 1 and group not in given_up:
            found.append((min(call.enqueued_ns for call in calls.values()), group, sequence, calls, signatures))
    if not found:
        return None
    _, group, sequence, calls, signatures = min(found, key=lambda one: one[0])
    (usual, most), (_, second) = signatures.most_common(2)
    odd = [rank for rank, call in calls.items() if call.signature != usual or most == second]
    said = [
        f"{_ranks(rank for rank, call in calls.items() if call.signature == signature)} "
        + " and ".join(sorted({f"{call} at {call.site}" for call in calls.values() if call.signature == signature}))
        for signature in signatures
    ]
    tie = "; as many called the one as the other" if most == second else ""
    evidence = f"call {sequence} of {group}: {'; '.join(said)}{tie}"
    return Verdict("mismatch", tuple(sorted(odd)), evidence, group, sequence)


def _dead(waiting: list[WaitingRank], dumps: Dumps, known: Collection[int]) -> Verdict | None:
    """Processes that are gone, and that others wait for; whoever saw a collective fail before it ended is a victim."""
    gone = {rank for rank, dump in dumps.items() if not dump.process and not dump.closed}
    failed = {one.rank for one in waiting if one.call.state == "failed"}
    some_live = any(dump.process not in ("", "?") for dump in dumps.values())
    dead = set(known) or (gone - failed if some_live else set())
    for one in waiting:
        if ranks := dead.intersection(one.call.group.ranks) - {one.rank}:
            what = f"{_place(one.call)}, in which {_waiters(one, waiting)} waited"
            last = " ".join(_last_call(rank, dumps) for rank in sorted(ranks))
            return Verdict("dead", tuple(sorted(ranks)), f"{_ranks(ranks)} died before the end of {what}. {last}",
                           one.call.group, one.call.sequence)  # fmt: skip
    last = " ".join(_last_call(rank, dumps) for rank in sorted(known))
    return Verdict("dead", tuple(sorted(known)), f"{_ranks(known)} died, nobody waited. {last}") if known else None


def _waited_for(waiting: list[WaitingRank], dumps: Dumps, patience: float) -> Verdict | None:
    """The ranks that are waited for and wait for nobody, or the circle in which all of them wait."""
    blocked = {one.rank for one in waiting if one.blocks}
    for one in waiting:
        if free := set(one.absent) - blocked:
            return _not_entered(one, free, waiting, dumps)
    for one in waiting:
        if one.unknown and not one.absent:
            return _not_entered(one, set(one.unknown), waiting, dumps)
    if circle := cycle([one for one in waiting if one.blocks]):
        return _deadlock(circle)
    for one in waiting:
        if late := _too_late(one, waiting, patience):
            return _not_entered(one, late, waiting, dumps)
    return _stuck(waiting[0], waiting, dumps) if waiting else None


def _too_late(one: WaitingRank, waiting: list[WaitingRank], patience: float) -> set[int]:
    """Ranks that called a collective when the others had waited for long, and had failed."""
    seconds = {other.rank: other.call.wait_ns / 1e9 for other in waiting if _same(one, other)}
    longest = max(seconds.values())
    failed = one.call.state == "failed" and len(seconds) == len(one.call.group.ranks)
    return {rank for rank, value in seconds.items() if failed and value <= longest - patience}


def _deadlock(circle: list[WaitingRank]) -> Verdict:
    after = [*circle[1:], circle[0]]
    said = [
        f"rank {one.rank} waits in {_place(one.call)} ({one.call.site}) for rank {following.rank}"
        for one, following in zip(circle, after, strict=True)
    ]
    ranks, call = tuple(sorted(one.rank for one in circle)), circle[0].call
    return Verdict("deadlock", ranks, ", ".join(said), call.group, call.sequence)


def _not_entered(one: WaitingRank, ranks: set[int], waiting: list[WaitingRank], dumps: Dumps) -> Verdict:
    last = " ".join(_last_call(rank, dumps) for rank in sorted(ranks))
    evidence = (
        f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} not called {_place(one.call)} in time; "
        f"{_waiters(one, waiting, ranks)} waited ({one.call.site}). {last}"
    )
    return Verdict("not_entered", tuple(sorted(ranks)), evidence, one.call.group, one.call.sequence)


def _stuck(one: WaitingRank, waiting: list[WaitingRank], dumps: Dumps) -> Verdict:
    members = [rank for rank in one.call.group.ranks if rank in dumps]
    stopped = [rank for rank in members if dumps[rank].process == "T"]
    inside = [other.rank for other in waiting if _same(one, other)]
    why = f"; {_ranks(stopped)} is stopped" if stopped else ""
    evidence = f"all have called {_place(one.call)}, and {_waiters(one, waiting)} waited for its end{why}"
    return Verdict("stuck", tuple(sorted(stopped or inside)), evidence, one.call.group, one.call.sequence)


def _slow(dumps: Dumps, patience: float) -> Verdict | None:
    """The rank whose calls were short where those of the others were long, in the call where that was worst."""
    worst, found = patience, None
    for group, sequence, calls in together(dumps):
        if len(calls) < len(group.ranks) or any(call.state != "completed" for call in calls.values()):
            continue
        seconds = {rank: (call.ended_ns - call.started_ns) / 1e9 for rank, call in calls.items()}
        longest = max(seconds.values())
        late = [rank for rank in calls if seconds[rank] <= longest - patience]
        one_rank = calls[group.ranks[0]].op not in ROOTED or len(late) == 1 == len(calls) - sum(
            value > longest - patience for value in seconds.values()
        )
        if late and one_rank and longest - min(seconds.values()) >= worst:
            worst, found = longest - min(seconds.values()), (group, sequence, calls, late)
    if found is None:
        return None
    group, sequence, calls, late = found
    waiters = [rank for rank in calls if rank not in late]
    evidence = (
        f"{_ranks(late)} came {worst:.1f} s after others to {_place(calls[late[0]])} ({calls[late[0]].site}), "
        f"in which {_ranks(waiters)} waited"
    )
    return Verdict("slow", tuple(sorted(late)), evidence, group, sequence)


def _by_rank(dumps: Iterable[Dump]) -> Dumps:
    everything = list(dumps)
    by_rank = {dump.rank: dump for dump in everything}
    if not everything or len(by_rank) < len(everything):
        found = sorted(dump.rank for dump in everything)
        raise ValueError(f"an analysis takes one dump of each rank, and at least one; got dumps of ranks {found}")
    return by_rank


def _count(dumps: Dumps) -> int:
    return sum(len(dump.calls) for dump in dumps.values())


def _place(call: RecordedCall) -> str:
    return f"{call}, call {call.sequence} of {call.group}"


def _same(one: WaitingRank, other: WaitingRank) -> bool:
    """Whether two ranks wait in the same collective."""
    return (one.call.group, one.call.sequence) == (other.call.group, other.call.sequence)


def _waiters(one: WaitingRank, waiting: list[WaitingRank], but: Collection[int] = ()) -> str:
    return _ranks(other.rank for other in waiting if _same(one, other) and other.rank not in but)


def _last_call(rank: int, dumps: Dumps) -> str:
    """What is known of a rank that others wait for."""
    if rank not in dumps:
        return f"Rank {rank} left no dump."
    dump = dumps[rank]
    process = "; it has ended well" if dump.closed else "; its process is stopped" if dump.process == "T" else ""
    if not dump.calls:
        return f"Rank {rank} has called nothing{process}."
    last = dump.calls[-1]
    return f"The last call of rank {rank} is {_place(last)}, {last.state} ({last.site}){process}."


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
