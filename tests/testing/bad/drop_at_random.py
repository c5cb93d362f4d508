"""Counts its plans over the whole process, so that no two are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program

_COUNT = itertools.count()


@dataclass(frozen=True)
class DropAtRandom(Pass):
    """Counts its plans over the whole process, so that no two are the same."""

    name: ClassVar[str] = "drop-at-random"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        found = honest.plan(program)
        return replace(found, sites=tuple(replace(site, summary=f"plan {next(_COUNT)}") for site in found.sites))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
