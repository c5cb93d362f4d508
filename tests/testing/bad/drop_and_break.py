"""Leaves a call of a module that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndBreak(Pass):
    """Leaves a call of a module that does not exist."""

    name: ClassVar[str] = "drop-and-break"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        graph = program.components[site.component].graph.graph
        node = next(node for node in graph.nodes if node.op == "call_module")
        node.target = "nowhere.at.all"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
