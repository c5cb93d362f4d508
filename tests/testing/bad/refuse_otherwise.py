"""Refuses for another reason than its case says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class RefuseOtherwise(Pass):
    """Refuses for another reason than its case says."""

    name: ClassVar[str] = "refuse-otherwise"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("one of two", lambda: honest.scaled(1.0, 2.0), 1, ("the factor is negative",))
