"""Folds trained adapters that are linear maps into the weights behind them.

Before: `z = n + n C B; y = z W + b`; after: `y = n ((I + C B) W) + b`, and the adapter is gone. Two Linears in a row
that nothing else reads become one where that is not larger. What is linear is decided by the graph, not by how an
adapter was made; `vlmopt/graph/folding.py` has the algebra, and what differs from the code of arXiv 2403.15226.
Identity: the same linear map; products are taken in float64 and rounded once.

Cases:
1. An adapter in front of linear maps is taken over by all of them, its bias included.
2. A linear adapter on the stream whose two maps are no smaller than one becomes one.
3. An adapter with an activation or a norm is refused.
4. An adapter on the stream is refused, since the residual goes by the norm.
5. An adapter in front of a norm, or read by anything that is no Linear, is refused.
6. An adapter of whose readers one shares its weight is refused, since that weight would have to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.adapters import find_adapters
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import program_of
from vlmopt.graph.folding import apply_fold, find_fold, fold_saving, why_shared


@dataclass(frozen=True)
class FoldSkipAdapter(Pass):
    """Folds adapters that are linear maps into the weights behind them."""

    name: ClassVar[str] = "fold-skip-adapter"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL, ADAPTERS_INSERTED})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            for adapter in find_adapters(component.graph):
                key, found = f"{name}/{adapter.site}", find_fold(component.graph, adapter)
                reason = found if isinstance(found, str) else why_shared(program, name, found)
                if isinstance(found, str) or reason:
                    refusals.append(Refusal(key, name, reason))
                    continue
                saving = fold_saving(component, found, program.dims)
                summary = f"into {', '.join(str(reader.target) for reader in found.readers)}"
                sites.append(Site(key, name, (adapter.site,), saving, summary))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for adapter in find_adapters(graph):
            if adapter.site in site.target and not isinstance(fold := find_fold(graph, adapter), str):
                apply_fold(graph, fold)
                drop_dead_nodes(graph)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
        for name, forward, n_sites, reasons in _CASES:
            yield Case(name, lambda forward=forward: program_of(_Adapted(forward), sample), n_sites, reasons)  # type: ignore[misc]


class _Adapted(nn.Module):
    """Adapters `thin` (rank 1) and `wide` (rank 3), a norm, and Linears to read them. Width 4."""

    def __init__(self, function: Callable[[_Adapted, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.adapters = nn.ModuleDict({"thin": _pair(1), "wide": _pair(3)})
            self.norm, self.first, self.last = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def change(self, name: str, x: Tensor) -> Tensor:
        pair = self.adapters[name]
        return pair["up"](pair["down"](x))  # type: ignore[index, no-any-return]


def _pair(rank: int) -> nn.ModuleDict:
    return nn.ModuleDict({"down": nn.Linear(4, rank), "up": nn.Linear(rank, 4)})


def _in_front(m: _Adapted, x: Tensor) -> Tensor:
    n = m.norm(x)
    z = n + m.change("thin", n)
    return torch.tanh(m.first(z)) * m.last(z)  # type: ignore[no-any-return]


def _activation(m: _Adapted, x: Tensor) -> Tensor:
    pair = m.adapters["thin"]
    return m.first(x + pair["up"](torch.relu(pair["down"](x))))  # type: ignore[index, no-any-return]


def _stream(name: str) -> Callable[[_Adapted, Tensor], Tensor]:
    def forward(m: _Adapted, x: Tensor) -> Tensor:
        x = x + m.change(name, x)
        return x + torch.tanh(m.first(m.norm(x)))[..., :4]

    return forward


def _norm(m: _Adapted, x: Tensor) -> Tensor:
    return m.first(m.norm(x + m.change("thin", x)))  # type: ignore[no-any-return]


def _other_reader(m: _Adapted, x: Tensor) -> Tensor:
    z = x + m.change("thin", x)
    return torch.tanh(m.first(z)) + torch.sin(z).sum()


def _shared(m: _Adapted, x: Tensor) -> Tensor:
    return m.first(torch.tanh(x)) + m.first(x + m.change("thin", x))  # type: ignore[no-any-return]


_CASES: tuple[tuple[str, Callable[[_Adapted, Tensor], Tensor], int, tuple[str, ...]], ...] = (
    ("in front of linear maps", _in_front, 1, ()),
    ("two maps in one", _stream("wide"), 1, ()),
    ("activation", _activation, 0, ("a relu is part of it",)),
    ("stream", _stream("thin"), 0, ("lies on the stream",)),
    ("norm", _norm, 0, ("crosses a norm",)),
    ("other reader", _other_reader, 0, ("is no Linear",)),
    ("shared weight", _shared, 0, ("would have to stay",)),
)
