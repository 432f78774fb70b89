"""How an exercise lists the answers that its graders are tested with.

For solutions/NN_name/ there is tests/graders/NN_name.py, with a dictionary from each task's grade id to its answers:

    from tests.graders.answers import Answers

    TASKS = {
        "task_1": Answers(
            correct=("def double(x):\\n    return x + x",),
            wrong={
                "forgets negative numbers": "def double(x):\\n    return 2 * abs(x)",
                "squares": "def double(x):\\n    return x * x",
                "truncates": "def double(x):\\n    return 2 * int(x)",
            },
        ),
    }

The code replaces the whole answer cell. Mistakes are those that a reader of the chapter would make, and each must be
found by a check: an answer that fails because it has a syntax error or a misspelt name proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answers:
    """Answers to one task.

    Args:
        correct: code for the answer cell, right but different from the official solution; at least one.
        wrong: plausible mistake in one line → code for the answer cell; at least three.
    """

    correct: tuple[str, ...]
    wrong: dict[str, str]
