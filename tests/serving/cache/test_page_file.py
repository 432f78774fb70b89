"""A file of pages gives back what was put into it, bit by bit, or nothing; one that is not right is refused by name."""

import gc
import json
import os
import random
import warnings

import pytest
import torch

from minilib.mechanisms.content_addressing import ORIGIN
from minilib.serving.cache import page_file
from minilib.serving.cache.page_file import HEADER_BYTES, MAGIC, PageFile, PageFileError, PageName

PAGE = (2, 3, 2, 4, 5)


def opened(path, num_pages=3, model="m", page=PAGE, dtype=torch.float32):
    return PageFile(path, num_pages, model, page, dtype)


def name(number, parent=ORIGIN):
    return PageName.of(parent, (number, 2, 3, 4), ())


def content(number, dtype=torch.float32):
    return torch.randn(PAGE, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pages_come_back_bit_by_bit_in_another_process_s_life_too(tmp_path, dtype):
    file = opened(tmp_path / "pages", dtype=dtype)
    special = content(1, dtype)
    special.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    assert file.put(name(1), special) and file.put(name(2), content(2, dtype))
    for _ in range(2):
        assert file.get(name(1)).view(torch.uint8).equal(special.view(torch.uint8))
        assert file.get(name(2)).equal(content(2, dtype)) and file.get(name(2)).dtype == dtype
        assert file.get(name(3)) is None and name(3) not in file and len(file) == 2
        file.check_invariants()
        file.close()
        file = opened(tmp_path / "pages", dtype=dtype)


def test_the_page_used_longest_ago_makes_room(tmp_path):
    file = opened(tmp_path / "pages")
    for number in (1, 2, 3):
        file.put(name(number), content(number))
    file.get(name(1))
    file.put(name(2), content(2))
    file.put(name(4), content(4))
    file.check_invariants()
    assert [number for number in range(5) if file.get(name(number)) is not None] == [1, 2, 4]


def test_any_order_of_operations(tmp_path):
    choices, model, file = random.Random(1), {}, opened(tmp_path / "pages", 4)
    for _ in range(400):
        number = choices.randrange(8)
        action = choices.choice(["put", "get", "get", "open"])
        if action == "put":
            file.put(name(number), content(number))
            model[number] = content(number)
        elif action == "get":
            found = file.get(name(number))
            assert found is None or found.equal(content(number))
            assert found is None or number in model
        else:
            held = {number for number in range(8) if name(number) in file}
            file.close()
            file = opened(tmp_path / "pages", 4)
            assert {number for number in range(8) if name(number) in file} == held and len(held) == min(4, len(model))
        file.check_invariants()


def damage(path, change):
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


@pytest.mark.parametrize("at", [0, 40, 70, 100, 120, 150, 400])
def test_a_slot_that_was_changed_is_a_miss_and_free_again(tmp_path, at):
    """Its key, its parent's, its tokens, its checksum, its keys and values."""
    path = tmp_path / "pages"
    file = opened(path)
    file.put(name(1), content(1))
    file.put(name(2), content(2))
    slots = dict(file._slots)
    file.close()

    def flip(raw):
        raw[HEADER_BYTES + slots[name(1).key] * file._slot_bytes + at] ^= 1

    damage(path, flip)
    file = opened(path)
    assert file.get(name(1)) is None and file.get(name(2)).equal(content(2))
    file.check_invariants()
    assert file.put(name(1), content(1)) and file.get(name(1)).equal(content(1))


def test_a_file_that_was_closed_touches_no_other_file(tmp_path):
    """The system gives the number of a closed file to the next one that is opened."""
    file = opened(tmp_path / "pages")
    number = file._file
    file.put(name(1), content(1))
    file.close()
    with (tmp_path / "other").open("w+b") as other:
        assert other.fileno() == number
        assert not file.put(name(2), content(2)) and not file.put(name(1), content(1))
        assert file.get(name(1)) is None and name(1) not in file and len(file) == 0
        file.check_invariants()
    assert (tmp_path / "other").read_bytes() == b""
    again = opened(tmp_path / "pages")
    assert again.get(name(1)).equal(content(1))
    again.close()


def test_a_file_that_shrinks_while_it_is_used_is_a_miss(tmp_path):
    file = opened(tmp_path / "pages")
    file.put(name(1), content(1))
    os.truncate(tmp_path / "pages", HEADER_BYTES + 200)
    assert file.get(name(1)) is None
    file.check_invariants()


def test_other_tokens_under_the_same_key_are_never_served(tmp_path):
    file = opened(tmp_path / "pages")
    file.put(name(1), content(1))
    for other in (PageName(name(1).key, ORIGIN, (9, 2, 3, 4)), PageName(name(1).key, b"p" * 32, (1, 2, 3, 4))):
        file.put(name(1), content(1))
        assert file.get(other) is None


@pytest.mark.parametrize("breaks_at", [0, 1, 2])
def test_a_write_that_fails_loses_that_page_alone(tmp_path, monkeypatch, breaks_at):
    """Before, while and after the content is written; also for whoever opens the file then."""
    file, real, calls = opened(tmp_path / "pages"), os.pwrite, []
    for number in (1, 2, 3):
        file.put(name(number), content(number))

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == breaks_at + 1:
            raise OSError("no space left on device")
        return real(*arguments)

    monkeypatch.setattr(page_file.os, "pwrite", write)
    assert not file.put(name(4), content(4))
    monkeypatch.undo()
    for _ in range(2):
        left = file.get(name(1))  # what was to make room is still whole, or gone
        assert file.get(name(4)) is None and (left is None or breaks_at == 0 and left.equal(content(1)))
        assert file.get(name(2)).equal(content(2)) and file.get(name(3)).equal(content(3))
        file.check_invariants()
        file.close()
        file = opened(tmp_path / "pages")
    assert file.put(name(4), content(4)) and file.get(name(4)).equal(content(4))


def test_a_write_that_the_disk_takes_half_of_is_no_page(tmp_path, monkeypatch):
    file, real = opened(tmp_path / "pages"), os.pwrite
    monkeypatch.setattr(page_file.os, "pwrite", lambda f, data, at: real(f, data[: len(data) // 2], at))
    assert not file.put(name(1), content(1)) and file.get(name(1)) is None
    monkeypatch.undo()
    file.check_invariants()


OTHERS = {
    "model": {"model": "another"},
    "page": {"page": (2, 3, 2, 8, 5)},
    "dtype": {"dtype": torch.bfloat16},
    "num_pages": {"num_pages": 4},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_engine_is_refused_and_left_alone(tmp_path, what):
    path = tmp_path / "pages"
    file = opened(path)
    file.put(name(1), content(1))
    file.close()
    before = path.read_bytes()
    with pytest.raises(PageFileError, match=rf"pages was written by another engine: {what} is .* is needed"):
        opened(path, **OTHERS[what])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.pop(), "was cut"),
        (lambda raw: raw.append(0), "was cut"),
        (lambda raw: raw.__delitem__(slice(HEADER_BYTES - 8, None)), "was cut"),
        (lambda raw: raw.__delitem__(slice(50, None)), "header of pages cannot be read"),
        (lambda raw: raw.__setitem__(slice(20, 30), b"\0" * 10), "header of pages cannot be read"),
        (lambda raw: raw.__setitem__(slice(len(MAGIC), HEADER_BYTES), b"[]".ljust(HEADER_BYTES - 16, b"\0")), "cannot"),
        (lambda raw: raw.__setitem__(slice(len(MAGIC), HEADER_BYTES), b"{}".ljust(HEADER_BYTES - 16, b"\0")), "cannot"),
        (lambda raw: raw.__setitem__(0, 0), "no file of pages"),
        (lambda raw: raw.__delitem__(slice(3, None)), "no file of pages"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "pages"
    opened(path).close()
    assert json.loads(path.read_bytes()[len(MAGIC) : HEADER_BYTES].rstrip(b"\0"))["model"] == "m"
    damage(path, change)
    with pytest.raises(PageFileError, match=message):
        opened(path)


def test_a_disk_without_room_says_so_when_the_file_is_opened(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_file.os, "posix_fallocate", full)
    with pytest.raises(PageFileError, match="No space left on device; give it fewer pages"):
        opened(tmp_path / "pages")
    monkeypatch.undo()
    assert len(opened(tmp_path / "pages")) == 0, "what was left of it is no obstacle"


def test_one_file_serves_one_engine_at_a_time(tmp_path):
    file = opened(tmp_path / "pages")
    with pytest.raises(PageFileError, match="used by another engine"):
        opened(tmp_path / "pages")
    file.close()
    opened(tmp_path / "pages").close()
    with pytest.raises(ValueError, match="num_pages is a whole number ≥ 1"):
        opened(tmp_path / "pages", 0)


def test_a_file_that_nobody_holds_any_more_is_free(tmp_path):
    """Held in a cycle, as an engine's is, and dropped without a word."""
    file = opened(tmp_path / "pages")
    file.put(name(1), content(1))
    file.engine = file
    del file
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gc.collect()
    assert not seen
    again = opened(tmp_path / "pages")
    assert again.get(name(1)).equal(content(1))
    again.close()
