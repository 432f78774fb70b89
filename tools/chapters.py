"""Re-execute notebooks from top to bottom and store clean outputs.

Usage: python tools/chapters.py [NAME ...]      NAME such as 01_numbers; all chapters and solutions if left out
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

from tools import pages
from tools.busy_cells import said

ROOT = Path(__file__).resolve().parents[1]
CELL_TIMEOUT = 120  # seconds
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_CELL_METADATA = ("tags", "nbgrader", "deletable", "editable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="chapter names, such as 01_numbers")
    wanted = parser.parse_args().names
    paths = notebooks(wanted)
    if not paths:
        print(f"no notebook called {', '.join(wanted)} in chapters/ or solutions/", file=sys.stderr)
        return 2
    for path in paths:
        started = time.perf_counter()
        error = execute(path)
        if error:
            print(f"{path.relative_to(ROOT)}: {error}\nThe file is left as it was.", file=sys.stderr)
            return 1
        size = path.stat().st_size / 1e6
        print(f"{path.relative_to(ROOT)}: {time.perf_counter() - started:.1f} s, {size:.2f} MB")
    pages.write()
    return 0


def notebooks(names: list[str] | None = None) -> list[Path]:
    """Every chapter and every solution, or those of the given names, in reading order."""
    found = [*sorted((ROOT / "chapters").glob("*.ipynb")), *sorted((ROOT / "solutions").glob("*/*.ipynb"))]
    return [path for path in found if not names or path.stem in names]


def execute(path: Path) -> str | None:
    """Run one notebook in its own folder and write it back clean; return what went wrong, if anything did."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        # what child processes and C code write to the file descriptors is not stored: nbval does not see it either
        extra_arguments=["--IPKernelApp.log_level=ERROR", "--IPKernelApp.capture_fd_output=False"],
    )
    bar = tqdm(total=sum(cell.cell_type == "code" for cell in notebook.cells), desc=path.name, unit="cell", leave=False)
    client.on_cell_complete = lambda **_: bar.update()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error).strip()
    finally:
        bar.close()
    doubt = next((text for cell in notebook.cells if (text := said(cell.get("outputs", [])))), None)
    if doubt:
        return doubt
    clean(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return None


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs between two readers' runs without saying anything: timestamps, progress bars, versions."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_CELL_METADATA})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _progress_bar(output)]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = nbformat.from_dict(_alt_texts(output.metadata))


def _alt_texts(metadata: dict) -> dict:
    """Of an output's metadata what is said to somebody who cannot see its picture."""
    pictures = {kind: known for kind, known in metadata.items() if isinstance(known, dict) and "alt" in known}
    return {kind: {"alt": known["alt"]} for kind, known in pictures.items()}


def _progress_bar(output: nbformat.NotebookNode) -> bool:
    """A bar, or the line that it leaves behind."""
    said = output.text if output.output_type == "stream" and output.name == "stderr" else None
    return said is not None and ("\r" in said or not said.strip())


if __name__ == "__main__":
    sys.exit(main())
