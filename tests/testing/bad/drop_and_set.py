"""Leaves a variable in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndSet(Pass):
    """Leaves a variable in the environment."""

    name: ClassVar[str] = "drop-and-set"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        os.environ["SCALINGS_DROPPED"] = site.name

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
