"""Collects on the task's data what a pass asks for before it plans."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.core.contract import Pass, StatRequest
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.replay import inputs_of
from vlmopt.workflow.run_state import RunState

ROWS = "rows"
_N_ITEMS, _N_ROWS = 256, 4096


def collected(state: RunState, program: Program, pass_: Pass) -> dict[StatRequest, object]:
    """The statistics that the pass wants, from at most 256 items of the profile split; none without a task.

    Raises:
        PassError: the pass asks for a statistic that is not known, or of a node that is not there.
    """
    requests = list(pass_.wants(program))
    if not requests or state.bound is None:
        return {}
    for request in requests:
        if request.statistic != ROWS:
            raise PassError(pass_.name, f"wants the statistic {request.statistic!r}", expected=ROWS)
    limit = min(_N_ITEMS, state.recipe.num_samples or _N_ITEMS)
    fit = state.bound.source.workload(program, "profile", limit=limit)
    whole = joined(program)
    found: dict[StatRequest, object] = {}
    for name, component in whole.program.components.items():
        names = {whole.nodes.get((r.component, r.node), r.node): r for r in requests if name in (r.component, MODEL)}
        if not names:
            continue
        watching = _Rows(component.graph, frozenset(names), -(-_N_ROWS // len(fit.feeds[name])), state.recipe.seed)
        feeds = fit.feeds[name]
        for feed in state.progress.track(feeds, f"measuring for {pass_.name}", total=len(feeds)):
            with torch.no_grad():
                watching.run(*inputs_of(component, feed))
        for node, request in names.items():
            if node not in watching.rows:
                raise PassError(
                    pass_.name, f"wants statistics of {request.component}/{request.node}, which is not there"
                )
            found[request] = torch.cat(watching.rows[node])
    return found


class _Rows(fx.Interpreter):
    """Runs a graph and keeps some rows of the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, names: frozenset[str], n_rows: int, seed: int) -> None:
        super().__init__(graph)
        self._names, self._n_rows = names, n_rows
        self._generator = torch.Generator().manual_seed(seed)
        self.rows: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n.name in self._names:
            assert isinstance(value, Tensor)
            flat = value.detach().reshape(-1, value.shape[-1])
            chosen = torch.randperm(len(flat), generator=self._generator)[: self._n_rows]
            self.rows.setdefault(n.name, []).append(flat[chosen.to(flat.device)].float().cpu())
        return value
