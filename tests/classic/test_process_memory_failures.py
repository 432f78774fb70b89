"""What fails, changes nothing: memory and swap that are full, a disk that fails, calls that make no sense."""

import errno
import os
import random
from pathlib import Path

import pytest

from minilib.classic.process_memory import PhysicalMemory, SegmentationFault
from minilib.classic.swapping import SwapFull
from minilib.mechanisms.paging import OutOfFrames


def state(memory, processes):
    """What must be as before when an operation fails: content, sharing, frames and swap in use."""
    memory.check_invariants()
    pager = memory.pager
    content = [process.read(0, len(process.table.frames) * memory.page_size) for process in processes]
    sharing = [
        [pager.is_private(process.table, page) for page in range(len(process.table.frames))] for process in processes
    ]
    counts = pager.counts["first touch"], pager.counts["copy"]
    return (
        content,
        sharing,
        [process.table.length for process in processes],
        pager.fast.num_used + pager.slow.num_used,
        counts,
    )


def test_out_of_memory_changes_nothing():
    with PhysicalMemory(3, 4) as memory:
        parent = memory.new_process()
        parent.append(b"abcdefgh")
        child = parent.fork()
        before = state(memory, [parent, child])
        with pytest.raises(OutOfFrames, match="2 frames are needed, 1 are free, and there is no swap"):
            child.write(3, b"XY")
        with pytest.raises(OutOfFrames, match="2 frames are needed"):
            child.append(b"ijklm")
        with pytest.raises(OutOfFrames, match="4 pages are written at once, and memory has 3 frames"):
            child.append(bytes(13))
        assert state(memory, [parent, child]) == before
        child.write(7, b"X")
        assert (parent.read(0, 8), child.read(0, 8)) == (b"abcdefgh", b"abcdefgX")
        parent.exit()
        child.append(b"ijkl")


def test_swap_full_changes_nothing_and_what_is_there_stays_usable():
    with PhysicalMemory(2, 4, num_swap_frames=3) as memory:
        process = memory.new_process()
        for number in range(4):
            process.append(bytes([number]) * 4)
        child = process.fork()
        before = state(memory, [process, child])
        with pytest.raises(
            SwapFull, match="1 frames are needed; 0 of memory and 1 of swap are free, and one must stay"
        ):
            child.write(0, b"X")
        with pytest.raises(SwapFull):
            process.append(b"Y")
        assert state(memory, [process, child]) == before
        child.exit()
        for number in (3, 1, 0, 2):
            process.write(4 * number, b"Z")
        assert process.read(0, 16) == b"".join(b"Z" + bytes([number]) * 3 for number in range(4))
        process.exit()
        assert memory.pager.fast.num_used == memory.pager.slow.num_used == 0


def test_a_file_that_cannot_be_written_changes_nothing():
    """/dev/full has no space left, ever."""
    with Path("/dev/full").open("r+b", buffering=0) as full, PhysicalMemory(2, 4, 8, swap_file=full) as memory:
        parent = memory.new_process()
        parent.append(b"abcdefgh")
        child = parent.fork()
        before = state(memory, [parent, child])
        for operation in (lambda: child.write(2, b"XYZ"), lambda: child.append(b"i"), lambda: parent.write(7, b"X")):
            with pytest.raises(OSError) as raised:
                operation()
            assert raised.value.errno == errno.ENOSPC
            assert state(memory, [parent, child]) == before
        parent.exit()
        child.write(0, b"12345678")
        assert child.read(0, 8) == b"12345678"


@pytest.mark.parametrize("call", ["pread", "pwrite"])
def test_a_disk_that_fails_at_any_time_changes_nothing(call, monkeypatch):
    """Each write is tried with a failure of the first, second, … call, until it succeeds."""
    works, left = getattr(os, call), [0]

    def fails(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "the disk fails")
        return works(*arguments)

    choices, failed = random.Random(1), 0
    with PhysicalMemory(4, 4, num_swap_frames=40) as memory:
        processes = [memory.new_process()]
        processes[0].append(bytes(range(1, 13)))
        processes[0].append(bytes(range(13, 25)))
        processes += [processes[0].fork(), processes[0].fork()]
        for _ in range(60):
            process, address, data = choices.choice(processes), choices.randrange(12), choices.randbytes(12)
            for number in range(1, 20):
                before = state(memory, processes)
                monkeypatch.setattr(os, call, fails)
                left[0] = number
                try:
                    process.write(address, data)
                except OSError:
                    failed += 1
                else:
                    break
                finally:
                    monkeypatch.setattr(os, call, works)
                assert state(memory, processes) == before
            assert process.read(address, 12) == data
    assert failed > 20


def test_a_swap_file_that_was_cut_is_an_error_and_not_zeros(tmp_path):
    path = tmp_path / "swap"
    with path.open("w+b", buffering=0) as file, PhysicalMemory(1, 4, 4, swap_file=file) as memory:
        process, other = memory.new_process(), memory.new_process()
        process.append(b"abcd")
        other.append(b"efgh")
        other.exit()
        assert path.read_bytes() == b"abcd"
        file.truncate(2)
        for call in (lambda: process.read(0, 1), lambda: process.write(0, b"x")):
            with pytest.raises(OSError, match="the swap file ends within frame 0"):
                call()
        file.write(b"abcd")
        assert process.read(0, 4) == b"abcd"
        memory.check_invariants()


def test_short_writes_to_the_swap_file_go_on(monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, position: pwrite(file, content[:3], position))
    with PhysicalMemory(1, 16, 4) as memory:
        process = memory.new_process()
        for number in range(3):
            process.append(bytes([65 + number]) * 16)
        assert process.read(0, 48) == b"A" * 16 + b"B" * 16 + b"C" * 16


def test_who_has_exited_can_do_nothing():
    with PhysicalMemory(2) as memory:
        process = memory.new_process()
        child = process.fork()
        process.exit()
        for call in (process.exit, process.fork, lambda: process.read(0, 0), lambda: process.write(0, b""),
                     lambda: process.reserve(0), lambda: process.append(b"")):  # fmt: skip
            with pytest.raises(ProcessLookupError, match="has exited"):
                call()
        child.append(b"still here")


def test_what_makes_no_sense_is_refused():
    for sizes in ((0, 4), (-1, 4), (4, 0), (4, -1), (4, 4, -1)):
        with pytest.raises(ValueError, match="got -1|got 0|got 4 and|and 0|and -1"):
            PhysicalMemory(*sizes)
    with PhysicalMemory(2, 4) as memory:
        process = memory.new_process()
        process.append(b"ab")
        for call in (process.reserve, lambda count: process.read(0, count)):
            with pytest.raises(ValueError, match="-2"):
                call(-2)
        for data in ("text", 3, None):
            for call in (process.append, lambda data: process.write(0, data)):
                with pytest.raises(TypeError, match="bytes-like"):
                    call(data)
        for address in (-1, -4, 4):
            with pytest.raises(SegmentationFault):
                process.read(address, 1)
        assert process.table.length == 2 and process.read(0, 4) == b"ab\0\0"
        process.write(1, memoryview(b"xyz"))
        process.write(0, bytearray(b"w"))
        assert process.read(0, 4) == b"wxyz"
