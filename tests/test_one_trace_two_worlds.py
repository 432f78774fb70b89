"""One trace through both worlds: bytes of processes, and keys and values of sequences, in the same frames."""

import random

import pytest
import torch

from minilib.classic.memory_trace import Step, replay
from minilib.classic.process_memory import PhysicalMemory
from minilib.model.config import ModelConfig
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention, Work

SHAPE = ModelConfig(31, 16, 16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, max_position=512)


class CachedSequences:
    """The paged KV cache as a world: all keys of a token are its value in the trace, all values the negative."""

    def __init__(self, num_pages, page_size):
        self.cache, self.num_copies = PagedCache(SHAPE, num_pages, page_size), 0
        self.pool = self.cache.pool

    def new_process(self):
        return CachedSequence(self, self.cache.new_table())


class CachedSequence:
    def __init__(self, world, table):
        self.world, self.table = world, table

    def append(self, values):
        self.copy(self.table.append(len(values)))
        if values:  # as the engine does it: attention stores the keys and values of the new tokens
            attention = PagedAttention(self.world.cache, [Work(self.table, len(values))])
            keys = torch.tensor(list(values), dtype=torch.float32)[:, None, None].expand(-1, 2, 4)
            for layer in range(SHAPE.num_layers):
                attention(layer, keys, keys, -keys)

    def write(self, slot, values):
        size = self.table.page_size
        for page in range(slot // size, -(-(slot + len(values)) // size)):
            fault = self.table.touch(page)
            self.copy([fault.copy] if fault and fault.copy else [])
        for place, value in enumerate(values, start=slot):
            frame, offset = self.table.translate(place)
            self.world.cache.k[:, frame, :, offset], self.world.cache.v[:, frame, :, offset] = value, -value

    def read(self, slot, count):
        slots = torch.arange(slot, slot + count)
        frames = torch.tensor(self.table.frames, dtype=torch.long)[slots // self.table.page_size]
        places = slice(None), frames, slice(None), slots % self.table.page_size  # of all layers and heads
        keys, values = (side[places].flatten(1) for side in (self.world.cache.k, self.world.cache.v))
        assert (keys == -values).all() and (keys == keys[:, :1]).all(), "every layer and head holds the same"
        return bytes(keys[:, 0].int().tolist())

    def fork(self):
        return CachedSequence(self.world, self.table.fork())

    def exit(self):
        self.table.release()

    def copy(self, copies):
        self.world.cache.copy(copies)
        self.world.num_copies += len(copies)


def both(trace, num_frames, page_size):
    """The snapshots of both worlds, which are equal at every step."""
    with PhysicalMemory(num_frames, page_size) as memory:
        ours = replay(trace, memory)
        memory.check_invariants()
        theirs = replay(trace, CachedSequences(num_frames, page_size))
    for step, one, other in zip(trace, ours, theirs, strict=True):
        assert one == other, f"{step}: {one} in memory, {other} in the cache"
    return ours


def random_trace(seed, page_size, num_steps=120):
    """Steps of at most six processes; what is appended lies around whole pages."""
    choices, lengths, started, trace = random.Random(seed), {0: 0}, 1, []
    for _ in range(num_steps):
        process = choices.choice(sorted(lengths))
        action = choices.choices(["append", "write", "fork", "exit"], [10, 6, 3, 2])[0]
        if action == "append":
            count = max(0, choices.choice([0, 1, 1, 1, choices.randrange(3) * page_size + choices.choice([-1, 0, 1])]))
            trace.append(Step("append", process, choices.randbytes(count)))
            lengths[process] += count
        elif action == "write" and lengths[process]:
            count = choices.randrange(1, 1 + min(lengths[process], page_size))
            slot = choices.randrange(lengths[process] - count + 1)
            trace.append(Step("write", process, choices.randbytes(count), slot))
        elif action == "fork" and len(lengths) < 6:
            trace.append(Step("fork", process))
            lengths[started] = lengths[process]
            started += 1
        elif action == "exit" and len(lengths) > 1:
            trace.append(Step("exit", process))
            del lengths[process]
    return trace + [Step("exit", process) for process in sorted(lengths)]


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_random_traces_have_the_same_tables_copies_and_frames_at_every_step(page_size):
    copies = 0
    for seed in range(12):
        snapshots = both(random_trace(seed, page_size), 1500, page_size)
        assert not any(snapshot.refused for snapshot in snapshots)
        assert snapshots[-1].num_used == 0
        copies += snapshots[-1].num_copies
    assert copies > 50


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_both_refuse_the_same_appends_when_frames_run_out(page_size):
    """Forks that append until nothing is left, exit, and let others go on."""
    refused = 0
    for seed in range(12):
        choices = random.Random(seed)
        trace = [Step("append", 0, choices.randbytes(2 * page_size + 1)), Step("fork", 0), Step("fork", 1)]
        running = [0, 1, 2]
        for number in range(90):
            if number % 30 == 29:
                trace.append(Step("exit", running.pop(choices.randrange(len(running)))))
            else:
                length = choices.choice([0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size])
                trace.append(Step("append", choices.choice(running or [0]), choices.randbytes(length)))
            if not running:
                break
        refused += sum(snapshot.refused for snapshot in both(trace, 9, page_size))
    assert refused > 50


def test_a_trace_with_writes_step_by_step():
    """A prompt of six slots in pages of four, a fork, both go on, one ends: the numbers, counted by hand."""
    trace = [
        Step("append", 0, b"prompt"),
        Step("fork", 0),
        Step("append", 0, b"a"),
        Step("append", 1, b"b"),
        Step("write", 1, b"P", slot=0),
        Step("append", 1, b"cd"),
        Step("exit", 0),
        Step("write", 1, b"Q", slot=1),
    ]
    snapshots = both(trace, 8, 4)
    assert [snapshot.frames for snapshot in snapshots] == [
        {0: (0, 1)},
        {0: (0, 1), 1: (0, 1)},
        {0: (0, 2), 1: (0, 1)},  # the first to write copies page 1
        {0: (0, 2), 1: (0, 1)},  # the last holder writes in place
        {0: (0, 2), 1: (3, 1)},
        {0: (0, 2), 1: (3, 1, 4)},
        {1: (3, 1, 4)},
        {1: (3, 1, 4)},
    ]
    assert [snapshot.num_copies for snapshot in snapshots] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [snapshot.num_used for snapshot in snapshots] == [2, 2, 3, 3, 4, 5, 3, 3]
    assert snapshots[5].values == {0: b"prompta", 1: b"Promptbcd"} and snapshots[7].values == {1: b"PQomptbcd"}


def test_a_trace_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="append, write, fork, exit; got 'jump'"):
        Step("jump", 0)
    with PhysicalMemory(2) as memory, pytest.raises(ValueError, match=r"process=1.*does not run; running: \[0\]"):
        replay([Step("fork", 1)], memory)
