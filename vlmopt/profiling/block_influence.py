"""Block influence: how far a branch or layer turns the stream, 1 - cos(before, after), mean over tokens.

One forward pass and no labels: the cheap baseline. It says what a block *does*, not whether the task needs it.

Source: Men et al., "ShortGPT" (arXiv 2403.03853), equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Workload
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.replay import run_node
from vlmopt.profiling.estimator import Checkpoint, Estimate, Score, Unit, units_of


@dataclass(frozen=True)
class BlockInfluence:
    with_layers: bool = True
    name: str = "block-influence"
    unit: str = "cosine distance"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        scores: list[Score] = []
        for name, component in program.components.items():
            if name not in workload.feeds:
                continue
            branches = find_branches(component.graph)
            units = units_of(name, branches, with_layers=self.with_layers)
            feeds = workload.feeds[name]
            parts = []
            for i, feed in enumerate(progress.track(feeds, f"block influence {name}", total=len(feeds))):
                parts.append(checkpoint(f"{name}-{i:05d}", partial(_distances, component, branches, units, feed)))
            for unit in units:
                values = torch.cat([part[_key(unit)] for part in parts])
                scores.append(Score(unit, *clustered(values, workload.groups(name))))
        return Estimate(tuple(scores), float("nan"), float(workload.n_items))


def _key(unit: Unit) -> str:
    return f"{unit.is_layer}:{unit.name}"


def _distances(component: Component, branches: list[Branch], units: list[Unit], feed: Feed) -> dict[str, Tensor]:
    """For every unit one distance a sample, [B]."""
    by_name = {branch.name: branch for branch in branches}
    ends = {_key(unit): (by_name[unit.branches[0]].stream, by_name[unit.branches[-1]].exit) for unit in units}
    kept = _run(component, feed, {node for pair in ends.values() for node in pair})
    return {key: _distance(kept[before], kept[after]) for key, (before, after) in ends.items()}


def _distance(before: Tensor, after: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1.0 - cosine).reshape(len(cosine), -1).mean(dim=1)


def _run(component: Component, feed: Feed, wanted: set[fx.Node]) -> dict[fx.Node, Tensor]:
    values: dict[fx.Node, object] = {}
    left = {node: len(node.users) for node in component.graph.graph.nodes}
    with torch.no_grad():
        for node in component.graph.graph.nodes:
            if node.op == "output":
                break
            values[node] = run_node(component.graph, node, values, feed)
            for operand in node.all_input_nodes:
                left[operand] -= 1
                if left[operand] == 0 and operand not in wanted:
                    del values[operand]
    return {node: value for node in wanted if isinstance(value := values[node], Tensor)}
