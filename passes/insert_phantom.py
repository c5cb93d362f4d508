"""Puts a phantom dimension into attentions: heads that are twice as wide inside (arXiv 2409.14713).

Before: `out = softmax(s q k^T + mask) v`; after: q', k' and v' of modules of their own that attend across the heads of
token 0, scores `s (q k^T + q' k'^T)`, and `w o1 + (1 - w) o2` of the values that v and v' give (formulas:
`vlmopt/graph/phantom.py`). `12 d^2 + 2 (d + 1)` parameters a layer for heads of width d, and eta.
Bound: with eta 0 the function stays what it is, to the bit. A class has one promise, so it is the weaker one.

A decoder's cache gets an entry more for every layer, the queries of token 0 (`past_key_values_N_query`).

Cases:
1. Every self-attention whose heads are found gets one, be it with grouped queries or with its softmax spelled out.
2. With `branches` given, those that match are sites and the others are refused.
3. An attention without an axis of heads, a cross attention, and one that has a phantom dimension are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import Branch, BranchKind, find_branches
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import AttentionBlocks, GroupedHeads, program_of
from vlmopt.graph.heads import Heads, find_heads
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.phantom import PhantomForm, insert_phantom, unfit
from vlmopt.graph.phantom_removal import find_phantoms

_ATTENTIONS = (BranchKind.ATTENTION, BranchKind.CROSS_ATTENTION)


@dataclass(frozen=True)
class InsertPhantom(Pass):
    """Puts a phantom dimension into attentions.

    Args:
        eta: how much of it counts at first; 0 changes nothing before training, the paper has 1e-4.
        learn_eta: eta is trained with the modules, a number for every layer.
        branches: names or patterns of attentions, as COMPONENT/BRANCH; by default all.
    """

    eta: float = 1e-4
    learn_eta: bool = True
    branches: tuple[str, ...] = ()

    name: ClassVar[str] = "insert-phantom"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED})
    changes_signature: ClassVar[bool] = True  # the cache gets entries

    def __post_init__(self) -> None:
        self._form()  # an eta that is no number is refused

    def _form(self) -> PhantomForm:
        return PhantomForm(self.eta, self.learn_eta)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for name, component in program.components.items():
            trial = replace(component, graph=clone_graph(component.graph))
            for branch in find_branches(component.graph):
                if branch.kind not in _ATTENTIONS:
                    continue
                key, heads = f"{name}/{branch.name}", self._heads(component, branch)
                names.append(key)
                if isinstance(heads, str):
                    refusals.append(Refusal(key, name, heads))
                    continue
                before = component_cost(trial, program.dims)
                trial = self._inserted(trial, branch.name, context)
                saving, summary = before - component_cost(trial, program.dims), f"width {heads.width}, eta {self.eta:g}"
                sites.append(Site(key, name, (branch.name,), saving, summary))
        check_patterns(f"{self.name}: branches", self.branches, names)
        return Plan(tuple(sites), tuple(refusals))

    def _heads(self, component: Component, branch: Branch) -> Heads | str:
        """The heads of the attention, or why it gets no phantom dimension."""
        if self.branches and not is_match(f"{component.name}/{branch.name}", self.branches):
            return "not named in `branches`"
        if any(one.plain in branch.region for one in find_phantoms(component.graph)):
            return "has a phantom dimension already"
        heads = find_heads(branch)
        return heads if isinstance(heads, str) else unfit(component, heads) or heads

    def _inserted(self, component: Component, name: str, context: Context) -> Component:
        for branch in find_branches(component.graph):
            if branch.name == name and not isinstance(heads := self._heads(component, branch), str):
                return insert_phantom(component, branch, heads, self._form(), seed=context.seed)
        return component

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        program.components[site.component] = self._inserted(component, site.target[0], context)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.ones(2, 3, 8)
        grouped: dict[str, object] = {"eta": 0.0}
        yield Case("grouped", lambda: program_of(GroupedHeads(), sample), 2, options=grouped)
        fixed: dict[str, object] = {"eta": 0.1, "learn_eta": False}
        yield Case("every head its keys", lambda: program_of(GroupedHeads(key_heads=4), sample), 2, options=fixed)
        yield Case("spelled out", lambda: program_of(GroupedHeads(is_fused=False), sample), 2, options=fixed)
        named: dict[str, object] = {"branches": ("*layers.1.*",)}
        yield Case("named", lambda: program_of(GroupedHeads(), sample), 1, ("not named in",), named)
        yield Case("no heads", lambda: program_of(AttentionBlocks(), sample), 0, ("no axis of their own",) * 2)
