"""Gives a module that it shares with the program before another weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class DropAndAlter(Pass):
    """Gives a module that it shares with the program before another weight."""

    name: ClassVar[str] = "drop-and-alter"
    promise: ClassVar[Promise] = Promise.LOSSY

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        for module in program.components[site.component].graph.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight * 1.5)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
