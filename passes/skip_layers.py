"""Takes whole layers out of the stream: all branches of one repeated block at once.

Before: `y = x + attention(x); z = y + ffn(y)`; after: `z = x`.
Bound: none in general; the layers are chosen by their importance on the task and the result is judged on the task.

Cases:
1. Every layer of a stack is a site.
2. With `layers` given, those that match are sites and the others are refused.
3. A layer one of whose branches cannot be skipped is refused whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, STREAM_CUT, Fact
from vlmopt.core.program import Program
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.regions import is_read_behind
from vlmopt.graph.skipping import skip


@dataclass(frozen=True)
class SkipLayers(Pass):
    """Skips whole layers: those named, or those that a profile and the allowed drop choose.

    Args:
        layers: layer names or patterns (`vision_model.encoder.layers.7`), with or without `COMPONENT/` in front.
    """

    layers: tuple[str, ...] = ()

    name: ClassVar[str] = "skip-layers"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})  # dead code would be counted as saved
    produces: ClassVar[frozenset[Fact]] = frozenset({STREAM_CUT})
    changes_signature: ClassVar[bool] = True  # entries of the cache go with their attention

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        names: list[str] = []
        for component_name, component in program.components.items():
            for layer in _layers(find_branches(component.graph)):
                name = f"{component_name}/{layer[0].layer_name}"
                names.append(name)
                if self.layers and not is_match(name, self.layers):
                    refusals.append(Refusal(name, component_name, "not named in `layers`"))
                elif any(is_read_behind(component, branch) for branch in layer):
                    refusals.append(Refusal(name, component_name, "a value computed inside is read behind it"))
                else:
                    nodes = dict.fromkeys(node for branch in layer for node in branch.region)
                    cost = nodes_cost(component, nodes, program.dims)
                    target = tuple(branch.name for branch in layer)
                    sites.append(Site(name, component_name, target, cost, f"{len(layer)} branches"))
        check_patterns("skip-layers: layers", self.layers, names)
        return Plan(tuple(sites), tuple(refusals), is_chosen=bool(self.layers))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        skip(program, site.component, site.target)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.ones(2, 8)
        yield Case("stack", lambda: program_of(ResidualBlocks(), sample), n_sites=2)
        named = {"layers": ("layers.1",)}
        yield Case("named", lambda: program_of(ResidualBlocks(), sample), 1, ("not named in `layers`",), named)


def _layers(branches: list[Branch]) -> list[list[Branch]]:
    return [list(members) for _, members in groupby(branches, key=lambda branch: branch.layer)]
