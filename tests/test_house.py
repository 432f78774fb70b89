"""The house rules of DESIGN.md: arrows that only point down, one table of chapters, eight headings, clean outputs."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

from minilib.book import curriculum
from minilib.numbers.records import ROOT
from tools import pages
from tools.chapters import clean, notebooks

# The seven floors, lowest first: a room may import from its own floor and from floors below it.
FLOORS = (
    ("mechanisms",),
    ("classic", "numbers"),
    ("ranks", "kernels", "book"),
    ("model",),
    ("parallel", "serving"),
    ("training",),
    ("operations",),
)
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
# What every kernel has: one interface, which several modules implement.
OF_A_KERNEL = {"forward", "backward", "reference", "cost", "choose_tile", "builds", "tile_traffic"}
# Functions that are called by the name of their module, as `records.load`: alone the name would say too little.
OF_A_MODULE = {
    "minilib.model.tokenizer.load",
    "minilib.model.weights.load",
    "minilib.numbers.records.load",
    "minilib.numbers.probes.chase.random_access",
    "minilib.numbers.probes.cuda.random_access",
    "minilib.numbers.workloads.matmul",
    "minilib.numbers.workloads.softmax",
}
CHAPTERS = [path for path in notebooks() if path.parent.name == "chapters"]
SOURCES = sorted((ROOT / "minilib").rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a file of minilib, "minilib.numbers.price"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Modules of minilib that a file imports anywhere: at its top, in a function, or for a type checker."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minilib":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def floor(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_stands_on_a_floor():
    rooms = {path.name for path in (ROOT / "minilib").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {room for rooms_of_floor in FLOORS for room in rooms_of_floor}
    assert len(rooms) <= 14 and len(FLOORS) == 7
    assert {path.name for path in (ROOT / "minilib").glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "minilib"])
def test_arrows_point_down(module):
    upwards = {imported for imported in IMPORTS[module] if floor(imported) > floor(module)}
    assert not upwards, f"{module} stands below {', '.join(sorted(upwards))} and must not import it"


def test_there_are_no_circles():
    """Not even for type checking. What a folder re-exports is taken from its files, which never import the folder."""
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in IMPORTS[module]:
                follow(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


def shared_names(kind: type[ast.AST]) -> dict[str, set[str]]:
    """Modules of minilib that define a public class or function of one name, by names that several modules define."""
    homes: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_no_two_public_classes_share_a_name():
    assert not shared_names(ast.ClassDef), "one name, one thing"


def test_no_two_public_functions_share_a_name():
    shared, confusing = shared_names(ast.FunctionDef), {}
    for name, modules in shared.items():
        left = {module for module in modules if f"{module}.{name}" not in OF_A_MODULE}
        of_a_kernel = name in OF_A_KERNEL and all(module.startswith("minilib.kernels.") for module in left)
        if len(left) > 1 and not of_a_kernel:
            confusing[name] = sorted(left)
    assert not confusing, f"one name, one thing: {confusing}"
    needless = (OF_A_KERNEL | {function.rsplit(".", 1)[1] for function in OF_A_MODULE}) - set(shared)
    assert not needless, f"one module alone defines {', '.join(sorted(needless))}"


def test_functions_of_a_module_are_called_by_its_name():
    """In the library, the tests, the tools and the notebooks: `load` alone leaves open what is loaded."""
    imported = re.compile(r"from (minilib[\w.]*) import (\([^)]*\)|[^\n(]*)")
    modules = [path for room in ("minilib", "tests", "tools") for path in (ROOT / room).rglob("*.py")]
    for path in (*modules, *notebooks()):
        for module, names in imported.findall(path.read_text(encoding="utf-8")):
            alone = {f"{module}.{name}" for name in re.findall(r"\w+", names)} & OF_A_MODULE
            assert not alone, f"{path.name} imports {', '.join(alone)} without its module"


def reached_from(modules: set[str]) -> set[str]:
    """Mechanisms that these modules import, and what those import in turn."""
    found: set[str] = set()
    left = {name for module in modules for name in IMPORTS[module] if name.startswith("minilib.mechanisms.")}
    while left:
        found |= left
        left = {name for module in left for name in IMPORTS[module]} - found
    return found


def test_mechanisms_are_the_ground_of_both_worlds():
    old = reached_from({module for module in MODULES if module.startswith("minilib.classic.")})
    new = reached_from({module for module in MODULES if module != "minilib" and floor(module) >= 2})
    files = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    shared = {name for name in files if name.startswith("minilib.mechanisms.")}
    shared -= {name for name in shared if name.startswith("minilib.mechanisms.basics.")}
    assert shared <= old, f"nothing in classic/ imports {', '.join(sorted(shared - old))}"
    assert shared <= new, f"nothing from ranks/ up imports {', '.join(sorted(shared - new))}"
    folders = {name.split(".")[2] for name in shared}
    named = {chapter.mechanism for chapter in curriculum.chapters()}
    written = {chapter.mechanism for chapter in curriculum.chapters() if chapter.written}
    assert folders <= named, "the curriculum names each mechanism; it may come before its chapter does"
    assert written - {""} <= folders, "a chapter that is written has its mechanism"


def test_mechanisms_need_nothing_but_the_standard_library_and_numpy():
    for path in (ROOT / "minilib" / "mechanisms").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        allowed = {"minilib"} if "basics" in path.parts else {"minilib", "numpy"}
        foreign = {name.split(".")[0] for name in names} - allowed - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {', '.join(foreign)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    assert not text or ast.get_docstring(ast.parse(text)), f"{path.name} needs a docstring"
    assert not re.search(r"^\s*print\(", text, re.M), "the library does not print"


def test_importing_the_library_loads_no_torch():
    import subprocess

    numbers = "minilib.numbers.price, minilib.numbers.workloads, minilib.numbers.records"
    loaded = "'torch' in sys.modules or 'matplotlib' in sys.modules"
    code = f"import sys, {numbers}, minilib.book.curriculum, minilib.book.notebook; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_readme_shows_the_curriculum_as_it_is():
    assert pages.README.read_text(encoding="utf-8") == pages.readme(), "run `make chapters`"


def test_the_paths_show_the_hours_that_the_notebooks_take_now():
    assert pages.PATHS.read_text(encoding="utf-8") == pages.paths(), "run `python -m tools.pages`"


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
    assert all(cell in ignored for cell in code if "too_busy(" in cell.source), "its output differs when it speaks"
    assert len(ignored) <= len(code) / 2
    for cell in ignored:
        asserted = "assert" in cell.source
        assert asserted or "import" in cell.source or len(cell.source.splitlines()) <= 8, f"{cell.id} claims nothing"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_links_within_the_repository_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target


PAGES = [pages.README, pages.PATHS, ROOT / "chapters" / "glossary.md", ROOT / "minilib" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_readme_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_table_of_floors_names_every_room():
    table = (ROOT / "minilib" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+?) \|", table, re.M)
    assert [set(re.findall(r"`(\w+)/`", rooms)) for _, rooms in reversed(rows)] == [set(rooms) for rooms in FLOORS]
