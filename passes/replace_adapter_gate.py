"""Replaces the gate of a cross-modal adapter by its mean on the task, so that what is left is linear and folds.

Before: `x + (silu(x G) * (x D)) U`; after: `x + (x D') U` with `D' = D diag(g)`; `fold-adapters` then takes it into the
Linear that makes `x`. `g` is the mean of the gate on the task's profile split, each value counted by what goes through
it: of all constants the one that leaves least of the hidden values.
Bound: none over all inputs, as the gate grows with `x`. The certificate is measured, on rows that `g` was not fitted
to: the root of the mean squared deviation over that of the adapted value, and the largest one. Above `tolerance` the
adapter is refused with it. It holds for data like the task's.

Cases:
1. A gate that hardly varies on the data goes.
2. One that does is refused with the deviation.
3. Without data nothing is replaced; text that folds exactly is left to the pass that does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site, StatRequest
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.cross_modal import MODALITIES, adapted_program, adapted_sum, component_of, gated_value
from vlmopt.graph.example import eyes_and_words, two_towers
from vlmopt.graph.frozen_gate import FrozenGate, freeze_gate, put_gate
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.token_table import token_embedding


@dataclass(frozen=True)
class ReplaceAdapterGate(Pass):
    """Replaces the gate of a cross-modal adapter by its mean on the task.

    Args:
        tolerance: largest deviation of the adapted value on the task's data, as a share of its size.
    """

    tolerance: float = 0.05

    name: ClassVar[str] = "replace-adapter-gate"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL, ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tolerance is {self.tolerance}; expected a share of the adapted value, below 1")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        for modality in MODALITIES:
            part = program.components.get(name := component_of(program, modality))
            value = None if part is None else gated_value(part.graph, modality)
            if value is not None:
                yield _request(name, value)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for modality in MODALITIES:
            name = component_of(program, modality)
            part = program.components.get(name)
            value = None if part is None else gated_value(part.graph, modality)
            if part is None or value is None:
                continue
            found = self._found(part.graph, modality, context.statistics.get(_request(name, value)))
            if isinstance(found, str):
                refusals.append(Refusal(f"{name}/{modality}", name, found))
                continue
            cut = replace(part, graph=clone_graph(part.graph))
            put_gate(cut.graph, modality, found.gate)
            saving = program_cost(program) - program_cost(program.with_components({**program.components, name: cut}))
            sites.append(Site(f"{name}/{modality}", name, (modality,), saving, found.certificate()))
        return Plan(tuple(sites), tuple(refusals))

    def _found(self, graph: fx.GraphModule, modality: str, rows: object) -> FrozenGate | str:
        """The gate's mean with its certificate, or why it stays."""
        total = adapted_sum(graph, modality)
        if total is not None and not isinstance(token_embedding(graph, total), str):
            return "`fold-cross-modal-adapter` folds it exactly, gate and all"
        if not isinstance(rows, Tensor) or len(rows) < 2:
            return "its gate was not measured, which takes a recipe with a task"
        found = freeze_gate(graph, modality, rows)
        if not found.deviation <= self.tolerance:
            return f"{found.certificate()}, which is above the tolerance of {100 * self.tolerance:g} %"
        return found

    def apply(self, program: Program, site: Site, context: Context) -> None:
        (modality,), graph = site.target, program.components[site.component].graph
        value = gated_value(graph, modality)
        if value is None:
            return
        rows = context.statistics[_request(site.component, value)]
        assert isinstance(rows, Tensor)
        put_gate(graph, modality, freeze_gate(graph, modality, rows).gate)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        loose: dict[str, object] = {"tolerance": 0.9}
        exact = "folds it exactly"
        adapted, measured = partial(adapted_program, eyes_and_words), _measured("vision_encoder")
        yield Case("measured", adapted, 1, (exact,), loose, measured)
        varies = ("which is above the tolerance of 0 %", exact)
        none: dict[str, object] = {"tolerance": 0.0}
        yield Case("varies", adapted, 0, varies, none, measured)
        yield Case("no data", partial(adapted_program, two_towers), 0, ("was not measured",) * 2)


def _request(component: str, value: fx.Node) -> StatRequest:
    return StatRequest(component, value.name, "rows")


def _measured(component: str) -> Context:
    """Rows of every value that may be asked for."""
    rows = torch.linspace(-1, 1, 64).reshape(8, 8)
    program = adapted_program(eyes_and_words)
    value = gated_value(program.components[component].graph, "visual")
    assert value is not None
    return Context(statistics={_request(component, value): rows})
