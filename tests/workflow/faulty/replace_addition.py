"""Multiplies every sum by one; at one of its sites something else happens, for the tests of bisect.

Before: `y = a + b`; after: `y = (a + b) * 1.0`.
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

FACTORS = {"wrong": 1.25, "nan": float("nan"), "large": 3e38}


@dataclass(frozen=True)
class ReplaceAddition(Pass):
    """Multiplies sums by one.

    Args:
        broken: which of the sites is broken, counted from 1; 0 for none.
        how: what happens there.
    """

    broken: int = 0
    how: str = "wrong"

    name: ClassVar[str] = "replace-addition"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        if self.broken and self.how == "plan":
            raise ValueError("planted in the plan")
        sites: list[Site] = []
        for name, part in program.components.items():
            sums = [node for node in part.graph.graph.nodes if node.target is torch.ops.aten.add.Tensor]
            sites += [
                Site(f"{name}/{node.name}", name, (node.name, str(len(sites) + i))) for i, node in enumerate(sums, 1)
            ]
        return Plan(tuple(sites))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        name, number = site.target
        how = self.how if int(number) == self.broken else ""
        if how == "raises":
            raise ValueError("planted")
        while how == "loops":
            pass
        if how == "weights":
            with torch.no_grad():
                graph.get_parameter("scale").data.mul_(2.0)
        node = next(node for node in graph.graph.nodes if node.name == name)
        with graph.graph.inserting_after(node):
            made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, FACTORS.get(how, 1.0)))
        made.meta = copy.copy(node.meta)
        if how == "shape":
            made.args = (node, torch.device("cpu"))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("two sums", lambda: program_of(ResidualBlocks(), torch.ones(2, 8)), n_sites=2)
