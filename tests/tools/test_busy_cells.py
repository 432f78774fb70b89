"""A cell that was too busy to judge is skipped for that reason: it neither passes nor fails, others are as before."""

import re
import subprocess
import sys

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from minilib.numbers.records import ROOT

IGNORE = {"tags": ["nbval-ignore-output"]}
SETUP = """from types import SimpleNamespace
from minilib.book.notebook import too_busy
quiet, beside = SimpleNamespace(busy=0.05), SimpleNamespace(busy=0.4)"""
CELLS = {
    "setup": SETUP,
    "holds": "later = 1\nassert True or too_busy(beside)",
    "open": "later = 2\nassert False or too_busy(quiet, beside)\n'a table'",
    "fails": "assert False or too_busy(quiet)",
    "fails beside": "too_busy(beside)\nassert False",
    "later": "assert later == 2",
}
SAID = "too busy to judge: others took 40% of the cores"


def test_what_nobody_could_judge_is_skipped_and_nothing_else(tmp_path):
    cells = [new_code_cell(source, metadata=IGNORE, execution_count=1) for source in CELLS.values()]
    nbformat.write(new_notebook(cells=cells), tmp_path / "cells.ipynb")
    (tmp_path / "pytest.ini").touch()  # a root of its own
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tools.busy_cells", "-rA"]
    words += ["--nbval", "--nbval-current-env", "--junitxml=report.xml", "cells.ipynb"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    said = {cell: word for word, cell in re.findall(r"^(PASSED|FAILED) .*Cell (\d)", run.stdout, re.M)}
    print(run.stdout)
    assert said == {"0": "PASSED", "1": "PASSED", "3": "FAILED", "4": "FAILED", "5": "PASSED"}
    assert SAID in re.search(r"^SKIPPED .*", run.stdout, re.M)[0]
    assert SAID in (tmp_path / "report.xml").read_text()


def test_every_run_of_pytest_here_has_the_plugin(pytestconfig):
    """That of a reader, too, who runs nbval by hand."""
    assert pytestconfig.pluginmanager.has_plugin("tools.busy_cells")
