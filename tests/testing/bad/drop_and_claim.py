"""Signs a node that was there before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndClaim(Pass):
    """Signs a node that was there before."""

    name: ClassVar[str] = "drop-and-claim"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        graph = program.components[site.component].graph.graph
        next(iter(graph.nodes)).meta["made_by"] = (1, "somebody-else")

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
