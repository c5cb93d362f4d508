"""Distortion: how far the features that the head reads, or the outputs, move when a branch is skipped. No labels.

    score = mean over samples of |v(without) - v|^2 / mean over samples of |v - mean v|^2

with v the head's features or the outputs. The head is as it is, so a change that a re-fit would undo counts in full
(see `compensated`). On a sample of the rows, all branches sharing one run of what lies in front of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.modules import output_values
from vlmopt.profiling.estimator import Checkpoint, Estimate, Score, units_of
from vlmopt.profiling.part import sampled_rows
from vlmopt.profiling.skipped_values import skipped_values


@dataclass(frozen=True)
class Distortion:
    """Of the outputs, or of the features in front of the head."""

    of_features: bool = False
    n_samples: int = 64
    with_layers: bool = True
    unit: str = "share of variance"

    @property
    def name(self) -> str:
        return "feature-distortion" if self.of_features else "logit-distortion"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        scores, passes = list[Score](), 0.0
        for name in workload.feeds:
            component = program.components[name]
            target = output_values(component.graph)[0]
            if self.of_features:
                target = head_features(component, program.heads.get(name))
            units = units_of(name, find_branches(component.graph), with_layers=self.with_layers)
            rows = sampled_rows(workload, name, self.n_samples, seed=seed)
            groups = [workload.groups(name)[row] for row in rows.tolist()]
            found = skipped_values(
                program, name, workload, target, [frozenset(unit.branches) for unit in units],
                rows=rows, progress=progress, checkpoint=checkpoint, what=self.name,
            )  # fmt: skip
            for unit, value in zip(units, found.without, strict=True):
                scores.append(Score(unit, *clustered(distortions(found.whole, value), groups)))
            passes += found.forward_passes
        return Estimate(tuple(scores), float("nan"), passes)


def distortions(whole: Tensor, without: Tensor) -> Tensor:
    """For every row of values [n, ...] its squared change over the mean squared distance to the mean, [n], float64."""
    before, after = (value.double().reshape(len(value), -1) for value in (whole, without))
    spread = ((before - before.mean(dim=0)) ** 2).sum(dim=1).mean().clamp(min=torch.finfo(torch.float64).tiny)
    return ((after - before) ** 2).sum(dim=1) / spread
