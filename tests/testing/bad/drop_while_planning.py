"""Edits the program while it plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropWhilePlanning(Pass):
    """Edits the program while it plans."""

    name: ClassVar[str] = "drop-while-planning"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        found = honest.plan(program)
        for site in found.sites:
            honest.apply(program, site)
        return found

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
