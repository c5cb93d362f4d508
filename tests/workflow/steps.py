"""A pass with one edit a site, to be wrong at any of them; and smallest programs for observers to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.program import Program
from vlmopt.core.workload import Feed
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.modules import output_node, output_values
from vlmopt.rewrite.pipeline import Observer, StepResult, run_step

Edit = Callable[[Program], None]


def times(factor: float) -> Edit:
    """An edit that multiplies the output."""

    def edit(program: Program) -> None:
        graph = program.components["model"].graph
        (value,) = output_values(graph)
        with graph.graph.inserting_before(output_node(graph)):
            made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, factor))
        made.meta = dict(value.meta)
        output_node(graph).args = ((made,),)

    return edit


def without_metadata(program: Program) -> None:
    times(1.0)(program)
    output_values(program.components["model"].graph)[0].meta.clear()


def with_an_operand_too_few(program: Program) -> None:
    times(1.0)(program)
    output_values(program.components["model"].graph)[0].args = ()


def fail(program: Program) -> None:
    raise ValueError("planted")


@dataclass(frozen=True)
class EditOutput(Pass):
    """Makes one edit for every site, in order."""

    edits: tuple[Edit, ...] = ()

    name: ClassVar[str] = "edit-output"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        sites = tuple(Site(f"model/{i}", "model", (f"{i}",)) for i in range(len(self.edits)))
        return Plan(sites, (Refusal("model/layers.0.ffn", "model", "it is needed"),))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        self.edits[int(site.target[0])](program)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return ()


class EditClosely(EditOutput):
    name: ClassVar[str] = "edit-closely"
    promise: ClassVar[Promise] = Promise.CLOSE


class EditLossily(EditOutput):
    name: ClassVar[str] = "edit-lossily"
    promise: ClassVar[Promise] = Promise.LOSSY


def blocks() -> Program:
    """Two residual blocks and a head: branches `layers.0.ffn` and `layers.1.ffn`."""
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def feeds(program: Program) -> dict[str, Feed]:
    return {"model": {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}}


def run_all(program: Program, passes: Sequence[Pass], *observers: Observer) -> list[StepResult]:
    """The passes one after another."""
    results: list[StepResult] = []
    for number, pass_ in enumerate(passes, 1):
        results.append(run_step(program, pass_, Context(), step=number, observers=observers))
        program = results[-1].program
    return results
