"""Puts trainable low-rank adapters beside Linears of branches: LoRA, rsLoRA, Lily and RaSA.

Before: `y = x W + b`; after: `y = x W + b + s u(x)`, where `u` is one of the maps of `vlmopt/graph/low_rank.py`.
Bound: the second factor of every map begins at zero, so the function stays what it is, to the bit, until the adapters
are trained. A class has one promise, and training changes the function, so it is the weakest one. `fold-adapters` takes
trained adapters into the weights, all but Lily's with `mixture: routed`.

Cases:
1. Every Linear of a branch gets an adapter; with `modules` or `kinds` given, those that match.
2. With the kinds `lily` and `rasa` the Linears of one shape that differ by their number share weights.
3. A Linear that has such an adapter, or that is called twice, is refused.
4. A Linear outside of branches is refused unless `modules` names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import AttentionBlocks, program_of
from vlmopt.graph.low_rank import LowRankForm, Target, branch_kinds, find_targets, insert_low_rank, is_adapted
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.patterns import check_patterns, is_match


@dataclass(frozen=True)
class InsertLowRankAdapter(Pass):
    """Puts trainable low-rank adapters beside Linears.

    Args:
        rank: hidden width of an adapter.
        alpha: the adapter counts `alpha / rank` times with `lora` and `rasa`, `alpha / sqrt(rank)` times with `rslora`,
            and `alpha` times with `lily`.
        kind: `lora`, `rslora`, `lily` (shared first maps and experts), or `rasa` (a pool of shared ranks).
        modules: names or patterns of Linears, as COMPONENT/PATH; by default all in branches.
        kinds: only in branches of these kinds (attention, cross_attention, ffn, other); by default in all.
        stride: with `lily`, layers that share their first map.
        experts: with `lily`, second maps that all layers share.
        mixture: with `lily`, weights that each layer learns (`static`), or that look at the data (`routed`).
        shared_rank: with `rasa`, ranks that each layer gives to the pool.
    """

    rank: int = 8
    alpha: float = 16.0
    kind: Literal["lora", "rslora", "lily", "rasa"] = "lora"
    modules: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    stride: int = 1
    experts: int = 2
    mixture: Literal["static", "routed"] = "static"
    shared_rank: int = 1

    name: ClassVar[str] = "insert-low-rank-adapter"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        self._form()  # what no adapter can be made of is refused
        if odd := set(self.kinds) - {"attention", "cross_attention", "ffn", "other"}:
            raise ValueError(f"kinds holds {min(odd)!r}; expected attention, cross_attention, ffn or other")

    def _form(self) -> LowRankForm:
        shared = {"stride": self.stride, "n_experts": self.experts, "shared_rank": self.shared_rank}
        return LowRankForm.named(self.kind, self.rank, self.alpha, is_routed=self.mixture == "routed", **shared)

    def _wanted(self, component: Component) -> dict[str, str]:
        """For every Linear why it gets no adapter; empty where it does."""
        inside, reasons = branch_kinds(component.graph), dict[str, str]()
        for target in find_targets(component.graph, lambda path: True):
            is_named = is_match(f"{component.name}/{target.path}", self.modules)
            kind = inside.get(target.path, "")
            reason = "" if kind or is_named else "lies in no branch, and `modules` does not name it"
            reason = "not named in `modules`" if self.modules and not is_named else reason
            reason = reason or ("" if not self.kinds or kind in self.kinds else "its branch is of no kind in `kinds`")
            reasons[target.path] = "is called twice" if target.path in reasons else reason
        return reasons

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for name, component in program.components.items():
            reasons = self._wanted(component)
            names += [f"{name}/{path}" for path in reasons]
            refusals += [Refusal(f"{name}/{path}", name, reason) for path, reason in reasons.items() if reason]
            trial, seen = replace(component, graph=clone_graph(component.graph)), set[int]()
            wanted = {path for path, reason in reasons.items() if not reason}
            for target in find_targets(trial.graph, wanted.__contains__):
                key, before = f"{name}/{target.path}", set(trial.graph.graph.nodes)
                if is_adapted(trial.graph, target):
                    refusals.append(Refusal(key, name, "has a low-rank adapter already"))
                    continue
                insert_low_rank(trial.graph, target, self._form(), seed=context.seed)
                made = [node for node in trial.graph.graph.nodes if node not in before]
                cost = Cost() - nodes_cost(trial, made, program.dims, seen=seen)
                sites.append(Site(key, name, target.names, cost, f"{self.kind} of rank {self.rank}"))
        check_patterns(f"{self.name}: modules", self.modules, names)
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        target = Target.named(graph, site.target)
        if target is not None and not is_adapted(graph, target):
            insert_low_rank(graph, target, self._form(), seed=context.seed)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample, head, rest = torch.ones(2, 3, 8), ("lies in no branch",), ("not named in `modules`",) * 11
        for kind in ("lora", "rslora", "lily", "rasa"):
            options: dict[str, object] = {"kind": kind, "rank": 2, "stride": 2}
            yield Case(kind, lambda: program_of(AttentionBlocks(), sample), 12, head, options)
        ffn: dict[str, object] = {"kinds": ("ffn",), "rank": 2}
        others = (*head, *("its branch is of no kind",) * 8)
        yield Case("kinds", lambda: program_of(AttentionBlocks(), sample), 4, others, ffn)
        routed: dict[str, object] = {"kind": "lily", "mixture": "routed", "rank": 2, "modules": ("*.query", "head")}
        yield Case("routed", lambda: program_of(AttentionBlocks(), sample), 3, rest[:10], routed)
        yield Case("twice", lambda: program_of(_Twice(), torch.ones(2, 8)), 0, ("is called twice",), {"rank": 2})


class _Twice(nn.Module):
    """One layer in two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.layer(x))
        return x + torch.sin(self.layer(x))
