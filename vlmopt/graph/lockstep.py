"""Runs a graph over many batches at once, up to one node after another, so that its weights can change on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from vlmopt.core.workload import Feed
from vlmopt.graph.replay import run_node


class Lockstep:
    """One graph on a few batches. Values are held from where they are computed to their last reader, for all batches.

    `wanted` are the nodes that will be asked for; they are held too.
    """

    def __init__(self, graph: fx.GraphModule, feeds: Sequence[Feed], wanted: Sequence[fx.Node]) -> None:
        self.graph, self.feeds = graph, feeds
        self._nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._values: list[dict[fx.Node, object]] = [{} for _ in feeds]
        self._done = 0
        self._wanted = set(wanted)
        self._last: dict[fx.Node, int] = {}
        for node in self._nodes:
            for operand in node.all_input_nodes:
                self._last[operand] = self._order[node]

    def values(self, node: fx.Node) -> list[Tensor]:
        """The node's value on every batch; nodes must be asked for in graph order."""
        with torch.no_grad():
            self._advance(self._order[node] + 1)
        found = [values[node] for values in self._values]
        return [value for value in found if isinstance(value, Tensor)]

    def release(self, node: fx.Node) -> None:
        """The node will not be asked for again."""
        self._wanted.discard(node)
        if self._last.get(node, -1) < self._done:
            for values in self._values:
                values.pop(node, None)

    def _advance(self, end: int) -> None:
        for values, feed in zip(self._values, self.feeds, strict=True):
            for i in range(self._done, end):
                node = self._nodes[i]
                values[node] = run_node(self.graph, node, values, feed)
                for operand in node.all_input_nodes:
                    if self._last[operand] == i and operand not in self._wanted:
                        values.pop(operand, None)
        self._done = max(self._done, end)
