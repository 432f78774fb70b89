"""nbgrader's execution of a notebook with a cap on what its cells write: an endless print must not fill the memory."""

from __future__ import annotations

from collections import Counter

from nbformat import NotebookNode
from nbgrader.preprocessors import Execute

# Characters that are kept of one cell. Pictures are displayed, and large.
CAPS = {"stdout": 2**16, "stderr": 2**16, "display": 2**20}
ERROR_CAP = 2**12  # of each line of a traceback: it is never dropped, because points depend on it
OVERHEAD = 100  # characters that an output counts beyond its own: a million empty ones are large, too


class CappedExecute(Execute):
    """Runs a notebook and keeps the beginning of what each cell writes, and a line that says so."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._written: Counter[tuple[int, str]] = Counter()  # (cell, kind of output) → characters
        self._full: set[tuple[int, str]] = set()  # of which something has been cut

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Take in a message of the kernel, cut to what there is still room for."""
        kind, content = msg["msg_type"], msg["content"]
        if kind == "stream":
            room = self._room(cell_index, content["name"], len(content["text"]))
            if room is None:
                return None
            if len(content["text"]) > room:
                content["text"] = content["text"][:room] + _note(content["name"])
        elif kind in ("display_data", "execute_result", "update_display_data"):
            size = sum(len(str(value)) for value in content["data"].values())
            room = self._room(cell_index, "display", size)
            if room is None:
                return None
            if size > room:
                content["data"] = {"text/plain": _note("display").strip()}
        elif kind == "error":
            content["evalue"] = _shortened(content["evalue"])
            content["traceback"] = [_shortened(line) for line in content["traceback"]]
        return super().process_message(msg, cell, cell_index)

    def _room(self, cell_index: int, kind: str, size: int) -> int | None:
        """Characters that there is room for when an output comes; None if one before it was cut."""
        key = cell_index, kind
        if key in self._full:
            return None
        room = max(0, CAPS[kind] - self._written[key])
        self._written[key] += size + OVERHEAD
        if size > room:
            self._full.add(key)
        return room


def _note(kind: str) -> str:
    return f"\n… cut here: {CAPS[kind]:,} characters are kept of what one cell writes ({kind})\n"


def _shortened(text: str) -> str:
    if len(text) <= ERROR_CAP:
        return text
    return f"{text[:ERROR_CAP]} … {len(text) - ERROR_CAP:,} characters left out"
