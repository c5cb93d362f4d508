"""Names a head that does not exist; the pipeline refuses that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndForget(Pass):
    """Names a head that does not exist; the pipeline refuses that."""

    name: ClassVar[str] = "drop-and-forget"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        program.heads[site.component] = "nowhere.at.all"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
