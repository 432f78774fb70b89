"""The graders, graded: blank scores 0, the solution and its equals score full, every plausible mistake loses points.

Each exercise has an answers_NN_name.py beside this file. The k-th wrong answer of every task goes into one notebook, so
that an exercise takes a few runs; tasks are independent, and the runs prove that, too.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from copy import deepcopy
from functools import cache
from itertools import zip_longest

import nbformat
import pytest

from tests.graders.answers import Answers
from tools.course import SOLUTIONS, Course, course, exercises, test_cells
from tools.release import EXERCISES, has_answers, release

EVERY = exercises()


def answers(exercise: str) -> dict[str, Answers]:
    return importlib.import_module(f"tests.graders.answers_{exercise}").TASKS


@cache
def runs(exercise: str) -> dict[str, dict[str, float]]:
    """Points per test cell, as a share of the most, for every notebook that the answers make."""
    tasks = answers(exercise)
    sheets = {"blank": {}, "solution": None}
    for kind in ("correct", "wrong"):
        columns = [
            list(getattr(task, kind)) if kind == "correct" else list(task.wrong.values()) for task in tasks.values()
        ]
        for k, row in enumerate(zip_longest(*columns)):
            sheets[f"{kind} {k}"] = {name: code for name, code in zip(tasks, row, strict=True) if code is not None}
    first, *others = tasks
    sheets["one mistake"] = {name: tasks[name].correct[0] for name in others}
    sheets["one mistake"][first] = next(iter(tasks[first].wrong.values()))
    with course(exercise) as made:
        blank = nbformat.read(made.release(), as_version=4)
        return {name: score(made, blank, name, sheet) for name, sheet in sheets.items()}


def score(made: Course, blank: nbformat.NotebookNode, name: str, sheet: dict[str, str] | None) -> dict[str, float]:
    """Grade the official solution (None), or the blank exercise with some cells filled in."""
    notebook = deepcopy(blank) if sheet is not None else nbformat.read(solution(made.exercise), as_version=4)
    for cell in notebook.cells:
        cell.source = (sheet or {}).get(cell.id, cell.source)
    path = made.folder / "notebook.ipynb"
    nbformat.write(notebook, path)
    return {test: got / most for test, (got, most) in made.grade(path, learner=name.replace(" ", "-")).items()}


def solution(exercise: str):
    return SOLUTIONS / exercise / f"{exercise}.ipynb"


@pytest.mark.parametrize("exercise", EVERY)
def test_every_task_has_answers_enough(exercise):
    tasks = answers(exercise)
    source = nbformat.read(solution(exercise), as_version=4)
    assert list(tasks) == [name.replace("test", "task") for name in test_cells(source)]
    for name, task in tasks.items():
        assert len(task.correct) >= 1, f"{name} needs an answer that is different but correct"
        assert len(task.wrong) >= 3, f"{name} needs three plausible mistakes"


@pytest.mark.parametrize("exercise", EVERY)
def test_blank_scores_nothing_and_the_solution_everything(exercise):
    assert set(runs(exercise)["blank"].values()) == {0}
    assert set(runs(exercise)["solution"].values()) == {1}


@pytest.mark.parametrize("exercise", EVERY)
def test_answers_that_are_different_but_correct_score_everything(exercise):
    for name, task in answers(exercise).items():
        for k in range(len(task.correct)):
            assert runs(exercise)[f"correct {k}"][name.replace("task", "test")] == 1, f"{name}, correct answer {k}"


@pytest.mark.parametrize("exercise", EVERY)
def test_every_plausible_mistake_loses_points(exercise):
    for name, task in answers(exercise).items():
        for k, mistake in enumerate(task.wrong):
            assert runs(exercise)[f"wrong {k}"][name.replace("task", "test")] < 1, f"{name}: {mistake}"


@pytest.mark.parametrize("exercise", EVERY)
def test_a_mistake_in_one_task_costs_no_points_in_another(exercise):
    first = next(iter(answers(exercise)))
    lost = [name for name, share in runs(exercise)["one mistake"].items() if share < 1]
    assert lost == [first.replace("task", "test")]


@pytest.mark.parametrize("exercise", EVERY)
def test_the_exercise_is_what_the_solution_releases(exercise):
    target = EXERCISES / exercise / f"{exercise}.ipynb"
    if has_answers(target):
        pytest.skip(f"exercises/{exercise} has been worked in")
    assert target.read_text(encoding="utf-8") == release(exercise), "run `make exercises`"


@pytest.mark.parametrize("exercise", EVERY)
def test_nbgrader_validates_the_solution_and_not_the_blank(exercise):
    """What JupyterLab's Validate button calls."""

    def validate(path) -> str:
        command = [sys.executable, "-m", "nbgrader", "validate", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    target = EXERCISES / exercise / f"{exercise}.ipynb"
    if has_answers(target):
        pytest.skip(f"exercises/{exercise} has been worked in")
    assert "Success! Your notebook passes all the tests." in validate(solution(exercise))
    assert f"VALIDATION FAILED ON {len(answers(exercise))} CELL(S)" in validate(target)
