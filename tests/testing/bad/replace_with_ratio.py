"""Divides by numbers that may be zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceWithRatio(Pass):
    """Divides by numbers that may be zero."""

    name: ClassVar[str] = "replace-with-ratio"
    promise: ClassVar[Promise] = Promise.LOSSY

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program, is_free=True)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        operand = honest.node_of(program, site).args[0]
        honest.put(program, site, torch.ops.aten.div.Tensor, operand)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
