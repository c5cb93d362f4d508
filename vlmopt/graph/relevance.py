"""How much a component's features feel a change of the stream, position by position."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.branches import find_branches
from vlmopt.graph.replay import inputs_of


def token_relevance(component: Component, target: fx.Node, feed: Feed, *, seed: int = 0) -> list[Tensor]:
    """For every branch, how much the target feels a change of the stream behind it, by token position; mean 1.

    The mean square, over samples and channels, of the gradient of a random projection of the target, which in
    expectation is the squared norm of the Jacobian's rows. Streams without a token axis get [1.0].
    """
    exits = [branch.exit for branch in find_branches(component.graph)]
    watching = _Gradients(component.graph, set(exits), target)
    value = watching.run(*inputs_of(component, feed))
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    gradients = torch.autograd.grad(
        (value * direction).sum(), [watching.kept[node] for node in exits], allow_unused=True
    )
    return [_by_position(gradient) for gradient in gradients]


def _by_position(gradient: Tensor | None) -> Tensor:
    if gradient is None or gradient.ndim != 3 or not bool(gradient.any()):
        return torch.ones(1)
    square = (gradient**2).mean(dim=(0, 2))
    return square / square.mean()


class _Gradients(fx.Interpreter):
    """Runs a graph up to a target, following gradients from the first of the nodes on, and keeps their values."""

    def __init__(self, graph: fx.GraphModule, nodes: set[fx.Node], target: fx.Node) -> None:
        super().__init__(graph)
        self._nodes, self._target = {node.name for node in nodes}, target.name
        self._by_name = {node.name: node for node in nodes}
        self.kept: dict[fx.Node, Tensor] = {}
        self._value = torch.empty(0)

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n.name in self._nodes and isinstance(value, Tensor):
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.kept[self._by_name[n.name]] = value
        if n.name == self._target and isinstance(value, Tensor):
            self._value = value
        return value

    def run(self, *args: object) -> Tensor:  # type: ignore[override]
        super().run(*args)
        return self._value
