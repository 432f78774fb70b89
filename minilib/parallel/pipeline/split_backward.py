"""A backward in two halves: the gradient of the input now, those of the weights later.

    forward      x ──▶ mul ──▶ mm ──▶ … ──▶ output           output's gradient flows back through the graph:
                        ▲       ▲
                       norm     W

    input half       gradient of mm's output · Wᵀ, and so on down to x; at every operation that has a weight, the
                     gradient of its output is kept
    weight half      at each of these operations alone, xᵀ · the gradient that was kept

Autograd does the operations; this module finds those that have weights. Each half does what is its own and no more: the
weight half does not go through the graph again, as torch.autograd.grad(output, weights) would.

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class ParameterUsedTwice(ValueError):
    """Two operations of a graph have the same weight, one of them upstream of the other."""


@dataclass
class _Weighted:
    """An operation that has weights.

    Args:
        node: autograd's.
        parameters: whose gradients come from this operation.
        gradients: of its outputs, once they are known; None for an output that nobody uses.
    """

    node: Node
    parameters: list[Tensor]
    gradients: tuple[Tensor | None, ...] = ()

    def keep(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Called by autograd before the operation's backward."""
        self.gradients = gradients


class SplitBackward:
    """The backward of one graph in two halves.

    Args:
        output: end of the graph, a loss or a tensor.
        source: its begin, a leaf that requires a gradient.

    Raises:
        ParameterUsedTwice: if a parameter is used by several operations.

    Cost: until the weight half everything that the forward has saved is held, and the gradients of the outputs of
    operations with weights, besides.
    """

    def __init__(self, output: Tensor, source: Tensor) -> None:
        self._output, self._source = output, source
        self._weighted = _operations_with_weights(output.grad_fn, get_gradient_edge(source).node)

    def input_gradient(self, gradient: Tensor | None) -> Tensor:
        """The first half.

        Args:
            gradient: of the output; None for a loss.

        Returns:
            The gradient of the source.
        """
        hooks = [weighted.node.register_prehook(weighted.keep) for weighted in self._weighted]
        (found,) = torch.autograd.grad(self._output, self._source, gradient, retain_graph=True)
        for hook in hooks:
            hook.remove()
        self._output = self._source = None
        return found

    def weight_gradients(self) -> None:
        """The second half: add to every parameter's .grad, and let go of the graph. Hooks of parameters run as ever."""
        while self._weighted:
            weighted = self._weighted.pop()
            known = [number for number, gradient in enumerate(weighted.gradients) if gradient is not None]
            edges = [GradientEdge(weighted.node, number) for number in known]
            torch.autograd.backward(edges, [weighted.gradients[number] for number in known], inputs=weighted.parameters)


def _operations_with_weights(end: Node, begin: Node) -> list[_Weighted]:
    """Operations between begin and end that also read something else, which is weights."""
    users = _users([end])
    between, left = {begin}, [begin]
    while left:
        new = [user for user in users[left.pop()] if user not in between]
        between.update(new)
        left += new
    found: list[_Weighted] = []
    owner: dict[Tensor, Node] = {}
    for node in between - {begin}:
        apart = [read for read, _ in node.next_functions if read is not None and read not in between]
        parameters = [leaf.variable for leaf in _users(apart) if hasattr(leaf, "variable")]
        for parameter in parameters:
            if owner.setdefault(parameter, node) is not node:
                raise ParameterUsedTwice(
                    f"a parameter of shape {tuple(parameter.shape)} is used by {owner[parameter].name()} and by "
                    f"{node.name()}; use a schedule that does not split backwards"
                )
        if parameters:
            found.append(_Weighted(node, parameters))
    return found


def _users(ends: Iterable[Node]) -> dict[Node, list[Node]]:
    """Every node that ends read, directly or not, and the ends themselves: node → nodes that read it."""
    left = list(ends)
    users: dict[Node, list[Node]] = {node: [] for node in left}
    while left:
        node = left.pop()
        for read, _ in node.next_functions:
            if read is None:
                continue
            if read not in users:
                users[read] = []
                left.append(read)
            users[read].append(node)
    return users
