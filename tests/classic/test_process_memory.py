"""Bytes of processes against the operating system's own, and against a model in which nothing is shared."""

import random
import signal
import subprocess
import sys

import pytest

from minilib.classic.process_memory import PhysicalMemory, SegmentationFault
from minilib.classic.swapping import SwapFull
from minilib.mechanisms.caching import Fifo, Lru
from minilib.mechanisms.paging import OutOfFrames
from tests.classic.memory_model import Model
from tests.classic.real_process import RealProcesses


class Driven:
    """Ours and the model side by side; a write that ours refuses must be one that the model has no room for."""

    def __init__(self, num_bytes, **options):
        self.memory = PhysicalMemory(**options)
        self.model = Model(self.memory.page_size)
        pools = self.memory.pager.fast, self.memory.pager.slow
        self.num_frames, self.room = pools[0].num_frames, pools[0].num_frames + max(0, pools[1].num_frames - 1)
        self.processes = {"0": self.memory.new_process()}
        self.processes["0"].reserve(num_bytes)
        self.model.new("0", num_bytes)
        self.refused = 0

    def write(self, name, address, data):
        pages = self.model.written(address, len(data))
        full = self.model.places() + self.model.fresh(name, pages) > self.room
        if full or len(pages) > self.num_frames:
            error = SwapFull if len(pages) <= self.num_frames and self.room > self.num_frames else OutOfFrames
            with pytest.raises(error):
                self.processes[name].write(address, data)
            self.refused += 1
            return False
        self.processes[name].write(address, data)
        self.model.write(name, address, data)
        return True

    def fork(self, name, child):
        used = self.places()
        self.processes[child] = self.processes[name].fork()
        self.model.fork(name, child)
        assert self.places() == used, "a fork takes no place"

    def exit(self, name):
        self.processes.pop(name).exit()
        self.model.exit(name)

    def places(self):
        return self.memory.pager.fast.num_used + self.memory.pager.slow.num_used

    def check(self):
        self.memory.check_invariants()
        counts = self.memory.pager.counts
        assert self.places() == self.model.places()
        assert (counts["first touch"], counts["copy"]) == (self.model.first_touches, self.model.copies)


def random_operations(seed, count, num_bytes, page_size, most=5):
    """(action, process, address, bytes) with ranges around whole pages, of 0 and 1 byte, and across borders."""
    choices = random.Random(seed)
    names, started = ["0"], 1
    for _ in range(count):
        name = choices.choice(names)
        action = choices.choices(["read", "write", "fork", "exit"], [40, 50, 7, 5])[0]
        if action == "fork" and len(names) < most:
            names.append(str(started))
            yield "fork", name, names[-1], b""
            started += 1
        elif action == "exit" and len(names) > 1:
            names.remove(name)
            yield "exit", name, None, b""
        else:
            length = choices.choice([0, 1, 2, choices.randrange(3) * page_size + choices.choice([-1, 0, 1])])
            length = max(0, min(length, num_bytes))
            border = choices.randrange(num_bytes // page_size + 1) * page_size - choices.choice([0, 0, 1, length // 2])
            address = max(0, min(choices.choice([border, choices.randrange(num_bytes)]), num_bytes - length))
            yield ("write" if action == "write" else "read"), name, address, choices.randbytes(length)


SIZES = {
    "all fits": dict(num_frames=100, page_size=16),
    "no swap, too small": dict(num_frames=20, page_size=16),
    "swap": dict(num_frames=6, page_size=16, num_swap_frames=80),
    "swap, too small": dict(num_frames=4, page_size=16, num_swap_frames=16),
    "one frame": dict(num_frames=1, page_size=16, num_swap_frames=60),
    "a byte a page": dict(num_frames=30, page_size=1, num_swap_frames=300),
    "odd pages": dict(num_frames=5, page_size=7, num_swap_frames=150),
}


@pytest.mark.parametrize("order", [None, Fifo, Lru])
@pytest.mark.parametrize("name", SIZES)
def test_random_operations_against_a_model(name, order):
    """21 runs of 2,000 operations: after each one the counts are the model's, and after every 50th all bytes."""
    num_bytes = 15 * SIZES[name]["page_size"]
    driven = Driven(num_bytes, **SIZES[name], order=order and order())
    with driven.memory:
        for number, (action, who, where, data) in enumerate(
            random_operations(name, 2000, num_bytes, driven.memory.page_size)
        ):
            if action == "read":
                expected = driven.model.bytes[who][where : where + len(data)]
                assert driven.processes[who].read(where, len(data)) == expected
            elif action == "write":
                driven.write(who, where, data)
            else:
                getattr(driven, action)(*((who, where) if action == "fork" else (who,)))
            driven.check()
            if number % 50 == 0:
                for process, content in driven.model.bytes.items():
                    assert driven.processes[process].read(0, len(content)) == content
                driven.check()
        counts = driven.memory.pager.counts
        assert counts["copy"] > 50 and (driven.refused > 0) == ("too small" in name or name == "one frame")
        assert (counts["move out"] > 100) == (counts["move in"] > 100) == ("num_swap_frames" in SIZES[name])
        for process in list(driven.processes):
            driven.exit(process)
        driven.check()
        assert driven.places() == 0


@pytest.mark.parametrize("page_size, num_frames, num_swap_frames", [(4096, 60, 0), (4096, 5, 60), (100, 90, 3000)])
def test_the_operating_system_reads_the_same_bytes(tmp_path, page_size, num_frames, num_swap_frames):
    """One trace through real processes (anonymous mmap, fork) and through ours, whatever the size of our pages."""
    num_bytes = 12 * 4096
    driven = Driven(num_bytes, num_frames=num_frames, page_size=page_size, num_swap_frames=num_swap_frames)
    depth, deepest = {"0": 0}, 0
    with driven.memory, RealProcesses(tmp_path, num_bytes) as real:
        for action, who, where, data in random_operations(page_size, 1500, num_bytes, 4096, most=4):
            if action == "read":
                assert driven.processes[who].read(where, len(data)) == real.read(who, where, len(data))
            elif action == "write":
                assert driven.write(who, where, data)
                real.write(who, where, data)
            elif action == "fork":
                driven.fork(who, where)
                real.fork(who, where)
                depth[where] = depth[who] + 1
                deepest = max(deepest, depth[where])
            else:
                driven.exit(who)
                real.exit(who)
        for name, process in driven.processes.items():
            assert process.read(0, num_bytes) == real.read(name, 0, num_bytes)
        driven.check()
    assert deepest >= 3
    assert (driven.memory.pager.counts["move in"] > 100) == (num_swap_frames > 0)


FAULT = """
import ctypes, mmap
memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + 2 * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
address, count, write = start + {address}, {count}, {write}
ctypes.memset(address, 1, count) if write else ctypes.string_at(address, count)
"""


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("address, count", [(8191, 1), (8190, 3), (8192, 1), (8192, 0), (0, 8192)])
def test_a_segmentation_fault_where_the_operating_system_has_one(address, count, write):
    """Two pages of memory, and behind them a page that must not be touched."""
    program = FAULT.format(address=address, count=count, write=write)
    status = subprocess.run([sys.executable, "-I", "-c", program], timeout=60).returncode
    faults = address + count > 8192 and count > 0
    assert status == (-signal.SIGSEGV if faults else 0)
    with PhysicalMemory(4) as memory:
        process = memory.new_process()
        assert process.reserve(8000) == 0  # rounded up to two pages
        if not faults:
            process.write(address, bytes(count)) if write else process.read(address, count)
            return
        with pytest.raises(SegmentationFault, match="this process has 0 to 8191"):
            process.write(address, bytes(count)) if write else process.read(address, count)
        assert memory.pool.num_used == 0


@pytest.mark.parametrize("page_size", [1, 2, 16, 4096])
@pytest.mark.parametrize("k, more", [(k, more) for k in (1, 2, 3) for more in (-1, 0, 1)])
def test_lengths_around_a_multiple_of_the_page_size(page_size, k, more):
    length = k * page_size + more
    with PhysicalMemory(8, page_size) as memory:
        process, data = memory.new_process(), random.Random(length).randbytes(length)
        assert process.append(data) == 0
        assert memory.pool.num_used == len(process.table.frames) == len({byte // page_size for byte in range(length)})
        assert process.read(0, length) == data
        assert process.append(b"") == length and process.append(b"x") == length
        assert process.read(0, length + 1) == data + b"x"
        memory.check_invariants()


@pytest.mark.parametrize("num_swap_frames", [0, 40])
def test_closed_forms(num_swap_frames):
    """N pages touched: N first touches. Each of three generations writes k of them: k copies, the last holder none."""
    num_pages, k = 6, 4
    with PhysicalMemory(8 if num_swap_frames else 30, 16, num_swap_frames) as memory:
        counts = memory.pager.counts
        family = [memory.new_process()]
        family[0].reserve(16 * num_pages)
        assert family[0].read(0, 16 * num_pages) == bytes(16 * num_pages) and memory.pool.num_used == 0
        family[0].write(3, b"y" * (16 * num_pages - 3))
        assert (counts["first touch"], counts["copy"]) == (num_pages, 0)
        for generation in (1, 2, 3):
            family.append(family[-1].fork())
            for page in range(k):
                family[-1].write(16 * page, bytes([generation]))
            assert counts["copy"] == generation * k
        assert [process.read(0, 4) for process in family] == [b"\0\0\0y", b"\1\0\0y", b"\2\0\0y", b"\3\0\0y"]
        for process in family[:-1]:
            process.exit()
        family[-1].write(0, b"z" * 16 * num_pages)
        assert (counts["first touch"], counts["copy"]) == (num_pages, 3 * k), "the last holder writes in place"
        assert memory.pager.fast.num_used + memory.pager.slow.num_used == num_pages
        memory.check_invariants()


def test_a_range_larger_than_memory_is_read_page_by_page():
    with PhysicalMemory(2, 4, 10) as memory:
        process = memory.new_process()
        for number in range(8):
            process.append(bytes([number]) * 4)
        assert process.read(1, 31) == b"".join(bytes([number]) * 4 for number in range(8))[1:]
