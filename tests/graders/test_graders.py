"""The graders, graded: blank scores 0, the solution and its equals score full, every plausible mistake loses points."""

from __future__ import annotations

import nbformat
import pytest
from nbgrader.validator import Validator

from tests.graders import harness
from tools import release
from tools.grading.cells import tasks
from tools.grading.course import EXERCISES, SOLUTIONS, exercises, settings

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
def test_every_answer_gets_what_it_deserves(exercise, tmp_path):
    """One test for all answers of an exercise, because its runs share a course."""
    found = harness.disagreements(exercise, harness.answers(exercise), tmp_path)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("exercise", EVERY)
def test_the_exercise_is_what_the_solution_releases(exercise, capsys):
    target = EXERCISES / exercise / f"{exercise}.ipynb"
    code = release.main(["--check", exercise])
    said = capsys.readouterr().err
    if "holds answers" in said:
        pytest.skip(f"{target.name} has been worked in")
    assert code == 0, said


@pytest.mark.parametrize("exercise", EVERY)
def test_validate_passes_the_solution_and_not_the_blank(exercise, tmp_path):
    """What JupyterLab's Validate button runs: the tests that a learner sees."""
    blank = tmp_path / f"{exercise}.ipynb"
    blank.write_bytes(release.release(exercise)[blank.name])
    validator = Validator(config=settings(tmp_path))
    assert validator.validate(str(solution(exercise))) == {}
    failed = validator.validate(str(blank))["failed"]
    assert len(failed) == len(harness.answers(exercise)), "every task's visible tests fail without an answer"
