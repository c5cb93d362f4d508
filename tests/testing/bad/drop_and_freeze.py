"""Keeps the first two rows, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.build import insert_call
from vlmopt.graph.modules import output_node, output_values, set_at


@dataclass(frozen=True)
class DropAndFreeze(Pass):
    """Keeps the first two rows, whatever the batch."""

    name: ClassVar[str] = "drop-and-freeze"
    promise: ClassVar[Promise] = Promise.LOSSY
    changes_signature: ClassVar[bool] = True

    def plan(self, program: Program, context: Context) -> Plan:
        found = honest.plan(program)
        grown = Cost(activation_bytes=sum(self._row_bytes(program, site) * 2 for site in found.sites[:1]))
        return replace(found, sites=tuple(replace(site, saving=site.saving - grown) for site in found.sites[:1]))

    def _row_bytes(self, program: Program, site: Site) -> int:
        row = output_values(program.components[site.component].graph)[0].meta["val"][0]
        return int(row.numel()) * row.element_size()

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        part = program.components[site.component]
        set_at(part.graph, "first_rows", torch.tensor([0, 1]))
        value, *others = output_values(part.graph)
        with part.graph.graph.inserting_before(output_node(part.graph)):
            rows = part.graph.graph.get_attr("first_rows")
            rows.meta["val"] = value.meta["val"].new_empty(2, dtype=torch.int64)
            made = insert_call(part.graph, torch.ops.aten.index_select.default, (value, 0, rows))
        output_node(part.graph).args = ((made, *others),)
        first, *more = part.outputs
        frozen = replace(first, shape=(2, *first.shape[1:]))
        program.components[site.component] = replace(part, outputs=(frozen, *more))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
