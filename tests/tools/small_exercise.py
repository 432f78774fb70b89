"""A small exercise for the tests of what grades and validates it."""

from pathlib import Path

from nbformat import NotebookNode

from tools.grading import author
from tools.grading.course import course

RIGHT = {"task_1": "def double(x):\n    return x + x", "task_2": "def triple(x):\n    return x + x + x"}


def function(number: int, name: str, factor: int, points: int) -> list[NotebookNode]:
    """The cells of a task: its text, its answer and its tests."""
    source = f"def {name}(x):\n    ### BEGIN SOLUTION\n    return {factor} * x\n    ### END SOLUTION"
    visible = f'assert {name}(1) == {factor}, "{name}(1) is {factor}"'
    hidden = f'assert {name}(-5) == {-5 * factor}, "negative numbers count as well"'
    return [
        author.text(f"text_{number}", f"## {number}. Write {name} ({points} points)"),
        author.task(f"task_{number}", source),
        author.tests(f"test_{number}", points, visible, hidden),
    ]


def save(solutions: Path) -> None:
    """Write its source, for which `RIGHT` has the answers, into a folder of sources."""
    author.save(author.notebook(*function(1, "double", 2, 2), *function(2, "triple", 3, 3)), "small", solutions)


def released(name: str, solutions: Path) -> NotebookNode:
    """What learners get."""
    with course(name, solutions) as made:
        return made.release()
