"""Drops every relu: right after an exponential, as in its case, and wrong everywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import program_of


@dataclass(frozen=True)
class DropActivation(Pass):
    """Drops every relu: right after an exponential, as in its case, and wrong everywhere else."""

    name: ClassVar[str] = "drop-activation"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan(
            tuple(
                Site(f"{name}/{node.name}", name, (node.name,), nodes_cost(part, [node], program.dims))
                for name, part in program.components.items()
                for node in part.graph.graph.nodes
                if node.target is torch.ops.aten.relu.default
            )
        )

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("after an exponential", lambda: program_of(_Exponential(), torch.ones(2, 4)), n_sites=1)


class _Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.exp(x)) + 1.0
