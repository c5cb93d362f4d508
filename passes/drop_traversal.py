"""Takes traversals of layers out again: all of them, or those whose gate lets little through on the task.

Before: `y = h1 + w (L(h1) - h1)`; after: `y = h1`, and the graph is what it was before the traversal was inserted. What
else was trained with it (adapters, projector) stays: train with traversal, deploy without.
Bound: none, it is judged on the task. Where w is zero everywhere, nothing changes.

Cases:
1. All traversals go; with `layers` given, those that match.
2. With `below` given, those whose mean w on the profile split is less; the others are refused, with the measured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site, StatRequest
from vlmopt.core.cost import Cost
from vlmopt.core.facts import ADAPTERS_INSERTED, CAPTURED, TRAVERSAL_INSERTED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import AttentionBlocks, program_of
from vlmopt.graph.layer_regions import find_layer_regions
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.traversal import (
    Start,
    Traversal,
    TraversalForm,
    drop_traversal,
    find_traversals,
    insert_traversal,
    traversed_nodes,
)


@dataclass(frozen=True)
class DropTraversal(Pass):
    """Takes traversals of layers out again.

    Args:
        layers: names or patterns of traversed layers, as COMPONENT/LAYER; by default all.
        below: only those whose mean gate on the task is less, in size; 0 for all.
    """

    layers: tuple[str, ...] = ()
    below: float = 0.0

    name: ClassVar[str] = "drop-traversal"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, ADAPTERS_INSERTED, TRAVERSAL_INSERTED})

    def __post_init__(self) -> None:
        if not self.below >= 0.0:
            raise ValueError(f"below is {self.below}; expected 0 for all, or a number above")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        if self.below:
            for name, component in program.components.items():
                for traversal in find_traversals(component.graph):
                    yield from (StatRequest(name, gate.name, "mean") for gate in traversal.gates)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        found = {name: find_traversals(part.graph) for name, part in program.components.items()}
        keys = [f"{name}/{one.site}" for name, ones in found.items() for one in ones]
        check_patterns(f"{self.name}: layers", self.layers, keys)
        for name, traversals in found.items():
            for one in traversals:
                key = f"{name}/{one.site}"
                if reason := self._why_kept(name, one, context):
                    refusals.append(Refusal(key, name, reason))
                else:
                    saving = _without(program.components[name], one, program)
                    sites.append(Site(key, name, (one.site,), saving, f"passes dropped: {len(one.gates)}"))
        return Plan(tuple(sites), tuple(refusals))

    def _why_kept(self, component: str, traversal: Traversal, context: Context) -> str:
        if self.layers and not is_match(f"{component}/{traversal.site}", self.layers):
            return "not named in `layers`"
        if not self.below:
            return ""
        means = _means(component, traversal, context.statistics)
        if len(means) < len(traversal.gates):
            return "its gate is measured on the task when the recipe runs, and was not yet"
        largest = max(means, key=abs)
        return "" if abs(largest) < self.below else f"its mean gate is {largest:.3g}, and `below` is {self.below:g}"

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for one in find_traversals(graph):
            if one.site in site.target:
                drop_traversal(graph, one)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("all", _traversed, 2)
        yield Case("named", _traversed, 1, ("not named in",), {"layers": ("layers.1",)})
        requests = list(cls(below=0.2).wants(_traversed()))
        measured = Context(statistics=dict(zip(requests, torch.tensor([[0.1], [0.3]]), strict=True)))
        yield Case("below", _traversed, 1, ("its mean gate is 0.3",), {"below": 0.2}, measured)


def _means(component: str, traversal: Traversal, statistics: Mapping[StatRequest, object]) -> list[float]:
    """The mean of every gate of a traversal that was measured."""
    found = [statistics.get(StatRequest(component, gate.name, "mean")) for gate in traversal.gates]
    return [float(value) for value in found if isinstance(value, Tensor)]


def _without(component: Component, traversal: Traversal, program: Program) -> Cost:
    trial = replace(component, graph=clone_graph(component.graph))
    own = next(one for one in find_traversals(trial.graph) if one.site == traversal.site)
    drop_traversal(trial.graph, own)
    return component_cost(component, program.dims) - component_cost(trial, program.dims)


def _traversed() -> Program:
    program = program_of(AttentionBlocks(), torch.ones(2, 3, 8))
    component = program.components["model"]
    for name in ("layers.0", "layers.1"):
        layers = find_layer_regions(component.graph, traversed_nodes(component.graph))
        layer = next(one for one in layers if one.name == name)
        insert_traversal(component, layer, TraversalForm(start=Start.PAPER), program.dims)
    component.graph.recompile()
    return program
