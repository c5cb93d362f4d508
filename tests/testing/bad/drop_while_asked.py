"""Edits the program while it is asked which statistics it wants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site, StatRequest
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropWhileAsked(Pass):
    """Edits the program while it is asked which statistics it wants."""

    name: ClassVar[str] = "drop-while-asked"
    promise: ClassVar[Promise] = Promise.EXACT

    def wants(self, program: Program) -> Iterable[StatRequest]:
        for site in honest.plan(program).sites:
            honest.apply(program, site)
        return ()

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
