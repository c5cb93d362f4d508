"""Takes the one token that is read out of many in front of what treats every token by itself.

Before: `y = norm(x + W2 gelu(W1 n(x + attend(q, k, v) Wo)))[:, 0]`, of which all tokens but the first are computed for
nobody; after: the same with `x[:, :1]`, and with `q[:, :1]` in the attention, whose keys and values stay whole.
Identity: `f(x)[:, i] = f(x[:, i])` for every f that treats each token by itself; products of fewer rows may be summed
in another order.

Cases:
1. A class token that is read behind an attention and an FFN: both run for it alone, but for keys and values.
2. A mask with a row for every query loses its other rows; a head written with products and a softmax is the same.
3. A value that is read whole as well, and one that was mixed from all tokens just before, are refused.
4. Queries of a causal call stay: which keys they see is counted from their place.
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
from vlmopt.graph.example import GroupedHeads, program_of
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.token_reads import TokenRead, find_token_reads, read_early
from vlmopt.graph.unit_axes import Mixed


@dataclass(frozen=True)
class HoistTokenReads(Pass):
    """Takes the one token that is read out of many in front of what treats every token by itself."""

    name: ClassVar[str] = "hoist-token-reads"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            reads, reasons = find_token_reads(component.graph)
            refusals += [Refusal(f"{name}/{node}", name, reason) for node, reason in reasons.items()]
            for read in reads:
                key = f"{name}/{read.call.name}"
                try:
                    trial = _hoisted(component, read)
                except Mixed as reason:
                    refusals.append(Refusal(key, name, str(reason)))
                    continue
                saving = component_cost(component, program.dims) - component_cost(trial, program.dims)
                summary = f"{len(read.narrowed)} operations for 1 of {read.n_tokens} tokens"
                sites.append(Site(key, name, (read.call.name,), saving, summary))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        for read in find_token_reads(component.graph)[0]:
            if read.call.name in site.target:
                program.components[site.component] = _hoisted(component, read)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("class token", partial(_program, "alone"), 1)
        yield Case("spelled out", partial(_program, "alone", is_fused=False), 1)
        yield Case("read whole too", partial(_program, "whole"), 0, ("reads the same tokens",))
        yield Case("mixed", partial(_program, "mixed"), 0, ("looks across tokens",))
        yield Case("causal call", partial(_program, "causal"), 0, ("looks across tokens",))


def _hoisted(component: Component, read: TokenRead) -> Component:
    """The component with the read moved, of a clone whose nodes have the same names."""
    made = replace(component, graph=clone_graph(component.graph))
    own = next(one for one in find_token_reads(made.graph)[0] if one.call.name == read.call.name)
    read_early(made.graph, own)
    drop_dead_nodes(made.graph)
    return made


class _Reader(nn.Module):
    """A class token read behind one block; what else happens depends on the kind. [B, N, 8] -> [B, 8]."""

    def __init__(self, kind: str, *, is_fused: bool) -> None:
        super().__init__()
        self.kind, self.blocks = kind, GroupedHeads(blocks=1, key_heads=4, is_fused=is_fused).layers
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "causal":
            y = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        else:
            y = self.blocks[0](x)
            y = y + self.down(nn.functional.gelu(self.up(self.norm(y))))
        y = y.cumsum(1) if self.kind == "mixed" else y
        return y[:, 0] + y.mean(1) if self.kind == "whole" else y[:, 0]


def _program(kind: str, *, is_fused: bool = True) -> Program:
    program = program_of(_Reader(kind, is_fused=is_fused), torch.linspace(-1, 1, 80).reshape(2, 5, 8))
    program.heads.clear()
    return program
