"""Runs an exercise's sheets without Jupyter: each in a fork of one process that has IPython and torch loaded.

Jupyter, nbgrader and what every kernel imports anew take four seconds a sheet, and there are a hundred sheets and more.
What a sheet is worth, its cells alone decide, by nbgrader's rule: a test is passed if it raises nothing and writes
nothing to stderr. harness.py has some sheets graded both ways and compares.

Usage: python -m tests.graders.sheet_runner SECONDS_A_CELL
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from tests.graders.preloaded import ENVIRONMENT, START_TIMEOUT

SHEET_TIMEOUT = 300.0  # seconds for all cells of a sheet

Run = Callable[[Mapping[str, str]], dict[str, str]]  # (name → code of each cell, in order) → what went wrong, by name


class SheetLost(RuntimeError):
    """A sheet ended its process, or could not be interrupted."""


class CellTimeoutError(BaseException):
    """nbgrader's name for a cell that was stopped."""


@contextlib.contextmanager
def sheet_runner(seconds_a_cell: int) -> Iterator[Run]:
    """While the block runs, a function that runs the cells of one sheet after another, and goes on after errors.

    Raises:
        SheetLost: by the function, if a sheet ends its process or does not end.
    """
    command = [sys.executable, "-m", "tests.graders.sheet_runner", str(seconds_a_cell)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(cells: Mapping[str, str]) -> dict[str, str]:
            server.stdin.write(json.dumps(dict(cells)) + "\n")
            server.stdin.flush()
            return _reply(server, SHEET_TIMEOUT + 30)

        try:
            _reply(server, START_TIMEOUT)
            yield run
        finally:
            server.kill()


def _reply(server: subprocess.Popen, timeout: float) -> dict[str, str]:
    spoke, _, _ = select.select([server.stdout], [], [], timeout)
    line = server.stdout.readline() if spoke else ""
    found = json.loads(line) if line else None
    if found is None:
        raise SheetLost("a sheet ended its process, or did not end" if line else "the server of sheets is gone")
    return found


def serve(seconds_a_cell: int) -> None:
    """Run a sheet for each line of stdin, and answer with a line: what went wrong where, or null if it is lost."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what cells print is no reply
    os.environ |= {"MPLBACKEND": "agg", **ENVIRONMENT}
    import torch._dynamo  # noqa: F401 - optimizers and dispatch modes load it; here, once for all sheets
    import torch.distributed  # noqa: F401
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from minilib.ranks.launch import local

    local.server.ensure_running()  # one for the ranks of all sheets
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    shell.showtraceback = shell.showsyntaxerror = lambda *args, **kwargs: None
    print(json.dumps({}), file=replies)
    for line in sys.stdin:
        reader, writer = os.pipe()
        sheet = os.fork()
        if sheet == 0:
            os.setsid()
            local.server.ensure_running = lambda: None  # only the parent of it may ask
            with tempfile.TemporaryDirectory(prefix="sheet-") as folder:
                os.chdir(folder)
                os.write(writer, json.dumps(_run_cells(shell, json.loads(line), seconds_a_cell)).encode() + b"\n")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            ended, _, _ = select.select([pipe], [], [], SHEET_TIMEOUT)
            reply = pipe.readline() if ended else ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(sheet, signal.SIGKILL)
        os.waitpid(sheet, 0)
        replies.write(reply or "null\n")


def _run_cells(shell, cells: dict[str, str], seconds: int) -> dict[str, str]:
    found = {}
    signal.signal(signal.SIGALRM, _stop)
    for name, code in cells.items():
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


if __name__ == "__main__":
    serve(int(sys.argv[1]))
