"""Grade a learner's notebook with nbgrader: points per task, and why points were lost. The notebook is never changed.

Usage: python -m tools.grade --ex 01_numbers [--nb PATH] [--json] [--verbose]

Exit code: 0 for full points, 1 for fewer, 2 if it could not be graded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nbformat import NotebookNode
from tqdm import tqdm

from tools.grading import explain, submission
from tools.grading.cells import Task, grade_id, is_answer, tasks
from tools.grading.course import EXERCISES, ROOT, SOLUTIONS, Course, CourseError, KernelLost, course
from tools.grading.submission import CannotGrade, Submission

FEEDBACK = ROOT / "feedback"


@dataclass(frozen=True)
class TaskGrade:
    """Points for one task, and what the check that failed said, if one did.

    Args:
        task: grade id of the answer cell.
        test: grade id of the test cell.
        title: the task's heading.
        points: points that the answer got.
        most: points that it could get.
        message: why it got fewer; empty if it did not.
    """

    task: str
    test: str
    title: str
    points: float
    most: float
    message: str = ""


@dataclass(frozen=True)
class Grades:
    """What grading a notebook found out.

    Args:
        tasks: one grade per task, in the exercise's order.
        notes: what else the learner should know, such as a cell of their own that had to be left out.
        html: nbgrader's feedback page.
        log: what nbgrader logged.
    """

    tasks: list[TaskGrade]
    notes: list[str]
    html: str
    log: str

    @property
    def points(self) -> float:
        return sum(task.points for task in self.tasks)

    @property
    def most(self) -> float:
        return sum(task.most for task in self.tasks)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    notebook = options.nb or EXERCISES / options.ex / f"{options.ex}.ipynb"
    print(f"grading {shown(notebook)} …", file=sys.stderr, flush=True)
    try:
        with tqdm(desc="running cells", unit="cell", leave=False, disable=None) as bar:
            grades = grade(options.ex, notebook, timeout=options.timeout, on_cell=lambda index: bar.update())
    except CannotGrade as error:
        print(f"not graded: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"notebook": shown(notebook), "error": str(error)}))
        return 2
    except KeyboardInterrupt:
        print("not graded: interrupted", file=sys.stderr)
        return 2
    page = options.feedback / f"{options.ex}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(grades.html, encoding="utf-8")
    if options.verbose:
        print(grades.log, file=sys.stderr)
    (_print_json if options.json else _print_report)(notebook, grades, page)
    return 0 if grades.points == grades.most else 1


def grade(
    exercise: str,
    notebook: Path,
    solutions: Path = SOLUTIONS,
    timeout: int | None = None,
    on_cell: Callable[[int], object] = lambda index: None,
) -> Grades:
    """Grade a copy of a notebook against an exercise's tests, hidden ones included.

    Args:
        exercise: name of the exercise.
        notebook: the learner's file; read, never written.
        solutions: folder of the sources, where the tests come from.
        timeout: seconds that a cell may run; nbgrader_config.py says how many if left out.
        on_cell: called with the index of each code cell when it starts.

    Raises:
        CannotGrade: if there is no such exercise or file, it is no notebook or another one, or nbgrader failed.
    """
    try:
        with course(exercise, solutions, timeout=timeout, on_cell=on_cell) as made:
            learner = submission.read(notebook, shown(notebook))
            return grade_in(made, made.release(), learner, solutions)
    except (FileNotFoundError, CourseError) as error:
        raise CannotGrade(str(error)) from error


def grade_in(made: Course, released: NotebookNode, learner: NotebookNode, solutions: Path) -> Grades:
    """Grade a learner's notebook in a course that has released its exercise.

    Args:
        made: the course.
        released: what it has released.
        learner: what `submission.read` made of the learner's file; not changed.
        solutions: folder of the sources.

    Raises:
        CannotGrade: if it is the notebook of another exercise, or never runs to its end.
        CourseError: if nbgrader failed.
    """
    submission.check_exercise(made.exercise, released, learner, solutions)
    handed_in = submission.prepare(learner, released)
    points = _run(made, handed_in)
    graded = made.graded_notebook()
    found = [_grade_of(task, points, handed_in, graded, made) for task in tasks(released)]
    return Grades(found, _notes(handed_in), made.feedback(), made.log)


def shown(path: Path) -> str:
    """A path relative to where the reader stands, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ex", required=True, help="the exercise, such as 01_numbers")
    parser.add_argument("--nb", type=Path, help="the notebook; by default the one in exercises/")
    parser.add_argument("--timeout", type=int, help="seconds that a cell may run; nbgrader_config.py has the default")
    parser.add_argument("--feedback", type=Path, default=FEEDBACK, help="folder for the feedback page (feedback/)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--verbose", action="store_true", help="print nbgrader's log, too")
    return parser.parse_args(argv)


def _run(made: Course, handed_in: Submission) -> dict[str, float]:
    """Grade until the notebook runs to its end, each time without one more cell that kept it from doing so."""
    while True:
        try:
            points = made.grade(handed_in.notebook)
        except KernelLost as lost:
            handed_in.leave_out(made.running, _what_happened(lost, made.timeout))
            continue
        endless = _endless_answer(made.graded_notebook(), handed_in)
        if endless is None:
            return points
        handed_in.leave_out(endless, f"was stopped after {made.timeout} s: is there an endless loop?")


def _endless_answer(graded: NotebookNode, handed_in: Submission) -> int | None:
    """Index of an answer cell that was stopped. What it defined before is still there, and might score."""
    for index, cell in enumerate(graded.cells):
        error = explain.failure(cell) if is_answer(cell) else None
        if error and error.ename == explain.TIMED_OUT and index not in handed_in.left_out:
            return index
    return None


def _what_happened(lost: KernelLost, timeout: int) -> str:
    if "DeadKernelError" in str(lost):
        return "ended the kernel: it exited, crashed or ran out of memory"
    return f"was still busy after {timeout} s and could not be interrupted: is there an endless loop?"


def _grade_of(
    task: Task, points: dict[str, float], handed_in: Submission, graded: NotebookNode, made: Course
) -> TaskGrade:
    got = 0.0 if task.test in handed_in.missing else points[task.test]
    message = "" if got == task.most else explain.why(task, handed_in, graded, made.timeout, made.exercise)
    return TaskGrade(task.answer, task.test, task.title, got, task.most, message)


def _notes(handed_in: Submission) -> list[str]:
    """What happened in cells that belong to no task."""
    cells = handed_in.notebook.cells
    return [f"{what}; it was left out" for index, what in handed_in.left_out.items() if not grade_id(cells[index])]


def _print_json(notebook: Path, grades: Grades, page: Path) -> None:
    result = {
        "notebook": shown(notebook),
        "tasks": [asdict(task) for task in grades.tasks],
        "points": grades.points,
        "most": grades.most,
        "notes": grades.notes,
        "feedback": shown(page),
    }
    print(json.dumps(result, indent=1))


def _print_report(notebook: Path, grades: Grades, page: Path) -> None:
    print(f"\ngraded {shown(notebook)}\n")
    width = max(len(task.title) for task in grades.tasks)
    for task in grades.tasks:
        print(f"  {task.title:{width}}  {task.task:8}  {task.points:g} of {task.most:g}")
        for line in task.message.splitlines():
            print(f"      {line}")
    print(f"\n  {'total':{width}}  {'':8}  {grades.points:g} of {grades.most:g}\n")
    for note in grades.notes:
        print(f"note: {note}")
    print(f"feedback: {shown(page)}")


if __name__ == "__main__":
    sys.exit(main())
