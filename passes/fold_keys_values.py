"""Folds the maps of keys and values into the few queries of an attention, so that neither is computed for all tokens.

Before: `softmax(s q (x Wk + ck)^T) (x Wv + cv)` with few queries q and many tokens x; after:
`softmax((s q Wk^T) x^T) x Wv + cv`, weights by head.
Identity: `s q ck` is the same for all tokens, which a softmax does not see; its weights sum to one, so `cv` can be
added behind it. Sums are in another order.

Cases:
1. One query that reads many tokens, and several; a mask of numbers stays.
2. Where the products would be more than before, it is refused.
3. Keys that are read elsewhere, or that are more than a Linear, are refused.
4. A mask that hides tokens by true and false is refused: weights of a query that sees nothing sum to nothing. One that
   is true everywhere goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import program_of
from vlmopt.graph.few_queries import FewQueries, find_few_queries, move_maps
from vlmopt.graph.modules import clone_graph


@dataclass(frozen=True)
class FoldKeysValues(Pass):
    """Folds the maps of keys and values into the few queries of an attention."""

    name: ClassVar[str] = "fold-keys-values"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            found, reasons = find_few_queries(component.graph)
            refusals += [Refusal(f"{name}/{node}", name, reason) for node, reason in reasons.items()]
            for one in found:
                key, trial = f"{name}/{one.call.name}", _folded(component, one)
                saving = component_cost(component, program.dims) - component_cost(trial, program.dims)
                if saving.macs > 0:
                    summary = f"{one.n_queries} queries in {one.n_heads} heads"
                    sites.append(Site(key, name, (one.call.name,), saving, summary))
                else:
                    reason = f"{one.n_queries} queries are too many: it would take {-saving.macs} MACs more"
                    refusals.append(Refusal(key, name, reason))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        for one in find_few_queries(component.graph)[0]:
            if one.call.name in site.target:
                program.components[site.component] = _folded(component, one)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("one query", partial(_program, 1), 1)
        yield Case("mask", partial(_program, 2, "mask"), 1)
        yield Case("no bias", partial(_program, 2, "no bias"), 1)
        yield Case("many", partial(_program, 8), 0, ("are too many",))
        yield Case("read elsewhere", partial(_program, 1, "elsewhere"), 0, ("is read elsewhere, too",))
        yield Case("more than a Linear", partial(_program, 1, "turned"), 0, ("more than a Linear",))
        yield Case("nothing hidden", partial(_program, 1, "all"), 1)
        yield Case("hidden", partial(_program, 1, "hidden"), 0, ("may hide all tokens",))


def _folded(component: Component, one: FewQueries) -> Component:
    """The component with the maps moved, of a clone whose nodes have the same names."""
    made = replace(component, graph=clone_graph(component.graph))
    own = next(other for other in find_few_queries(made.graph)[0] if other.call.name == one.call.name)
    move_maps(made.graph, own)
    drop_dead_nodes(made.graph)
    return made


class _Attention(nn.Module):
    """The first n tokens ask all of them: [B, T, 8] -> [B, 2, n, 4], two heads; the rest depends on the kind."""

    mask: Tensor

    def __init__(self, n_queries: int, kind: str) -> None:
        super().__init__()
        self.n_queries, self.kind = n_queries, kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=kind != "no bias") for _ in range(3))
        self.register_buffer("mask", torch.linspace(-1, 0, 11) if kind == "mask" else torch.arange(11) < 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(y).unflatten(-1, (2, 4)).transpose(1, 2)
            for one, y in ((self.q, x[:, : self.n_queries]), (self.k, x), (self.v, x))
        )
        k = k.roll(1, -1) if self.kind == "turned" else k
        mask = self.mask.expand(self.n_queries, -1) if self.kind in ("mask", "hidden") else None
        mask = torch.arange(x.shape[1])[None] >= 0 if self.kind == "all" else mask
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return found + k.sum(2, keepdim=True) if self.kind == "elsewhere" else found


def _program(n_queries: int, kind: str = "") -> Program:
    program = program_of(_Attention(n_queries, kind), torch.linspace(-1, 1, 176).reshape(2, 11, 8))
    program.heads.clear()
    return program
