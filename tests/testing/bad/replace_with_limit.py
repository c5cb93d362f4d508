"""Is exact for small numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceWithLimit(Pass):
    """Is exact for small numbers only."""

    name: ClassVar[str] = "replace-with-limit"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program, is_free=True)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.put(program, site, torch.ops.aten.clamp.default, None, 100.0)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
