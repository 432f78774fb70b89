from pathlib import Path

import pytest

from minilib.model import corpus
from minilib.model.corpus import standard_library


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def library(tmp_path):
    """A hundred files in two folders, each with a text of its own."""
    return write(tmp_path, {f"{'abc'[k % 3]}/m{k}.py": f"x = {k}\n".encode() for k in range(100)})


def test_every_file_is_in_one_split_and_in_one_only(library):
    read = standard_library(library)
    assert not set(read.train) & set(read.validation)
    assert sorted(read.train + read.validation) == sorted(f"x = {k}\n" for k in range(100))
    assert 1 <= len(read.validation) <= 15  # one in twenty, by chance of the name


def test_a_file_stays_in_its_split_whatever_it_says_and_whatever_is_beside_it(library):
    held_out = set(standard_library(library).validation)
    write(library, {"c/new.py": b"y = 1\n", **{f"a/m{k}.py": b"# changed\n" for k in range(0, 99, 3)}})
    later = set(standard_library(library).validation)
    assert {text for text in held_out if int(text[4:]) % 3} == later - {"# changed\n", "y = 1\n"}


def test_reading_twice_gives_the_same_corpus_wherever_it_lies(library, tmp_path_factory):
    copy = tmp_path_factory.mktemp("site-packages") / "tests"  # names above the root are nobody's business
    library.rename(copy)
    moved = standard_library(copy)
    copy.rename(library)
    assert moved == standard_library(library) == standard_library(library)


@pytest.mark.parametrize(
    "change",
    [{"a/m3.py": b"x = 4\n"}, {"a/m3.py": b"x = 3"}, {"a/more.py": b""}, {"a/more.py": b"\xff"}],
    ids=["a byte", "a byte less", "an empty file", "a byte that is no text"],
)
def test_the_digest_changes_with_a_byte(change, library):
    before = standard_library(library).digest
    assert standard_library(write(library, change)).digest != before


def test_the_digest_changes_with_a_name(library):
    before = standard_library(library).digest
    (library / "a/m3.py").rename(library / "a/m3000.py")
    assert standard_library(library).digest != before


def test_contents_that_look_like_names_do_not_fool_the_digest(tmp_path):
    two = write(tmp_path / "two", {"a.py": b"1", "b.py": b"2"})
    one = write(tmp_path / "one", {"a.py": b"1b.py\x002"})
    assert standard_library(two).digest != standard_library(one).digest


def test_tests_and_foreign_packages_and_what_is_not_python_are_left_out(library):
    before = standard_library(library)
    write(library, {f"deep/{folder}/x.py": b"z\n" for folder in corpus.LEFT_OUT})
    write(library, {"notes.txt": b"z\n", "module.pyc": b"z\n"})
    assert standard_library(library) == before


def test_blank_files_are_no_texts_and_broken_bytes_are_dropped(library):
    before = standard_library(library)
    write(library, {"a/blank.py": b" \n\t\n", "a/latin.py": b"# caf\xe9\n"})
    after = standard_library(library)
    assert sorted(set(after.train + after.validation) - set(before.train + before.validation)) == ["# caf\n"]


def test_a_folder_without_python_says_so(tmp_path):
    empty = write(tmp_path / "empty", {"readme.txt": b"x"})
    for root in (empty, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no Python source under {root.name}/.*standard library"):
            standard_library(root)


def test_this_interpreter_has_one():
    read = standard_library()
    size = sum(map(len, read.train))
    assert size > 3_000_000  # characters, some ten megabytes without the tests
    assert 0.01 < sum(map(len, read.validation)) / size < 0.2
    assert any("class OrderedDict" in text for text in read.train + read.validation)
    assert not any("site-packages/torch" in text for text in read.train)
