"""Puts an operation into the graph that ONNX does not have, though it computes the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceWithSign(Pass):
    """Puts an operation into the graph that ONNX does not have, though it computes the same."""

    name: ClassVar[str] = "replace-with-sign"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program, is_free=True)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        operand = honest.node_of(program, site).args[0]
        honest.put(program, site, torch.ops.aten.copysign.Tensor, operand)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
