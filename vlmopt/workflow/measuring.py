"""What the gates of traversals let through on the task, and how the layers of adapters mix their experts there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlmopt.core.contract import Pass, StatRequest
from vlmopt.core.facts import TRAVERSAL_INSERTED
from vlmopt.core.program import Program
from vlmopt.graph.mixtures import layer_mixtures
from vlmopt.graph.traversal import find_traversals
from vlmopt.profiling.node_statistics import SAMPLE, node_statistics
from vlmopt.workflow.run_state import RunState


@dataclass(frozen=True)
class TraversalGate:
    """The gate of one pass through a layer on the tokens of the profile split: mean and standard deviation of w."""

    component: str
    layer: str
    number: int  # of the pass after the first
    mean: float
    spread: float


@dataclass(frozen=True)
class ExpertMixture:
    """The shares of experts beside a layer: their mean over samples of the profile split and standard deviation [E], or
    what the layer learned, without a deviation."""

    component: str
    layer: str
    is_routed: bool
    shares: tuple[float, ...]
    spread: tuple[float, ...]


def note_mixtures(state: RunState, program: Program) -> None:
    """Keeps the mixtures of the program's layers for the report, once: what follows folds them.

    Those that look at the data are measured, so without a task there are none of them."""
    found = [(name, one) for name, part in program.components.items() for one in layer_mixtures(part.graph)]
    if state.mixtures or not found:
        return
    nodes = [(name, one.node) for name, one in found if one.node is not None]
    requests = [StatRequest(*place, what) for place in nodes for what in ("mean", "second_moment")]
    known: dict[StatRequest, Tensor] = {}
    if requests and state.bound is not None:
        fit = state.bound.source.workload(program, "profile", limit=min(SAMPLE, state.recipe.num_samples or SAMPLE))
        known = node_statistics(program, requests, fit, state.progress)
    for name, one in found:
        shares, spread = one.shares, (0.0,) * len(one.shares)
        if one.node is not None:
            mean, square = (known.get(StatRequest(name, one.node, what)) for what in ("mean", "second_moment"))
            if mean is None or square is None:
                continue
            shares = tuple(mean.tolist())
            spread = tuple((square.diagonal() - mean**2).clamp_min(0.0).sqrt().tolist())
        state.mixtures.append(ExpertMixture(name, one.layer, one.node is not None, shares, spread))
        state.ledger.note("mixture", f"{name}/{one.layer}", shares=list(shares), spread=list(spread))


def note_gates(state: RunState, program: Program, pass_: Pass | None = None) -> None:
    """Measures the gates of the program's traversals and keeps them for the report: before a pass that may drop some,
    and at the end. Without a task nothing is measured."""
    if state.bound is None or (pass_ is not None and TRAVERSAL_INSERTED not in pass_.requires):
        return
    places = [
        (name, one.site, number, gate.name)
        for name, component in program.components.items()
        for one in find_traversals(component.graph)
        for number, gate in enumerate(one.gates, 1)
    ]
    requests = [StatRequest(name, node, what) for name, _, _, node in places for what in ("mean", "second_moment")]
    if not places:
        return
    fit = state.bound.source.workload(program, "profile", limit=min(SAMPLE, state.recipe.num_samples or SAMPLE))
    found = node_statistics(program, requests, fit, state.progress)
    for name, layer, number, node in places:
        mean, square = (float(found[StatRequest(name, node, what)]) for what in ("mean", "second_moment"))
        spread = math.sqrt(max(square - mean**2, 0.0))
        state.traversal_gates[name, layer, number] = gate = TraversalGate(name, layer, number, mean, spread)
        state.ledger.note("traversal", f"{name}/{layer}", number=number, mean=gate.mean, spread=gate.spread)
