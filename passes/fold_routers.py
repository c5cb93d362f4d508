"""Replaces mixtures that look at the data (Lily's routers) by their means on the task, so that the maps can be folded.

Before: `y = x W + s (x A) (sum_e S_e(x) B_e)`, `S` a softmax averaged over batch and tokens;
after: the same with the mean of `S` over task data, one sample at a time. `fold-adapters` then makes one weight of it.
Bound: the weight that the layer and its maps amount to moves by the certificate of `vlmopt/graph/mixtures.py`: the root
mean square over task data must be within `tolerance`, and the most that any input can make it is told.

Cases:
1. A mixture of linear maps beside a layer becomes its mean.
2. Without task data nothing is known of the mixture, and it stays.
3. A mixture that moves the weight more than the tolerance stays, with the figures.
4. A mixture of anything else than linear maps beside a layer stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site, StatRequest
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import program_of
from vlmopt.graph.mixtures import Exchange, exchange_savings, exchanges, find_mixtures, replace_mixture

_STATISTICS = ("mean", "second_moment")
_UNKNOWN = "its mixture on the task is not measured"


@dataclass(frozen=True)
class FoldRouters(Pass):
    """Replaces mixtures that look at the data (Lily's routers) by their means on the task.

    Args:
        tolerance: the largest root mean square, over task data, by which the weight of a layer may move (relative).
    """

    tolerance: float = 0.01

    name: ClassVar[str] = "fold-routers"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL, ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance}; expected 0 or more")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        for name, component in program.components.items():
            for mixture in find_mixtures(component.graph):
                yield from (StatRequest(name, mixture.node.name, statistic) for statistic in _STATISTICS)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            moments = _moments(component, context)
            certificates = exchanges(component.graph, moments)
            fit: dict[str, Exchange] = {}
            for mixture in find_mixtures(component.graph):
                key, found = f"{name}/{mixture.node.name}", certificates.get(mixture.node.name, _UNKNOWN)
                if isinstance(found, str):
                    refusals.append(Refusal(key, name, found))
                elif found.rms > self.tolerance:
                    told = f"the task moves the weight of {found.layer} by {found.rms:.2%} (root mean square)"
                    refusals.append(Refusal(key, name, f"{told}, more than the tolerance of {self.tolerance:.2%}"))
                else:
                    fit[mixture.node.name] = found
            for node, saving in exchange_savings(
                component, program.dims, {node: moments[node][0] for node in fit}
            ).items():
                sites.append(Site(f"{name}/{node}", name, (node,), saving, _summary(fit[node], *moments[node])))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        moments = _moments(component, context)
        for mixture in find_mixtures(component.graph):
            if mixture.node.name in site.target and mixture.node.name in moments:
                replace_mixture(component.graph, mixture, moments[mixture.node.name][0])
                drop_dead_nodes(component.graph)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        calm, moved = _context((0.3, 0.7), spread=1e-4), _context((0.3, 0.7), spread=0.1)
        beside = partial(_program, nn.Identity())
        yield Case("calm", beside, 1, (), {}, calm)
        yield Case("unmeasured", beside, 0, ("is not measured",))
        yield Case("moved", beside, 0, ("more than the tolerance of 1.00%",), {}, moved)
        yield Case("tolerated", beside, 1, (), {"tolerance": 1.0}, moved)
        yield Case("bent", partial(_program, torch.tanh), 0, ("no linear maps",), {}, calm)


def _moments(component: Component, context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean [E] and second moment [E, E] of every mixture that was measured."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for mixture in find_mixtures(component.graph):
        requests = (StatRequest(component.name, mixture.node.name, statistic) for statistic in _STATISTICS)
        mean, second = (context.statistics.get(request) for request in requests)
        if isinstance(mean, Tensor) and isinstance(second, Tensor):
            found[mixture.node.name] = (mean, second)
    return found


def _summary(exchange: Exchange, mean: Tensor, second: Tensor) -> str:
    spread = (second.diagonal() - mean.square()).clamp_min(0).sqrt()
    shares = " ".join(f"{m:.2f}±{s:.2f}" for m, s in zip(mean.tolist(), spread.tolist(), strict=True))
    moves = f"{exchange.rms:.2%} on the task, at most {exchange.largest:.2%} on any input"
    return f"experts {shares}; the weight of {exchange.layer} moves by {moves}"


class _Routed(nn.Module):
    """A layer 4 -> 6 with two experts of rank 2 beside it."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bend = bend
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.down = nn.Linear(4, 6), nn.Linear(4, 2, bias=False)
            self.route, self.experts = nn.Linear(2, 2, bias=False), nn.Parameter(torch.randn(2, 12) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        shares = self.route(hidden).softmax(-1).mean((0, 1))
        weight = (shares.unsqueeze(0) @ self.experts).view(6, 2)
        return torch.relu(self.base(x) + self.bend(nn.functional.linear(hidden, weight)))


def _program(bend: Callable[[Tensor], Tensor]) -> Program:
    return program_of(_Routed(bend), torch.linspace(-1, 1, 24).reshape(2, 3, 4))


def _context(mean: tuple[float, float], *, spread: float) -> Context:
    """As if the mixture of `_Routed` had been measured."""
    shares, away = torch.tensor(mean, dtype=torch.float64), torch.tensor([spread, -spread], dtype=torch.float64)
    second = torch.outer(shares, shares) + torch.outer(away, away)
    return Context(
        statistics={StatRequest("model", "mean", "mean"): shares, StatRequest("model", "mean", "second_moment"): second}
    )
