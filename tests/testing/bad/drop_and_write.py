"""Writes a weight in place, where autograd does not see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndWrite(Pass):
    """Writes a weight in place, where autograd does not see it."""

    name: ClassVar[str] = "drop-and-write"
    promise: ClassVar[Promise] = Promise.LOSSY

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        for weight in program.components[site.component].graph.parameters():
            weight.data.mul_(1.5)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
