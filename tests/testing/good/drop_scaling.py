"""Removes multiplications by one: the pass that every check must let through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropScaling(Pass):
    """Removes multiplications by one."""

    name: ClassVar[str] = "drop-scaling"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield from honest.cases()
        yield Case("twice", lambda: honest.scaled(1.0, 1.0), n_sites=2)
        yield Case("by two", lambda: honest.scaled(2.0), 0, (honest.NOT_ONE,))
