"""Puts a small trainable map beside branches that are kept, so that a frozen model can be tuned to a task.

Before: `y = x + f(x)`; after: `y = x + f(x) + A(x)`, the adaptation adapter of Dynamic Architecture Skipping (arXiv
2309.01479). In a post-norm block the adapter joins the sum in front of the norm; the released code adds the adapter of
a post-norm FFN behind the norm instead, with as many parameters.
Bound: with `init: zero` the function stays what it is, to the bit, until the adapters are trained; with `init: paper`
it changes at once. A class has one promise, so it is the weaker one.

Cases:
1. Every branch gets an adapter beside it.
2. With `branches` given, those that match are sites and the others are refused.
3. A post-norm branch gets its adapter in front of the norm.
4. A stream that is no matrix of vectors [.., D] is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.adapter_places import AdapterPlace, branch_place
from vlmopt.graph.adapters import AdapterForm, adapter_cost, find_adapters, insert_adapter, is_adapter, site_name
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.example import AttentionBlocks, ResidualBlocks, program_of
from vlmopt.graph.patterns import check_patterns, is_match


@dataclass(frozen=True)
class InsertAdaptationAdapter(Pass):
    """Puts a small trainable map beside branches that are kept.

    Args:
        rank: hidden width of an adapter (96 is the paper's).
        kind: `bottleneck` (norm, two projections, ReLU), `linear` (two projections), or `routed` (two linear maps,
            weighed by the first token).
        init: `zero` changes nothing before training; `paper` draws both projections.
        with_norm: a bottleneck begins with a norm of its own.
        with_bias: a linear adapter has biases.
        branches: names or patterns as `vlmopt inspect` prints them; by default all.
    """

    rank: int = 96
    kind: Literal["bottleneck", "linear", "routed"] = "bottleneck"
    init: Literal["zero", "paper"] = "zero"
    with_norm: bool = True
    with_bias: bool = True
    branches: tuple[str, ...] = ()

    name: ClassVar[str] = "insert-adaptation-adapter"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        self._form()  # a rank below 1 is refused

    def _form(self) -> AdapterForm:
        has_norm, has_bias = self.with_norm, self.with_bias
        return AdapterForm.named(self.kind, self.rank, init=self.init, has_norm=has_norm, has_bias=has_bias)

    def _place(self, branch: Branch) -> AdapterPlace | str:
        place = branch_place(branch)
        return place if isinstance(place, str) else self._form().unfit(place.value) or place

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for component_name, component in program.components.items():
            present = {adapter.site for adapter in find_adapters(component.graph)}
            for branch in _kept_branches(program, component_name):
                name, place = f"{component_name}/{branch.name}", self._place(branch)
                names.append(name)
                if self.branches and not is_match(name, self.branches):
                    refusals.append(Refusal(name, component_name, "not named in `branches`"))
                    continue
                if _site(branch) in present:
                    refusals.append(Refusal(name, component_name, "has an adapter beside it already"))
                    continue
                if isinstance(place, str):
                    refusals.append(Refusal(name, component_name, place))
                    continue
                cost = Cost() - adapter_cost(component, branch.stream, self._form(), program.dims)
                summary = f"{self.kind} of rank {self.rank} beside the {branch.kind.value} of {branch.layer_name}"
                sites.append(Site(name, component_name, (branch.name,), cost, summary))
        check_patterns(f"{self.name}: branches", self.branches, names)
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for branch in _kept_branches(program, site.component):
            if branch.name in site.target and not isinstance(place := self._place(branch), str):
                insert_adapter(graph, place, self._form(), site=_site(branch), seed=context.seed)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.ones(2, 3, 8)
        small: dict[str, object] = {"rank": 2}
        yield Case("every branch", lambda: program_of(AttentionBlocks(), sample), 4, options=small)
        named: dict[str, object] = {"branches": ("*.0.ffn",), "rank": 2, "kind": "linear", "init": "paper"}
        yield Case("named", lambda: program_of(AttentionBlocks(), sample), 1, ("not named in `branches`",), named)
        routed: dict[str, object] = {"branches": ("*.1.ffn",), "rank": 2, "kind": "routed"}
        yield Case("routed", lambda: program_of(AttentionBlocks(), sample), 1, ("not named in `branches`",), routed)
        yield Case("post-norm", lambda: program_of(_PostNorm(), sample), 2, options=small)
        yield Case("grid", lambda: program_of(ResidualBlocks(), torch.ones(2, 2, 2, 8)), 0, ("4 axes",), small)


def _kept_branches(program: Program, component: str) -> list[Branch]:
    """The branches of the model itself; adapters are branches as well."""
    branches = find_branches(program.components[component].graph)
    return [branch for branch in branches if not is_adapter(branch)]


def _site(branch: Branch) -> str:
    return site_name(f"{branch.name}.beside")


class _PostNorm(nn.Module):
    """Blocks `x = norm(x + f(x))` on a normed stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + torch.tanh(layer(x)))
        return x
