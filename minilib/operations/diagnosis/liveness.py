"""Which ranks are gone or stand still, from their heartbeats; and what those that ended in an error said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.heartbeat import Pulse

SILENT = 50  # beats of the other ranks without one of its own, after which a rank is lost


@dataclass(frozen=True)
class RankError:
    """The error with which a rank ended.

    Args:
        rank, step: where and when.
        type: of the error.
        text: of its message.
        errno: name of the system's error that this rank itself met, such as "ENOSPC"; empty if it met none.
    """

    rank: int
    step: int
    type: str
    text: str
    errno: str


def lost_heartbeats(pulses: Sequence[Pulse], silent: Sequence[int], died: Sequence[int] = ()) -> list[Finding]:
    """Ranks whose process is gone, or has no beats while others have.

    Args:
        pulses: of all ranks, as last read.
        silent: for each rank, beats of others since its own last one.
        died: ranks whose process is known to be gone.
    """
    return [
        Finding("lost_heartbeat", rank, f"no beat since number {pulse.beats} in step {pulse.step}, "
                + ("and its process is gone" if rank in died else f"while others had {silent[rank]}"))
        for rank, pulse in enumerate(pulses)
        if rank in died or (silent[rank] >= SILENT and not pulse.over)
    ]  # fmt: skip


def unexplained_errors(errors: Sequence[RankError]) -> list[Finding]:
    """Every error, as a symptom: for when nothing says where it comes from."""
    return [Finding("error", error.rank, f"{error.type} in step {error.step}: {error.text}") for error in errors]


def full_disks(errors: Sequence[RankError]) -> list[Finding]:
    """Ranks whose own disk is full: all ranks fail to save, and one alone has met ENOSPC."""
    return [
        Finding("full_disk", error.rank, f"{error.type} after step {error.step}: {error.text}")
        for error in errors
        if error.errno == "ENOSPC"
    ]
