"""A radix tree: sequences that begin alike share a path from the root, and a run of blocks that nothing leaves is one
node.

    [a b][c d][e f]                       ┌─ [e f]
    [a b][c d][g h][i j]       [a b][c d] ┤
    [x b]                      [x b]      └─ [g h][i j]

Tokens themselves are compared, so nothing is hashed but the first block behind a fork, and nothing can collide; but the
names are paths in this tree, and mean nothing elsewhere. SGLang finds pages of keys and values so.

Sources: Morrison, "PATRICIA", JACM 1968; Zheng et al., "SGLang: Efficient Execution of Structured Language Model
Programs", NeurIPS 2024, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minilib.mechanisms.caching import EvictionPolicy
from minilib.mechanisms.content_addressing.index import PrefixIndex, Tokens


@dataclass(eq=False)
class Run:
    """A node: blocks one behind another, of which only the last one is followed by something else, or by nothing.

    Args:
        number: its name for the policy; 0 is the root.
        parent: the run before it, None for the root.
        start: blocks before it, from the first one on.
        salt: of the sequences that come through here, "" for the root.
        blocks: what its blocks hold; none for the root.
        values: what they stand for.
        children: the runs behind it, by their first block, and those of the root by their salt as well.
    """

    number: int
    parent: Run | None
    start: int
    salt: str
    blocks: list[Tokens]
    values: list[Any]
    children: dict[Hashable, Run] = field(default_factory=dict, repr=False)

    @property
    def end(self) -> int:
        """Blocks from the first one to its last one."""
        return self.start + len(self.blocks)

    @property
    def label(self) -> Hashable:
        """Its key among its parent's children."""
        return (self.salt, self.blocks[0]) if self.start == 0 else self.blocks[0]


class Place(NamedTuple):
    """A position: `depth` blocks from the first one, the last of them in `run` or, since runs are cut, in one before.

    Args:
        run: the root for depth 0.
        depth: blocks up to here.
        salt: of the sequence.
        value: of the block at this depth.
    """

    run: Run
    depth: int
    salt: str
    value: Any = None

    listed = True


class RadixTree(PrefixIndex):
    """Runs of blocks in a tree.

    Args:
        policy: whose keys are numbers of runs; a run that comes back has another number. A run is used as a whole, and
            gives up its last block first. Growing at its end is no use of it.

    Cost: comparing 1 block to find or add one, and hashing it where a run ends; memory for the tokens, and a node for
    each run: sequences and forks, not blocks.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self._numbers = itertools.count()
        self._root = Run(next(self._numbers), None, 0, "", [], [])
        self._runs: dict[int, Run] = {}  # all but the root
        self._num_blocks = 0

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(run.values for run in self._runs.values())

    def paths(self) -> Iterator[tuple[Hashable, ...]]:
        for run in self._runs.values():
            before = [at.blocks for at in self._path(run.parent)]
            path = [run.salt, *itertools.chain(*reversed(before))]
            for tokens in run.blocks:
                path.append(tokens)
                yield tuple(path)

    @property
    def num_runs(self) -> int:
        """Nodes of the tree, the root left out."""
        return len(self._runs)

    def begin(self, salt: str = "") -> Place:
        return Place(self._root, 0, salt)

    def find(self, position: Place, tokens: Tokens) -> Place | None:
        run, depth = self._run_of(position), position.depth
        if depth < run.end:
            run = run if run.blocks[depth - run.start] == tokens else None
        else:
            run = run.children.get(tokens if depth else (position.salt, tokens))
        return None if run is None else Place(run, depth + 1, position.salt, run.values[depth - run.start])

    def add(self, position: Place, tokens: Tokens, value: Any) -> Place:
        if held := self.find(position, tokens):
            return held
        run, depth = self._run_of(position), position.depth
        if depth < run.end:
            run = self._cut(run, depth)
        if depth and not run.children:
            run.blocks.append(tokens)
            run.values.append(value)
        else:
            run = self._new_run(run, position.salt, [tokens], [value])
        self._num_blocks += 1
        return Place(run, depth + 1, position.salt, value)

    def use(self, position: Place) -> None:
        for run in self._path(self._run_of(position)):
            self.policy.use(run.number)

    def renew(self, position: Place) -> None:
        for run in self._path(self._run_of(position)):
            self.policy.renew(run.number)

    def evict(self, in_use: Callable[[Any], bool]) -> Any:
        def evictable(number: int) -> bool:
            run = self._runs[number]
            return not run.children and not in_use(run.values[-1])

        run = self._runs[self.policy.victim(evictable)]
        self.evictions += 1
        return self._drop_last(run, self.policy.evict)

    def discard(self, position: Place, in_use: Callable[[Any], bool]) -> list[Any]:
        values, run = [], self._run_of(position)
        while run.end <= position.depth and run.blocks and not run.children and not in_use(run.values[-1]):
            values.append(self._drop_last(run, self.policy.remove))
            run = run if run.blocks else run.parent
        return values

    def check_invariants(self) -> None:
        """As every index; and runs are where their labels say, none is empty, and each is known to its parent."""
        super().check_invariants()
        assert set(self.policy) == self._runs.keys(), "the policy holds other keys than the tree"
        reached, left = set(), [self._root]
        while left:
            run = left.pop()
            for label, child in run.children.items():
                assert child.parent is run and child.start == run.end and child.label == label, f"{child} is lost"
                assert child.blocks and len(child.blocks) == len(child.values), f"{child} is empty"
                assert child.salt == run.salt or run is self._root
                reached.add(child.number)
                left.append(child)
        assert reached == self._runs.keys(), "a run cannot be reached"

    @staticmethod
    def _path(run: Run) -> Iterator[Run]:
        """The runs from here back to the first one."""
        while run.parent is not None:
            yield run
            run = run.parent

    @staticmethod
    def _run_of(position: Place) -> Run:
        """The run that the block at this depth is in now; a run that is cut keeps its end."""
        run = position.run
        while run.parent is not None and run.start >= position.depth:
            run = run.parent
        return run

    def _drop_last(self, run: Run, leave: Callable[[int], None]) -> Any:
        """Give up the last block of a run; with its last one the run leaves the policy, too."""
        if len(run.blocks) == 1:
            leave(run.number)
            del self._runs[run.number], run.parent.children[run.label]
        run.blocks.pop()
        self._num_blocks -= 1
        return run.values.pop()

    def _new_run(self, parent: Run, salt: str, blocks: list[Tokens], values: list[Any]) -> Run:
        run = Run(next(self._numbers), parent, parent.end, salt, blocks, values)
        parent.children[run.label] = run
        self._runs[run.number] = run
        self.policy.add(run.number)
        return run

    def _cut(self, run: Run, depth: int) -> Run:
        """Make the blocks of a run up to `depth` a run of their own, and return that."""
        at = depth - run.start
        first = self._new_run(run.parent, run.salt, run.blocks[:at], run.values[:at])  # takes the label over
        run.parent, run.start = first, depth
        run.blocks, run.values = run.blocks[at:], run.values[at:]
        first.children[run.label] = run
        return first
