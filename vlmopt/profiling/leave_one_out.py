"""Leave-one-out: the task loss without one branch (or layer) minus the loss of the whole.

*raw*: the head stays as it is. *refit*: the head is fitted in closed form for the whole and for every cut alike, and
losses are those of items that the fit has not seen. A fixed head misleads: it punishes a change of basis as if it were
a loss of information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Outputs, Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.modules import output_values
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay, run_component
from vlmopt.profiling.estimator import Checkpoint, Estimate, Score, Unit, units_of

_WHOLE = "whole"  # key of the run without a skip


@dataclass(frozen=True)
class LeaveOneOut:
    """`is_refit` chooses between the two ways to score; without layers only branches are scored, which costs less."""

    is_refit: bool = True
    with_layers: bool = True
    name: str = "leave-one-out"
    unit: str = "loss"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        reference = {name: _outputs(program, name, workload) for name in program.components if name in workload.feeds}
        scores: list[Score] = []
        passes, reference_loss = 0.0, 0.0
        for name in reference:
            units = units_of(name, find_branches(program.components[name].graph), with_layers=self.with_layers)
            values = self._values(program, name, workload, units, progress, checkpoint)
            losses = {
                key: self._losses(program, name, value, workload, reference, seed) for key, value in values.items()
            }
            whole = losses[_WHOLE]
            reference_loss = float(whole.mean())
            for unit in units:
                mean, error = clustered(losses[_key(unit)] - whole, workload.item_groups)
                scores.append(Score(unit, mean, error))
            passes += workload.n_items * (1 + len(units) / 2)
        return Estimate(tuple(scores), reference_loss, passes)

    def _values(
        self,
        program: Program,
        name: str,
        workload: Workload,
        units: list[Unit],
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> dict[str, Tensor]:
        """For the whole and for every unit left out the features (refit) or outputs (raw), over all batches."""
        component = program.components[name]
        target = output_values(component.graph)[0]
        if self.is_refit:
            target = head_features(component, program.heads.get(name))
        replay = Replay(component, find_branches(component.graph), target)
        subsets = [frozenset[str](), *(frozenset(unit.branches) for unit in units)]
        keys = [_WHOLE, *(_key(unit) for unit in units)]
        feeds = workload.feeds[name]
        parts: list[dict[str, Tensor]] = []
        for i, feed in enumerate(progress.track(feeds, f"leave-one-out {name}", total=len(feeds))):
            parts.append(checkpoint(f"{name}-{i:05d}", partial(_named_variants, replay, keys, subsets, feed)))
        return {key: torch.cat([part[key] for part in parts]) for key in keys}

    def _losses(
        self, program: Program, name: str, value: Tensor, workload: Workload, reference: Outputs, seed: int
    ) -> Tensor:
        if self.is_refit:
            fit = fit_head(name, value, workload, reference, prior=prior_weight(program, name), seed=seed)
            if fit is not None:
                value = fit.held_out
        return workload.losses({**reference, name: value})


def _key(unit: Unit) -> str:
    return ("layer:" if unit.is_layer else "branch:") + unit.name


def _named_variants(
    replay: Replay, keys: Sequence[str], subsets: Sequence[frozenset[str]], feed: Feed
) -> dict[str, Tensor]:
    return dict(zip(keys, replay.variants(feed, subsets), strict=True))


def _outputs(program: Program, name: str, workload: Workload) -> Tensor:
    return run_component(program.components[name], workload.feeds[name])
