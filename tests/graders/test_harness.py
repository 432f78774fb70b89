"""The harness must see a bad grader, a bad answer and a task that leans on another; else its silence means nothing."""

import pytest

from tests.graders import harness
from tests.graders.answers import Answers
from tests.graders.harness import Entry
from tests.graders.sheet_runner import SheetLost
from tools.grading import author
from tools.grading.cells import tasks
from tools.grading.course import exercises

DOUBLE = Answers(
    correct=("def double(x):\n    return x + x",),
    wrong={
        "squares": "def double(x):\n    return x * x",
        "forgets the sign": "def double(x):\n    return 2 * abs(x)",
        "returns its argument": "def double(x):\n    return x",
    },
)
TRIPLE = Answers(
    correct=("def triple(x):\n    return x + x + x",),
    wrong={
        "cubes": "def triple(x):\n    return x**3",
        "forgets the sign": "def triple(x):\n    return 3 * abs(x)",
        "returns nothing": "def triple(x):\n    3 * x",
        "adds three": "def triple(x):\n    return x + 3",
    },
)
NEGATE = Answers(
    correct=("def negate(x):\n    return 0 - x",),
    wrong={
        "inverts": "def negate(x):\n    return 1 / x",
        "keeps it": "def negate(x):\n    return x",
        "always negative": "def negate(x):\n    return -abs(x)",
    },
)


def function(number: int, name: str, answer: str, visible: str, hidden: str) -> list:
    """The two cells of a task."""
    source = f"def {name}(x):\n    ### BEGIN SOLUTION\n    return {answer}\n    ### END SOLUTION"
    return [author.task(f"task_{number}", source), author.tests(f"test_{number}", 2, visible, hidden)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_answer_is_on_a_sheet_and_every_two_tasks_are_held_apart(count):
    answered = {
        f"task_{n}": Answers(
            correct=tuple(f"right {n} {k}" for k in range(1 + n % 2)),
            wrong={f"mistake {k}": f"wrong {n} {k}" for k in range(3 + n % 3)},
        )
        for n in range(count)
    }
    plan = harness.sheets(answered)
    for name, task in answered.items():
        assert {sheet[name].code for sheet in plan} == {*task.correct, *task.wrong.values()}
        for other in set(answered) - {name}:
            assert any(sheet[name].mistake and not sheet[other].mistake for sheet in plan)
    assert len(plan) <= max(count, 6) + 1


def test_bad_graders_are_told(tmp_path, run_sheets):
    source = author.notebook(
        author.text("text_1", "# A mistake overlooked, a task that leans on the first, points for nothing"),
        *function(1, "double", "2 * x", "assert double(3) == 6, 'twice'", "assert double(4) == 8, 'twice'"),
        *function(2, "triple", "double(x) + x", "assert triple(2) == 6, 'thrice'", "assert triple(-5) == -15, 'sign'"),
        *function(3, "negate", "-x", "assert negate or True, 'never'", "assert negate or 1, 'nor this'"),
    )
    leaning = Answers(correct=("def triple(x):\n    return double(x) + x",), wrong=TRIPLE.wrong)
    answered = {"task_1": DOUBLE, "task_2": leaning, "task_3": NEGATE}
    author.save(source, "small", tmp_path / "solutions")
    found = harness.disagreements("small", answered, tmp_path, run_sheets, tmp_path / "solutions")
    assert {line.partition(" (")[0] for line in found} == {
        "task_1: nobody notices the mistake 'forgets the sign'",
        "task_2: a right answer gets 0 of 2",
        *(f"task_3: nobody notices the mistake {mistake!r}" for mistake in (*NEGATE.wrong, "no answer")),
    }


def test_a_mistake_that_does_not_even_run_is_told():
    sheet = {"task_1": Entry("def double(x) return x", "squares")}
    found = harness.judge(sheet, {"task_1": harness.Score(0, 2, "SyntaxError: invalid syntax")}, "sheet 1")
    assert found == ["task_1: 'squares' proves nothing, it does not run (sheet 1: SyntaxError: invalid syntax)"]


def test_other_points_than_a_learner_would_get_are_told():
    scores = {"task_1": harness.Score(2, 2, ""), "task_2": harness.Score(0, 3, "")}
    assert harness.compare(scores, {"task_1": 2.0, "task_2": 0.0}, "sheet 0") == []
    (found,) = harness.compare(scores, {"task_1": 0.0, "task_2": 0.0}, "sheet 0")
    assert found == "task_1: nbgrader gives 0 points, a run of its cells 2 (sheet 0)"


def test_too_few_answers_are_told():
    first, second = function(1, "double", "2 * x", "", ""), function(2, "triple", "3 * x", "", "")
    there = tasks(author.notebook(*first, *second))
    assert harness.shortcomings({"task_1": DOUBLE, "task_2": TRIPLE}, there) == []
    assert "answers for ['task_1']" in harness.shortcomings({"task_1": DOUBLE}, there)[0]
    few = Answers(correct=(), wrong={"squares": "x", "": "y"})
    found = " ".join(harness.shortcomings({"task_1": few, "task_2": TRIPLE}, there))
    for complaint in ("different but correct", "has 2 plausible mistakes", "say in one line"):
        assert complaint in found
    same = Answers(correct=("x",), wrong={"squares": "x", "b": "y", "c": "z"})
    assert "the same answer twice" in harness.shortcomings({"task_1": same, "task_2": TRIPLE}, there)[0]


def test_an_exercise_without_answers_is_told():
    with pytest.raises(ModuleNotFoundError, match="99_nothing"):
        harness.answers("99_nothing")


def test_every_file_of_answers_belongs_to_an_exercise():
    folder = harness.Path(harness.__file__).parent
    assert {path.stem for path in folder.glob("[0-9]*.py")} == set(exercises())


def test_a_run_passes_what_nbgrader_would(run_sheets):
    sheet = {"a": "x = 1", "b": "1 / 0", "c": "assert x == 1", "d": "import sys; sys.stderr.write('!')"}
    other = {"a": "assert 'x' not in globals()"}
    failed = {"b": "ZeroDivisionError: division by zero", "d": "on stderr: !"}
    assert run_sheets([sheet]) == [failed]
    assert run_sheets([other]) == [{}], "nothing is left of the sheet before"
    assert run_sheets([sheet, other, sheet]) == [failed, {}, failed], "not even of one at the same time"


def test_what_sheets_begin_with_is_run_once_for_all(run_sheets, tmp_path):
    count = f"with open({str(tmp_path / 'count')!r}, 'a') as file:\n    written = file.write('!')"
    first = {"a": count, "b": "x = [1]\nopen('note', 'w').close()", "c": "1 / 0"}
    last = {"e": "open('note').close()", "f": "assert x == [1, 2], x"}
    right, wrong = first | {"d": "x.append(2)"} | last, first | {"d": "x.append(3)"} | last
    failed = {"c": "ZeroDivisionError: division by zero"}
    assert run_sheets([right, wrong, right]) == [failed, failed | {"f": "AssertionError: [1, 3]"}, failed]
    assert (tmp_path / "count").read_text() == "!"


def test_a_sheet_that_ends_its_process_is_told_and_the_next_one_runs(run_sheets):
    ends = {"a": "import os", "b": "os._exit(0)"}
    for sheets in ([ends], [{"a": "import os", "b": "1 / 1"}, ends]):
        with pytest.raises(SheetLost, match="ended its process"):
            run_sheets(sheets)
        assert run_sheets([{"a": "1 / 1"}]) == [{}]


def test_a_cell_that_does_not_end_is_stopped(run_sheets):
    (failed,) = run_sheets([{"a": "while True: pass", "b": "1 / 1"}], seconds=1)
    assert failed == {"a": "CellTimeoutError: this cell ran too long and was stopped"}
