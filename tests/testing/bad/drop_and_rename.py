"""Renames an output and does not say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndRename(Pass):
    """Renames an output and does not say so."""

    name: ClassVar[str] = "drop-and-rename"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        part = program.components[site.component]
        first, *others = part.outputs
        program.components[site.component] = replace(part, outputs=(replace(first, name="scores"), *others))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
