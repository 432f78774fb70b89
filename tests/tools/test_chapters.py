"""`make chapters`: what is stored of a run, and what is refused."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from minilib.book.notebook import TOO_BUSY
from tools import chapters

FROM_OUTSIDE = [
    "import subprocess\nsubprocess.run('echo from a child; echo from a child >&2', shell=True)\nprint('kept')",
    "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.puts(b'from C')\nlibc.fflush(None)\nprint('kept')",
    "import os\nos.write(2, b'from the descriptor')\nprint('kept')",
]


def write(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_what_nbval_does_not_see_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # under pytest, and so under nbval, no kernel watches the descriptors
    path = write(tmp_path / "outside.ipynb", *FROM_OUTSIDE)
    assert chapters.execute(path) is None
    outputs = [cell.outputs for cell in nbformat.read(path, as_version=4).cells]
    texts = [["".join(output.text for output in cell if output.output_type == "stream")] for cell in outputs]
    assert texts == [["kept\n"]] * 3


@pytest.mark.parametrize(
    ("source", "why"),
    [("1 / 0", "ZeroDivisionError"), (f"display({{'text/plain': '{TOO_BUSY}: others'}}, raw=True)", TOO_BUSY)],
)
def test_a_run_that_failed_or_could_not_judge_is_not_stored(source, why, tmp_path):
    path = write(tmp_path / "refused.ipynb", "print(1)", source)
    before = path.read_bytes()
    assert why in chapters.execute(path)
    assert path.read_bytes() == before


def test_alt_text_is_all_that_is_kept_of_an_outputs_metadata(tmp_path):
    draw = "from minilib.book import plot\n_ = plot.axes('Half < whole')"
    path = write(tmp_path / "figure.ipynb", draw, "display({'text/plain': '1'}, raw=True, metadata={'seen': 1})")
    assert chapters.execute(path) is None
    picture, plain = (cell.outputs[-1] for cell in nbformat.read(path, as_version=4).cells)
    assert picture.metadata == {"image/png": {"alt": "Half < whole."}} and plain.metadata == {}
