"""How long chapters and paths through the book take: counted words, code lines and graded tasks, at three rates."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from minilib.book.curriculum import CHAPTERS

# Assumptions: prose at the pace of a careful reader, code slower, and a task with its tests.
WORDS_A_MINUTE, LINES_A_MINUTE, MINUTES_A_TASK = 200, 20, 10


@dataclass(frozen=True)
class Effort:
    """What a chapter asks of its reader.

    Args:
        words: of its Markdown cells.
        lines: of its code cells, blank ones left out.
        tasks: graded tasks of its exercises.
    """

    words: int
    lines: int
    tasks: int

    @property
    def reading(self) -> float:
        """Minutes for text and code."""
        return self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE

    @property
    def solving(self) -> float:
        """Minutes for the exercises."""
        return self.tasks * MINUTES_A_TASK


@dataclass(frozen=True)
class ReadingPath:
    """A way through the book (chapters/paths.toml).

    Args:
        title: where it leads.
        reader: who it is for.
        afterwards: what the reader can do then.
        chapters: names, in reading order.
        exercises: names of those of its chapters whose exercises belong to it.
    """

    title: str
    reader: str
    afterwards: str
    chapters: tuple[str, ...]
    exercises: tuple[str, ...]

    def __post_init__(self) -> None:
        if strange := set(self.exercises) - set(self.chapters):
            raise ValueError(f"path {self.title!r} has exercises of {', '.join(sorted(strange))}, but not the chapters")

    @property
    def hours(self) -> float:
        """Hours for its chapters and its exercises."""
        reading = sum(effort(name).reading for name in self.chapters)
        return (reading + sum(effort(name).solving for name in self.exercises)) / 60


def effort(name: str, chapters: Path = CHAPTERS) -> Effort:
    """Count one chapter and its exercises.

    Args:
        name: such as "01_numbers"; its tasks are counted in solutions/ beside the folder of chapters.

    Raises:
        FileNotFoundError: if there is no such chapter; one without exercises has no tasks.
    """
    cells = _cells(chapters / f"{name}.ipynb")
    words = sum(len(_source(cell).split()) for cell in cells if cell["cell_type"] == "markdown")
    code = [line for cell in cells if cell["cell_type"] == "code" for line in _source(cell).splitlines()]
    exercise = chapters.parent / "solutions" / name / f"{name}.ipynb"
    solved = _cells(exercise) if exercise.exists() else []
    tasks = sum(bool(cell["metadata"].get("nbgrader", {}).get("solution")) for cell in solved)
    return Effort(words, sum(bool(line.strip()) for line in code), tasks)


def paths(file: Path = CHAPTERS / "paths.toml") -> list[ReadingPath]:
    """All paths, in the order of the file; ``exercises = true`` there stands for those of all its chapters."""
    rows = tomllib.loads(file.read_text(encoding="utf-8"))["path"]
    for row in rows:
        row["exercises"] = row["chapters"] if row["exercises"] is True else row["exercises"]
    return [ReadingPath(**row | {key: tuple(row[key]) for key in ("chapters", "exercises")}) for row in rows]


def paths_markdown() -> str:
    """The paths and the time of every chapter on them, as chapters/README.md shows them."""
    parts = [_described(path) for path in paths()]
    rows = ["| chapter | text and code | graded tasks | solving them |", "|---|---|---|---|"]
    for file in sorted(CHAPTERS.glob("[0-9][0-9]_*.ipynb")):
        cost = effort(file.stem)
        solving = f"{cost.tasks} | {_minutes(cost.solving)}" if cost.tasks else "– | –"
        rows.append(f"| [{file.stem}]({file.name}) | {_minutes(cost.reading)} | {solving} |")
    return "\n\n".join([*parts, "## Every chapter", "\n".join(rows)])


def _described(path: ReadingPath) -> str:
    links = " → ".join(f"[{name}]({name}.ipynb)" for name in path.chapters)
    solved = ", ".join(name[:2] for name in path.exercises) if path.exercises != path.chapters else "all"
    head = f"## {path.title}: {path.hours:.0f} hours\n\n**For** {path.reader}. **Afterwards** {path.afterwards}."
    return f"{head}\n\n{links}\n\nExercises: {solved}."


def _minutes(minutes: float) -> str:
    return f"{5 * round(minutes / 5)} min"  # nobody reads by the minute, and an edited sentence changes no line


def _cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _source(cell: dict) -> str:
    return "".join(cell["source"])
