"""Produces a fact that nobody registered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.facts import Fact
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropWithUnknownFact(Pass):
    """Produces a fact that nobody registered."""

    name: ClassVar[str] = "drop-with-unknown-fact"
    promise: ClassVar[Promise] = Promise.EXACT
    produces: ClassVar[frozenset[Fact]] = frozenset({Fact("polished", "no multiplication by one is left")})

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
