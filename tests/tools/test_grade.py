"""Every way in which a learner's notebook can be wrong must end in points and a sentence, never in a traceback."""

import contextlib
import json
import resource
from copy import deepcopy

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from sqlalchemy import create_engine

from tests.tools import small_exercise
from tests.tools.small_exercise import RIGHT, function, released
from tools import grade as command
from tools.grade import CannotGrade, grade
from tools.grading import author
from tools.grading.cells import by_grade_id
from tools.grading.course import ROOT, course

SOLUTION = ROOT / "solutions" / "01_numbers" / "01_numbers.ipynb"


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solutions")
    small_exercise.save(folder)
    author.save(author.notebook(*function(1, "negate", -1, 1)), "other", folder)
    return folder


@pytest.fixture(scope="module")
def blanks(solutions):
    """Name of the exercise → what its learners get."""
    return {name: released(name, solutions) for name in ("small", "other")}


@pytest.fixture
def graded(tmp_path, blanks, solutions, preloaded):
    """Grade the exercise with some cells replaced and changed, and see that nothing else changes."""

    def run(answers=None, change=lambda cells: None, timeout=2):
        notebook = deepcopy(blanks["small"])
        cells = by_grade_id(notebook.cells)
        for name, source in (answers or {}).items():
            cells[name].source = source
        notebook.cells = change(notebook.cells) or notebook.cells
        path = tmp_path / "mine.ipynb"
        nbformat.write(notebook, path)
        with without_a_trace(path):
            return grade("small", path, solutions, timeout=timeout)

    return run


@contextlib.contextmanager
def without_a_trace(path):
    """The block changes neither the file nor the processes that run."""
    before, children = path.read_bytes(), psutil.Process().children(recursive=True)
    try:
        yield
    finally:
        assert path.read_bytes() == before
        started = set(psutil.Process().children(recursive=True)) - set(children)
        assert not psutil.wait_procs(started, timeout=10)[1]


def points(grades):
    return [task.points for task in grades.tasks]


def test_right_answers_get_full_points_and_a_page(graded, monkeypatch):
    monkeypatch.delenv("JUPYTER_PATH", raising=False)  # a kernel of its own, as a reader has
    grades = graded(RIGHT)
    assert points(grades) == [2, 3]
    assert [(task.task, task.test, task.title, task.message) for task in grades.tasks] == [
        ("task_1", "test_1", "1. Write double", ""),
        ("task_2", "test_2", "2. Write triple", ""),
    ]
    assert "<html" in grades.html


def test_blank_gets_nothing(graded):
    grades = graded()
    assert points(grades) == [0, 0]
    assert {task.message for task in grades.tasks} == {"not answered yet"}


def test_a_hidden_test_finds_what_the_visible_one_does_not(graded):
    grades = graded(RIGHT | {"task_1": "def double(x):\n    return 2 * abs(x)"})
    assert points(grades) == [0, 3]
    assert grades.tasks[0].message == "negative numbers count as well"


SWALLOWS = "import time\nwhile True:\n    try:\n        time.sleep(9)\n    except BaseException:\n        pass"
LOOP = "stopped after 2 s: is there an endless loop?"
ENDED = "ended the kernel: it exited, crashed or ran out of memory"


MISHAPS = {
    "wrong name": ("def double(x):\n    return y", "NameError: name 'y' is not defined\nin task_1, line 2: return y"),
    "no colon": ("def double(x)\n    return x", "SyntaxError: expected ':'\nin task_1, line 1: def double(x)"),
    "raises": ("def double(x):\n    raise OSError('no')", "OSError: no\nin task_1, line 2: raise OSError('no')"),
    "asserts": ("def double(x):\n    assert x > 5", "an assert of your own failed\nin task_1, line 2: assert x > 5"),
    "catches": ("def double(x):\n    try:\n        return y\n    except Exception:\n        pass", "double(1) is 2"),
    "loops": ("def double(x):\n    while True: pass", f"{LOOP}\nin task_1, line 2: while True: pass"),
    "loops after": ("def double(x):\n    return 2 * x\nwhile True: pass", f"cell task_1 was {LOOP}"),
    "loops on": (SWALLOWS, "cell task_1 was still busy after 2 s and could not be interrupted"),
    "exits at once": ("import os\nos._exit(1)", f"cell task_1 {ENDED}"),
    "exits when called": ("import os\ndef double(x):\n    os._exit(1)", f"cell test_1 {ENDED}"),
    "is killed": ("import os\ndef double(x):\n    os.kill(os.getpid(), 9)", f"cell test_1 {ENDED}"),  # want of memory
    "sys.exit": ("import sys\nsys.exit()", "SystemExit: the code asks Python to end"),
    "asks": ("def double(x):\n    return input()", "StdinNotImplementedError"),
    "warns": ("import warnings\ndef double(x):\n    warnings.warn('old')\n    return 2 * x", "UserWarning: old"),
}
# These end the run of the whole notebook, which then begins anew.
ENDING = ("loops after", "loops on", "exits at once", "exits when called", "is killed")


@pytest.fixture(scope="module")
def together(tmp_path_factory, preloaded):
    """Mishap → (its grade, that of the right answer after it), from one notebook with all that let its run go on."""
    folder, cells, answers = tmp_path_factory.mktemp("together"), [], {}
    for number, mishap in enumerate(mishaps := [name for name in MISHAPS if name not in ENDING]):
        wrong, right = 2 * number + 1, 2 * number + 2
        cells += [*function(wrong, f"double_{wrong}", 2, 2), *function(right, f"triple_{right}", 3, 3)]
        answers[f"task_{wrong}"] = MISHAPS[mishap][0].replace("double", f"double_{wrong}")
        answers[f"task_{right}"] = RIGHT["task_2"].replace("triple", f"triple_{right}")
    author.save(author.notebook(*cells), "many", folder)
    notebook = released("many", folder)
    for name, source in answers.items():
        by_grade_id(notebook.cells)[name].source = source
    path = folder / "mine.ipynb"
    nbformat.write(notebook, path)
    with without_a_trace(path):
        graded = grade("many", path, folder, timeout=2).tasks
    return {mishap: graded[2 * number : 2 * number + 2] for number, mishap in enumerate(mishaps)}


@pytest.mark.parametrize("mishap", [name for name in MISHAPS if name not in ENDING])
def test_a_task_that_fails_costs_its_own_points_only(together, mishap):
    failed, right = together[mishap]
    number = failed.task.removeprefix("task_")
    assert (failed.points, right.points) == (0, 3)
    assert MISHAPS[mishap][1].replace("task_1", failed.task).replace("double", f"double_{number}") in failed.message


@pytest.mark.parametrize("mishap", ENDING)
def test_a_task_that_ends_the_run_costs_its_own_points_only(graded, mishap):
    answer, message = MISHAPS[mishap]
    grades = graded(RIGHT | {"task_1": answer})
    assert points(grades) == [0, 3]
    assert message in grades.tasks[0].message


FLOODS = {
    "prints without end": "while True: print('all work and no play' * 50)",
    "one long line": "print('x' * 60_000_000)",
    "to stderr": "import sys\nprint('x' * 10_000_000, file=sys.stderr)",
    "displays": "from IPython.display import HTML, display\nfor _ in range(20): display(HTML('x' * 500_000))",
    "raises": "raise ValueError('x' * 10_000_000)",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_output_is_cut_while_it_is_collected_and_costs_no_points_of_others(graded, flood):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grades = graded(RIGHT | {"task_1": f"{RIGHT['task_1']}\n{FLOODS[flood]}"})
    endless = flood == "prints without end"  # which is left out of the run that the page shows
    assert points(grades) == [0 if endless else 2, 3]  # double is defined, and right
    assert len(grades.html) < 3_000_000
    assert endless or "cut here" in grades.html or "characters left out" in grades.html
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def test_stderr_counts_however_much_was_printed_before(graded):
    noisy = (
        "def double(x):\n    import sys\n    print('x' * 10**6)\n    print('old', file=sys.stderr)\n    return 2 * x"
    )
    grades = graded(RIGHT | {"task_1": noisy})
    assert points(grades) == [0, 3]
    assert "stderr" in grades.tasks[0].message and "old" in grades.tasks[0].message


def test_only_databases_of_a_course_do_not_wait_for_the_disk(solutions, tmp_path):
    def synchronous():
        engine = create_engine(f"sqlite:///{tmp_path}/some.db")
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    before = synchronous()
    with course("small", solutions):
        assert synchronous() == 0
    assert synchronous() == before > 0


def test_a_byte_order_mark_is_no_obstacle(tmp_path, blanks, solutions, preloaded):
    path = tmp_path / "mine.ipynb"
    path.write_text(nbformat.writes(blanks["small"]), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert points(grade("small", path, solutions)) == [0, 0]


def test_a_test_cell_that_was_edited_is_restored(graded):
    assert points(graded({"test_1": "pass", "test_2": "assert True"})) == [0, 0]


@pytest.mark.parametrize("name", ["test_1", "task_1"])
def test_a_cell_that_was_deleted_is_named(graded, name):
    grades = graded(RIGHT, lambda cells: [cell for cell in cells if cell.id != name])
    assert points(grades) == [0, 3]
    assert f"cell {name} is missing" in grades.tasks[0].message


def test_a_cell_that_was_renamed_is_named(graded):
    def change(cells):
        by_grade_id(cells)["test_1"].metadata.nbgrader.grade_id = "mine"

    grades = graded(RIGHT, change)
    assert points(grades) == [0, 3]
    assert "cell test_1 is missing" in grades.tasks[0].message


def test_what_nbgrader_would_refuse_is_graded(graded):
    """Copied cells, graded cells of the learner's own, and settings that have changed."""

    def change(cells):
        copied, tests = deepcopy(by_grade_id(cells)["task_1"]), by_grade_id(cells)["test_1"]
        copied.id, copied.source = "copy", "def double(x):\n    return 'an earlier try'"
        tests.metadata.nbgrader |= {"schema_version": 1, "points": 100, "grade": False}
        tests.cell_type = "markdown"
        del tests["outputs"], tests["execution_count"]
        return [copied, *cells, author.tests("mine", 50, "assert True", "assert True")]

    grades = graded(RIGHT, change)
    assert points(grades) == [2, 3]
    assert grades.most == 5


def test_a_cell_of_the_learners_own_that_ends_the_kernel_is_left_out(graded):
    grades = graded(RIGHT, lambda cells: [*cells[:3], new_code_cell("import os\nos._exit(3)"), *cells[3:]])
    assert points(grades) == [2, 3]
    assert grades.notes == [f"cell number 4 ('import os') {ENDED}; it was left out"]


def test_another_notebook_is_recognised(blanks, solutions, tmp_path):
    path = tmp_path / "mine.ipynb"
    nbformat.write(blanks["other"], path)
    with pytest.raises(CannotGrade, match="this is the notebook of other, not of small"):
        grade("small", path, solutions)
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), path)
    with pytest.raises(CannotGrade, match="none of the cells of small"):
        grade("small", path, solutions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no JSON at all", "is not a notebook: it is not JSON"),
        (b"\xff\xfe\x00", "is not a notebook"),
        (b"[]", "is JSON, but not a notebook"),
        (b"null", "is JSON, but not a notebook"),
        (b'{"cells": 3}', "is not a valid notebook"),
        (b'{"cells": [{}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "is not a valid notebook"),
    ],
)
def test_what_is_no_notebook_is_refused(content, message, tmp_path, solutions):
    path = tmp_path / "text.ipynb"
    path.write_bytes(content)
    with pytest.raises(CannotGrade, match=message):
        grade("small", path, solutions)


def test_what_is_not_there_is_refused(tmp_path, solutions):
    for path in (tmp_path / "nowhere.ipynb", tmp_path):
        with pytest.raises(CannotGrade, match="there is no file"):
            grade("small", path, solutions)
    with pytest.raises(CannotGrade, match="there is no exercise '99_nothing'; there are: other, small"):
        grade("99_nothing", tmp_path / "nowhere.ipynb", solutions)


def test_the_command_reports_and_says_how_it_went(tmp_path, capsys, preloaded):
    common = ["--ex", "01_numbers", "--feedback", str(tmp_path)]
    assert command.main([*common, "--nb", str(SOLUTION), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["notebook"] == "solutions/01_numbers/01_numbers.ipynb"
    assert result["points"] == result["most"] > 0
    notebook = nbformat.read(SOLUTION, as_version=4)
    by_grade_id(notebook.cells)["task_1"].source = "decode_rate = None"
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    assert command.main([*common, "--nb", str(tmp_path / "mine.ipynb")]) == 1
    said = capsys.readouterr().out
    assert f"graded {tmp_path}/mine.ipynb" in said
    assert "task_1    0 of 2\n      TypeError: 'NoneType' object is not callable" in said
    assert "<html" in (tmp_path / "01_numbers.html").read_text()
    assert command.main([*common, "--nb", "nowhere.ipynb", "--json"]) == 2
    assert "there is no file nowhere.ipynb" in json.loads(capsys.readouterr().out)["error"]
