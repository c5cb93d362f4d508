"""Compensated distortion: what a linear re-fit of the head cannot bring back when branches are skipped.

    score(S) = error of predicting the targets from the features without S
             - error of predicting them from the features of the whole

The error is that of ridge regression on rows it has not seen (`press`: exact and closed form, also with fewer rows than
features). A change of basis or scale costs nothing here, as it costs nothing after a re-fit. Lost information does, and
a branch whose absence helps the task scores below zero. Works for any subsets.

Targets are what the task gives its head (labels, say) and the original's outputs, both scaled to their variance. Labels
say what the task needs, and take many images to say it; outputs say from few images what the whole model knows, and
never that a branch does harm. So outputs count as much as the labels of sixteen images, n0 / (n0 + n) of the score.

Purpose: to rank as leave-one-out after a re-fit does, from a small sample of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import HeadBlock, Workload, head_blocks_of
from vlmopt.graph.branches import by_component
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features, head_module
from vlmopt.profiling.estimator import (
    Checkpoint,
    Estimate,
    Score,
    no_checkpoint,
    program_units,
)
from vlmopt.profiling.part import sampled_rows
from vlmopt.profiling.press import press_errors
from vlmopt.profiling.skipped_values import skipped_values

Target = tuple[float, Tensor]  # its weight, and one row a sample; rows of NaN are not asked for
# Chosen on two tasks of one vision tower among 0, 8, 16, 32, 64 and infinity; 8 to 32 rank nearly alike.
_OUTPUTS_COUNT = 16.0


@dataclass(frozen=True)
class SubsetScore:
    """Score of a set of branches skipped together, with its standard error over rows."""

    skipped: frozenset[str]
    mean: float
    standard_error: float


@dataclass(frozen=True)
class CompensatedDistortion:
    """On `n_samples` rows of every component; `targets` chooses the task's, the original's outputs, or both."""

    n_samples: int = 64
    targets: Literal["task", "outputs", "both"] = "both"
    with_layers: bool = True
    name: str = "compensated-distortion"
    unit: str = "share of variance"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        units = program_units(program, workload, with_layers=self.with_layers)
        found, passes = self._scored(
            program, workload, [unit.sites for unit in units], progress=progress, checkpoint=checkpoint, seed=seed
        )
        scores = (Score(unit, one.mean, one.standard_error) for unit, one in zip(units, found, strict=True))
        return Estimate(tuple(scores), float("nan"), passes)

    def score_subsets(
        self,
        program: Program,
        workload: Workload,
        subsets: Sequence[frozenset[str]],
        *,
        progress: Progress,
        seed: int = 0,
    ) -> list[SubsetScore]:
        """A score for every set of branches (`component/branch`), in order; components add up."""
        scores, _ = self._scored(program, workload, subsets, progress=progress, checkpoint=no_checkpoint, seed=seed)
        return scores

    def _scored(
        self,
        program: Program,
        workload: Workload,
        subsets: Sequence[frozenset[str]],
        *,
        progress: Progress,
        checkpoint: Checkpoint,
        seed: int,
    ) -> tuple[list[SubsetScore], float]:
        """The scores, and their cost in full passes."""
        plans, passes = [by_component(subset) for subset in subsets], 0.0
        means, variances = [0.0] * len(subsets), [0.0] * len(subsets)
        for name in workload.feeds:
            own = list(dict.fromkeys(plan[name] for plan in plans if name in plan))
            if not own:
                continue
            component, head = program.components[name], program.heads.get(name)
            rows = sampled_rows(workload, name, self.n_samples, seed=seed)
            groups = [workload.groups(name)[row] for row in rows.tolist()]
            found = skipped_values(
                program, name, workload, head_features(component, head), own,
                rows=rows, progress=progress, checkpoint=checkpoint, what=self.name,
            )  # fmt: skip
            passes += found.forward_passes
            outputs = found.whole if head is None else _outputs(component, head, found.whole)
            targets = self._targets(workload, name, rows, outputs)
            changes = compensated_changes(found.whole, found.without, targets)
            by_skips = {skips: clustered(change, groups) for skips, change in zip(own, changes, strict=True)}
            for i, plan in enumerate(plans):
                if name in plan:
                    mean, error = by_skips[plan[name]]
                    means[i], variances[i] = means[i] + mean, variances[i] + error**2
        scored = zip(subsets, means, variances, strict=True)
        return [SubsetScore(subset, mean, variance**0.5) for subset, mean, variance in scored], passes

    def _targets(self, workload: Workload, name: str, rows: Tensor, outputs: Tensor) -> list[Target]:
        """What is to be predicted on these rows, whose original outputs are given."""
        if self.targets == "outputs":
            return [(1.0, outputs)]
        reference = outputs.new_zeros(len(workload.groups(name)), *outputs.shape[1:]).index_copy(0, rows, outputs)
        targets = workload.head_targets(name, {name: reference})
        if targets is None:
            return [(1.0, outputs)]
        share = 0.0 if self.targets == "task" else _OUTPUTS_COUNT / (_OUTPUTS_COUNT + len(rows))
        blocks = head_blocks_of(workload)
        if not blocks:
            return [(1.0 - share, targets[rows]), (share, outputs)]
        of_tasks = [(1.0 - share, _only(block, targets)[rows]) for block in blocks]
        return [*of_tasks, (share, outputs)]


def _outputs(component: Component, head: str, features: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = head_module(component, head)(features)
    return outputs


def compensated_changes(whole: Tensor, without: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
    """For every set of skipped branches the growth of the prediction error of each row, [n], summed over the targets.

    Shapes: features `whole` and each of `without` [n, d], each of `targets` [n, k].
    """
    before = _errors(whole, targets)
    return [_errors(features, targets) - before for features in without]


def _only(block: HeadBlock, targets: Tensor) -> Tensor:
    """The targets of one task: its own columns, and NaN in the rows of other tasks."""
    rows, columns = torch.tensor(list(block.rows)), torch.tensor(list(block.columns))
    made = targets.new_full((len(targets), len(columns)), float("nan"))
    return made.index_copy(0, rows, targets[rows][:, columns])


def _errors(features: Tensor, targets: Sequence[Target]) -> Tensor:
    total = torch.zeros(len(features), dtype=torch.float64)
    for weight, target in targets:
        asked = torch.nonzero(~torch.isnan(target).any(dim=1)).flatten()
        if weight > 0 and len(asked) > 1:
            total.index_add_(0, asked, weight * press_errors(features[asked], target[asked]))
    return total
