"""Every byte comes back, equal things are stored once, keys are git's own, and a changed byte is found by name."""

import itertools
import random
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from minilib.classic.content_store import LAYOUTS, ContentStore, ObjectDamaged, object_key, read_tree
from minilib.mechanisms.content_addressing import ORIGIN, block_key

BLOCK = 1024


@pytest.fixture(scope="module")
def before():
    """Some packages of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    tree = {f"{name}/{path}": text for name in ("json", "email", "urllib") for path, text in
            read_tree(root / name, "*.py").items()}  # fmt: skip
    assert len(tree) > 20 and sum(map(len, tree.values())) > 200_000
    return tree


def edited(tree):
    """One file of each kind of edit: (tree, {kind: path})."""
    names = [name for name, text in tree.items() if len(text) > 6 * BLOCK]
    kinds = dict(zip(["replace", "insert", "append", "rename", "delete"], names, strict=False))
    after, middle = dict(tree), 3 * BLOCK + 100
    text = tree[kinds["replace"]]
    after[kinds["replace"]] = text[:middle] + bytes([text[middle] ^ 1]) + text[middle + 1 :]
    text = tree[kinds["insert"]]
    after[kinds["insert"]] = text[:middle] + b"#" + text[middle:]
    after[kinds["append"]] = tree[kinds["append"]] + b"# the end\n"
    after["json/renamed.py"] = after.pop(kinds["rename"])
    del after[kinds["delete"]]
    return after, kinds


def blocks(text):
    return [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]


def chained(text):
    """Every block with all that is before it."""
    return [tuple(blocks(text)[: n + 1]) for n in range(len(blocks(text)))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_trees_come_back_and_what_they_share_is_stored_once(tmp_path, before, layout):
    """Bytes are counted by hand: contents, lists of keys, folders."""
    store, (after, _) = ContentStore(tmp_path, layout, BLOCK), edited(before)
    keys = [store.save(tree) for tree in (before, after)]
    assert [store.load(key) for key in keys] == [before, after] and keys[0] != keys[1]
    texts = {*before.values(), *after.values()}
    if layout == "files":
        expected = sum(map(len, texts))
    else:
        pieces = {piece for text in texts for piece in (blocks if layout == "blocks" else chained)(text)}
        expected = sum(len(piece if layout == "blocks" else piece[-1]) for piece in pieces)
        expected += sum(len(one) for one in {tuple(blocks(text)) for text in texts}) * 32
    folders = {key for root in keys for key in store.folders(root).values()}
    expected += sum(store.path_of(bytes.fromhex(key)).stat().st_size for key in folders)
    assert store.bytes_stored == expected
    assert store.bytes_stored == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert ContentStore(tmp_path, layout, BLOCK).bytes_stored == expected, "opened again"
    assert [store.save(tree) for tree in (before, after)] == keys and store.bytes_stored == expected


def test_what_each_kind_of_edit_stores_anew(tmp_path, before):
    """Contents alone: a file; a block, or all behind an insertion; all behind any change; nothing for a new name."""
    after, kinds = edited(before)
    stored = {}
    for layout, kind in itertools.product(LAYOUTS, kinds):
        store = ContentStore(tmp_path / layout / kind, layout, BLOCK)
        path = kinds[kind]
        store.save({"a.py": before[path]})
        objects = store.bytes_stored, store.num_objects
        new = {"b.py": before[path]} if kind == "rename" else {"a.py": after[path]} if path in after else {}
        store.save(new)
        folder = len(b"100644 a.py\0") + 32 if new else 0
        stored[layout, kind] = store.bytes_stored - objects[0] - folder
    for kind, path in kinds.items():
        size, new = len(before[path]), len(after.get(path, b""))
        count = -(-new // BLOCK)
        behind = new - 3 * BLOCK  # from the block of the change on
        last = new - (count - 1) * BLOCK
        expected = {
            "replace": (size, BLOCK + 32 * count, behind + 32 * count),
            "insert": (new, behind + 32 * count, behind + 32 * count),
            "append": (new, last + 32 * count, last + 32 * count),
        }.get(kind, (0, 0, 0))
        assert tuple(stored[layout, kind] for layout in LAYOUTS) == expected, kind


def test_an_edit_changes_the_keys_on_its_path_to_the_root_and_no_others(tmp_path, before):
    store = ContentStore(tmp_path)
    tree = {f"lib/{path}": text for path, text in before.items()}
    path = next(path for path in tree if path.startswith("lib/email/mime/") and tree[path])
    first = store.folders(store.save(tree))
    second = store.folders(store.save(tree | {path: tree[path] + b"\n"}))
    assert first.keys() == second.keys() == {"", "lib", "lib/json", "lib/email", "lib/email/mime", "lib/urllib"}
    assert {name for name in first if first[name] != second[name]} == {"", "lib", "lib/email", "lib/email/mime"}
    assert store.folders(store.save(dict(reversed(tree.items())))) == first, "the order of files says nothing"


def git(*arguments, cwd):
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def test_keys_are_those_that_git_computes(tmp_path, before):
    """Whole trees: names that sort differently with a slash behind them, empty files, bytes that are no text."""
    if not shutil.which("git"):
        pytest.skip("there is no git here to compare with")
    work = tmp_path / "work"
    work.mkdir()
    try:
        git("init", "-q", "--object-format=sha256", cwd=work)
    except subprocess.CalledProcessError:
        pytest.skip("this git knows no SHA-256")
    odd = {"a": b"", "a.b": b"1", "a-": b"2", "ab/c": b"3", "a b/ü": b"\0\xff", "b/c/d/e": b"4", "b0": b"5", "b.c": b""}
    odd |= {"c/x": b"6", "c.d": b"7", "c-d": b"8", "c0": b"9"}
    for number, tree in enumerate((odd, before, edited(before)[0], {})):
        for path in work.iterdir():
            if path.name != ".git":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in tree.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_bytes(content)
        git("add", "-A", ".", cwd=work)
        store = ContentStore(tmp_path / str(number))
        assert store.save(tree) == git("write-tree", cwd=work)
        assert read_tree(work) == tree | {n: c for n, c in read_tree(work).items() if n.startswith(".git/")}
        for path in list(tree)[:3]:
            assert object_key("blob", tree[path]).hex() == git("hash-object", path, cwd=work)
            assert store.path_of(object_key("blob", tree[path])).read_bytes() == tree[path]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_byte_is_found_by_name(tmp_path, before, layout):
    """Any object of any kind, changed, cut, or missing."""
    small = dict(itertools.islice(before.items(), 6)) | {"x/empty": b"", "x/y/z": before["json/decoder.py"]}
    store = ContentStore(tmp_path, layout, BLOCK)
    key, choices = store.save(small), random.Random(layout)
    assert store.damaged(key) == []
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        at = choices.randrange(max(1, len(content)))
        for bad in {content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] if content else b"x", content[:-1]}:
            if bad == content:
                continue
            path.write_bytes(bad)
            found = store.damaged(key)
            name = path.parent.name + path.name
            with pytest.raises(ObjectDamaged, match=name if layout == "files" else f"{name}|was changed"):
                store.load(key)
            assert found and all(one == "" or one.endswith("/") or one in small for one in found)
        path.unlink()
        with pytest.raises(ObjectDamaged, match="missing"):
            store.load(key)
        path.write_bytes(content)
    assert store.load(key) == small and store.damaged(key) == []


def test_the_one_file_that_was_damaged_is_named(tmp_path, before):
    for layout in LAYOUTS:
        store = ContentStore(tmp_path / layout, layout, BLOCK)
        key, path, text = store.save(before), "email/parser.py", before["email/parser.py"]
        block = blocks(text)[1]
        of_chain = block_key(block_key(ORIGIN, blocks(text)[0]), block)
        one = {"files": object_key("blob", text), "blocks": object_key("blob", block), "chain": of_chain}[layout]
        store.path_of(one).write_bytes(bytes([block[0] ^ 1]) + block[1:])
        assert store.damaged(key) == [path]
        with pytest.raises(ObjectDamaged, match=f"{path}" if layout != "files" else one.hex()):
            store.load(key)


def test_a_save_that_breaks_off_leaves_no_half_of_an_object(tmp_path, monkeypatch):
    store, real = ContentStore(tmp_path), Path.write_bytes

    def cut(path, content):
        real(path, content[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(OSError, match="no space"):
        store.save({"a": b"abcdef"})
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and store.bytes_stored == 0
    assert store.load(store.save({"a": b"abcdef"})) == {"a": b"abcdef"}


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\0b"])
def test_what_is_no_path_is_refused(tmp_path, path):
    with pytest.raises(ValueError, match="no path"):
        ContentStore(tmp_path).save({path: b""})


@pytest.mark.parametrize("tree", [{"a": b"", "a/b": b""}, {"a/b": b"", "a": b""}])
def test_a_file_and_a_folder_of_one_name_are_refused(tmp_path, tree):
    with pytest.raises(ValueError, match="folder"):
        ContentStore(tmp_path).save(tree)


def test_options_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="files, blocks, chain"):
        ContentStore(tmp_path, "zip")
    with pytest.raises(ValueError, match="1 byte or more"):
        ContentStore(tmp_path, "blocks", 0)
    with pytest.raises(NotADirectoryError, match="missing"):
        read_tree(tmp_path / "missing")
    with pytest.raises(ObjectDamaged, match="missing"):
        ContentStore(tmp_path).load("00" * 32)
