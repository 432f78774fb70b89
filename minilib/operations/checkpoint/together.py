"""Ranks that go on together or fail together: what one of them cannot do, none of them takes for done."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from minilib.ranks.agreement import gather_texts
from minilib.ranks.collectives import Communicator

Found = TypeVar("Found")


class OtherRankFailed(RuntimeError):
    """Another rank could not do its part; the message says which one, and why."""


def told_by_all(text: str, comm: Communicator | None) -> list[str]:
    """What every rank has to say, in order of ranks; on one process its own."""
    return [text] if comm is None else gather_texts(text, comm)


def fail_together(error: Exception | None, comm: Communicator | None) -> None:
    """Return if no rank has an error. A collective.

    Raises:
        Exception: this rank's own error.
        OtherRankFailed: if another rank has one.
    """
    said = told_by_all("" if error is None else f"{type(error).__name__}: {error}", comm)
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(said) if text]
    if failed:
        raise OtherRankFailed(f"rank {failed[0][0]} failed: {failed[0][1]}")


def tried(action: Callable[[], Found]) -> tuple[Found | None, Exception | None]:
    """What an action returns, and what it raises: one of both is None."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def decided_by_first(action: Callable[[], object], comm: Communicator | None) -> object:
    """What an action returns on rank 0, on all ranks; anything that JSON can say. A collective.

    Raises:
        Exception: on rank 0 what the action raises, elsewhere OtherRankFailed.
    """
    found, error = tried(action) if comm is None or comm.rank == 0 else (None, None)
    fail_together(error, comm)
    return json.loads(told_by_all(json.dumps(found), comm)[0])
