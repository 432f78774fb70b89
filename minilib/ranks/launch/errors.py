"""What can go wrong with ranks, by name."""

from __future__ import annotations


class RankFailed(RuntimeError):
    """A rank raised or died; the message says which one and how, with its own traceback where there is one.

    Args:
        message: what happened.
        rank: the first rank to fail; what befell others because of it is not reported.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message, rank)  # both, so that the error can be pickled
        self.rank = rank

    def __str__(self) -> str:
        return self.args[0]


class ReturnNotPicklable(RankFailed):
    """A rank returned a value that cannot be pickled there or unpickled here."""


class RanksTimedOut(TimeoutError):
    """Ranks had not returned in time; the message says which, and where each of them was.

    Args:
        message: what happened.
        ranks: the ranks that had not returned.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class WorkingFolderGone(FileNotFoundError):
    """The working folder of the process that calls `run` was deleted."""


class TemporaryFolderTooLong(OSError):
    """The path of the temporary folder leaves no room for the name of a socket in it."""


class UnsupportedPython(ImportError):
    """This Python lacks an interface of CPython's that launch needs; the message names it."""


class NestedRun(RuntimeError):
    """`run` was called by a function that already runs on a rank."""
