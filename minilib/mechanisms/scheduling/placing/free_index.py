"""Nodes in the order of what is free on them, so that a best fit is found without looking at all nodes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator


class FreeIndex:
    """Numbers of nodes, ordered by the free amount of one resource; among equals the smallest number first.

    Args:
        free: the number of each node, with what is free on it.

    Cost: the first node of an iteration, `add` and `remove` take O(log n) comparisons, `add` and `remove` the move
    of part of a list, too.
    """

    def __init__(self, free: Iterable[tuple[int, int]]) -> None:
        self._order = sorted((amount, number) for number, amount in free)

    def __len__(self) -> int:
        """Nodes that are in the order."""
        return len(self._order)

    def add(self, number: int, amount: int) -> None:
        """A node joins."""
        insort(self._order, (amount, number))

    def remove(self, number: int, amount: int) -> None:
        """A node leaves."""
        del self._order[bisect_left(self._order, (amount, number))]

    def fewer_than(self, amount: int) -> int:
        """How many nodes have less than this."""
        return bisect_left(self._order, (amount,))

    def least_first(self, amount: int) -> Iterator[int]:
        """Nodes with at least so much, the least free first."""
        for place in range(self.fewer_than(amount), len(self._order)):
            yield self._order[place][1]

    def most_first(self, amount: int) -> Iterator[int]:
        """Nodes with at least so much, the most free first."""
        end = len(self._order)
        while end and self._order[end - 1][0] >= amount:
            start = self.fewer_than(self._order[end - 1][0])
            for place in range(start, end):
                yield self._order[place][1]
            end = start

    def items(self) -> list[tuple[int, int]]:
        """(free amount, number) of all nodes, in order."""
        return list(self._order)
