"""What learners get: nothing of the answers, always the same bytes, and never a notebook that cannot grade."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from tools import release
from tools.grading import author, checks
from tools.grading.course import ROOT

DOUBLE = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x  # the whole secret\n    ### END SOLUTION"
TRIPLE = "def triple(x):\n    ### BEGIN SOLUTION\n    return 3 * x  # another secret\n    ### END SOLUTION"
VISIBLE = 'assert double(1) == 2, "double(1) is 2"'
HIDDEN = 'assert double(-5) == -10, "negative numbers count as well"'


def source(**changes):
    """Two tasks, with some cells replaced (by name) or left out (None)."""
    cells = {
        "text_1": author.text("text_1", "# A small exercise"),
        "task_1": author.task("task_1", DOUBLE),
        "test_1": author.tests("test_1", 2, VISIBLE, HIDDEN),
        "task_2": author.task("task_2", TRIPLE),
        "test_2": author.tests("test_2", 3, "assert triple(1) == 3, 'thrice'", "assert triple(-1) == -3, 'minus 3'"),
    }
    return author.notebook(*(cell for cell in (cells | changes).values() if cell))


def graded(visible=VISIBLE, hidden=HIDDEN, points=2, **settings):
    cell = author.tests("test_1", points, visible, hidden)
    cell.metadata.nbgrader |= settings
    return cell


def plain(code):
    """A test cell without the region that `author.tests` adds."""
    cell = graded()
    cell.source = code
    return cell


def again():
    cell = author.text("task_1", "the name of another cell")
    cell.id = "again"
    return cell


@pytest.fixture
def folders(tmp_path):
    author.save(source(), "small", tmp_path / "solutions")
    return {"solutions": tmp_path / "solutions", "target": tmp_path / "exercises"}


def released(solutions):
    return release.release("small", solutions)["small.ipynb"]


def test_the_release_has_neither_answers_nor_hidden_tests(folders):
    text = released(folders["solutions"]).decode()
    for secret in ("secret", "negative numbers", "minus 3", "BEGIN", "HIDDEN"):
        assert secret not in text
    assert text.count("raise NotImplementedError()") == 2
    assert "double(1) is 2" in text


def test_the_same_source_gives_the_same_clean_bytes(tmp_path):
    """Whatever a run of the source has left in it: outputs, counts, widgets, the version of Python."""
    author.save(source(), "small", tmp_path / "clean")
    ran = source()
    ran.metadata.language_info.version = "3.11.7"
    ran.metadata["widgets"] = {"state": "the whole secret"}
    for cell in ran.cells[1:]:
        cell.execution_count, cell.outputs = 7, [new_output("stream", text="the whole secret")]
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    author.save(ran, "small", tmp_path / "ran")
    first = released(tmp_path / "clean")
    assert first == released(tmp_path / "clean") == released(tmp_path / "ran")
    notebook = json.loads(first)
    assert [cell["id"] for cell in notebook["cells"]] == ["text_1", "task_1", "test_1", "task_2", "test_2"]
    assert notebook["metadata"]["language_info"] == {"name": "python"}


BAD = {
    "tests nothing": (checks.TestsNothing, source(task_1=None, test_1=None, task_2=None, test_2=None)),
    "grades nothing": (checks.TestsNothing, source(test_1=graded(points=0), task_2=None, test_2=None)),
    "one test without points": (checks.NoPoints, source(test_1=graded(points=0))),
    "points on the answer": (checks.NoPoints, source(task_1=author.task("task_1", DOUBLE))),
    "used twice": (checks.DuplicateGradeId, source(again=again())),
    "no answer": (checks.NotATask, source(task_1=None)),
    "no tests": (checks.NotATask, source(test_2=None)),
    "no tests between": (checks.NotATask, source(test_1=None)),
    "names of two tasks": (checks.NotATask, source(test_2=author.tests("test_9", 2, VISIBLE, HIDDEN))),
    "can be edited": (checks.NotLocked, source(test_1=graded(locked=False))),
    "no solution region": (checks.NoSolution, source(task_1=author.task("task_1", "def double(x): return 2 * x"))),
    "empty solution": (checks.NoSolution, source(task_1=author.task("task_1", "### BEGIN SOLUTION\n### END SOLUTION"))),
    "solution elsewhere": (checks.StrayRegion, source(given=author.given("given_1", DOUBLE))),
    "solution in an ungraded cell": (checks.StrayRegion, source(own=new_code_cell(DOUBLE))),
    "hidden tests elsewhere": (checks.StrayRegion, source(own=new_code_cell(graded().source))),
    "not closed": (checks.StrayRegion, source(test_1=plain(f"{VISIBLE}\n### BEGIN HIDDEN TESTS\n{HIDDEN}"))),
    "misspelt": (checks.StrayRegion, source(test_1=plain(f"{graded().source}\n### begin hidden tests\n{HIDDEN}"))),
    "not Python": (checks.NotPython, source(test_1=graded(visible="%time double(1)"))),
    "no visible tests": (checks.NoVisibleTests, source(test_1=graded(visible=""))),
    "no hidden tests": (checks.NoHiddenTests, source(test_1=plain(VISIBLE))),
    "empty hidden tests": (checks.NoHiddenTests, source(test_1=graded(hidden=""))),
    "calls without asserting": (checks.CannotFail, source(test_1=graded(visible="double(1)"))),
    "asserts a constant": (checks.CannotFail, source(test_1=graded(hidden="assert True, 'always'"))),
    "asserts its own name": (checks.CannotFail, source(test_1=graded(hidden="y = 2\nassert y == 2, 'always'"))),
    "asserts a tuple": (checks.CannotFail, source(test_1=graded(visible="assert (double(1) == 2, 'always')"))),
    "asserts a function": (checks.CannotFail, source(test_1=graded(visible="assert double, 'always'"))),
    "is never called": (checks.CannotFail, source(test_1=graded(hidden=f"def check():\n    {HIDDEN}"))),
    "says nothing": (checks.NoMessage, source(test_1=graded(hidden="assert double(-5) == -10"))),
}
BAD["points on the answer"][1].cells[1].metadata.nbgrader.points = 2


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_by_name(name, tmp_path):
    error, notebook = BAD[name]
    author.save(notebook, "small", tmp_path)
    with pytest.raises(checks.BadSource) as refused:
        release.release("small", tmp_path)
    assert type(refused.value) is error


GOOD = {
    "a helper that asserts": "def check(found, expected):\n    assert found == expected, 'why'\ncheck(double(2), 4)",
    "a loop": "for x in (1, 2):\n    found = double(x)\n    assert found == 2 * x, 'why'",
    "collected": "found = []\nfor x in (1, 2):\n    found.append(double(x))\nassert found == [2, 4], 'why'",
    "counted": "wrong = 0\nfor x in (1, 2):\n    if double(x) != 2 * x:\n        wrong += 1\nassert wrong == 0, 'why'",
    "an error is due": "try:\n    double('x')\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError('why')",
    "in a comprehension": "assert all(double(x) == 2 * x for x in range(3)), 'why'",
}


@pytest.mark.parametrize("name", GOOD)
def test_tests_may_be_written_in_many_ways(name):
    checks.check_source(source(test_1=graded(visible=GOOD[name])))
    checks.check_source(source(test_1=graded(hidden=GOOD[name])))


def test_what_is_no_notebook_is_refused(tmp_path):
    path = author.save(source(), "small", tmp_path)
    for content in ("no JSON", "[]"):
        path.write_text(content)
        with pytest.raises(checks.NotReadable):
            release.release("small", tmp_path)


@pytest.mark.parametrize("secret", ["return 2 * x  # the whole secret", HIDDEN])
def test_a_secret_that_comes_out_anywhere_is_refused(secret, folders):
    notebook = nbformat.reads(released(folders["solutions"]).decode(), as_version=4)
    checks.check_leaks(source(), notebook)
    for leak in (new_code_cell(f"x = 1\n{secret}"), new_markdown_cell("", metadata={"note": f"see {secret}"})):
        notebook.cells.append(leak)
        with pytest.raises(checks.Leak, match="give away"):
            checks.check_leaks(source(), notebook)
        notebook.cells.pop()
    notebook.cells[2].outputs = [new_output("stream", text=secret)]
    with pytest.raises(checks.Leak, match="give away"):
        checks.check_leaks(source(), notebook)


def test_a_source_that_leaks_is_not_released(folders):
    text = author.text("text_1", "# See the picture")
    text.attachments = {"answer.txt": {"text/plain": "return 2 * x  # the whole secret"}}
    author.save(source(text_1=text), "small", folders["solutions"])
    with pytest.raises(checks.Leak, match="the whole secret"):
        released(folders["solutions"])


def test_a_short_line_may_stand_elsewhere_by_chance(folders):
    short = "def double(x):\n    ### BEGIN SOLUTION\n    python = 2\n    return (\n        python\n        * x)\n"
    author.save(source(task_1=author.task("task_1", short + "    ### END SOLUTION")), "small", folders["solutions"])
    assert b'"name": "python"' in released(folders["solutions"])


def test_what_the_source_shows_anyway_is_no_secret(folders):
    shown = source(text_1=author.text("text_1", "Remember: `return 2 * x  # the whole secret`"))
    author.save(shown, "small", folders["solutions"])
    assert b"the whole secret" in released(folders["solutions"])


def test_check_tells_what_is_stale_and_changes_nothing(folders, capsys):
    def check(code, words):
        before = sorted(path.read_bytes() for path in folders["target"].rglob("*.*"))
        assert release.main(["--check"], **folders) == code
        assert words in capsys.readouterr().err
        assert sorted(path.read_bytes() for path in folders["target"].rglob("*.*")) == before

    check(1, "small.ipynb is missing")
    (folders["solutions"] / "small" / "data.csv").write_text("1,2")
    assert release.main([], **folders) == 0
    check(0, "")
    author.save(source(test_1=graded(visible=VISIBLE + "  # changed")), "small", folders["solutions"])
    check(1, "small.ipynb: cell test_1 differs")
    release.main([], **folders)
    (folders["solutions"] / "small" / "data.csv").write_text("1,2,3")
    check(1, "data.csv: its content differs")
    release.main([], **folders)
    author.save(source(), "gone", folders["target"])
    check(1, "gone has no source")
    author.save(source(test_1=None), "small", folders["solutions"])
    check(2, "small: NotATask: task_1")


def test_a_learners_work_is_never_overwritten(folders, capsys):
    release.main([], **folders)
    path = folders["target"] / "small" / "small.ipynb"
    fresh = path.read_bytes()

    def answered(notebook):
        notebook.cells[1].source = "def double(x):\n    return 7"

    def ran(notebook):
        notebook.cells[1].execution_count = 1

    def added(notebook):
        notebook.cells.append(new_code_cell("double(2)"))

    for work in (answered, ran, added):
        notebook = nbformat.reads(fresh.decode(), as_version=4)
        work(notebook)
        nbformat.write(notebook, path)
        before = path.read_bytes()
        assert release.main([], **folders) == 2
        assert path.read_bytes() == before
        assert "holds answers: move it away" in capsys.readouterr().err
        assert release.main(["--check"], **folders) == 1
        assert "it holds answers" in capsys.readouterr().err


def test_nothing_of_nbgrader_lands_in_the_repository():
    names = ("gradebook.db", "submitted", "autograded", ".nbgrader.log")
    before = [name for name in names if (ROOT / name).exists()]
    command = [sys.executable, "-m", "tools.release", "--check", "01_numbers"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode in (0, 1)
    assert [name for name in names if (ROOT / name).exists()] == before
