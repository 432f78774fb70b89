"""The one table of chapters (chapters/curriculum.toml), read for the README, the map and the tests."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.basics.format import Table

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"


@dataclass(frozen=True)
class Chapter:
    """A row of the table; the fields are explained at the head of curriculum.toml."""

    name: str
    classic: str
    ai: str
    mechanism: str
    modules: tuple[str, ...]
    breaks: str
    state: str

    def __post_init__(self) -> None:
        if self.state not in ("written", "planned"):
            raise ValueError(f"chapter {self.name}: state is 'written' or 'planned', got {self.state!r}")

    @property
    def number(self) -> int:
        """Position in the book, from the two digits that the name begins with."""
        return int(self.name[:2])

    @property
    def written(self) -> bool:
        """True once the notebook exists."""
        return self.state == "written"


def chapters(path: Path = CHAPTERS / "curriculum.toml") -> list[Chapter]:
    """All chapters in reading order.

    Raises:
        TypeError: if a row lacks a field or has one that no row should.
        ValueError: if a state is neither "written" nor "planned".
    """
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["chapter"]
    return [Chapter(**{**row, "modules": tuple(row["modules"])}) for row in rows]


def markdown(prefix: str = "") -> str:
    """The table of mappings in Markdown; `prefix` leads from the page that shows it to chapters/."""
    lines = ["| | what you know | what AI infrastructure calls it | state |", "|---|---|---|---|"]
    for chapter in chapters():
        label = f"[{chapter.name}]({prefix}{chapter.name}.ipynb)" if chapter.written else chapter.name
        lines.append(f"| {label} | {chapter.classic} | {chapter.ai} | {chapter.state} |")
    return "\n".join(lines)


def breaks_table() -> Table:
    """Each mapping with the line that says where it breaks."""
    pairs = [chapter for chapter in chapters() if chapter.ai]
    return Table(
        ("chapter", "what you know", "what AI calls it", "where the analogy breaks", "state"),
        [(chapter.name, chapter.classic, chapter.ai, chapter.breaks, chapter.state) for chapter in pairs],
    )
