"""Divides its option by a hundred whenever it is made, so a recipe brings back another number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropByPercent(Pass):
    """Divides its option by a hundred whenever it is made, so a recipe brings back another number."""

    name: ClassVar[str] = "drop-by-percent"
    promise: ClassVar[Promise] = Promise.EXACT

    share: float = 50.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", self.share / 100.0)

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
