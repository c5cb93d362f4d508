"""Takes traversals of layers out again: all of them, or the passes whose gate lets little through on the task.

Before: `y = h1 + w (L(h1) - h1)`; after: `y = h1`, and the graph is what it was before the traversal was inserted. What
else was trained with it (adapters, projector) stays: train with traversal, deploy without. Together with
`insert-traversal: {times: 3}` in front of the training, `below` finds which layers are traversed, and how often.
Bound: none, it is judged on the task. Where w is zero everywhere, nothing changes.

Cases:
1. All traversals go; with `layers` given, those that match.
2. With `below` given, of every layer the passes behind the last one whose mean w on the profile split is not less;
   where that is the last one of all, the layer is refused, with the measured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.traversal import (
    Start,
    Traversal,
    TraversalForm,
    drop_traversal,
    find_traversals,
    insert_traversal,
    layers_to_traverse,
)


@dataclass(frozen=True)
class DropTraversal(Pass):
    """Takes traversals of layers out again.

    Args:
        layers: names or patterns of traversed layers, as COMPONENT/LAYER; by default all.
        below: only passes whose mean gate on the task is less, in size, as all behind them are; 0 for all.
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
                n_kept = self._kept(name, one, context)
                if isinstance(n_kept, str):
                    refusals.append(Refusal(key, name, n_kept))
                else:
                    saving = _without(program.components[name], one, n_kept, program)
                    summary = f"passes dropped: {len(one.gates) - n_kept}"
                    sites.append(Site(key, name, (one.site, str(n_kept)), saving, summary))
        return Plan(tuple(sites), tuple(refusals))

    def _kept(self, component: str, traversal: Traversal, context: Context) -> int | str:
        """How many passes after the first are kept, or why nothing is dropped."""
        if self.layers and not is_match(f"{component}/{traversal.site}", self.layers):
            return "not named in `layers`"
        if not self.below:
            return 0
        means = _means(component, traversal, context.statistics)
        if len(means) < len(traversal.gates):
            return "its gate is measured on the task when the recipe runs, and was not yet"
        n_kept = max((i for i, mean in enumerate(means, 1) if abs(mean) >= self.below), default=0)
        if n_kept == len(means):
            return f"its mean gate is {means[-1]:.3g}, and `below` is {self.below:g}"
        return n_kept

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for one in find_traversals(graph):
            if one.site in site.target:
                drop_traversal(graph, one, n_kept=int(site.target[1]))
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("all", _traversed, 2)
        yield Case("named", _traversed, 1, ("not named in",), {"layers": ("layers.1",)})
        measured = _measured(cls(below=0.2), _traversed(), [0.1, 0.3])
        thrice = _measured(cls(below=0.2), _thrice(), [0.3, 0.1, 0.05])
        yield Case("how often", _thrice, 1, (), {"below": 0.2}, thrice)
        yield Case("below", _traversed, 1, ("its mean gate is 0.3",), {"below": 0.2}, measured)


def _means(component: str, traversal: Traversal, statistics: Mapping[StatRequest, object]) -> list[float]:
    """The mean of every gate of a traversal that was measured."""
    found = [statistics.get(StatRequest(component, gate.name, "mean")) for gate in traversal.gates]
    return [float(value) for value in found if isinstance(value, Tensor)]


def _without(component: Component, traversal: Traversal, n_kept: int, program: Program) -> Cost:
    trial = replace(component, graph=clone_graph(component.graph))
    own = next(one for one in find_traversals(trial.graph) if one.site == traversal.site)
    drop_traversal(trial.graph, own, n_kept=n_kept)
    return component_cost(component, program.dims) - component_cost(trial, program.dims)


def _measured(pass_: DropTraversal, program: Program, means: Sequence[float]) -> Context:
    return Context(
        statistics={one: torch.tensor([mean]) for one, mean in zip(pass_.wants(program), means, strict=True)}
    )


def _traversed() -> Program:
    return _with_traversals(("layers.0", "layers.1"), TraversalForm(start=Start.PAPER))


def _thrice() -> Program:
    return _with_traversals(("layers.0",), TraversalForm(times=3, start=Start.PAPER))


def _with_traversals(names: Sequence[str], form: TraversalForm) -> Program:
    program = program_of(AttentionBlocks(), torch.ones(2, 3, 8))
    component = program.components["model"]
    for name in names:
        layer = next(one for one in layers_to_traverse(component) if one.name == name)
        insert_traversal(component, layer, form, program.dims)
    return program
