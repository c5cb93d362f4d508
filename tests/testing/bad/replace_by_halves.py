"""Does half of its work at each of two sites: a program between them is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program


@dataclass(frozen=True)
class ReplaceByHalves(Pass):
    """Does half of its work at each of two sites: a program between them is wrong."""

    name: ClassVar[str] = "replace-by-halves"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        for name, node in honest.scalings(program):
            operand = node.args[0]
            if node.args[1] == 1.0 and (name, operand) in honest.scalings(program) and operand.args[1] == 1.0:
                first, second = (
                    Site(f"{name}/first", name, (operand.name, "2")),
                    Site(f"{name}/second", name, (node.name, "0.5")),
                )
                return Plan((first, second))
        return Plan(tuple(sites))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.put(program, site, torch.ops.aten.mul.Tensor, float(site.target[1]))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("twice by one", lambda: honest.scaled(1.0, 1.0), n_sites=2)
