"""Folds chains of linear maps that lie beside a layer into the weight of that layer.

Before: `y = x W + b + s (x A) B`; after: `y = x W' + b`, and the chain is gone: the nodes are those of the model
without it. What counts is what the graph computes, not which adapter it was: low-rank chains of any length, several at
once, scaled by numbers or by learned values (per channel as well), with weights that several layers share, beside
Linears, convolutions and embeddings. The algebra is in `vlmopt/graph/linear_maps.py`, the rules in `parallel.py`.
Identity: the same linear map; products are taken in float64 and rounded once.

Cases:
1. A low-rank chain beside a Linear goes, its bias into the bias, at whatever scale.
2. Several chains go together, wherever the layer is called with them; one that is no linear map stays beside it.
3. A chain beside a convolution goes where it reads what the convolution reads; one beside an embedding is rows.
4. Weights that are normed by a constant go as a whole.
5. A chain with an activation, or whose mixture depends on the input, is refused.
6. A chain that only some tokens see is refused.
7. A chain beside a weight that something else reads, or that is quantized, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import program_of
from vlmopt.graph.parallel import find_parallel
from vlmopt.graph.parallel_folding import alike, apply_parallel, fold_savings, weight_readers, why_shared

_Forward = Callable[["_Adapted", Tensor], Tensor]


@dataclass(frozen=True)
class FoldAdapters(Pass):
    """Folds chains of linear maps beside a layer into the weight of that layer."""

    name: ClassVar[str] = "fold-adapters"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        readers = weight_readers(program)
        for name, component in program.components.items():
            found, kept = find_parallel(component.graph)
            refusals += [Refusal(f"{name}/{one.name}", name, one.reason) for one in kept]
            groups = [(own, why_shared(component.graph, name, own, readers)) for own in alike(found)]
            refusals += [Refusal(f"{name}/{own[0].path}", name, reason) for own, reason in groups if reason]
            folds = [own for own, reason in groups if not reason]
            for own, saving in zip(folds, fold_savings(program, name, folds, readers), strict=True):
                summary = f"chains beside it: {len(own[0].chains)}" + (f", {len(own)} calls" if own[1:] else "")
                sites.append(Site(f"{name}/{own[0].path}", name, (own[0].path,), saving, summary))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for own in alike([fold for fold in find_parallel(graph)[0] if fold.path in site.target]):
            if own[0].path in site.target:
                apply_parallel(graph, own)
                drop_dead_nodes(graph)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        for name, forward, n_sites, reasons in _CASES:
            yield Case(name, partial(_program, forward), n_sites, reasons)


def _program(forward: _Forward) -> Program:
    if forward is _embedding:
        return program_of(_Adapted(forward), torch.arange(6).reshape(2, 3))
    shape = (2, 3, 5, 5) if forward is _convolution else (2, 3, 4)
    return program_of(_Adapted(forward), torch.linspace(-1, 1, math.prod(shape)).reshape(shape))


class _Adapted(nn.Module):
    """A layer `base` 4 -> 6 of each kind, and low-rank maps to put beside it."""

    def __init__(self, function: _Forward) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.image = nn.Linear(4, 6), nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
            self.c, self.d, self.route = nn.Linear(4, 1), nn.Linear(1, 6), nn.Linear(2, 2)
            self.words, self.word_a = nn.Embedding(8, 6), nn.Embedding(8, 2)
            self.image_a = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
            self.image_b = nn.Conv2d(2, 6, 1, bias=False)
            self.grid = nn.Parameter(torch.arange(24, dtype=torch.int8).reshape(6, 4), requires_grad=False)
            self.scale, self.norm = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.function(self, x))


def _several(m: _Adapted, x: Tensor) -> Tensor:
    return m.base(x) + m.b(m.a(x)) * 2.0 + m.scale * m.d(m.c(x))  # type: ignore[no-any-return]


def _beside(function: _Forward) -> _Forward:
    return lambda m, x: m.base(x) + function(m, x)


def _convolution(m: _Adapted, x: Tensor) -> Tensor:
    return m.image(x) + 0.5 * m.image_b(m.image_a(x))  # type: ignore[no-any-return]


def _embedding(m: _Adapted, x: Tensor) -> Tensor:
    return m.words(x) + 0.5 * m.b(m.word_a(x))  # type: ignore[no-any-return]


def _normed(m: _Adapted, x: Tensor) -> Tensor:
    out = m.base(x)
    factor = m.norm / (m.base.weight + 2.0 * m.b.weight @ m.a.weight).norm(dim=1)
    return out + (factor - 1.0) * (out - m.base.bias) + factor * m.b(m.a(x)) * 2.0  # type: ignore[no-any-return]


def _quantized(m: _Adapted, x: Tensor) -> Tensor:
    return nn.functional.linear(x, m.grid.to(x.dtype) * 0.1) + m.b(m.a(x))  # type: ignore[no-any-return]


def _chosen(m: _Adapted, x: Tensor) -> Tensor:
    out = m.base(x)
    return torch.where(x[..., :1] > 0, out + m.b(m.a(x)), out)


_CASES: tuple[tuple[str, _Forward, int, tuple[str, ...]], ...] = (
    ("one chain", _beside(lambda m, x: 2.0 * m.b(m.a(x))), 1, ()),
    ("several chains", _several, 1, ()),
    ("two calls", lambda m, x: _several(m, x) * _several(m, torch.tanh(x)), 1, ()),
    ("one of two", lambda m, x: _several(m, x) + m.b(torch.relu(m.a(x))), 1, ("a relu is part of it",)),
    ("convolution", _convolution, 1, ()),
    ("embedding", _embedding, 1, ()),
    ("normed weight", _normed, 1, ()),
    ("routed", _beside(lambda m, x: m.b(m.a(x) * m.route(m.a(x)).softmax(-1))), 0, ("multiplied by softmax",)),
    ("some tokens", _beside(lambda m, x: m.b(m.a(x)) * (x[..., :1] > 0)), 0, ("multiplied by gt",)),
    ("chosen", _chosen, 0, ("only some tokens see it",)),
    ("shared", lambda m, x: _several(m, x) + m.base(torch.tanh(x)), 0, ("which would have to stay",)),
    ("quantized", _quantized, 0, ("is quantized",)),
)
