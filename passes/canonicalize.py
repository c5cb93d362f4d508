"""Removes what computes nothing: assertions, nodes that only hand on their input, dead code.

Before: `a = contiguous(x); assert shape(a); d = unused(x); y = f(a)`; after: `y = f(x)`.
Identity: every removed node is unread, or returns its operand's value with the same dtype, device, shape and strides.

Cases:
1. An assertion is removed (it is read by nobody, but looks like a reader of its operand).
2. A dtype cast to the dtype that is there is removed (and the assertion that torch.export puts before it).
3. A cast that changes the dtype stays (only its assertion goes).
4. Dead nodes and the tensors that only they read are removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.canonical import assertion_nodes, dead_nodes, drop_dead_nodes, hand_on_nodes
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import program_of
from vlmopt.graph.marks import hand_marks_on

DEAD_CODE = "dead code"


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Removes assertions, nodes that only hand on their input, and dead code."""

    name: ClassVar[str] = "canonicalize"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})
    produces: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        for name, component in program.components.items():
            nodes = [*assertion_nodes(component.graph), *hand_on_nodes(component.graph)]
            for node in nodes:
                cost = nodes_cost(component, [node], program.dims)
                sites.append(Site(f"{name}/{node.name}", name, (node.name,), cost, f"{node.target}"))
            if dead := dead_nodes(component.graph):
                cost = nodes_cost(component, dead, program.dims)
                summary = f"{len(dead)} nodes that no output needs"
                sites.append(Site(f"{name}/{DEAD_CODE}", name, (DEAD_CODE,), cost, summary))
        return Plan(tuple(sites))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        if site.target != (DEAD_CODE,):
            (name,) = site.target
            node = next((node for node in graph.graph.nodes if node.name == name), None)
            if node is None:
                return
            if node.users:
                hand_marks_on(node, _operand(node))
                node.replace_all_uses_with(_operand(node))
            graph.graph.erase_node(node)
        else:
            drop_dead_nodes(graph)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("assertion", lambda: program_of(_Asserting(), torch.ones(2, 4), raw=True), n_sites=1)
        yield Case(
            "same-dtype cast", lambda: program_of(_Casting(torch.float32), torch.ones(2, 4), raw=True), n_sites=2
        )
        yield Case("real cast", lambda: program_of(_Casting(torch.float64), torch.ones(2, 4), raw=True), n_sites=1)
        yield Case("dead code", lambda: program_of(_Dead(), torch.ones(2, 4), raw=True), n_sites=1)


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


class _Asserting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._assert_tensor_metadata.default(x, dtype=torch.float32)
        return x * 2.0


class _Casting(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.to.dtype(x, self.dtype) * 2.0  # type: ignore[no-any-return]


class _Dead(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cos(x)
        return x * 2.0
