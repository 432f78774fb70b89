"""The graders, graded: blank scores 0, the solution and its equals score full, every plausible mistake loses points."""

from __future__ import annotations

import nbformat
import pytest

from tests.graders import harness
from tools import release
from tools.grading.cells import tasks
from tools.grading.course import EXERCISES, SOLUTIONS, exercises

EVERY = exercises()


def solution(exercise: str):
    return SOLUTIONS / exercise / f"{exercise}.ipynb"


def test_there_are_exercises():
    assert EVERY


@pytest.mark.parametrize("exercise", EVERY)
def test_every_task_has_answers_enough(exercise):
    there = tasks(nbformat.read(solution(exercise), as_version=4))
    assert not harness.shortcomings(harness.answers(exercise), there)


@pytest.mark.parametrize("exercise", EVERY)
def test_every_answer_gets_what_it_deserves(exercise, tmp_path, run_sheets):
    found = harness.disagreements(exercise, harness.answers(exercise), tmp_path, run_sheets)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("exercise", EVERY)
def test_the_exercise_is_what_the_solution_releases(exercise, capsys):
    target = EXERCISES / exercise / f"{exercise}.ipynb"
    code = release.main(["--check", exercise])
    said = capsys.readouterr().err
    if "holds answers" in said:
        pytest.skip(f"{target.name} has been worked in")
    assert code == 0, said
