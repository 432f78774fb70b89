"""The glossary: one sentence a term, in order, each with a chapter that exists and uses it."""

import re

import nbformat
import pytest

from minilib.book import curriculum
from minilib.book.curriculum import CHAPTERS

LINE = re.compile(r"\* \*\*(?P<term>[^*]+)\*\*: (?P<sentence>[^.]+) \(\[(?P<chapter>\w+)\]\((?P=chapter)\.ipynb\)\)\.")
LINES = [line for line in (CHAPTERS / "glossary.md").read_text(encoding="utf-8").splitlines() if line.startswith("*")]
ENTRIES = [LINE.fullmatch(line) for line in LINES]
WRITTEN = [chapter.name for chapter in curriculum.chapters() if chapter.written]
TERMS = {entry["term"].lower() for entry in ENTRIES if entry}
# Bold in a mapping table for emphasis, or a name: a reader who knows the words of the row needs no entry.
PLAIN = {
    "compute", "daly", "dropped", "everybody", "kept", "kernel launch", "loading the weights", "loss and gradient norm",
    "model", "order of the axes", "stage 0", "young",
}  # fmt: skip


def prose(name: str) -> str:
    """All Markdown of a chapter."""
    cells = nbformat.read(CHAPTERS / f"{name}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def mapped(name: str) -> set[str]:
    """Bold words in the tables of section 2, where a chapter maps one world's terms to the other's."""
    section = prose(name).partition("\n## 2. ")[2].partition("\n## 3. ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return {term.lower() for row in rows for term in re.findall(r"\*\*([^*]+)\*\*", row)}


def test_every_line_is_a_term_a_sentence_and_a_chapter():
    odd = [line for line, entry in zip(LINES, ENTRIES, strict=True) if not entry]
    assert not odd and len(LINES) > 100


def test_terms_are_in_order_and_there_once():
    terms = [entry["term"].lower() for entry in ENTRIES]
    assert terms == sorted(set(terms))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_chapter_uses_the_terms_that_it_is_said_to_build(name):
    text = prose(name).lower()
    missing = [entry["term"] for entry in ENTRIES if entry["chapter"] == name and entry["term"].lower() not in text]
    assert not missing, f"{name} never says {', '.join(missing)}"


def test_every_entry_leads_to_a_written_chapter():
    assert {entry["chapter"] for entry in ENTRIES} <= set(WRITTEN)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "00_map"])
def test_terms_of_a_mapping_table_are_in_the_glossary(name):
    terms = mapped(name)
    assert terms, "section 2 has a table"
    absent = {term for term in terms - PLAIN if term not in TERMS and term.removesuffix("s") not in TERMS}
    assert not absent, f"chapters/glossary.md has no {', '.join(sorted(absent))}"


def test_words_that_need_no_entry_are_in_some_table():
    assert set().union(*map(mapped, WRITTEN)) >= PLAIN, "a word that no table has any more"
