"""Grade the graders: fill sheets with answers whose worth is known, and list where the points disagree.

A sheet is one run of an exercise. It mixes one task's right answer with the other tasks' mistakes, so that an exercise
takes about as many runs as one task has answers, and still shows that a mistake in one task costs no points in another.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tests.graders.answers import Answers
from tests.graders.sheet_runner import Run
from tools.grade import grade_in
from tools.grading import submission
from tools.grading.cells import Task, by_grade_id, grade_id, tasks
from tools.grading.course import SOLUTIONS, course

BROKEN = ("IndentationError", "ModuleNotFoundError", "NameError", "SyntaxError", "TabError")


@dataclass(frozen=True)
class Entry:
    """One answer on a sheet; without a mistake it is right."""

    code: str
    mistake: str = ""


@dataclass(frozen=True)
class Score:
    """What one answer got, and what the grader said about it."""

    points: float
    most: float
    message: str


def answers(exercise: str) -> dict[str, Answers]:
    """What tests/graders/NN_name.py declares.

    Raises:
        ModuleNotFoundError: if there is no such file.
    """
    return importlib.import_module(f"tests.graders.{exercise}").TASKS


def sheets(answered: dict[str, Answers]) -> list[dict[str, Entry]]:
    """Sheets (grade id → entry) that hold every answer at least once.

    For any two tasks some sheet has a mistake in the first and the right answer to the second: a task's first right
    answer stands on the sheet of its own number, and its mistakes stand on all the others.
    """
    count = max(len(answered), *(1 + len(task.wrong) for task in answered.values()))
    plan: list[dict[str, Entry]] = [{} for _ in range(count)]
    for number, (name, task) in enumerate(answered.items()):
        plan[number][name] = Entry(task.correct[0])
        mistakes = list(task.wrong.items())
        for k in range(count - 1):
            mistake, code = mistakes[k % len(mistakes)]
            plan[(number + 1 + k) % count][name] = Entry(code, mistake)
    for k in range(1, max(len(task.correct) for task in answered.values())):
        plan.append({name: Entry(task.correct[k % len(task.correct)]) for name, task in answered.items()})
    return plan


def shortcomings(answered: dict[str, Answers], there: list[Task]) -> list[str]:
    """What the declared answers lack."""
    found = []
    if list(answered) != [task.answer for task in there]:
        found.append(f"answers for {list(answered)}, but the tasks are {[task.answer for task in there]}")
    for name, task in answered.items():
        if len(task.correct) < 1:
            found.append(f"{name} needs an answer that is different but correct")
        if len(task.wrong) < 3:
            found.append(f"{name} has {len(task.wrong)} plausible mistakes and needs three")
        if any(not mistake.strip() or "\n" in mistake for mistake in task.wrong):
            found.append(f"{name}: say in one line what each mistake is")
        if len({*task.correct, *task.wrong.values()}) < len(task.correct) + len(task.wrong):
            found.append(f"{name} has the same answer twice")
    return found


def disagreements(
    exercise: str, answered: dict[str, Answers], folder: Path, run: Run, solutions: Path = SOLUTIONS
) -> list[str]:
    """Sentences about answers that get more or fewer points than they should; none if the graders are right.

    All sheets run without Jupyter. The blank exercise and the solution are graded by nbgrader, and the first sheet as a
    learner's notebook is, by tools/grade.py, as well, and must get the same points.

    Args:
        exercise: name of the exercise.
        answered: its declared answers.
        folder: for the notebook of a learner.
        run: runs sheets' cells.
        solutions: folder of the sources.
    """
    solution = nbformat.read(solutions / exercise / f"{exercise}.ipynb", as_version=4)
    tests = {task.answer: task.test for task in tasks(solution)}
    with course(exercise, solutions) as made:
        blank = made.release()
        plan = {
            "the blank exercise": _answers_in(blank, answered, "no answer"),
            "the solution": _answers_in(solution, answered),
            **{f"sheet {number}": sheet for number, sheet in enumerate(sheets(answered))},
        }
        filled = [fill(solution, sheet) for sheet in plan.values()]
        scores = dict(zip(plan, scored(filled, run), strict=True))
        found = [line for where, sheet in plan.items() for line in judge(sheet, scores[where], where)]
        for learner, where in (("blank", "the blank exercise"), ("solution", "the solution")):
            notebook = fill(blank, plan[where])
            (visible,) = scored([notebook], run)  # as JupyterLab's Validate button does
            found += judge(plan[where], visible, f"{where}, visible tests")
            points = made.grade(notebook, learner)
            found += compare(scores[where], {name: points[test] for name, test in tests.items()}, where)
        path = folder / f"{exercise}.ipynb"
        nbformat.write(fill(blank, plan["sheet 0"]), path)
        grades = grade_in(made, blank, submission.read(path, path.name), solutions)
    return found + compare(scores["sheet 0"], {task.task: task.points for task in grades.tasks}, "sheet 0")


def scored(notebooks: list[NotebookNode], run: Run) -> list[dict[str, Score]]:
    """What each task's answer in each notebook gets by the tests in it."""
    failed = run([_code(notebook) for notebook in notebooks])
    return [_scores(notebook, by_name) for notebook, by_name in zip(notebooks, failed, strict=True)]


def _code(notebook: NotebookNode) -> dict[str, str]:
    return {grade_id(cell) or cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


def _scores(notebook: NotebookNode, failed: dict[str, str]) -> dict[str, Score]:
    scores = {}
    for task in tasks(notebook):
        message = failed.get(task.answer) or failed.get(task.test, "")
        scores[task.answer] = Score(0.0 if task.test in failed else task.most, task.most, message)
    return scores


def compare(scores: dict[str, Score], graded: dict[str, float], where: str) -> list[str]:
    """Where nbgrader comes to other points than a run without Jupyter."""
    return [
        f"{name}: nbgrader gives {graded[name]:g} points, a run of its cells {score.points:g} ({where})"
        for name, score in scores.items()
        if graded[name] != score.points
    ]


def fill(exercise: NotebookNode, sheet: dict[str, Entry]) -> NotebookNode:
    """The exercise with a sheet's answers in it."""
    notebook = deepcopy(exercise)
    cells = by_grade_id(notebook.cells)
    for name, entry in sheet.items():
        cells[name].source = entry.code.strip()
    return notebook


def _answers_in(notebook: NotebookNode, names: Iterable[str], mistake: str = "") -> dict[str, Entry]:
    cells = by_grade_id(notebook.cells)
    return {name: Entry(cells[name].source, mistake) for name in names}


def judge(sheet: dict[str, Entry], scores: dict[str, Score], where: str) -> list[str]:
    """Where points disagree with what a sheet's answers are worth."""
    found = []
    for name, entry in sheet.items():
        score = scores[name]
        if not entry.mistake and score.points < score.most:
            found.append(
                f"{name}: a right answer gets {score.points:g} of {score.most:g} ({where}: {score.message}); "
                "it is wrong, its test is, or a mistake in another task reached it"
            )
        elif entry.mistake and score.points >= score.most:
            found.append(f"{name}: nobody notices the mistake {entry.mistake!r} ({where})")
        elif entry.mistake and score.message.startswith(BROKEN):
            found.append(f"{name}: {entry.mistake!r} proves nothing, it does not run ({where}: {score.message})")
    return found
