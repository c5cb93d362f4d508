"""Multiplies every sum by very little more than one, so that no site alone breaks the promise, but several do.

Before: `y = a + b`; after: `y = (a + b) * (1 + drift)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program
from vlmopt.graph.example import ResidualBlocks, program_of


@dataclass(frozen=True)
class ReplaceSlightly(Pass):
    """Multiplies sums by little more than one.

    Args:
        drift: how much more.
    """

    drift: float = 4e-6

    name: ClassVar[str] = "replace-slightly"
    promise: ClassVar[Promise] = Promise.CLOSE

    def plan(self, program: Program, context: Context) -> Plan:
        nodes = [(name, n) for name, part in program.components.items() for n in part.graph.graph.nodes]
        sums = [(name, node.name) for name, node in nodes if node.target is torch.ops.aten.add.Tensor]
        return Plan(tuple(Site(f"{name}/{node}", name, (node,)) for name, node in sums))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        node = next(node for node in graph.graph.nodes if node.name in site.target)
        with graph.graph.inserting_after(node):
            made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0 + self.drift))
        made.meta = copy.copy(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("two sums", lambda: program_of(ResidualBlocks(), torch.ones(2, 8)), n_sites=2)
