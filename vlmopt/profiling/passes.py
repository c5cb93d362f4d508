"""What a measurement costs in full passes of one sample through the program, by the MACs that were really computed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from vlmopt.core.program import Program
from vlmopt.graph.costing import node_macs
from vlmopt.graph.replay import Replay, Skips
from vlmopt.graph.sizes import counting_sizes

BACKWARD_PASSES = 2.0  # a backward computes two products where the forward computes one


class PassCounter:
    """Turns nodes that were computed for one sample into a share of a full pass."""

    def __init__(self, program: Program, components: Iterable[str]) -> None:
        self._macs: dict[str, dict[fx.Node, int]] = {}
        for name in components:
            component = program.components[name]
            sizes = counting_sizes(component, program.dims)
            nodes = component.graph.graph.nodes
            self._macs[name] = {node: node_macs(component.graph, node, sizes) for node in nodes}
        self._total = max(1, sum(sum(macs.values()) for macs in self._macs.values()))

    def nodes(self, component: str, nodes: Iterable[fx.Node]) -> float:
        """Of these nodes, each as often as it is named."""
        return sum(self._macs[component][node] for node in nodes) / self._total

    def whole(self, component: str) -> float:
        """Of one pass of one row through the component."""
        return sum(self._macs[component].values()) / self._total

    def replay(self, replay: Replay, subsets: Iterable[Skips]) -> float:
        """Of one row under these skips, shared prefixes counted once."""
        return self.nodes(replay.component.name, replay.computed(subsets))
