"""Evaluates at compile time what depends on no input, and stores the result.

Before: `p = resize(position_embedding); y = x + p`; after: `y = x + stored`.
Identity: the same operations run once, on the same tensors, in the same library.

Cases:
1. A position embedding that is resized in every call becomes one tensor.
2. A small tensor spread out to a large one stays as it is, since storing it would make the artifact larger.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.constants import constant_frontier, constant_region, evaluate_constant, store_constant
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import program_of


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates at compile time what depends on no input.

    Args:
        max_growth_bytes: a constant is stored only if it is at most this much larger than what it is computed from.
    """

    max_growth_bytes: int = 65536

    name: ClassVar[str] = "fold-constants"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            for node in constant_frontier(component.graph):
                key = f"{name}/{node.name}"
                saving, stored = self._saving(program, component, node)
                if -saving.parameters_bytes > self.max_growth_bytes:
                    reason = f"storing it would add {-saving.parameters_bytes} bytes"
                    refusals.append(Refusal(key, name, reason))
                else:
                    sites.append(Site(key, name, (node.name,), saving, f"{stored} bytes stored"))
        return Plan(tuple(sites), tuple(refusals))

    def _saving(self, program: Program, component: Component, node: fx.Node) -> tuple[Cost, int]:
        """What dies with the node's computation, less the tensor that is stored."""
        region = constant_region(node)
        value = node.meta["val"]
        stored = value.numel() * value.element_size()
        is_weight = value.is_floating_point()
        kept = Cost(value.numel() if is_weight else 0, stored if is_weight else 0)
        return nodes_cost(component, region, program.dims) - kept, stored

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        node = next((node for node in graph.graph.nodes if node.name in site.target), None)
        if node is None:
            return
        store_constant(graph, node, evaluate_constant(graph, node), f"folded.{node.name}")
        drop_dead_nodes(graph)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("resized position embedding", lambda: program_of(_Resizing(), torch.ones(2, 4, 6)), n_sites=1)
        spread = Case("spread", lambda: program_of(_Spreading(), torch.ones(2, 4096)), 0, ("would add",))
        yield spread


class _Resizing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Parameter(torch.linspace(0, 1, 8).reshape(1, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.interpolate(self.positions, size=6, mode="linear")


class _Spreading(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = (self.scale * 2.0).expand(64, 4096).contiguous().sum(dim=0, keepdim=True).expand(16, 4096) * 1.0
        return x @ table.T
