"""Adds a zero that is always a float32, so that bfloat16 programs change their type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.build import insert_call
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import free_path, set_at


@dataclass(frozen=True)
class ReplaceWithWideZero(Pass):
    """Adds a zero that is always a float32, so that bfloat16 programs change their type."""

    name: ClassVar[str] = "replace-with-wide-zero"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        found = honest.plan(program, is_free=True)
        zero = Cost(parameters=1, parameters_bytes=4)
        return replace(found, sites=tuple(replace(site, saving=Cost() - zero) for site in found.sites))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph, node = program.components[site.component].graph, honest.node_of(program, site)
        operand = node.args[0]
        path = free_path(graph, "zero")
        set_at(graph, path, torch.zeros(1, dtype=torch.float32))
        with graph.graph.inserting_before(node):
            zero = graph.graph.get_attr(path)
            zero.meta["val"] = operand.meta["val"].new_empty(1, dtype=torch.float32)
            made = insert_call(graph, torch.ops.aten.add.Tensor, (operand, zero))
        node.replace_all_uses_with(made)
        drop_dead_nodes(graph)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
