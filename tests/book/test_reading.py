import json
import re

import pytest

from minilib.book import curriculum, reading


def notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")


def cell(kind, *lines, **metadata):
    return {"cell_type": kind, "source": list(lines), "metadata": metadata}


def test_words_lines_and_tasks_are_counted(tmp_path):
    chapters = tmp_path / "chapters"
    notebook(
        chapters / "01_x.ipynb",
        cell("markdown", "# One title\n", "and *six* words"),
        cell("code", "a = 1\n", "\n", "    \n", "b = 2  # four words, no prose"),
        cell("raw", "nobody reads this"),
    )
    assert reading.effort("01_x", chapters) == reading.Effort(words=6, lines=2, tasks=0)
    solved = [cell("code", nbgrader={"solution": value}) for value in (True, False, True)]
    notebook(tmp_path / "solutions" / "01_x" / "01_x.ipynb", *solved, cell("code"))
    assert reading.effort("01_x", chapters).tasks == 2
    with pytest.raises(FileNotFoundError):
        reading.effort("02_y", chapters)


def test_an_empty_chapter_takes_no_time(tmp_path):
    notebook(tmp_path / "chapters" / "01_x.ipynb")
    nothing = reading.effort("01_x", tmp_path / "chapters")
    assert nothing.reading == nothing.solving == 0


def test_minutes_follow_from_the_three_rates():
    assert reading.Effort(words=400, lines=30, tasks=0).reading == 3.5
    assert reading.Effort(words=0, lines=0, tasks=3).solving == 30


def test_paths_lead_through_written_chapters_in_order():
    written = [chapter.name for chapter in curriculum.chapters() if chapter.written]
    paths = reading.paths()
    assert len(paths) == 3
    for path in paths:
        assert [name for name in written if name in path.chapters] == list(path.chapters), path.title
        assert path.afterwards and path.reader
        minutes = sum(reading.effort(name).reading for name in path.chapters)
        minutes += sum(reading.effort(name).solving for name in path.exercises)
        assert path.hours == pytest.approx(minutes / 60)
    weekend = paths[-1]
    assert weekend.title == "One weekend" and weekend.hours < 8 < min(path.hours for path in paths[:-1])


def test_exercises_of_a_chapter_that_is_not_on_the_path_are_refused():
    with pytest.raises(ValueError, match="exercises of 02_b, but not the chapters"):
        reading.ReadingPath("t", "r", "a", ("01_a",), ("01_a", "02_b"))


def test_the_page_has_every_chapter_once():
    rows = [line for line in reading.paths_markdown().splitlines() if line.startswith("| [")]
    written = [chapter.name for chapter in curriculum.chapters() if chapter.written]
    assert [row.split("]")[0] for row in rows] == [f"| [{name}" for name in written]


MINUTES = {
    "thirty": 30, "half an hour": 30, "twenty-five": 25, "thirty-five": 35, "forty": 40, "forty-five": 45, "fifty": 50,
    "fifty-five": 55, "an hour": 60, "seventy": 70,
}  # fmt: skip


WRITTEN = [chapter.name for chapter in curriculum.chapters() if chapter.written and chapter.name != "00_map"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_chapter_says_how_long_it_takes(name):
    """Its sentence is right within five minutes of the count."""
    text = (reading.CHAPTERS / f"{name}.ipynb").read_text(encoding="utf-8")
    said = re.search(r"(?:It|The chapter) takes ([a-z -]+?)(?: minutes)? to read", text)
    assert said and said[1] in MINUTES, "the first cell says how long the chapter takes to read"
    assert abs(MINUTES[said[1]] - reading.effort(name).reading) <= 5, f"it says {said[1]}"
