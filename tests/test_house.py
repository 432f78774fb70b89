"""The house rules of DESIGN.md: arrows that only point down, one table of chapters, eight headings, clean outputs."""

import ast
import re

import nbformat
import pytest

from minilib import curriculum
from minilib.records import ROOT
from tools import pages
from tools.chapters import clean, notebooks

# Who may import whom, lowest first: a module may import from its own row and from rows before it.
LAYERS = (
    ("format", "mechanisms"),
    ("classic",),
    ("measure", "records", "quoted", "curriculum", "notebook"),
    ("launch", "launch_errors", "launch_group", "launch_local", "launch_member", "launch_pickle", "launch_rank"),
    ("probes",),
    ("machine",),
    ("plot", "plot_plans"),
    ("price",),
    ("workloads", "kernels"),
    ("model",),
    ("training", "serving"),
    ("operations",),
)
# Imports that point up on purpose, inside a function, so that loading a module never drags in what it may not need.
DEFERRED = {("machine", "probes"), ("price", "plot")}
HEADINGS = [
    "1. What you already know",
    "2. The same idea, rephrased",
    "3. Price it",
    "4. Build it",
    "5. Measure it",
    "6. Where the analogy breaks",
    "7. In production",
    "8. Check yourself",
]
CHAPTERS = [path for path in notebooks() if path.parent.name == "chapters"]
SOURCES = sorted((ROOT / "minilib").rglob("*.py"))


def layer(package: str) -> int:
    return next(number for number, row in enumerate(LAYERS) if package in row)


def imports_of(tree: ast.AST) -> set[str]:
    """Packages of minilib that the code imports, such as {"machine"}."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "minilib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("minilib.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    if path.name == "__init__.py" and path.parent.name == "minilib":
        return
    own = path.relative_to(ROOT / "minilib").parts[0].removesuffix(".py")
    for imported in imports_of(ast.parse(path.read_text())):
        downwards = layer(imported) <= layer(own)
        assert downwards or (own, imported) in DEFERRED, f"{own} must not import {imported}"


def test_mechanisms_need_nothing_but_numpy():
    for path in (ROOT / "minilib" / "mechanisms").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"torch", "triton", "matplotlib"}, path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    assert not text or ast.get_docstring(ast.parse(text)), f"{path.name} needs a docstring"
    assert not re.search(r"^\s*print\(", text, re.M), "the library does not print"


def test_importing_the_library_loads_no_torch():
    import subprocess
    import sys

    modules = "minilib.price, minilib.workloads, minilib.records, minilib.curriculum, minilib.notebook"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_readme_shows_the_curriculum_as_it_is():
    assert pages.README.read_text(encoding="utf-8") == pages.readme(), "run `make chapters`"


def test_the_curriculum_and_the_folders_agree():
    written = [chapter for chapter in curriculum.chapters() if chapter.written]
    assert [chapter.name for chapter in written] == [path.stem for path in CHAPTERS]
    for chapter in written:
        for module in chapter.modules:
            target = ROOT / "minilib" / module.replace(".", "/")
            assert target.with_suffix(".py").is_file() or target.is_dir(), f"{chapter.name}: no minilib/{module}"
        if chapter.ai:
            assert (ROOT / "solutions" / chapter.name / f"{chapter.name}.ipynb").is_file()
            assert (ROOT / "exercises" / chapter.name / f"{chapter.name}.ipynb").is_file()
            assert chapter.breaks


def test_the_curriculum_is_in_order_and_complete():
    chapters = curriculum.chapters()
    assert [chapter.number for chapter in chapters] == list(range(22))
    assert all(chapter.breaks for chapter in chapters if chapter.ai)
    with pytest.raises(ValueError, match="'written' or 'planned'"):
        curriculum.Chapter("01_x", "", "", "", (), "", "done")


def headings(notebook) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^## (.+)$", text, re.M)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_the_eight_headings(path):
    chapter = next(chapter for chapter in curriculum.chapters() if chapter.name == path.stem)
    if chapter.ai:
        assert headings(nbformat.read(path, as_version=4)) == HEADINGS


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stored_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make chapters`"
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    cleaned = nbformat.reads(nbformat.writes(notebook), as_version=4)
    clean(cleaned)
    assert nbformat.writes(cleaned) == nbformat.writes(notebook), "metadata that no reader needs"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"/(home|root|Users|tmp|work)/", text), "a path of the machine that ran it"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_code_cells_are_short_and_few_outputs_are_ignored(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in code:
        lines = cell.source.splitlines()
        assert len(lines) <= 25, f"{cell.id}: {len(lines)} lines"
        assert max(map(len, lines)) <= 100, f"{cell.id}: a line that needs scrolling"
        assert not cell.source.rstrip().endswith(";"), f"{cell.id}: nbval does not know that ; silences a line"
    ignored = [cell for cell in code if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(ignored) <= len(code) / 2
    for cell in ignored:
        asserted = "assert" in cell.source
        assert asserted or "import" in cell.source or len(cell.source.splitlines()) <= 8, f"{cell.id} claims nothing"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_links_within_the_repository_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target


def test_the_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", pages.README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
