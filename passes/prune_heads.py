"""Prunes heads of attentions: those that the others stand in for on the task.

Before: `y = x + Wo [head_1 ... head_H]`; after: the same of fewer heads, rows of the projections to queries, keys and
values and columns of Wo gone, constants in views rewritten, and what is left of Wo fitted so that its output on task
data stays what it was (formulas: `vlmopt/graph/reconstruction.py`). Queries that share one of several keys go together
with it.
Bound: none in general; on rows that the fit has not seen the error is never above that of the best plain cut. Heads
that Wo does not read cost nothing.

In a decoder the entries of the cache are as narrow as the layer's keys, so `past_key_values_N_*` and `present_N_*` are.

Cases:
1. Every attention with two or more heads is a site: one call or spelled out, from three projections or a fused one,
   with grouped queries or without; where one key serves all queries, it stays.
2. With `branches` given, those that match are sites and the others are refused.
3. An attention without an axis of heads, with one head, or whose weights go elsewhere is refused.
4. Without task data nothing is known of the heads, and they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.branches import BranchKind
from vlmopt.graph.example import AttentionBlocks, GroupedHeads, program_of
from vlmopt.graph.width_cuts import Wanted, apply_cut, plan_cuts, statistics_wanted
from vlmopt.graph.widths import find_head_groups


@dataclass(frozen=True)
class PruneHeads(Pass):
    """Prunes heads of attentions, with grouped queries whole groups, the projection behind them compensated.

    Args:
        keep: the share of heads, or of groups that share a key, that stays, between 0 and 1; one stays at least.
        branches: names or patterns of attentions, as COMPONENT/BRANCH; by default all.
        compensate: the projection behind takes over what was cut, in closed form, where that helps on unseen rows.
    """

    keep: float = 0.75
    branches: tuple[str, ...] = ()
    compensate: bool = True

    name: ClassVar[str] = "prune-heads"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    changes_signature: ClassVar[bool] = True  # entries of the cache are as narrow as the layer's keys

    def __post_init__(self) -> None:
        if not 0.0 < self.keep < 1.0:
            raise ValueError(f"keep is {self.keep}; expected a share between 0 and 1")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        return statistics_wanted(program, self._wanted())

    def plan(self, program: Program, context: Context) -> Plan:
        return plan_cuts(program, self._wanted(), context, place=f"{self.name}: branches")

    def apply(self, program: Program, site: Site, context: Context) -> None:
        apply_cut(program, site, find_head_groups, context, compensates=self.compensate)

    def _wanted(self) -> Wanted:
        kinds = {BranchKind.ATTENTION, BranchKind.CROSS_ATTENTION}
        return Wanted(kinds, find_head_groups, self.branches, self._n_kept, "heads or groups of heads")

    def _n_kept(self, n_units: int) -> int | str:
        n_kept = max(1, round(self.keep * n_units))
        return n_kept if n_kept < n_units else f"{self.keep:g} of its {n_units} heads or groups of heads is all"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        for name, build, n_sites, reasons, options in _CASES:
            yield Case(name, build, n_sites, reasons, {"keep": 0.5, **options}, _measured(build()))
        yield Case("unmeasured", _of(), 0, ("was not yet",) * 2, {"keep": 0.5})


def _measured(program: Program) -> Context:
    """As if rows of every attention had been collected."""
    rows: dict[StatRequest, object] = {}
    for request in PruneHeads().wants(program):
        node = next(n for n in program.components["model"].graph.graph.nodes if n.name == request.node)
        generator = torch.Generator().manual_seed(0)
        rows[request] = torch.randn(60, node.meta["val"].shape[-1], generator=generator, dtype=torch.float32)
    return Context(statistics=rows)


def _of(*, heads: int = 4, key_heads: int = 2, is_fused: bool = True) -> Callable[[], Program]:
    return lambda: program_of(GroupedHeads(heads=heads, key_heads=key_heads, is_fused=is_fused), torch.ones(2, 3, 8))


class _Fused(nn.Module):
    """Two heads of one projection, whose weights are returned perhaps: [B, 3, 8] -> [B, 3, 8]."""

    def __init__(self, *, shows_weights: bool) -> None:
        super().__init__()
        self.shows_weights = shows_weights
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.all, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = self.all(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        y: Tensor = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return (y, weights) if self.shows_weights else y


def _fused(*, shows_weights: bool) -> Callable[[], Program]:
    return lambda: program_of(_Fused(shows_weights=shows_weights), torch.ones(2, 3, 8))


_CASES: tuple[tuple[str, Callable[[], Program], int, tuple[str, ...], dict[str, object]], ...] = (
    ("grouped", _of(), 2, (), {}),
    ("every head its keys", _of(key_heads=4), 2, (), {"keep": 0.75}),
    ("spelled out", _of(is_fused=False), 2, (), {}),
    ("plain cut", _of(key_heads=4, is_fused=False), 2, (), {"compensate": False}),
    ("named", _of(), 1, ("not named in `branches`",), {"branches": ("*layers.1.*",)}),
    ("one key", _of(key_heads=1), 2, (), {}),
    ("one head", _of(heads=1, key_heads=1), 0, ("it has one head",) * 2, {}),
    ("no heads", lambda: program_of(AttentionBlocks(), torch.ones(2, 3, 8)), 0, ("no axis of their own",) * 2, {}),
    ("fused", _fused(shows_weights=False), 1, (), {}),
    ("shown", _fused(shows_weights=True), 0, ("are not recognised",), {}),
)
