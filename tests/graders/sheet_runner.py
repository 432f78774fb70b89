"""Runs an exercise's sheets without Jupyter: each in a fork of one process that has IPython and torch loaded.

Jupyter, nbgrader and what every kernel imports anew take four seconds a sheet, and there are a hundred sheets and more.
The cells that all sheets of an exercise begin with run once, and each sheet goes on in a fork of that process.
What a sheet is worth, its cells alone decide, by nbgrader's rule: a test is passed if it raises nothing and writes
nothing to stderr. harness.py has some sheets graded both ways and compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TextIO

from tests.graders.preloaded import SHEETS, START_TIMEOUT

SHEET_TIMEOUT = 300.0  # seconds for all cells of a sheet

Sheet = Mapping[str, str]  # name → code of each cell, in order
Run = Callable[..., list[dict[str, str]]]  # (sheets; seconds that a cell may run) → what went wrong in each, by name


class SheetLost(RuntimeError):
    """A sheet ended its process, or could not be interrupted."""


class CellTimeoutError(BaseException):
    """nbgrader's name for a cell that was stopped."""


@contextlib.contextmanager
def sheet_runner(door: str, seconds_a_cell: int) -> Iterator[Run]:
    """While the block runs, a function that runs the cells of sheets, and goes on after errors.

    Args:
        door: socket of the server in preloaded.py.
        seconds_a_cell: that a cell may run, unless the function is told otherwise.

    Raises:
        SheetLost: by the function, if a sheet ends its process or does not end.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(door)
        socket.send_fds(connection, [json.dumps(SHEETS).encode() + b"\0"], [0, 1, 2])
        with connection.makefile() as replies:

            def run(sheets: list[Sheet], seconds: int = seconds_a_cell) -> list[dict[str, str]]:
                connection.sendall(json.dumps([sheets, seconds]).encode() + b"\n")
                return _reply(replies, (1 + len(sheets)) * SHEET_TIMEOUT + 30)

            _reply(replies, START_TIMEOUT)
            yield run


def _reply(replies: TextIO, timeout: float) -> list[dict[str, str]]:
    spoke, _, _ = select.select([replies], [], [], timeout)
    line = replies.readline() if spoke else ""
    found = json.loads(line) if line else None
    if found is None:
        raise SheetLost("a sheet ended its process, or did not end" if line else "the server of sheets is gone")
    return found


def serve(connection: socket.socket) -> None:
    """Run the sheets of each line that comes, and answer with a line: what went wrong where, or null if one is lost."""
    asked, replies = connection.makefile(), connection.makefile("w")
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    matplotlib.use("agg")
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    shell.showtraceback = shell.showsyntaxerror = lambda *args, **kwargs: None
    print(json.dumps([]), file=replies, flush=True)
    for line in asked:
        sheets, seconds = json.loads(line)
        found = _in_fork(lambda: _run_sheets(shell, sheets, seconds), (1 + len(sheets)) * SHEET_TIMEOUT)  # noqa: B023
        print(json.dumps(found), file=replies, flush=True)


def _run_sheets(shell, sheets: list[Sheet], seconds: int) -> list[dict[str, str]] | None:
    """What went wrong in each sheet; None if one is lost."""
    cells = [list(sheet.items()) for sheet in sheets]
    first = os.path.commonprefix(cells)  # of lists, too
    before = _run_cells(shell, first, seconds)
    found = []
    for sheet in cells:
        rest = sheet[len(first) :]
        failed = _in_fork(lambda: _run_cells(shell, rest, seconds), SHEET_TIMEOUT, Path.cwd())  # noqa: B023
        if failed is None:
            return None
        found.append(before | failed)
    return found


def _in_fork(work: Callable[[], object], timeout: float, files: Path | None = None) -> object:
    """What a function returns in a fork, in a folder of its own; None if the process ends first or takes too long.

    Args:
        work: the function; what it returns goes through JSON.
        timeout: seconds that it may take.
        files: a folder whose content its own folder begins with.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        with tempfile.TemporaryDirectory(prefix="sheet-") as folder:
            if files is not None:
                shutil.copytree(files, folder, dirs_exist_ok=True)
            os.chdir(folder)
            os.write(writer, json.dumps(work()).encode() + b"\n")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ended, _, _ = select.select([pipe], [], [], timeout)
        reply = pipe.readline() if ended else ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return json.loads(reply) if reply else None


def _run_cells(shell, cells: list[tuple[str, str]], seconds: int) -> dict[str, str]:
    found = {}
    signal.signal(signal.SIGALRM, _stop)
    for name, code in cells:
        written = io.StringIO()
        signal.alarm(seconds)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(written):
                result = shell.run_cell(code)
            error = result.error_before_exec or result.error_in_exec
        except CellTimeoutError as late:
            error = late
        finally:
            signal.alarm(0)
        if error is not None:
            found[name] = f"{type(error).__name__}: {error}"
        elif written.getvalue():
            found[name] = f"on stderr: {written.getvalue()}"
    return found


def _stop(number: int, frame: FrameType | None) -> None:
    raise CellTimeoutError("this cell ran too long and was stopped")
