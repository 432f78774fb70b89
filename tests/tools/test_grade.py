"""Every way in which a learner's notebook can be wrong must end in points and a sentence, never in a traceback."""

import json
import subprocess
import sys

import nbformat
import psutil
import pytest

from tests.tools import notebooks
from tools import release
from tools.grade import CannotGrade, grade

RIGHT = {"task_1": "def double(x):\n    return x + x", "task_2": "def triple(x):\n    return x + x + x"}


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solutions")
    notebooks.make_source(folder)
    return folder


@pytest.fixture(scope="module")
def blank(solutions):
    return release.release("small", solutions)


@pytest.fixture
def learner(tmp_path, blank):
    """A function that writes a learner's notebook: the blank exercise with some cells replaced, or cells left out."""

    def write(answers: dict[str, str] | None = None, without: tuple[str, ...] = ()):
        notebook = nbformat.reads(blank, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
        for cell in notebook.cells:
            cell.source = (answers or {}).get(cell.id, cell.source)
        path = tmp_path / "mine.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


def points(grades):
    return {task.task: task.points for task in grades}


def messages(grades):
    return {task.task: task.message for task in grades}


def test_right_answers_get_full_points_and_a_page(learner, solutions):
    grades, html = grade("small", learner(RIGHT), solutions)
    assert points(grades) == {"test_1": 2, "test_2": 3}
    assert all(task.points == task.most and not task.message for task in grades)
    assert "<html" in html


def test_blank_gets_nothing(learner, solutions):
    grades, _ = grade("small", learner(), solutions)
    assert points(grades) == {"test_1": 0, "test_2": 0}
    assert set(messages(grades).values()) == {"not answered yet"}


def test_a_hidden_test_finds_what_the_visible_one_does_not(learner, solutions):
    grades, _ = grade("small", learner(RIGHT | {"task_1": "def double(x):\n    return 2 * abs(x)"}), solutions)
    assert points(grades) == {"test_1": 0, "test_2": 3}
    assert messages(grades)["test_1"] == "negative numbers count as well"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("def double(x):\n    return y", "NameError: name 'y' is not defined"),
        ("def double(x)\n    return x", "double"),  # a syntax error: the name is never defined
        ("def double(x):\n    while True: pass", "endless loop"),
        ("def double(x):\n    raise ValueError('mine')", "ValueError: mine"),
        ("import sys\ndef double(x):\n    sys.exit()", "SystemExit"),
    ],
)
def test_a_task_that_fails_costs_its_own_points_only(learner, solutions, answer, message):
    path = learner(RIGHT | {"task_1": answer})
    before = path.read_bytes()
    grades, _ = grade("small", path, solutions, timeout=3)
    assert points(grades) == {"test_1": 0, "test_2": 3}
    assert message in messages(grades)["test_1"]
    assert path.read_bytes() == before


def test_a_test_cell_that_was_edited_is_restored(learner, solutions):
    grades, _ = grade("small", learner({"test_1": "pass", "test_2": "assert True"}), solutions)
    assert points(grades) == {"test_1": 0, "test_2": 0}


def test_a_test_cell_that_was_deleted_scores_nothing_and_is_named(learner, solutions):
    grades, _ = grade("small", learner(RIGHT, without=("test_1",)), solutions)
    assert points(grades) == {"test_1": 0, "test_2": 3}
    assert "deleted or renamed" in messages(grades)["test_1"]


def test_a_kernel_that_dies_is_said_so_and_nothing_is_left_running(learner, solutions):
    path = learner({"task_1": "import os\nos._exit(1)"})
    before, children = path.read_bytes(), psutil.Process().children(recursive=True)
    with pytest.raises(CannotGrade, match="the kernel died"):
        grade("small", path, solutions)
    assert path.read_bytes() == before
    assert psutil.Process().children(recursive=True) == children


def test_another_notebook_is_recognised(learner, solutions):
    path = learner(without=("test_1", "test_2"))
    with pytest.raises(CannotGrade, match="notebook of another exercise"):
        grade("small", path, solutions)


def test_what_is_no_notebook_is_refused(tmp_path, solutions):
    path = tmp_path / "text.ipynb"
    path.write_text("no JSON at all")
    with pytest.raises(CannotGrade, match="is not a notebook"):
        grade("small", path, solutions)
    for content in ('{"cells": 3}', "[]", "null"):
        path.write_text(content)
        with pytest.raises(CannotGrade, match="not a notebook"):
            grade("small", path, solutions)
    with pytest.raises(CannotGrade, match="there is no file"):
        grade("small", tmp_path / "nowhere.ipynb", solutions)


def test_an_unknown_exercise_lists_those_there_are(learner, solutions):
    with pytest.raises(CannotGrade, match="there are: small"):
        grade("99_nothing", learner(), solutions)


def test_the_command_names_the_file_it_graded():
    run = subprocess.run(
        [sys.executable, "-m", "tools.grade", "--ex", "01_numbers", "--nb", "solutions/01_numbers/01_numbers.ipynb"]
        + ["--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["notebook"] == "solutions/01_numbers/01_numbers.ipynb"
    assert all(task["points"] == task["most"] > 0 for task in result["tasks"])
