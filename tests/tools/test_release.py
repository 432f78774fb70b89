"""What learners get: nothing of the answers, always the same bytes, and never a notebook that cannot grade."""

import nbformat
import pytest

from tests.tools import notebooks
from tests.tools.notebooks import cell, checks_of, make_source, source_cells
from tools import release
from tools.release import BadSource


def test_the_release_has_neither_answers_nor_hidden_tests(tmp_path):
    make_source(tmp_path)
    text = release.release("small", tmp_path)
    for secret in ("secret", "negative numbers", "BEGIN", "HIDDEN"):
        assert secret not in text
    assert text.count("raise NotImplementedError()") == 2
    assert "double(1) is 2" in text


def test_the_same_source_gives_the_same_bytes(tmp_path):
    make_source(tmp_path)
    assert release.release("small", tmp_path) == release.release("small", tmp_path)


def with_cell(index, new):
    cells = source_cells()
    cells[index] = new
    return cells


BAD = {
    "tests nothing": source_cells()[:1],
    "1 solution cells but 2 test cells": [c for c in source_cells() if c.id != "task_1"],
    "used more than once": [*source_cells(), cell("task_1", notebooks.DOUBLE, id="again")],
    "without points": with_cell(2, cell("test_1", checks_of("double", 2), 0)),
    "can edit": with_cell(2, cell("test_1", checks_of("double", 2), 2, locked=False)),
    "without ### BEGIN SOLUTION": with_cell(1, cell("task_1", "def double(x):\n    return 2 * x")),
    "hidden tests cannot fail": with_cell(2, cell("test_1", "assert double(1) == 2", 2)),
    "visible tests cannot fail": with_cell(
        2, cell("test_1", "assert True\n### BEGIN HIDDEN TESTS\nassert double(1) == 2\n### END HIDDEN TESTS", 2)
    ),
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_source_is_refused(complaint, tmp_path):
    source = nbformat.read(make_source(tmp_path, BAD[complaint]), as_version=4)
    with pytest.raises(BadSource, match=complaint):
        release.check_source(source)


def test_a_bad_source_is_not_released(tmp_path):
    make_source(tmp_path, BAD["hidden tests cannot fail"])
    with pytest.raises(BadSource, match="hidden tests cannot fail"):
        release.release("small", tmp_path)


@pytest.mark.parametrize("secret", ["return 2 * x  # the whole secret", 'double(-5) == -10, "negative numbers count'])
def test_a_secret_that_comes_out_anywhere_is_refused(secret, tmp_path):
    source = nbformat.read(make_source(tmp_path), as_version=4)
    released = nbformat.reads(release.release("small", tmp_path), as_version=4)
    release.check_leaks(source, released)
    lines = [line for c in source.cells for line in c.source.splitlines() if secret in line]
    released.cells[2].outputs = [nbformat.v4.new_output("stream", text=lines[0])]
    with pytest.raises(BadSource, match="give away"):
        release.check_leaks(source, released)


def test_a_learners_answers_are_recognised(tmp_path):
    make_source(tmp_path)
    target = tmp_path / "exercise.ipynb"
    assert not release.has_answers(target)
    target.write_text(release.release("small", tmp_path))
    assert not release.has_answers(target)
    answered = nbformat.read(target, as_version=4)
    answered.cells[1].source = "def double(x):\n    return 7"
    notebooks.write(target, answered.cells)
    assert release.has_answers(target)
