"""Plans two sites of one name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropTwiceNamed(Pass):
    """Plans two sites of one name."""

    name: ClassVar[str] = "drop-twice-named"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        found = honest.plan(program)
        return Plan(found.sites * 2, found.refusals)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
