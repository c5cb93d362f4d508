"""Returns its input as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from tests.testing import honest
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program
from vlmopt.graph.modules import output_node, output_values, placeholders


@dataclass(frozen=True)
class DropAndReturn(Pass):
    """Returns its input as well."""

    name: ClassVar[str] = "drop-and-return"
    promise: ClassVar[Promise] = Promise.EXACT
    changes_signature: ClassVar[bool] = True

    def plan(self, program: Program, context: Context) -> Plan:
        return honest.plan(program)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        honest.apply(program, site)
        part = program.components[site.component]
        values = output_values(part.graph)
        output_node(part.graph).args = ((*values, placeholders(part.graph)[0]),)
        again = replace(part.inputs[0], name="again")
        program.components[site.component] = replace(part, outputs=(*part.outputs, again))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()
