"""Takes phantom dimensions out of attentions again: what `insert-phantom` put in.

Before: `w o1 + (1 - w) o2`, of scores and values with a phantom dimension; after: `out = softmax(s q k^T + mask) v`,
the graph that was there before, and no entry of the cache for the queries of token 0.
Bound: with eta 0 nothing changes; at the paper's 1e-4 a fine model changes hardly, and the task says how much.

Cases:
1. Every phantom dimension goes, and with it all that only it read.
2. With `branches` given, those that match go and the others are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import GroupedHeads, program_of
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.phantom import PhantomForm, with_phantoms
from vlmopt.graph.phantom_removal import drop_phantom, find_phantoms, phantom_of


@dataclass(frozen=True)
class DropPhantom(Pass):
    """Takes phantom dimensions out of attentions again.

    Args:
        branches: names or patterns of attentions, as COMPONENT/BRANCH; by default all that have one.
    """

    branches: tuple[str, ...] = ()

    name: ClassVar[str] = "drop-phantom"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL, ADAPTERS_INSERTED})
    changes_signature: ClassVar[bool] = True  # entries of the cache go

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for name, component in program.components.items():
            branches = find_branches(component.graph)
            for phantom in find_phantoms(component.graph):
                key = next((b.name for b in branches if phantom.plain in b.region), phantom.path)
                key = f"{name}/{key}"
                names.append(key)
                if self.branches and not is_match(key, self.branches):
                    refusals.append(Refusal(key, name, "not named in `branches`"))
                    continue
                trial = replace(component, graph=clone_graph(component.graph))
                inner = phantom_of(trial.graph, phantom.path)
                assert inner is not None
                cost = component_cost(component, program.dims) - component_cost(
                    drop_phantom(trial, inner), program.dims
                )
                sites.append(Site(key, name, (phantom.path,), cost))
        check_patterns(f"{self.name}: branches", self.branches, names)
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        phantom = phantom_of(component.graph, site.target[0])
        if phantom is not None:
            program.components[site.component] = drop_phantom(component, phantom)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("all", lambda: _with_phantoms(GroupedHeads()), 2)
        yield Case("spelled out", lambda: _with_phantoms(GroupedHeads(is_fused=False)), 2)
        named: dict[str, object] = {"branches": ("*layers.1.*",)}
        yield Case("named", lambda: _with_phantoms(GroupedHeads()), 1, ("not named in",), named)


def _with_phantoms(module: GroupedHeads) -> Program:
    return with_phantoms(program_of(module, torch.ones(2, 3, 8)), PhantomForm(eta=0.1))
