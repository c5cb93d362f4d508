"""Prunes hidden channels of FFNs: those that the others stand in for on the task.

Before: `y = x + W2 f(W1 x)`, or gated `x + W2 (f(W1 x) * W3 x)`, of C hidden channels; after: the same of fewer, rows
of W1 and W3 and columns of W2 gone, and what is left of W2 fitted so that its output on task data stays what it was
(formulas: `vlmopt/graph/reconstruction.py`).
Bound: none in general; on rows that the fit has not seen the error is never above that of the best plain cut. Channels
that W2 does not read cost nothing.

Cases:
1. Every FFN is a site; its hidden channels are found by structure, be it gated, fused or with a number a channel.
2. With `branches` given, those that match are sites and the others are refused.
3. An FFN whose hidden channels are mixed before the last Linear reads them is refused.
4. Without task data nothing is known of the channels, and they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.branches import BranchKind
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.width_cuts import Wanted, apply_cut, plan_cuts, statistics_wanted
from vlmopt.graph.widths import find_hidden


@dataclass(frozen=True)
class PruneFfn(Pass):
    """Prunes hidden channels of FFNs, the Linear behind them compensated.

    Args:
        keep: the share of hidden channels that stays, between 0 and 1.
        branches: names or patterns of FFNs, as COMPONENT/BRANCH; by default all.
        multiple: the number of channels that stays is a multiple of it.
        compensate: the Linear behind takes over what was cut, in closed form, where that helps on unseen rows.
    """

    keep: float = 0.75
    branches: tuple[str, ...] = ()
    multiple: int = 8
    compensate: bool = True

    name: ClassVar[str] = "prune-ffn"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def __post_init__(self) -> None:
        if not 0.0 < self.keep < 1.0:
            raise ValueError(f"keep is {self.keep}; expected a share between 0 and 1")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}; expected 1 or more")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        return statistics_wanted(program, self._wanted())

    def plan(self, program: Program, context: Context) -> Plan:
        return plan_cuts(program, self._wanted(), context, place=f"{self.name}: branches")

    def apply(self, program: Program, site: Site, context: Context) -> None:
        apply_cut(program, site, find_hidden, context, compensates=self.compensate)

    def _wanted(self) -> Wanted:
        return Wanted({BranchKind.FFN}, find_hidden, self.branches, self._n_kept, "hidden channels")

    def _n_kept(self, n_units: int) -> int | str:
        n_kept = max(1, round(self.keep * n_units / self.multiple)) * self.multiple
        is_fewer = n_kept < n_units
        return (
            n_kept if is_fewer else f"{self.keep:g} of its {n_units} channels, in multiples of {self.multiple}, is all"
        )

    @classmethod
    def cases(cls) -> Iterable[Case]:
        for name, build, n_sites, reasons, options in _CASES:
            yield Case(name, build, n_sites, reasons, {"keep": 0.5, "multiple": 4, **options}, _measured(build()))
        yield Case("unmeasured", _stack, 0, ("was not yet",) * 2, {"keep": 0.5})


def _measured(program: Program) -> Context:
    """As if rows of every FFN had been collected."""
    rows: dict[StatRequest, object] = {}
    for request in PruneFfn().wants(program):
        node = next(n for n in program.components["model"].graph.graph.nodes if n.name == request.node)
        generator = torch.Generator().manual_seed(0)
        rows[request] = torch.randn(60, node.meta["val"].shape[-1], generator=generator, dtype=torch.float32)
    return Context(statistics=rows)


class _Ffn(nn.Module):
    """One residual FFN with 12 hidden channels, and a head: [B, 3, 8] -> [B, 3, 2]."""

    def __init__(self, hidden: Callable[[_Ffn, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = hidden
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.gate, self.both = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 24)
            self.scale, self.norm = nn.Parameter(torch.rand(12) + 0.5), nn.LayerNorm(12)
            self.down, self.head = nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.hidden(self, x)))  # type: ignore[no-any-return]


def _stack() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def _of(hidden: Callable[[_Ffn, Tensor], Tensor]) -> Callable[[], Program]:
    return lambda: program_of(_Ffn(hidden), torch.linspace(-1, 1, 48).reshape(2, 3, 8))


def _fused(m: _Ffn, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=-1)
    hidden: Tensor = F.silu(gate) * up
    return hidden


_CASES: tuple[tuple[str, Callable[[], Program], int, tuple[str, ...], dict[str, object]], ...] = (
    ("stack", _stack, 2, (), {}),
    ("plain cut", _stack, 2, (), {"compensate": False}),
    ("named", _stack, 1, ("not named in `branches`",), {"branches": ("layers.0.ffn",)}),
    ("gated", _of(lambda m, x: F.silu(m.gate(x)) * m.up(x)), 1, (), {}),
    ("fused", _of(_fused), 1, (), {}),
    ("scaled", _of(lambda m, x: torch.relu(m.up(x)) * m.scale), 1, (), {}),
    ("normed", _of(lambda m, x: m.norm(torch.relu(m.up(x)))), 0, ("computes one unit from the others",), {}),
    ("all", _of(lambda m, x: torch.relu(m.up(x))), 0, ("is all",), {"keep": 0.9}),
)
