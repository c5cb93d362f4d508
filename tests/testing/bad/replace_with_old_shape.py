"""Makes a node that says it has another shape than it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceWithOldShape(Pass):
    """Makes a node that says it has another shape than it has."""

    name: ClassVar[str] = "replace-with-old-shape"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program, is_free=True)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        made = honest.put(program, site, torch.ops.aten.relu.default)
        made.meta["val"] = made.meta["val"].mT

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
