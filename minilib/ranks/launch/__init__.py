"""Start ranks, run a function on each of them, and collect what they return."""

from minilib.ranks.launch.errors import (
    NestedRun,
    RankFailed,
    RanksTimedOut,
    ReturnNotPicklable,
    TemporaryFolderTooLong,
    UnsupportedPython,
    WorkingFolderGone,
)
from minilib.ranks.launch.run import hosts, run

__all__ = [
    "NestedRun",
    "RankFailed",
    "RanksTimedOut",
    "ReturnNotPicklable",
    "TemporaryFolderTooLong",
    "UnsupportedPython",
    "WorkingFolderGone",
    "hosts",
    "run",
]
