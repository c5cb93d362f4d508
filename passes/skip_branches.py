"""Takes residual branches out of the stream.

Before: `y = x + f(x)`; after: `y = x`, and everything that only `f` needed is gone: of an attention in a decoder the
entry in the cache too.
Bound: none in general; the branches are chosen by their importance on the task and the result is judged on the task.

Cases:
1. Every branch of a pre-norm stack is a site.
2. With `branches` given, those that match are sites and the others are refused.
3. A branch whose inside is returned by the component is refused.
4. What an attention keeps for the next step goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, STREAM_CUT, Fact
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.regions import is_read_behind
from vlmopt.graph.skipping import skip


@dataclass(frozen=True)
class SkipBranches(Pass):
    """Skips residual branches: those named, or those that a profile and the allowed drop choose.

    Args:
        branches: names or patterns as `vlmopt inspect` prints them, with or without `COMPONENT/` in front.
    """

    branches: tuple[str, ...] = ()

    name: ClassVar[str] = "skip-branches"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})  # dead code would be counted as saved
    produces: ClassVar[frozenset[Fact]] = frozenset({STREAM_CUT})
    changes_signature: ClassVar[bool] = True  # entries of the cache go with their attention

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for component_name, component in program.components.items():
            for branch in find_branches(component.graph):
                name = f"{component_name}/{branch.name}"
                names.append(name)
                if self.branches and not is_match(name, self.branches):
                    refusals.append(Refusal(name, component_name, "not named in `branches`"))
                elif is_read_behind(component, branch):
                    refusals.append(Refusal(name, component_name, "a value computed inside is read behind it"))
                else:
                    cost = nodes_cost(component, branch.region, program.dims)
                    sites.append(
                        Site(name, component_name, (branch.name,), cost, f"{branch.kind.value} of {branch.layer_name}")
                    )
        check_patterns("skip-branches: branches", self.branches, names)
        return Plan(tuple(sites), tuple(refusals), is_chosen=bool(self.branches))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        skip(program, site.component, site.target)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.ones(2, 8)
        yield Case("stack", lambda: program_of(ResidualBlocks(), sample), n_sites=2)
        named = {"branches": ("layers.0.ffn",)}
        yield Case("named", lambda: program_of(ResidualBlocks(), sample), 1, ("not named in `branches`",), named)
        yield Case("side output", lambda: program_of(_ReturnsInside(), sample), 0, ("read behind it",))


class _ReturnsInside(torch.nn.Module):
    """A branch whose hidden value is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 8)
        self.down = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.up(x))
        return (x + self.down(hidden)) * 2.0, hidden
