"""A load reads the blocks that hold what a rank needs, checks them, and reads no others."""

import json
import random
from zlib import crc32

import pytest
import torch

from minilib.mechanisms.journaling import ManifestDamaged, PartDamaged, digest, numbered
from minilib.operations.checkpoint import Checkpointer, Fragment, ModelState
from minilib.operations.checkpoint.format import reading
from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.folder import CheckpointFolder, check_parts, part_name, read_committed
from minilib.operations.checkpoint.format.reading import PartReader
from minilib.operations.checkpoint.format.table import check_fits

BLOCK = 64


def saved(folder, **tensors):
    model = torch.nn.Module()
    for name, value in tensors.items():
        model.register_buffer(name, value)
    with Checkpointer(folder, block_bytes=BLOCK) as checkpointer:
        checkpointer.save({"model": model}, 0, wait=True)
    disk = CheckpointFolder(folder)
    return disk, read_committed(disk)


def read_box(disk, committed, name, whole, box):
    into = torch.full(box.shape, -1, dtype=whole.dtype)
    reader = PartReader(disk, committed.checksums, committed.sizes, committed.block_bytes)
    reader.read([Fragment(f"model.{name}", tuple(whole.shape), box, into)], committed.table)
    assert torch.equal(into, whole[box.slices(Box.whole(whole.shape))])
    return reader.tally


def test_any_box_is_read_from_its_blocks_alone(tmp_path, monkeypatch):
    chance, whole = random.Random(0), torch.arange(7 * 40 * 6, dtype=torch.float32).view(7, 40, 6)
    disk, committed = saved(tmp_path, a=torch.zeros(5), w=whole)
    (stored,) = committed.table["model.w"].boxes
    for window in (16 * 2**20, 200):
        monkeypatch.setattr(reading, "WINDOW", window)
        for _ in range(60):
            start = tuple(chance.randrange(size) for size in whole.shape)
            box = Box(start, tuple(chance.randint(1, size - at) for at, size in zip(start, whole.shape, strict=True)))
            tally = read_box(disk, committed, "w", whole, box)
            places = whole[box.slices(Box.whole(whole.shape))].reshape(-1).long() * 4 + stored.offset
            blocks = torch.unique(places // BLOCK)
            assert tally.needed == 4 * box.numel
            assert tally.blocks == len(blocks) and tally.read <= BLOCK * len(blocks)


def test_a_few_rows_of_a_large_tensor_read_little(tmp_path):
    whole = torch.randn(1000, 16)
    disk, committed = saved(tmp_path, w=whole)
    assert read_box(disk, committed, "w", whole, Box((500, 0), (1, 16))).read == BLOCK
    columns = read_box(disk, committed, "w", whole.clone(), Box((0, 3), (1000, 1)))
    assert (columns.needed, columns.read) == (4000, 64_000)  # every block has one value of the column


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8,
                                   torch.float8_e4m3fn])  # fmt: skip
def test_every_dtype_and_the_edges_of_shapes(tmp_path, dtype):
    values = (torch.randn(3, 5) * 10).to(dtype)
    model, other = torch.nn.Module(), torch.nn.Module()
    for each, data in ((model, values), (other, torch.zeros_like(values))):
        each.register_buffer("a", data)
        each.register_buffer("scalar", data[1, 2].clone())
        each.register_buffer("none", data[:0].clone())
        each.register_buffer("turned", data.t())
    with Checkpointer(tmp_path, block_bytes=7) as checkpointer:
        checkpointer.save({"model": model}, 0)
        checkpointer.load({"model": other})
    for name, value in model.named_buffers():
        found = other.get_buffer(name)
        assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def test_nothing_is_lost_of_nan_inf_and_signed_zero(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    disk, committed = saved(tmp_path, a=values)
    into = torch.zeros(5)
    PartReader(disk, committed.checksums, committed.sizes, BLOCK).read(
        [Fragment("model.a", (5,), Box.whole((5,)), into)], committed.table
    )
    assert torch.equal(into.view(torch.int32), values.view(torch.int32))


def test_a_damaged_byte_is_found_where_it_is_needed_and_named(tmp_path):
    whole = torch.randn(100, 16)
    disk, committed = saved(tmp_path, w=whole)
    path = tmp_path / part_name(0, 0)
    data = bytearray(path.read_bytes())
    check_parts(disk, committed)
    for place in (0, 3000, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        row = place // 64
        with pytest.raises(PartDamaged, match=f"{path.name} is damaged between bytes {row * 64:,} and"):
            read_box(disk, committed, "w", whole, Box((row, 0), (1, 16)))
        read_box(disk, committed, "w", whole, Box(((row + 1) % 100, 0), (1, 16)))
        with pytest.raises(PartDamaged):
            check_parts(disk, committed)
    path.write_bytes(data[:-1])
    with pytest.raises(PartDamaged, match="ends at byte 6,399, and the manifest says 6,400"):
        read_box(disk, committed, "w", whole, Box((99, 0), (1, 16)))
    path.unlink()
    with pytest.raises(PartDamaged, match="is missing"):
        read_box(disk, committed, "w", whole, Box((99, 0), (1, 16)))


def test_damage_is_found_whenever_its_check_ends_and_a_reader_may_read_again(tmp_path, monkeypatch):
    """Checks run behind the reading of later windows, the last one behind all of it."""
    monkeypatch.setattr(reading, "WINDOW", BLOCK)
    whole = torch.randn(100, 16)
    disk, committed = saved(tmp_path, w=whole)
    path, into = tmp_path / part_name(0, 0), torch.zeros_like(whole)
    reader = PartReader(disk, committed.checksums, committed.sizes, BLOCK)
    data = path.read_bytes()
    for row in (0, 50, 99):
        changed = bytearray(data)
        changed[64 * row + 5] ^= 16
        path.write_bytes(changed)
        with pytest.raises(PartDamaged, match=f"between bytes {row * 64:,} and"):
            reader.read([Fragment("model.w", (100, 16), Box.whole((100, 16)), into)], committed.table)
    path.write_bytes(data)
    reader.read([Fragment("model.w", (100, 16), Box.whole((100, 16)), into)], committed.table)
    assert torch.equal(into, whole)


def lie(tmp_path, change) -> None:
    """Change what the manifest says, and make its digest agree."""
    path = tmp_path / numbered("manifest", 0)
    said = json.loads(path.read_bytes().split(b"\n")[0])
    change(said)
    line = json.dumps(said, sort_keys=True).encode() + b"\n"
    path.write_bytes(line + digest([line]).encode() + b"\n")


def boxes(said):
    return said["notes"]["table"]["tensors"]["model.w"][2]


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda said: boxes(said)[0].__setitem__(3, 6400), "is not within part"),
        (lambda said: boxes(said)[0].__setitem__(3, -64), "is not within part"),
        (lambda said: boxes(said)[0].__setitem__(1, [99, 16]), "ranks hold 1584 of 1600 elements"),
        (lambda said: boxes(said).append(boxes(said)[0]), "held twice"),
        (lambda said: boxes(said).clear(), "ranks hold 0 of 1600"),
        (lambda said: said["notes"]["checksums"].update({part_name(0, 0): "00"}), "not one checksum for each block"),
        (lambda said: said["notes"].pop("table"), "no manifest of a checkpoint"),
        (lambda said: said.update(number=3), "says that it is of step 3"),
    ],
)
def test_a_manifest_that_lies_is_found_out(tmp_path, change, why):
    disk, _ = saved(tmp_path, w=torch.randn(100, 16))
    lie(tmp_path, change)
    with pytest.raises(ManifestDamaged, match=why):
        read_committed(disk)


def test_a_fragment_that_is_not_stored_is_named(tmp_path):
    _, committed = saved(tmp_path, w=torch.randn(3, 4))
    into = torch.zeros(3, 4)
    for name, shape, data, said in (
        ("model.v", (3, 4), into, "model.v is missing"),
        ("model.w", (4, 3), into, r"is \(4, 3\) here and \(3, 4\) in the checkpoint"),
        ("model.w", (3, 4), into.int(), "is int32 here and float32 in the checkpoint; nothing is cast"),
    ):
        with pytest.raises(ValueError, match=said):
            check_fits([Fragment(name, shape, Box.whole(shape), data)], committed.table)
    assert ModelState([]).fragments() == []


def test_a_block_that_several_tensors_share_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WINDOW", 100)
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate((70, 3, 1, 2, 90, 1, 1, 200, 5))}
    disk, committed = saved(tmp_path, **tensors)
    block_bytes = 4 * BLOCK  # of a checkpoint with larger blocks than tensors
    data = disk.read(part_name(0, 0))
    sums = b"".join(crc32(data[at : at + block_bytes]).to_bytes(4, "little") for at in range(0, len(data), block_bytes))
    reader = PartReader(disk, {part_name(0, 0): sums}, committed.sizes, block_bytes)
    room = {name: torch.zeros_like(x) for name, x in tensors.items()}
    fragments = [Fragment(f"model.{name}", tuple(x.shape), Box.whole(x.shape), x) for name, x in room.items()]
    reader.read(fragments, committed.table)
    assert all(torch.equal(x, room[name]) for name, x in tensors.items())
    assert (reader.tally.read, reader.tally.blocks) == (len(data), len(sums) // 4)
