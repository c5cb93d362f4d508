"""How far edits of single branches move what a graph computes, beside how far leaving the branch out moves it.

The error of a branch by itself says little: where a few channels are a hundred times larger than the others, the share
of them that is wrong is small whatever happens to the rest, and the norm behind them sees the rest. So every error is
carried to the end: the branch reads what it reads in the original, its term takes the place of the original's, and
everything behind it is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.branches import find_branches
from vlmopt.graph.head import head_features
from vlmopt.graph.replay import Replay, run_node


class BranchDistortions:
    """Mean square changes of one component's features (what its head reads, or its output), relative to their own.

    Args:
        head: path of the component's head; None where it has none.
        feed: one batch of its inputs.
    """

    def __init__(self, component: Component, head: str | None, feed: Feed) -> None:
        self._component, self._feed, self._head = component, feed, head
        self._branches = {branch.name: branch for branch in find_branches(component.graph)}
        target = head_features(component, head)
        self._replay = Replay(component, list(self._branches.values()), target)
        streams = {branch.stream for branch in self._branches.values()}
        self._features, self._values = self._replay.run_keeping(feed, self._replay.resumable | streams)
        self._size = float(self._features.double().square().sum()) or 1.0

    @property
    def names(self) -> list[str]:
        """Of the branches, in order."""
        return list(self._branches)

    def skipped(self) -> dict[str, float]:
        """What leaving out every branch changes."""
        return {
            name: self._change({branch.term: torch.zeros_like(self._value(branch.term))})
            for name, branch in self._branches.items()
        }

    def edited(self, edited: Component, feed: Feed, names: Collection[str]) -> dict[str, float]:
        """What the edits in each of these branches change, each by itself; branches that are gone are left out.

        Args:
            edited: the component behind edits that leave its branches in their places.
            feed: the same batch as it reads it: the cache of an edited decoder may have fewer heads.
        """
        found = {branch.name: branch for branch in find_branches(edited.graph) if branch.name in names}
        given = {one.stream: self._value(self._branches[name].stream) for name, one in found.items()}
        terms = _terms(edited.graph, feed, {one.term for one in found.values()}, given)
        return {name: self._change({self._branches[name].term: terms[one.term]}) for name, one in found.items()}

    def whole(self, edited: Component, feed: Feed) -> float:
        """What all edits of a component change together."""
        replay = Replay(edited, find_branches(edited.graph), head_features(edited, self._head))
        return self._apart(replay.run(feed, frozenset()))

    def _value(self, node: fx.Node) -> Tensor:
        value = self._values[node]
        assert isinstance(value, Tensor)
        return value

    def _change(self, terms: Mapping[fx.Node, Tensor]) -> float:
        return self._apart(self._replay.run_changed(self._feed, self._values, terms))

    def _apart(self, features: Tensor) -> float:
        return float((features.double() - self._features.double()).square().sum()) / self._size


def _terms(
    graph: fx.GraphModule, feed: Feed, wanted: Collection[fx.Node], given: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """The tensors of the wanted nodes, where those given take the place of what is computed."""
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    values: dict[fx.Node, object] = {}
    kept: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for node in nodes:
            values[node] = given[node] if node in given else run_node(graph, node, values, feed)
            value = values[node]
            if node in wanted and isinstance(value, Tensor):
                kept[node] = value
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    values.pop(operand, None)
    return kept
