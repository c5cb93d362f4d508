"""Finds something to do in its own result, again and again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.build import insert_call
from vlmopt.graph.costing import nodes_cost


@dataclass(frozen=True)
class InsertScaling(Pass):
    """Finds something to do in its own result, again and again."""

    name: ClassVar[str] = "insert-scaling"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan(
            tuple(
                Site(f"{name}/{node.name}", name, (node.name,), Cost() - nodes_cost(part, [node], program.dims))
                for name, part in program.components.items()
                for node in part.graph.graph.nodes
                if node.target is torch.ops.aten.relu.default
            )
        )

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph, node = program.components[site.component].graph, honest.node_of(program, site)
        with graph.graph.inserting_after(node):
            made = insert_call(graph, torch.ops.aten.mul.Tensor, (node, 1.0))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
