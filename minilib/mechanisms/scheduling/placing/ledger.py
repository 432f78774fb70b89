"""The ledger: which claim has which node, and what is free. Nothing is given twice.

    reserve ─→ reserved ──bind──→ bound ──release──→ gone
                   └────────────release──────────────↑

Between `reserve` and `bind` the node is only promised; whoever starts the work binds it. An attempt undoes what was
reserved and released in it, in reverse, unless it is committed; so several claims get their nodes together, or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from minilib.mechanisms.scheduling.placing.attempts import Attempts, Trial
from minilib.mechanisms.scheduling.placing.claim import Claim, InvalidClaim
from minilib.mechanisms.scheduling.placing.free_index import FreeIndex
from minilib.mechanisms.scheduling.placing.holding import Holding, InsufficientCapacity, UnknownName
from minilib.mechanisms.scheduling.placing.node import InvalidNode, Node


class Ledger:
    """What nodes have, and who has it.

    Args:
        nodes: with names of their own; ties between nodes are broken by this order.

    Attributes:
        visits: how many nodes `choose` has looked at, over all decisions.
        num_open: how many nodes take claims.
        version: a number that changes whenever something is reserved, released or changed.

    Raises:
        InvalidNode: if two nodes have the same name.

    Cost: O(log n) comparisons and the move of part of a list for each resource by which nodes are ordered (`index`).
    """

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.visits = self.version = self.num_open = 0
        self._nodes: list[Node | None] = []  # by number; None for a node that was removed
        self._numbers: dict[str, int] = {}
        self._free: list[dict[str, int]] = []
        self._open: list[bool] = []
        self._on: list[dict[str, Holding]] = []
        self._held: dict[str, Holding] = {}
        self._indexes: dict[str, FreeIndex] = {}
        self._since = itertools.count()
        self._attempts = Attempts()
        for node in nodes:
            self.add(node)

    def __len__(self) -> int:
        """Nodes that are here, whether they take claims or not."""
        return len(self._numbers)

    def __contains__(self, claim: str) -> bool:
        """Whether a claim of that name has a node."""
        return claim in self._held

    @property
    def nodes(self) -> list[Node]:
        """All nodes, in order."""
        return [node for node in self._nodes if node is not None]

    @property
    def claims(self) -> list[Claim]:
        """All claims that have a node, the oldest reservation first."""
        return [held.claim for held in sorted(self._held.values(), key=lambda held: held.since)]

    def node(self, name: str) -> Node:
        """A node by its name.

        Raises:
            UnknownName: if there is none.
        """
        return self._nodes[self.number(name)]

    def number(self, name: str) -> int:
        """The number of a node.

        Raises:
            UnknownName: if there is none.
        """
        if name not in self._numbers:
            raise UnknownName(f"no node is called {name!r}; there are {len(self._numbers)}")
        return self._numbers[name]

    def by_number(self, number: int) -> Node:
        """The node with a number."""
        return self._nodes[number]

    def is_open(self, node: str) -> bool:
        """Whether a node takes claims."""
        return self._open[self.number(node)]

    def free(self, node: str) -> Mapping[str, int]:
        """What is free on a node, by resource."""
        return dict(self._free[self.number(node)])

    def lacks(self, claim: Claim, node: str) -> list[str]:
        """Resources of which less is free on a node than a claim asks for."""
        free = self._free[self.number(node)]
        return [resource for resource, amount in claim.requests.items() if amount > free.get(resource, 0)]

    def claims_on(self, node: str) -> list[Claim]:
        """Claims that have a node, the oldest reservation first."""
        held = self._on[self.number(node)].values()
        return [entry.claim for entry in sorted(held, key=lambda entry: entry.since)]

    def holding(self, claim: str) -> Holding:
        """A claim that has a node, and since when.

        Raises:
            UnknownName: if it has none.
        """
        if claim not in self._held:
            raise UnknownName(f"claim {claim!r} has no node")
        return self._held[claim]

    def node_of(self, claim: str) -> str:
        """The name of a claim's node.

        Raises:
            UnknownName: if it has none.
        """
        return self._nodes[self.holding(claim).node].name

    def index(self, resource: str) -> FreeIndex:
        """Open nodes in the order of what is free of a resource; made once, and kept from then on."""
        if resource not in self._indexes:
            opened = (number for number in self._numbers.values() if self._open[number])
            self._indexes[resource] = FreeIndex((number, self._free[number].get(resource, 0)) for number in opened)
        return self._indexes[resource]

    def reserve(self, claim: Claim, node: str) -> None:
        """Promise a node to a claim.

        Raises:
            InvalidClaim: if a claim of that name has a node already.
            InsufficientCapacity: if less is free than it asks for, or the node takes no claims.
            UnknownName: if there is no such node.
        """
        number = self.number(node)
        if claim.name in self._held:
            raise InvalidClaim(f"claim {claim.name!r} has node {self.node_of(claim.name)!r} already; release it first")
        if not self._open[number]:
            raise InsufficientCapacity(f"node {node!r} takes no claims; open it first")
        self._require(claim, node)
        held = Holding(claim, number, next(self._since))
        self._put(held)
        self._attempts.note(lambda: self._take(held))

    def bind(self, claim: str) -> None:
        """The work of a claim has started on its node.

        Raises:
            UnknownName: if it has no node.
        """
        held = self.holding(claim)
        before, held.bound = held.bound, True
        self._attempts.note(lambda: setattr(held, "bound", before))

    def release(self, claim: str) -> None:
        """A claim gives its node back.

        Raises:
            UnknownName: if it has none.
        """
        held = self.holding(claim)
        self._take(held)
        self._attempts.note(lambda: self._put(held))

    def resize(self, claim: str, requests: Mapping[str, int]) -> None:
        """A claim asks for more or less, where it is.

        Raises:
            UnknownName: if it has no node.
            InvalidClaim: if an amount is no whole number ≥ 0.
            InsufficientCapacity: if its node has not that much; nothing was changed.
        """
        held, node = self.holding(claim), self.node_of(claim)
        resized = replace(held, claim=replace(held.claim, requests=requests))
        with self.attempt() as trial:
            self.release(claim)
            self._require(resized.claim, node)
            self._put(resized)
            self._attempts.note(lambda: self._take(resized))
            trial.commit()

    def attempt(self) -> AbstractContextManager[Trial]:
        """Changes that are undone in reverse unless the trial is committed; attempts may be nested."""
        return self._attempts.attempt()

    def add(self, node: Node) -> None:
        """A node joins, and takes claims.

        Raises:
            InvalidNode: if there is one of that name.
        """
        self._outside_attempts()
        if node.name in self._numbers:
            raise InvalidNode(f"two nodes are called {node.name!r}; give each a name of its own")
        self._numbers[node.name] = len(self._nodes)
        self._nodes.append(node)
        self._free.append(dict(node.capacity))
        self._open.append(False)
        self._on.append({})
        self.open(node.name)

    def open(self, node: str) -> None:
        """A node takes claims again."""
        self._outside_attempts()
        number = self.number(node)
        if not self._open[number]:
            self._open[number] = True
            self.num_open += 1
            for resource, index in self._indexes.items():
                index.add(number, self._free[number].get(resource, 0))
            self.version += 1

    def close(self, node: str) -> None:
        """A node takes no more claims, and keeps those that it has."""
        self._outside_attempts()
        number = self.number(node)
        if self._open[number]:
            self._open[number] = False
            self.num_open -= 1
            for resource, index in self._indexes.items():
                index.remove(number, self._free[number].get(resource, 0))
            self.version += 1

    def remove(self, node: str) -> list[Claim]:
        """A node is gone; returns the claims that had it, which have none now."""
        self.close(node)
        lost = self.claims_on(node)
        for claim in lost:
            self.release(claim.name)
        self._nodes[self._numbers.pop(node)] = None
        return lost

    def relabel(self, node: Node) -> None:
        """Give a node other labels or taints; the claims on it stay.

        Raises:
            UnknownName: if there is none of that name.
            InvalidNode: if its capacity is another than before.
        """
        self._outside_attempts()
        number = self.number(node.name)
        if node.capacity != self._nodes[number].capacity:
            raise InvalidNode(f"node {node.name!r} has {dict(self._nodes[number].capacity)}; labels and taints change")
        self._nodes[number] = node
        self.version += 1

    def check_invariants(self) -> None:
        """What claims have and what is free is what there is; every index is in order; no attempt is left open."""
        assert not self._attempts.going_on, "an attempt was left open"
        assert sum(map(len, self._on)) == len(self._held), "a claim is on no node, or on two"
        for name, number in self._numbers.items():
            node, used = self._nodes[number], dict.fromkeys(self._free[number], 0)
            assert node.name == name, "a name leads to another node"
            for claim, held in self._on[number].items():
                assert self._held[claim] is held and held.node == number and held.claim.name == claim
                for resource, amount in held.claim.requests.items():
                    used[resource] = used.get(resource, 0) + amount
            for resource, amount in used.items():
                free = self._free[number].get(resource, 0)
                assert free >= 0 and amount + free == node.capacity.get(resource, 0), f"{resource} of {name} miscounted"
        for resource, index in self._indexes.items():
            opened = [number for number in self._numbers.values() if self._open[number]]
            assert len(opened) == self.num_open
            assert index.items() == sorted((self._free[number].get(resource, 0), number) for number in opened)

    def _require(self, claim: Claim, node: str) -> None:
        for resource in self.lacks(claim, node):
            free = self._free[self.number(node)].get(resource, 0)
            wanted = f"claim {claim.name!r} asks for {claim.requests[resource]} {resource}"
            raise InsufficientCapacity(f"{wanted}, and node {node!r} has {free} free")

    def _put(self, held: Holding) -> None:
        self._held[held.claim.name] = self._on[held.node][held.claim.name] = held
        self._change(held, -1)

    def _take(self, held: Holding) -> None:
        del self._held[held.claim.name], self._on[held.node][held.claim.name]
        self._change(held, 1)

    def _change(self, held: Holding, sign: int) -> None:
        free, indexed = self._free[held.node], self._open[held.node]
        for resource, amount in held.claim.requests.items():
            if amount:
                before, after = free[resource], free[resource] + sign * amount
                free[resource] = after
                if indexed and resource in self._indexes:
                    self._indexes[resource].remove(held.node, before)
                    self._indexes[resource].add(held.node, after)
        self.version += 1

    def _outside_attempts(self) -> None:
        if self._attempts.going_on:
            raise RuntimeError("nodes come, go and close outside of attempts; end the attempt first")
