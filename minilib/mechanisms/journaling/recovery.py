"""Which snapshots and which segments of a log are needed: to start again, and to be kept.

    log        │ segment 0 ────── │ segment 40 ───── │ segment 75 ── …     named by the first record
    snapshots                     ▲ 40               ▲ 75                  named by the records that they cover

Recovery takes the newest snapshot that is whole and replays what the log has behind it. A checkpoint of a training run
is a snapshot without a log: `retained` says which to keep, and nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple


class SegmentMissing(ValueError):
    """Records between a snapshot and the end of the log are in no segment."""


class Replay(NamedTuple):
    """A segment to read.

    Args:
        first: its first record.
        known_durable: records of the whole log that are durable because the next segment begins behind them; 0 for
            the last segment, of which this is not known.
    """

    first: int
    known_durable: int


def numbered(kind: str, number: int) -> str:
    """The name of a file, "log-000000000040"; names sort as their numbers do."""
    return f"{kind}-{number:012d}"


def numbers_of(kind: str, names: Iterable[str]) -> list[int]:
    """The numbers of all files of a kind, in order; other names, temporary ones among them, are skipped."""
    found = (name.removeprefix(f"{kind}-") for name in names if name.startswith(f"{kind}-"))
    return sorted(int(number) for number in found if len(number) == 12 and number.isascii() and number.isdigit())


def replay_order(snapshot: int, segments: Collection[int]) -> list[Replay]:
    """The segments to read behind a snapshot, in order.

    Args:
        snapshot: records that it covers; 0 without a snapshot.
        segments: first records of the segments that are there.

    Raises:
        SegmentMissing: if none reaches back to the snapshot. A gap between segments shows when one is scanned: it ends
            before `known_durable`.
    """
    firsts = sorted(segments)
    needed = firsts[max(0, sum(first <= snapshot for first in firsts) - 1) :]
    if not needed or needed[0] > snapshot:
        begins = f"the log begins with record {needed[0]}" if needed else "there is no log"
        raise SegmentMissing(f"the snapshot covers {snapshot} records, and {begins}; get what is missing from a copy")
    return [Replay(first, after) for first, after in zip(needed, [*needed[1:], 0], strict=True)]


def retained(committed: Collection[int], keep: int) -> list[int]:
    """The newest `keep` of the committed snapshots or checkpoints, in order; all others may be removed.

    Raises:
        ValueError: if nothing is to be kept.
    """
    if keep < 1:
        raise ValueError(f"keep is 1 or more, got {keep!r}: the newest is what recovery starts from")
    return sorted(committed)[-keep:]


def expendable_segments(oldest_kept: int, segments: Collection[int]) -> list[int]:
    """First records of the segments that no recovery needs: all of their records are in the oldest snapshot kept."""
    firsts = sorted(segments)
    return [first for first, after in zip(firsts, firsts[1:], strict=False) if after <= oldest_kept]
