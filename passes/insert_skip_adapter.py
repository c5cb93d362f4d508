"""Puts a small trainable map where branches were skipped, so that tuning has something to recover with.

Before: `y = x` where `x + f(x)` was; after: `y = x + A(x)`, one adapter for each skipped layer (the skip adapter of
arXiv 2309.01479), or one for each run of consecutive skipped branches. With the kind `eas` (arXiv 2403.15226) the
adapter of a skipped attention lies inside the FFN of its layer, between norm and first linear maps: `z = n + n C B`.
Bound: with `init: zero` the function stays what it is, to the bit, until the adapters are trained; with `init: paper`
it changes at once. A class has one promise, so it is the weaker one.

Cases:
1. Every skipped layer gets an adapter; consecutive ones get one together with `per: run`.
2. With `layers` or `branches` given, those that match are sites and the others are refused.
3. With `kind: eas` a skipped attention whose FFN is left is a site; anything else is refused.
4. A stream that is no matrix of vectors [.., D] is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

import torch
from torch import fx

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.adapter_places import AdapterPlace, ffn_place, stream_place
from vlmopt.graph.adapters import AdapterForm, adapter_cost, insert_adapter
from vlmopt.graph.example import AttentionBlocks, ResidualBlocks, program_of, without_branches
from vlmopt.graph.marks import Mark, marks_of, set_marks
from vlmopt.graph.patterns import check_patterns, is_match


@dataclass(frozen=True)
class InsertSkipAdapter(Pass):
    """Puts a small trainable map where branches or layers were skipped.

    Args:
        rank: hidden width of an adapter (192 in the paper).
        kind: `bottleneck`, `linear`, `routed` (two linear maps, weighed by the first token), `eas` (inside the FFN).
        init: `zero` changes nothing before training; `paper` draws both projections.
        per: one adapter for each skipped `layer`, or for each `run` of consecutive skipped branches.
        with_norm: a bottleneck begins with a norm of its own.
        with_bias: a linear adapter has biases.
        branches: names or patterns of skipped branches; by default all.
        layers: the same for skipped layers.
    """

    rank: int = 16
    kind: Literal["bottleneck", "linear", "routed", "eas"] = "bottleneck"
    init: Literal["zero", "paper"] = "zero"
    per: Literal["layer", "run"] = "layer"
    with_norm: bool = True
    with_bias: bool = True
    branches: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    name: ClassVar[str] = "insert-skip-adapter"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        self._form()  # a rank below 1 is refused

    def _form(self) -> AdapterForm:
        has_norm, has_bias = self.with_norm, self.with_bias
        return AdapterForm.named(self.kind, self.rank, init=self.init, has_norm=has_norm, has_bias=has_bias)

    def _named(self, component: str, group: tuple[Mark, ...]) -> bool:
        branches = any(is_match(f"{component}/{mark.branch}", self.branches) for mark in group)
        layers = any(is_match(f"{component}/{mark.layer}", self.layers) for mark in group)
        return branches or layers or not (self.branches or self.layers)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        marks: list[tuple[str, Mark]] = []
        for name, part in program.components.items():
            for node in part.graph.graph.nodes:
                for group in self._groups(marks_of(node)):
                    marks += [(name, mark) for mark in group]
                    key, place = f"{name}/{group[0].branch}", self._place(part.graph, node, group)
                    if not self._named(name, group):
                        refusals.append(Refusal(key, name, "not named in `branches` or `layers`"))
                    elif isinstance(place, str):
                        refusals.append(Refusal(key, name, place))
                    else:
                        n_same = sum(site.name.partition("#")[0] == key for site in sites)  # a block that runs twice
                        key, target = f"{key}#{n_same + 1}" if n_same else key, tuple(mark.branch for mark in group)
                        cost = Cost() - adapter_cost(part, place.value, self._form(), program.dims)
                        sites.append(Site(key, name, target, cost, f"{self.kind} for {', '.join(target)}"))
        check_patterns(f"{self.name}: branches", self.branches, [f"{name}/{mark.branch}" for name, mark in marks])
        check_patterns(f"{self.name}: layers", self.layers, [f"{name}/{mark.layer}" for name, mark in marks])
        return Plan(tuple(sites), tuple(refusals))

    def _groups(self, marks: tuple[Mark, ...]) -> list[tuple[Mark, ...]]:
        """The marks of one value by the adapters that they ask for."""
        if self.kind == "eas":
            return [(mark,) for mark in marks]
        if self.per == "run":
            return [marks] if marks else []
        return [tuple(group) for _, group in groupby(marks, key=lambda mark: mark.layer)]

    def _place(self, graph: fx.GraphModule, node: fx.Node, group: tuple[Mark, ...]) -> AdapterPlace | str:
        """Where the adapter for these marks of `node` goes, or why nowhere."""
        place = ffn_place(graph, node, group[0]) if self.kind == "eas" else stream_place(node)
        return place if isinstance(place, str) else self._form().unfit(place.value) or place

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph, n = program.components[site.component].graph, len(site.target)
        for node in list(graph.graph.nodes):
            marks = marks_of(node)
            for start in range(len(marks) - n + 1):
                before, own, after = marks[:start], marks[start : start + n], marks[start + n :]
                if tuple(mark.branch for mark in own) != site.target:
                    continue
                if not isinstance(place := self._place(graph, node, own), str):
                    role = "eas" if self.kind == "eas" else "skip"
                    label = own[0].layer if role == "skip" and self.per == "layer" else own[0].branch
                    path, seed = f"{label}.{role}", context.seed
                    made = insert_adapter(graph, place, self._form(), site=path, seed=seed)
                    # What was skipped behind this layer lies behind its adapter.
                    set_marks(node, (*before, *after) if role == "eas" else before)
                    set_marks(made, () if role == "eas" else after)
                    return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("every layer", lambda: _skipped(*_BOTH), 2, options={"rank": 2})
        yield Case("one run", lambda: _skipped(*_BOTH), 1, options={"rank": 2, "per": "run", "kind": "linear"})
        routed: dict[str, object] = {"rank": 2, "kind": "routed"}
        yield Case("routed", lambda: _skipped(*_BOTH), 2, options=routed)
        named: dict[str, object] = {"layers": ("layers.1",), "rank": 2, "init": "paper"}
        yield Case("named", lambda: _skipped(*_BOTH), 1, ("not named in",), named)
        eas: dict[str, object] = {"kind": "eas", "rank": 2}
        yield Case("inside the FFN", lambda: _skipped(_BOTH[0]), 1, options=eas)
        yield Case("no FFN left", lambda: _skipped(*_BOTH), 0, ("no FFN of its layer", "is a skipped ffn"), eas)
        tall = torch.ones(2, 2, 2, 8)
        yield Case("grid", lambda: without_branches(program_of(ResidualBlocks(), tall), "layers.0.ffn"), 0, ("4 axes",))


_BOTH = ("layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn")


def _skipped(*names: str) -> Program:
    return without_branches(program_of(AttentionBlocks(), torch.ones(2, 3, 8)), *names)
