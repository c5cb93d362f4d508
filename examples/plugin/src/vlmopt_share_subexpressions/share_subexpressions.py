"""Computes once what a graph computes several times.

Before: `a = f(x); b = f(x); y = a + b`; after: `a = f(x); y = a + a`.
Identity: the same operation on the same operands gives the same bits; operations that draw random numbers or write in
place are left alone.

Cases:
1. A repeated operation is shared, and then what repeats because of it.
2. A module that is called twice with one operand is called once.
3. Two outputs stay two values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.canonical import drop_dead_nodes, writes
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import program_of


@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    """Computes once what a graph computes several times."""

    name: ClassVar[str] = "share-subexpressions"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})
    needs_vlmopt: ClassVar[str] = ">=0.1,<0.2"

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            for node, first in _repeats(component.graph).items():
                key, reason = f"{name}/{node.name}", _why_not(node, first)
                if reason:
                    refusals.append(Refusal(key, name, reason))
                else:
                    cost = _cost(component, node, program)
                    sites.append(Site(key, name, (node.name, first.name), cost, f"is {first.name} again"))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        by_name = {node.name: node for node in graph.graph.nodes}
        repeated, first = site.target
        if repeated not in by_name or first not in by_name:
            return
        by_name[repeated].replace_all_uses_with(by_name[first])
        graph.graph.erase_node(by_name[repeated])
        drop_dead_nodes(graph)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("repeated", lambda: program_of(_Repeating(), torch.ones(2, 4)), n_sites=2)
        yield Case("module", lambda: program_of(_CallingTwice(), torch.ones(2, 4)), n_sites=1)
        yield Case("outputs", lambda: program_of(_TwoOutputs(), torch.ones(2, 4)), 0, ("both are outputs",))


def _repeats(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Nodes that compute what an earlier one computed, with that one, in the order of the graph (value numbering)."""
    first: dict[tuple[str, object, str], fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        operands = fx.map_arg((node.args, node.kwargs), lambda operand: same.get(operand, operand))
        known = first.setdefault((node.op, node.target, repr(operands)), node)
        if known is not node:
            same[node] = known
    return same


def _why_not(node: fx.Node, first: fx.Node) -> str:
    """Why a repeated node stays; empty where the first one may stand for it."""
    if any(writes(other) for other in node.graph.nodes):
        return "the graph writes tensors in place"
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return "it may draw random numbers"
    if all(any(user.op == "output" for user in each.users) for each in (node, first)):
        return "both are outputs"
    return ""


def _cost(component: Component, node: fx.Node, program: Program) -> Cost:
    """What the node computes; its weights stay, since the first node reads them."""
    return replace(nodes_cost(component, [node], program.dims), parameters=0, parameters_bytes=0)


class _Repeating(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(x) + 1.0) * (torch.sin(x) + 1.0)


class _CallingTwice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.linear.weight = torch.nn.Parameter(torch.arange(16.0).reshape(4, 4).to(self.linear.weight.dtype) / 8)
        self.linear.bias = torch.nn.Parameter(torch.ones_like(self.linear.bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) - torch.sigmoid(self.linear(x))


class _TwoOutputs(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x), torch.sin(x)
